"""What execution costs besides arithmetic: copies of activations, Python around small products, graphs of torch.compile."""

import dataclasses
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

import tn
from bench.row import Row, beside
from bench.timing import interleaved
from tn.machine import machine

WIDTH = 1024
COPIED = {
    "low rank": ("low_rank", dict(rank=128)),
    "Kronecker": ("kronecker", {}),
    "TT 3 cores": ("tt", dict(cores=3, rank=3)),
    "TT 4 cores": ("tt", dict(cores=4, rank=3)),
    "BLAST": ("blast", dict(rank=64)),
    "BTT": ("btt", dict(rank=4)),
    "Monarch": ("monarch", {}),
}
SPECS = {
    "Tucker": (
        "x: ... (a b), u: a p, v: b q, core: p q s t, w: s k, z: t l -> ... (k l)",
        dict(a=32, b=32, k=32, l=32, p=20, q=20, s=20, t=20),
    ),
    "CP": ("x: ... (a b), u: a r, v: b r, w: k r, z: l r -> ... (k l)", dict(a=32, b=32, k=32, l=32, r=128)),
}
ROWS = (16, 256, 2048)
_LARGE = 16  # elements a row from which a copy counts as one of activations


def copies(run: Callable[[], object], elements: int) -> int:
    """`aten::copy_` events of at least so many elements, inside any operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        run()
    shapes = [event.input_shapes[0] for event in profile.events() if event.name == "aten::copy_" and event.input_shapes]
    return sum(torch.Size(shape).numel() >= elements for shape in shapes)


def copy_rows(rows: int, rounds: int) -> Iterator[Row]:
    """Each family: the copies of its plan and of one for which copies are dear, and how much faster the first is."""
    networks = {name: tn.StructuredLinear(WIDTH, WIDTH, structure=family, **options).network for name, (family, options) in COPIED.items()}
    networks |= {
        name: tn.network(spec, sizes, cores=[part.split(":")[0].strip() for part in spec.split(",")[1:]])
        for name, (spec, sizes) in SPECS.items()
    }
    dear = dataclasses.replace(machine(), name="copies are dear", copy=1e3)
    for name, network in networks.items():
        operands = [torch.randn(rows, WIDTH), *(torch.randn(network.shape(core)) / 8 for core in network.cores)]
        operands = [operand.requires_grad_() for operand in operands]
        plans = {
            "tn": tn.plan(network, grad=network.names, rows=rows),
            "without copies": tn.plan(network, grad=network.names, rows=rows, table=dear),
        }
        runs = {which: _step(tn.compile(plan), operands) for which, plan in plans.items()}
        counts = {which: copies(run, rows * _LARGE) for which, run in runs.items()}
        times = interleaved(runs, rounds=rounds, least_seconds=0.005)
        settings: dict[str, object] = {"copies": counts["tn"], "copies where they are dear": counts["without copies"]}
        settings["tile"] = plans["tn"].tile
        yield beside(f"copies: {name} {WIDTH}", "forward + backward", times, "without copies", tokens=rows, settings=settings)


def overhead_rows(rounds: int) -> Iterator[Row]:
    """Three 8 × 8 operands: a Program, a Contraction and a plain module beside two products."""
    x, a, c = (torch.randn(8, 8) for _ in range(3))
    layer = tn.Contraction("x: ... i, a: i r, c: r o -> ... o", sizes=dict(i=8, r=8, o=8), cores=("a", "c"))
    program = tn.compile(tn.plan(layer.network, rows=8, grad=layer.network.names))
    plain = _TwoProducts(a, c)
    leaves = [operand.clone().requires_grad_() for operand in (x, a, c)]
    for what, grads in (("forward", False), ("forward, tracked", True)):
        operands = leaves if grads else [x, a, c]
        runs = {
            "two products": lambda operands=operands: torch.mm(torch.mm(operands[0], operands[1]), operands[2]),
            "Program": lambda operands=operands: program(*operands),
            "Contraction": lambda operands=operands: layer(operands[0]),
            "nn.Module": lambda operands=operands: plain(operands[0]),
        }
        with torch.set_grad_enabled(grads):
            times = interleaved({name: _often(run) for name, run in runs.items()}, rounds=rounds)
        for name in ("Program", "Contraction", "nn.Module"):
            yield beside(f"overhead: {name}", what, {"tn": times[name], "two products": times["two products"]}, "two products")


def graph_rows(rounds: int) -> Iterator[Row]:
    """Graphs that torch.compile makes of one layer over fifty numbers of rows."""
    layer = tn.StructuredLinear(64, 64, structure="btt", rank=4)
    for what, grads in (("forward", False), ("forward + backward", True)):
        torch.compiler.reset()
        graphs: list[int] = []

        def count(graph: torch.fx.GraphModule, inputs: list[Tensor], graphs: list[int] = graphs) -> Callable:
            graphs.append(1)
            return graph.forward

        compiled = torch.compile(layer, backend=count, fullgraph=True)
        started = time.perf_counter()
        for rows in range(2, 3002, 60):
            with torch.set_grad_enabled(grads):
                compiled(torch.randn(rows, 64, requires_grad=grads))
        seconds = time.perf_counter() - started
        yield Row(
            bench="execution",
            case="graphs: BTT 64 rank 4",
            what=what,
            seconds=seconds,
            low=seconds,
            high=seconds,
            samples=1,
            settings={"graphs": len(graphs), "sizes": 50},
        )


class _TwoProducts(nn.Module):
    def __init__(self, a: Tensor, c: Tensor) -> None:
        super().__init__()
        self.a, self.c = nn.Parameter(a.clone()), nn.Parameter(c.clone())

    def forward(self, x: Tensor) -> Tensor:
        return torch.mm(torch.mm(x, self.a), self.c)


def _step(program: Callable[..., Tensor], operands: list[Tensor]) -> Callable[[], object]:
    cotangent = torch.ones_like(program(*operands))
    return lambda: torch.autograd.grad(program(*operands), operands, cotangent)


def _often(run: Callable[[], object]) -> Callable[[], object]:
    def many() -> None:
        for _ in range(2000):
            run()

    return many
