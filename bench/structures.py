"""Structures: families × widths × rows beside nn.Linear and tltorch, in one process: parameters, FLOPs, time, memory."""

import importlib
import importlib.util
import itertools
import math
import resource
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

import tn
from bench.execution import passes
from bench.models import Parser
from bench.row import RESULTS, Row, append, wide_console
from bench.timing import interleaved
from tn.errors import unknown

# What each family is timed with besides its defaults.
OPTIONS: dict[str, dict[str, object]] = {"btt": {}, "btt rank 4": {"rank": 4}, "tt": {}, "kronecker": {}, "monarch": {}, "low_rank": {},
    "block_diagonal": {}, "blast": {}, "einsum2": {}, "btt_norm": {}, "btt_moe": {}}  # fmt: skip
WIDTHS, ROWS = (512, 1024), (16, 1024)
PASSES = ("forward", "forward + backward")


def factorised(width_in: int, width_out: int, rank: int) -> nn.Module | None:
    """tltorch's tensor-train layer ("blocktt") with two factors of each size, factorised forward; None where tltorch is absent."""
    if importlib.util.find_spec("tltorch") is None:
        return None
    tltorch = importlib.import_module("tltorch")  # an optional peer, found by name: the project does not depend on it
    ins, outs = (tn.structures.factors.even(size) for size in (width_in, width_out))
    sizes = dict(in_tensorized_features=ins, out_tensorized_features=outs, rank=rank, bias=False)
    return tltorch.FactorizedLinear(**sizes, factorization="blocktt", implementation="factorized")


def check(name: str, layer: nn.Module, x: Tensor) -> None:
    """Raise RuntimeError unless a layer is its dense matrix, to the precision of fp32 sums."""
    if not isinstance(layer, tn.StructuredLinear) or layer.experts is not None:
        return
    got, want = layer(x), x @ layer.to_dense().mT
    if (got - want).abs().max() > 1e-3 * want.abs().max():
        raise RuntimeError(f"{name}: wrong by {(got - want).abs().max().item():.2e} of {want.abs().max().item():.2e}; nothing is timed")


def layer_rows(width: int, rows: int, cases: list[str], rounds: int) -> Iterator[Row]:
    """All families at one width and number of rows, taken in turns with the peers: a row for each and each pass."""
    x = torch.randn(rows, width)
    layers: dict[str, nn.Module] = {"nn.Linear": nn.Linear(width, width, bias=False)}
    for case in cases:
        options: dict = OPTIONS[case]
        layers[case] = tn.StructuredLinear(width, width, structure=case.split(" ")[0], bias=False, **options)
        check(case, layers[case], x)
    peer = factorised(width, width, 4)
    if peer is not None:
        layers["tltorch rank 4"] = peer
    runs = {name: passes(layer, [x]) | {"forward + backward": _training(layer, x)} for name, layer in layers.items()}
    for what in PASSES:
        times = interleaved({name: both[what] for name, both in runs.items()}, rounds=rounds, least_seconds=0.005)
        for name, layer in layers.items():
            low, high = times[name].quartiles
            yield Row(
                bench="structures",
                case=f"{name} {width}",
                what=what,
                seconds=times[name].median,
                low=low,
                high=high,
                samples=rounds,
                tokens=rows,
                flops=_flops(layer, width) * rows * (1 if what == "forward" else 3),
                bytes=4 * sum(p.numel() for p in layer.parameters()),
                peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
                ratio=times[name].faster_than(times["nn.Linear"]),
                peer="nn.Linear",
                settings={"rows": rows, "width": width, "layer": repr(layer), **({"note": layer.note} if _noted(layer) else {})},
            )


def _noted(layer: nn.Module) -> bool:
    return isinstance(layer, tn.StructuredLinear) and bool(layer.note)


def _training(layer: nn.Module, x: Tensor) -> Callable[[], object]:
    """Forward, and the gradients of the input and every parameter."""
    tracked = [x.detach().requires_grad_(), *layer.parameters()]
    with torch.no_grad():
        cotangent = torch.ones_like(layer(x))
    return lambda: torch.autograd.grad(layer(tracked[0]), tracked, cotangent, allow_unused=True)


