"""python -m bench: list the benches, or run one."""

import sys

import tn
from bench import einsum, execution, flops, kernels, planner, projection, structures, throughput
from tn.errors import unknown
from zoo.pipes import quiet_pipe

BENCHES = {
    "einsum": einsum,
    "execution": execution,
    "flops": flops,
    "kernels": kernels,
    "planner": planner,
    "projection": projection,
    "structures": structures,
    "throughput": throughput,
}


def main(arguments: list[str]) -> int:
    """Run one bench; returns 0, 1 when a correctness check is red or a file cannot be written, or 2 after wrong usage."""
    return quiet_pipe(lambda: _command(arguments))


def _command(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("benches (python -m bench NAME --help for the flags):")
        for name, module in BENCHES.items():
            print(f"  {name:12}{(module.__doc__ or '').splitlines()[0].partition(': ')[2]}")
        return 0
    name, *rest = arguments
    if name not in BENCHES:
        print(f"error: {unknown('bench', name, BENCHES)}", file=sys.stderr)
        return 2
    try:
        return BENCHES[name].main(rest)
    except (tn.TnError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:
        raise
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
