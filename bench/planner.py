"""Planner: the time planning takes; random layers beside torch.einsum, opt_einsum and cotengra; regret; predicted against measured."""

import functools
import importlib
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

import tn
from bench.execution import check, passes
from bench.libraries import einsum_peers, optimal, random_network
from bench.models import Parser
from bench.networks import COUNT, RandomLayer, random_layers
from bench.row import RESULTS, Row, append, wide_console
from bench.timing import Timing, interleaved
from tn import order
from tn.machine import Machine, _built_in, machine
from tn.plan import Plan, leaf_axes
from tn.planner import along

PARTS = ("planning", "floors", "random", "regret", "predicted")
PAIRS = 30  # against the best peer
REGRETS = 30  # networks of three to five operands whose every tree is timed
AGAIN = 5  # the fastest of those, timed again
_LEAST = 0.005  # seconds of a sample

_TT4 = "x: ... (a b c d), g: a i r, h: r b j s, v: s c k t, w: t d l -> ... (i j k l)"
_TT3 = "x: ... (a b c), g: a i r, h: r b j s, w: s c k -> ... (i j k)"
FLOORS = (
    ("TT 1296, 4 cores, rank 16", tn.network(_TT4, {**dict.fromkeys("abcdijkl", 6), **dict.fromkeys("rst", 16)}, cores="ghvw"), 1024),
    ("TT 4096, 3 cores, rank 32", tn.network(_TT3, {**dict.fromkeys("abcijk", 16), **dict.fromkeys("rs", 32)}, cores="ghw"), 32),
)


def planning_rows() -> Iterator[Row]:
    """Seconds of one call of tn.plan with gradients of everything, nothing remembered from earlier plans."""
    for count in (3, 8, 30):
        times = []
        for seed in range(7):
            network = random_network(count, seed)
            _forget()
            begun = time.perf_counter()
            tn.plan(network, grad=network.names)
            times.append(time.perf_counter() - begun)
        timing = Timing(tuple(times))
        low, high = timing.quartiles
        yield Row(bench="planner", case=f"{count} operands", what="planning", seconds=timing.median, low=low, high=high, samples=len(times))


def _forget() -> None:
    """Clear every cache of the planner; the machine table stays loaded."""
    for name in ("tn.plan", "tn.planner", "tn.pairing", "tn.forms", "tn.layout", "tn.order", "tn.machine"):
        for value in vars(importlib.import_module(name)).values():
            if hasattr(value, "cache_clear") and value is not _built_in:
                value.cache_clear()


def floor_rows(table: Machine, rounds: int) -> Iterator[Row]:
    """Two TT layers beside opt_einsum's optimal expression, and beside the best of all trees run by our executor."""
    for name, network, rows in FLOORS:
        operands = _operands(network, rows)
        peer = optimal(network, rows)
        for what, grad in (("forward", ()), ("forward + backward", network.names)):
            program = tn.compile(tn.plan(network, grad=grad, rows=rows, table=table))
            check(name, tn.compile(tn.plan(network, grad=network.names, rows=rows, table=table)), peer, operands)
            runs = {"tn": passes(program, operands)[what], "opt_einsum": passes(peer, operands)[what]}
            times = interleaved(runs, rounds=rounds, least_seconds=_LEAST)
            yield _row(name, what, times, "opt_einsum", program.plan)
            yield from regret_rows(name, network, rows, what, table)


def random_rows(layer: RandomLayer, table: Machine) -> Iterator[Row]:
    """One random network: five rounds with every peer, then thirty pairs with the fastest of them."""
    network, operands = layer.network, _operands(layer.network, layer.rows)
    peers = einsum_peers(network, layer.rows)
    check(layer.name, tn.compile(tn.plan(network, grad=network.names, rows=layer.rows, table=table)), peers["torch.einsum"], operands)
    for what, grad in (("forward", ()), ("forward + backward", network.names)):
        program = tn.compile(tn.plan(network, grad=grad, rows=layer.rows, table=table))
        theirs = {name: passes(peer, operands)[what] for name, peer in peers.items()}
        ours = passes(program, operands)[what]
        first = interleaved({"tn": ours, **theirs}, rounds=5, least_seconds=_LEAST)
        best = min(theirs, key=lambda name: first[name].median)
        times = interleaved({"tn": ours, best: theirs[best]}, rounds=PAIRS, least_seconds=_LEAST)
        yield _row(layer.name, what, times, best, program.plan)


