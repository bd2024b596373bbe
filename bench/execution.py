"""Execution: structured layers against torch.einsum, opt_einsum and cotengra; BTT against dense products, a hand-written function, and
`nn.Linear`; compiled layers against eager ones; copies, overhead and graphs."""

import itertools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor, nn

import tn
from bench import counts
from bench.cases import LAYERS, ROWS, Layer
from bench.handwritten import TiledBTT
from bench.libraries import LIBRARIES, einsum_peers
from bench.models import Parser
from bench.row import RESULTS, Row, append, beside, wide_console
from bench.timing import interleaved
from tn.errors import unknown

BTT = ((1024, 4096, (1, 4)), (4096, 2048, (1, 4)))  # width, rows, ranks
LINEAR = tuple((width, rank, rows) for width in (512, 1024, 2048, 4096) for rank in (1, 4, 16) for rows in (1, 16, 256, 4096))
COMPILED = tuple((width, rank, rows) for width in (512, 1024) for rank in (1, 4) for rows in (256, 2048))
TILE = {(1024, 1): 512, (1024, 4): 256, (4096, 1): 256, (4096, 4): 128}  # of the hand-written function; not swept for it

COUNTS = {
    "copies": lambda rounds: itertools.chain.from_iterable(counts.copy_rows(rows, rounds) for rows in counts.ROWS),
    "overhead": counts.overhead_rows,
    "graphs": counts.graph_rows,
}

Run = Callable[[], object]


def passes(run: Callable[..., Tensor], operands: list[Tensor]) -> dict[str, Run]:
    """The function forward without gradients, and forward with the gradients of every operand."""
    tracked = [operand.detach().requires_grad_() for operand in operands]
    with torch.no_grad():
        cotangent = torch.ones_like(run(*operands))

    def forward() -> object:
        with torch.no_grad():
            return run(*operands)

    def both() -> object:
        return torch.autograd.grad(run(*tracked), tracked, cotangent)

    return {"forward": forward, "forward + backward": both}


def check(name: str, run: Callable[..., Tensor], reference: Callable[..., Tensor], operands: list[Tensor]) -> None:
    """Raise RuntimeError unless both give the same values and gradients, to the precision of fp32 sums."""
    results = []
    for f in (run, reference):
        tracked = [operand.detach().requires_grad_() for operand in operands]
        value = f(*tracked)
        results.append([value, *torch.autograd.grad(value.square().mean(), tracked)])
    for got, want in zip(*results, strict=True):
        if (got - want).abs().max() > 1e-3 * want.abs().max():
            raise RuntimeError(f"{name}: wrong by {(got - want).abs().max().item():.2e} of {want.abs().max().item():.2e}; nothing is timed")


def layer_rows(layer: Layer, rows: int, rounds: int) -> Iterator[Row]:
    """One layer at one number of rows beside its peers: a row for each pass."""
    network = layer.network
    operands = [torch.randn(rows, layer.width), *(torch.randn(network.shape(core)) / 8 for core in network.cores)]
    forward, training = (tn.compile(tn.plan(network, grad=grad, rows=rows)) for grad in ((), network.names))
    peers = einsum_peers(network, rows)
    check(layer.name, training, peers["torch.einsum"], operands)
    ours = {"forward": passes(forward, operands)["forward"], "forward + backward": passes(training, operands)["forward + backward"]}
    theirs = {name: passes(peer, operands) for name, peer in peers.items()}
    for what, program in (("forward", forward), ("forward + backward", training)):
        times = interleaved({"tn": ours[what], **{name: runs[what] for name, runs in theirs.items()}}, rounds=rounds, least_seconds=0.005)
        best = min((name for name in times if name != "tn"), key=lambda name: times[name].median)
        flops = program.plan.flops + (program.plan.backward_flops if what != "forward" else 0)
        settings = {"rows": rows, "spec": layer.spec, **dict(layer.sizes), "tile": program.plan.tile}
        yield beside(layer.name, what, times, best, tokens=rows, flops=flops, settings=settings)


def btt_rows(width: int, rows: int, rank: int, rounds: int) -> Iterator[Row]:
    """A square BTT layer against `x @ W.T`, and against the hand-written function."""
    layer = tn.StructuredLinear(width, width, structure="btt", rank=rank, bias=False)
    x, weight = torch.randn(rows, width), torch.randn(width, width)
    cores = [parameter.detach() for parameter in layer.parameters()]
    program = tn.compile(layer.plan(rows=rows))
    tile = TILE[width, rank]

    def by_hand(*t: Tensor) -> Tensor:
        return TiledBTT.apply(*t, tile)

    check(f"BTT {width} rank {rank}", program, by_hand, [x, *cores])
    dense = passes(lambda x, w: x @ w.mT, [x, weight])
    runs = {"tn": passes(program, [x, *cores]), "by hand": passes(by_hand, [x, *cores]), "dense": dense}
    for what in ("forward", "forward + backward"):
        times = interleaved({name: both[what] for name, both in runs.items()}, rounds=rounds)
        flops = program.plan.flops + (program.plan.backward_flops if what != "forward" else 0)
        settings: dict[str, object] = {"rows": rows, "tile": program.plan.tile}
        for peer in ("dense", "by hand"):
            yield beside(f"BTT {width} rank {rank}", what, times, peer, tokens=rows, flops=flops, settings=settings)


def linear_rows(width: int, rank: int, rows: int, rounds: int) -> Iterator[Row]:
    """A BTT layer beside `nn.Linear`: modules with bias, forward alone, with the gradients of input and parameters, and in `tn.frozen`."""
    layer, dense = tn.StructuredLinear(width, width, structure="btt", rank=rank), nn.Linear(width, width)
    x, case = torch.randn(rows, width), f"BTT {width} rank {rank}"
    yield from _beside("Linear", layer, dense, "nn.Linear", x, rounds, case)
    with tn.frozen(layer.eval()):
        yield from _beside("Linear, frozen", layer, dense, "nn.Linear", x, rounds, case, gradients=False)


