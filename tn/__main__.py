"""python -m tn doctor: is this installation healthy?"""

import argparse
import sys

from tn import doctor
from tn.errors import unknown

COMMANDS = {"doctor": "check versions, devices, Triton, a tiny layer forward and backward, and caches (seconds; exit code 1 if broken)"}


def main(arguments: list[str]) -> int:
    """Run one command; returns the exit code: 0 healthy, 1 something required is broken, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="python -m tn", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=_listing())
    parser.add_argument("command", nargs="?", metavar="COMMAND", help="one of: " + ", ".join(COMMANDS))
    options = parser.parse_args(arguments)
    if options.command is None:
        parser.print_help()
        return 0
    if options.command not in COMMANDS:
        print(f"python -m tn: {unknown('command', options.command, COMMANDS)}", file=sys.stderr)
        return 2
    return doctor.main()


def _listing() -> str:
    return "commands:\n" + "\n".join(f"  {name:10}{text}" for name, text in COMMANDS.items())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