def regret_rows(name: str, network: tn.Network, rows: int, what: str, table: Machine) -> Iterator[Row]:
    """The plan beside every other tree, each planned by us, those left out that are predicted five times slower: all are timed in three
    rounds, the fastest again with the plan."""
    grad = network.names if what != "forward" else ()
    plan = tn.plan(network, grad=grad, rows=rows, table=table)
    leaves = leaf_axes(network)
    task = order.Task(leaves, network.output.axes, plan.size, (False,) * len(leaves), order.flops)
    plans = {path: along(network, path, plan.sizes, plan.grad, table) for path in order.search(task)}
    operands = _operands(network, rows)
    slowest = 5 * plan.seconds
    runs = {str(path): passes(tn.compile(other), operands)[what] for path, other in plans.items() if other.seconds <= slowest}
    predicted = {str(path): other.seconds for path, other in plans.items()}
    ours = str(plan.path)
    runs[ours] = passes(tn.compile(plan), operands)[what]
    times = interleaved(runs, rounds=3, warmup=1, least_seconds=0.002)
    fastest = sorted(times, key=lambda path: times[path].median)[:AGAIN]
    again = interleaved({path: runs[path] for path in dict.fromkeys((ours, *fastest))}, rounds=PAIRS // 2, least_seconds=_LEAST)
    best = min(again, key=lambda path: again[path].median)
    trees = [(predicted[path], times[path].median) for path in times]
    settings = {"trees": trees, "all_trees": len(plans), "predicted": plan.seconds, "regret": again[ours].median / again[best].median}
    low, high = again[ours].quartiles
    yield Row(
        bench="planner",
        case=name,
        what=f"regret, {what}",
        seconds=again[ours].median,
        low=low,
        high=high,
        samples=len(again[ours].samples),
        ratio=again[best].median / again[ours].median,
        peer="the best of all trees",
        settings=settings,
    )


def step_rows(layer: RandomLayer, table: Machine) -> Iterator[Row]:
    """Every step of a plan, forward and backward, timed alone beside its prediction."""
    plan = tn.plan(layer.network, grad=layer.network.names, rows=layer.rows, table=table)
    generator = torch.Generator().manual_seed(0)
    for step in (*plan.steps, *plan.backward_steps):
        left, right, out = (plan.orders[value] for value in (step.left, step.right, step.out))
        words = {axis: "rows" if axis == "..." else axis for axis in (*left, *right)}
        terms = [" ".join(words[axis] for axis in t) or "1" for t in (left, right, out)]
        sizes = {words[axis]: plan.step_size[axis] for axis in (*left, *right)}
        network = tn.network(f"a: {terms[0]}, b: {terms[1]} -> {terms[2]}", sizes)
        orders = tuple(tuple(words[axis] for axis in t) for t in (left, right, out))
        alone = Plan(network, tuple((axis, sizes[axis]) for axis in network.axes), (), "time", "given", ((0, 1),), orders, None, table)
        operands = [torch.randn([sizes[axis] for axis in t] or [1], generator=generator) for t in orders[:2]]
        timing = interleaved({"step": functools.partial(_quietly, tn.compile(alone), operands)}, rounds=5, least_seconds=0.002)["step"]
        yield Row(
            bench="planner",
            case=f"{layer.name}, v{step.out} of v{step.left} · v{step.right}",
            what="step",
            seconds=timing.median,
            samples=5,
            flops=step.pairing.flops,
            settings={"predicted": step.pairing.seconds, "kind": step.pairing.kind, "copies": step.pairing.copies},
        )


def _quietly(run: Callable[..., Tensor], operands: Sequence[Tensor]) -> Tensor:
    with torch.no_grad():
        return run(*operands)


def _operands(network: tn.Network, rows: int) -> list[Tensor]:
    """Random values, scaled so that results stay near one."""
    generator = torch.Generator().manual_seed(0)
    sizes = {**network.sizes, "...": rows}
    shapes = [[math.prod(sizes[axis] for axis in dim) for dim in term.dims] for term in network.spec.operands]
    return [torch.randn(shape, generator=generator) / (1 if number == 0 else 8) for number, shape in enumerate(shapes)]


def _row(case: str, what: str, times: dict[str, Timing], peer: str, plan: Plan) -> Row:
    low, high = times["tn"].quartiles
    ratios = sorted(theirs / ours for ours, theirs in zip(times["tn"].samples, times[peer].samples, strict=True))
    side = max(0, math.floor(len(ratios) / 2 - 0.98 * math.sqrt(len(ratios))))  # of the 95 % interval of a median
    settings = {"predicted": plan.seconds, "interval": (ratios[side], ratios[-1 - side]), "tile": plan.tile, "spec": str(plan.network.spec)}
    flops = plan.flops + plan.backward_flops
    values = {"seconds": times["tn"].median, "low": low, "high": high, "ratio": times["tn"].faster_than(times[peer])}
    return Row(bench="planner", case=case, what=what, samples=len(ratios), flops=flops, peer=peer, settings=settings, **values)


def _cases(part: str, cells: range, table: Machine) -> Iterator[Iterator[Row]]:
    """The measurements of one part, each an iterator over its rows."""
    layers = list(random_layers(COUNT))
    if part == "planning":
        yield planning_rows()
    elif part == "floors":
        yield floor_rows(table, 7)
    elif part == "random":
        yield from (random_rows(layers[cell], table) for cell in cells if cell < len(layers))
    elif part == "predicted":
        yield from (step_rows(layers[cell], table) for cell in cells if cell < len(layers))
    else:
        few = [layer for layer in layers if len(layer.network.names) <= 5][:REGRETS]
        for layer in (few[cell] for cell in cells if cell < len(few)):
            for what in ("forward", "forward + backward"):
                yield regret_rows(layer.name, layer.network, layer.rows, what, table)


def main(arguments: list[str]) -> int:
    """Time, print and store; returns 0."""
    parser = Parser(prog="python -m bench planner", description=__doc__)
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS), help="only these parts")
    parser.add_argument("--cells", default=f"0..{COUNT - 1}", help="of the random networks, first..last (default: all)")
    parser.add_argument("--table", type=Path, help="a machine table as JSON, made with tn.calibrate() if the file does not exist")
    parser.add_argument("--out", type=Path, default=RESULTS / "planner.jsonl", help="file the rows are added to")
    given = parser.parse_args(arguments)
    try:
        first, last = map(int, given.cells.split(".."))
    except ValueError:
        raise ValueError(f"--cells {given.cells}: expected first..last, such as 0..39") from None
    table = _table(given.table) if given.table else machine()
    console = wide_console()
    for part in given.only:
        for case in _cases(part, range(first, last + 1), table):
            for row in case:
                append([row], given.out)  # row by row: what an interrupted run measured is kept
                assert row.seconds
                against = f"{row.ratio:.2f} × {row.peer}" if row.ratio else ""
                predicted = row.settings.get("predicted")
                said = f"predicted {predicted * 1e3:.3f} ms" if isinstance(predicted, float) else ""
                console.print(f"{row.case}, {row.what}: {row.seconds * 1e3:.3f} ms  {against}  {said}", highlight=False)
    for line in summary([json.loads(line) for line in given.out.read_text().splitlines()]):
        console.print(line, highlight=False)
    console.print(f"rows: {given.out}", highlight=False)
    return 0


