"""Einsum: one call of tn.einsum beside torch.einsum and opt_einsum.contract, on networks of einsum_benchmark's generators and a tiny one.

All three are timed as users call them, so the libraries search for an order in every call; "opt_einsum, planned" is an expression of
theirs that was planned before, whose call skips that.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import opt_einsum
import torch
from rich.table import Table
from torch import Tensor

import tn
from bench.models import Parser
from bench.row import RESULTS, Row, append, wide_console
from bench.timing import interleaved
from tn.errors import unknown

FAMILIES = ("network", "hypernetwork", "regular", "lattice", "chain", "tree")
SEEDS = range(8)  # of each family's generator, at three sizes each
MOST_FLOPS = 1e9


@dataclass(frozen=True)
class Case:
    """One einsum: a name, an equation and the shapes of its operands."""

    name: str
    equation: str
    shapes: tuple[tuple[int, ...], ...]


def cases(family: str, seeds: range = SEEDS) -> Iterator[Case]:
    """The networks of a family: random networks, random hypernetworks, random regular graphs, lattices, matrix chains, trees.

    Raises:
        ModuleNotFoundError: einsum_benchmark is not installed.
    """
    from einsum_benchmark.generators import random, structured  # late: an optional extra

    for seed in seeds:
        for step, size in enumerate(("small", "medium", "large")):
            made = {
                "network": lambda seed=seed, n=(6, 12, 9)[step], d=(10, 10, 24)[step]: random.connected_network(n, 2.5, 2, 4, d, seed=seed),
                "hypernetwork": lambda seed=seed, n=(6, 12, 8)[step], d=(8, 8, 20)[step]: random.connected_hypernetwork(
                    n, 2.5, max_edge_order=4, number_of_output_indices=2, min_axis_size=2, max_axis_size=d, seed=seed
                ),
                "regular": lambda seed=seed, n=(8, 14, 10)[step], d=(8, 8, 24)[step]: random.regular(n, 3, 4, d, seed=seed),
                "lattice": lambda seed=seed, n=((3, 3), (3, 5), (3, 4))[step], d=(6, 6, 12)[step]: structured.lattice(n, False, 3, d, seed),
                "chain": lambda seed=seed, n=(3, 8, 10)[step], d=(400, 400, 1000)[step]: structured.matrix_chain(n, 10, d, seed=seed),
                "tree": lambda seed=seed, n=(8, 16, 10)[step], d=(12, 12, 40)[step]: structured.tree(n, 4, d, seed=seed),
            }[family]
            try:
                equation, shapes = made()[:2]
            except ValueError:  # the generator of hypernetworks draws from an empty range for some seeds
                continue
            yield Case(f"{family} {size} {seed}", equation, tuple(tuple(map(int, shape)) for shape in shapes))


def within(case: Case) -> bool:
    """Whether opt_einsum's path costs at most 10⁹ FLOPs."""
    return opt_einsum.contract_path(case.equation, *case.shapes, shapes=True)[1].opt_cost <= MOST_FLOPS


def measure(case: Case, rounds: int) -> Iterator[Row]:
    """The three calls in turns; a row against each peer. Raises RuntimeError where a value is wrong."""
    generator = torch.Generator().manual_seed(0)
    operands = [torch.randn(shape, generator=generator) for shape in case.shapes]
    begun = time.perf_counter()
    _check(case, operands)
    first = time.perf_counter() - begun
    planned = opt_einsum.contract_expression(case.equation, *case.shapes)
    calls: dict[str, Callable[[], Tensor]] = {
        "tn": lambda: tn.einsum(case.equation, *operands),
        "opt_einsum": lambda: opt_einsum.contract(case.equation, *operands),
        "opt_einsum, planned": lambda: planned(*operands),
    }
    if len(set(case.equation) - set(",->")) <= 52:  # torch has no more letters
        calls["torch.einsum"] = lambda: torch.einsum(case.equation, *operands)
    with torch.no_grad():
        times = interleaved(calls, rounds=rounds, least_seconds=0.005)
    low, high = times["tn"].quartiles
    info = tn.contract_path(case.equation, *operands)
    for peer in [name for name in times if name != "tn"]:
        yield Row(
            bench="einsum",
            case=case.name,
            what="forward",
            seconds=times["tn"].median,
            low=low,
            high=high,
            samples=rounds,
            flops=int(info.opt_cost),
            ratio=times["tn"].faster_than(times[peer]),
            peer=peer,
            settings={"equation": case.equation, "shapes": case.shapes, "seconds_to_plan_and_check": first},
        )