def _flops(layer: nn.Module, width: int) -> int:
    """Of one row forward, 2 a multiply-add, cores applied in the order written, of experts those that run; 0 where we do not know."""
    if not isinstance(layer, tn.StructuredLinear):
        return 2 * width * width if isinstance(layer, nn.Linear) else 0
    return 2 * layer.built.macs


def draw(rows: list[Row], path: Path) -> None:
    """Times faster than nn.Linear, a line for each layer and a mark for each width and number of rows."""
    from matplotlib.figure import Figure  # late: only when a picture is wanted
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter  # late: the same

    shown = [row for row in rows if row.ratio and not row.case.startswith("nn.Linear")]
    names = list(dict.fromkeys(row.case.rpartition(" ")[0] for row in shown))
    kinds = list(dict.fromkeys((int(str(row.settings["width"])), row.tokens) for row in shown))
    figure = Figure(figsize=(10, 1.6 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(PASSES), sharex=True, sharey=True)
    for axes, what in zip(panels, PASSES, strict=True):
        for kind, mark in zip(kinds, itertools.cycle("osD^v<>P"), strict=False):
            points = [row for row in shown if row.what == what and (row.settings["width"], row.tokens) == kind]
            places = [names.index(row.case.rpartition(" ")[0]) for row in points]
            axes.plot([row.ratio for row in points], places, mark, markersize=5, label=f"width {kind[0]}, {kind[1]} rows")
        axes.axvline(1, color="gray", linewidth=0.8)
        axes.set(xscale="log", xlabel="times faster than nn.Linear", title=what)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_yticks(range(len(names)), names)
        axes.grid(alpha=0.3)
    panels[0].invert_yaxis()
    panels[-1].legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=120)


def main(arguments: list[str]) -> int:
    """Time, print, draw and store; returns 0."""
    parser = Parser(prog="python -m bench structures", description=__doc__)
    parser.add_argument("--family", nargs="*", default=list(OPTIONS), help=f"only these (default: all of {', '.join(OPTIONS)})")
    parser.add_argument("--width", type=int, nargs="*", default=list(WIDTHS), help="features in and out (default: 512 1024)")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS), help="rows (default: 16 1024)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each (default: 7)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS / "structures.jsonl", help="file the rows are added to; the plot lies beside it"
    )
    given = parser.parse_args(arguments)
    for family in given.family:
        if family not in OPTIONS:
            raise ValueError(unknown("family", family, OPTIONS))
    if min([given.rounds, *given.rows, *given.width]) < 1:
        raise ValueError(f"widths, rows and rounds are at least 1, got {given.width}, {given.rows} and {given.rounds}")
    console = wide_console()
    torch.manual_seed(0)
    found = [row for width in given.width for rows in given.rows for row in layer_rows(width, rows, given.family, given.rounds)]
    console.print(_table(found))
    if importlib.util.find_spec("tltorch") is None:
        console.print("tltorch is not installed, so it is not in the table: pip install tensorly-torch", highlight=False)
    append(found, given.out)
    picture = given.out.with_suffix(".png")
    draw(found, picture)
    console.print(f"rows: {given.out}\nplot: {picture}", highlight=False)
    return 0


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"{torch.get_num_threads()} threads, fp32", title_justify="left", pad_edge=False)
    for heading in ("layer", "rows", "pass", "parameters", "of dense", "kFLOP a row", "median", "quartiles", "times faster"):
        table.add_column(heading, justify="left" if heading in ("layer", "pass") else "right")
    for row in rows:
        assert row.seconds and row.low and row.high and row.ratio
        count, passes_of = row.bytes // 4, 1 if row.what == "forward" else 3
        share = count / int(str(row.settings["width"])) ** 2
        spread = f"{row.low * 1e3:.2f}–{row.high * 1e3:.2f}"
        work = f"{row.flops / row.tokens / passes_of / 1e3:,.0f}" if row.flops else ""
        cells = (row.case, str(row.tokens), row.what, f"{count:,}", f"{share:.3f}", work, f"{row.seconds * 1e3:.3f} ms", spread)
        table.add_row(*cells, f"{row.ratio:.2f}")
    mean = [row.ratio for row in rows if row.ratio and not row.case.startswith(("nn.Linear", "tltorch"))]
    table.caption = f"geometric mean {math.exp(sum(map(math.log, mean)) / len(mean)):.2f} × faster than nn.Linear" if mean else ""
    return table