def _table(path: Path) -> Machine:
    if not path.exists():
        path.write_text(tn.calibrate(name="here").to_json(), encoding="utf-8")
    return Machine.from_json(path.read_text(encoding="utf-8"))


def summary(rows: list[dict]) -> Iterator[str]:
    """What the floors ask for, over the last row of every case in a file."""
    last = {(row["case"], row["what"]): row for row in rows}
    of: dict[str, list[dict]] = {}
    for row in last.values():
        of.setdefault(row["what"], []).append(row)
    for what in ("forward", "forward + backward"):
        found = [row for row in of.get(what, []) if row["case"].startswith("random")]
        if found:
            ratios = [row["ratio"] for row in found]
            losses = [row for row in found if row["settings"]["interval"][1] < 1 / 1.05]
            mean = statistics.geometric_mean(ratios)
            yield f"random, {what}: {len(found)} networks, geometric mean {mean:.2f} ×, least {min(ratios):.2f} ×, {len(losses)} lose"
            yield f"  predicted against measured: {_errors(found)}"
        regrets = [row for row in of.get(f"regret, {what}", []) if row["case"].startswith("random")]
        if regrets:
            values = sorted(row["settings"]["regret"] for row in regrets)
            high = values[math.ceil(0.95 * len(values)) - 1]
            orders = [_spearman(row["settings"]["trees"]) for row in regrets if _spread(row["settings"]["trees"]) >= 2]
            middle = statistics.median(values)
            yield f"regret, {what}: {len(values)} networks, median {middle:.3f}, 95th percentile {high:.3f}, most {values[-1]:.3f}"
            if orders:
                middle = statistics.median(orders)
                yield f"  Spearman over the trees of {len(orders)} networks whose trees differ 2 × or more: median {middle:.2f}"
    if "step" in of:
        yield f"{len(of['step'])} steps alone, predicted against measured: {_errors(of['step'])}"


def _errors(rows: list[dict]) -> str:
    ratios = [row["settings"]["predicted"] / row["seconds"] for row in rows]
    errors = [abs(ratio - 1) for ratio in ratios]
    return f"geometric mean {statistics.geometric_mean(ratios):.2f}, median error {100 * statistics.median(errors):.0f} %"


def _spread(trees: list) -> float:
    times = [measured for _, measured in trees]
    return max(times) / min(times)


def _spearman(trees: list) -> float:
    """Rank correlation of predicted and measured seconds."""
    if len(trees) < 3:
        return 1.0 if sorted(trees) == sorted(trees, key=lambda tree: tree[1]) else -1.0
    columns = [*zip(*trees, strict=True)]
    predicted, measured = ([sorted(column).index(value) for value in column] for column in columns)
    return statistics.correlation(predicted, measured)