def compiled_rows(width: int, rank: int, rows: int, rounds: int) -> Iterator[Row]:
    """A structured MLP compiled with fullgraph=True beside itself in eager mode."""
    layers = [tn.StructuredLinear(width, 4 * width, structure="btt", rank=rank), nn.GELU()]
    mlp = nn.Sequential(*layers, tn.StructuredLinear(4 * width, width, structure="btt", rank=rank))
    torch.compiler.reset()  # every case compiles the same code of nn.Sequential
    compiled = torch.compile(mlp, fullgraph=True)
    x = torch.randn(rows, width)
    if (compiled(x) - mlp(x)).abs().max() > 1e-3:
        raise RuntimeError("the compiled MLP differs from the eager one; nothing is timed")
    yield from _beside("compiled", compiled, mlp, "eager", x, rounds, f"BTT MLP {width} rank {rank}")


def _beside(
    kind: str, model: nn.Module, other: nn.Module, peer: str, x: Tensor, rounds: int, case: str, *, gradients: bool = True
) -> Iterator[Row]:
    """A row for each pass of a model beside another one."""
    tracked, cotangent = x.clone().requires_grad_(), torch.ones_like(x)

    def forward(model: nn.Module) -> Run:
        def run() -> object:
            with torch.no_grad():
                return model(x)

        return run

    def both(model: nn.Module) -> Run:
        tensors = [tracked, *model.parameters()]
        return lambda: torch.autograd.grad(model(tracked), tensors, cotangent)

    for what, make in (("forward", forward), ("forward + backward", both))[: 1 + gradients]:
        times = interleaved({"tn": make(model), peer: make(other)}, rounds=rounds, least_seconds=0.005)
        yield beside(f"{kind}: {case}", what, times, peer, tokens=len(x))


def main(arguments: list[str]) -> int:
    """Time, print and store; returns 0."""
    parser = Parser(prog="python -m bench execution", description=__doc__)
    parser.add_argument("--family", default="", help="only what starts with this: BTT, Linear, compiled, TT, copies, …")
    parser.add_argument("--width", type=int, nargs="*", help="only these widths")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, *ROWS, 2048], help="rows of the cases (default: 1 16 256 2048 4096)")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each (default: 7)")
    parser.add_argument("--out", type=Path, default=RESULTS / "execution.jsonl", help="file the rows are added to")
    given = parser.parse_args(arguments)
    families = sorted({layer.family for layer in LAYERS} | {"BTT", "Linear", "compiled", *COUNTS})
    if not any(family.lower().startswith(given.family.lower()) for family in families):
        raise ValueError(unknown("family", given.family, families))
    if min([given.rounds, *given.rows]) < 1:
        raise ValueError(f"rows and rounds are counts of at least 1, got {given.rows} and {given.rounds}")
    console = wide_console()
    found: list[Row] = []
    torch.manual_seed(0)

    def chosen(family: str, width: int) -> bool:
        return family.lower().startswith(given.family.lower()) and (not given.width or width in given.width)

    cases = [btt_rows(width, rows, rank, given.rounds) for width, rows, ranks in BTT for rank in ranks if chosen("BTT", width)]
    for kind, sizes, make in (("Linear", LINEAR, linear_rows), ("compiled", COMPILED, compiled_rows)):
        cases += [make(*size, given.rounds) for size in sizes if chosen(kind, size[0]) and size[2] in given.rows]
    cases += [make(given.rounds) for kind, make in COUNTS.items() if chosen(kind, counts.WIDTH)]
    layers = [(layer, rows) for layer in LAYERS for rows in ROWS if rows in given.rows and chosen(layer.family, layer.width)]
    cases += [layer_rows(layer, rows, given.rounds) for layer, rows in layers]
    for number, case in enumerate(cases, start=1):
        made = list(case)
        append(made, given.out)  # case by case: what an interrupted run measured is kept
        found += made
        at = f", {made[0].tokens} rows" if made[0].tokens else ""
        console.print(f"{number} of {len(cases)}: {made[0].case}{at}", highlight=False)
    console.print(_table(found))
    against = [row.ratio for row in found if row.peer in LIBRARIES and row.ratio]
    if against:
        mean = math.exp(sum(map(math.log, against)) / len(against))
        console.print(f"{len(against)} cells against the best of three libraries: geometric mean {mean:.2f} ×, least {min(against):.2f} ×")
    console.print(f"rows: {given.out}", highlight=False)
    return 0


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"{torch.get_num_threads()} threads, fp32", title_justify="left", pad_edge=False)
    for heading in ("layer", "rows", "pass", "median", "quartiles", "GFLOP/s", "against", "times faster"):
        table.add_column(heading, justify="left" if heading in ("layer", "pass", "against") else "right")
    for row in rows:
        assert row.seconds and row.low and row.high
        spread = f"{row.low * 1e3:.2f}–{row.high * 1e3:.2f}"
        rate = f"{row.flops / row.seconds / 1e9:.0f}" if row.flops else ""
        counted = [f"{row.settings[name]} {name}" for name in ("copies", "copies where they are dear", "graphs") if name in row.settings]
        case = ", ".join([row.case, *counted])
        ratio = f"{row.ratio:.2f}" if row.ratio else ""
        table.add_row(case, str(row.tokens or ""), row.what, f"{row.seconds * 1e3:.2f} ms", spread, rate, row.peer, ratio)
    return table