def _check(case: Case, operands: list[Tensor]) -> None:
    """Against opt_einsum in float64; the tolerance is that of fp32 sums of products of the absolute values."""
    got = tn.einsum(case.equation, *operands)
    want = opt_einsum.contract(case.equation, *(t.double() for t in operands))
    size = opt_einsum.contract(case.equation, *(t.double().abs() for t in operands))
    if got.shape != want.shape or (got - want).abs().max() > 1e-4 * size.max():
        raise RuntimeError(f"{case.name}: wrong by {(got - want).abs().max().item():.2e}; nothing is timed")


def tiny(rounds: int) -> Iterator[Row]:
    """Overhead: a product of three 8 × 8 matrices against two calls of torch.mm and against the libraries."""
    a, b, c = (torch.randn(8, 8) for _ in range(3))
    equation = "ab,bc,cd->ad"
    calls: dict[str, Callable[[], Tensor]] = {
        "tn": lambda: tn.einsum(equation, a, b, c),
        "two torch.mm": lambda: torch.mm(torch.mm(a, b), c),
        "torch.einsum": lambda: torch.einsum(equation, a, b, c),
        "opt_einsum": lambda: opt_einsum.contract(equation, a, b, c),
    }
    with torch.no_grad():
        times = interleaved(calls, rounds=rounds)
    low, high = times["tn"].quartiles
    for peer in list(calls)[1:]:
        yield Row(
            bench="einsum",
            case="tiny 8 × 8",
            what="forward",
            seconds=times["tn"].median,
            low=low,
            high=high,
            samples=rounds,
            flops=2 * 2 * 8**3,
            ratio=times["tn"].faster_than(times[peer]),
            peer=peer,
            settings={"peer_seconds": times[peer].median},
        )


def main(arguments: list[str]) -> int:
    """Time, print and store; returns 0."""
    parser = Parser(prog="python -m bench einsum", description=__doc__)
    parser.add_argument("--family", nargs="*", default=list(FAMILIES), help=f"only these of {', '.join(FAMILIES)}")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each (default: 7)")
    parser.add_argument("--seeds", type=int, default=len(SEEDS), help=f"networks of each family and size (default: {len(SEEDS)})")
    parser.add_argument("--out", type=Path, default=RESULTS / "einsum.jsonl", help="file the rows are added to")
    given = parser.parse_args(arguments)
    for family in given.family:
        if family not in FAMILIES:
            raise ValueError(unknown("family", family, FAMILIES))
    if min(given.rounds, given.seeds) < 1:
        raise ValueError(f"rounds and seeds are counts of at least 1, got {given.rounds} and {given.seeds}")
    console = wide_console()
    found = list(tiny(given.rounds))
    try:
        chosen = [case for family in given.family for case in cases(family, range(given.seeds)) if within(case)]
    except ModuleNotFoundError as error:
        chosen = []
        console.print(f"only the tiny case: {error.name} is not installed (pip install 'tn-layers[bench]')")
    for case in chosen:
        found += measure(case, given.rounds)
    console.print(_table(found))
    for line in _summary([row for row in found if not row.case.startswith("tiny")]):
        console.print(line, highlight=False)
    append(found, given.out)
    console.print(f"rows: {given.out}", highlight=False)
    return 0


def _summary(rows: list[Row]) -> Iterator[str]:
    """Per peer: the geometric mean and how many cells are more than 5 % slower."""
    for peer in dict.fromkeys(row.peer for row in rows):
        ratios = [row.ratio for row in rows if row.peer == peer and row.ratio]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        slower = sum(ratio < 1 / 1.05 for ratio in ratios)
        yield f"{len(ratios)} cells against {peer}: geometric mean {mean:.2f} ×, least {min(ratios):.2f} ×, {slower} more than 5 % slower"


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"{torch.get_num_threads()} threads, fp32, no gradients", title_justify="left", pad_edge=False)
    for heading in ("einsum", "operands", "MFLOP", "median", "quartiles", "against", "times faster"):
        table.add_column(heading, justify="left" if heading in ("einsum", "against") else "right")
    for row in rows:
        assert row.seconds and row.low and row.high and row.ratio
        shapes = row.settings.get("shapes", ((),) * 3)
        assert isinstance(shapes, tuple)
        spread = f"{row.low * 1e6:.1f}–{row.high * 1e6:.1f}"
        table.add_row(
            row.case, str(len(shapes)), f"{row.flops / 1e6:.3f}", f"{row.seconds * 1e6:.1f} µs", spread, row.peer, f"{row.ratio:.2f}"
        )
    return table
