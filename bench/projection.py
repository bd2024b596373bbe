"""Projection: `tn.project` against the best of fifteen Adam fits (five starts at three rates), family by family: error and time."""

import math
import statistics
import string
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

import tn
from bench.models import Parser
from bench.row import RESULTS, Row, append, wide_console
from tn.errors import unknown
from tn.linear import core_std
from tn.projection_svd import as_tensor
from tn.structures.registry import Built

# btt_norm is projected as btt is, btt_moe as btt of rank 1 in every expert, and every matrix is dense.
CASES: dict[str, dict[str, object]] = {"low_rank": {"rank": 16}, "tt": {"rank": 16}, "tt 3 cores": {"rank": 8, "cores": 3},
    "kronecker": {"rank": 4}, "kronecker 3 cores": {"rank": 4, "cores": 3}, "monarch": {}, "btt": {"rank": 2},
    "btt 3 cores": {"rank": 2, "cores": 3}, "block_diagonal": {}, "blast": {"rank": 48},
    "einsum2": {"theta": (0.3, 0.3, 0.4, 0.3, 0.3, 0.4, 0.3)}}  # fmt: skip
SHAPE = (256, 384)  # out, in
STARTS, RATES, STEPS = 5, (1e-1, 1e-2, 1e-3), 2000
_REPEATS = 3  # of our projection, whose median counts
_LOOK = 50  # steps from one reading of the distance to the next; the best reading counts


def matrix(kind: str, seed: int, shape: tuple[int, int]) -> Tensor:
    """A normal matrix (out, in), or one with random singular vectors and the k-th singular value k^-0.7 ("spectrum")."""
    normal = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    if kind == "gaussian":
        return normal
    u, s, v = torch.linalg.svd(normal, full_matrices=False)
    return u * torch.arange(1, len(s) + 1) ** -0.7 @ v


class AdamFits:
    """Fits of a structure's cores to one matrix, all in one batch: tensors have the fit as their first dimension.

    Args:
        built: the structure. weight: (out, in), of its very sizes. rates: of each fit. seed: of the starts.
    """

    def __init__(self, built: Built, weight: Tensor, rates: Sequence[float], seed: int) -> None:
        net, generator = built.network, torch.Generator().manual_seed(seed)
        target, axes = as_tensor(net, weight)
        letter = dict(zip(dict.fromkeys((*axes, *net.axes)), string.ascii_letters, strict=False))
        terms = ["Z" + "".join(letter[axis] for axis in net.term(name).axes) for name in net.cores]
        self.equation = f"{','.join(terms)}->Z{''.join(letter[axis] for axis in axes)}"
        std, count = core_std(built, float(weight.square().mean().sqrt())), len(rates)
        shapes = [[net.sizes[axis] for axis in net.term(name).axes] for name in net.cores]
        self.cores = [(std * torch.randn(count, *shape, generator=generator)).requires_grad_() for shape in shapes]
        self.rates = torch.tensor(rates)
        self.moments = [(torch.zeros_like(core), torch.zeros_like(core)) for core in self.cores]
        self.target = torch.empty_like(self.value().detach()).copy_(target.expand(count, *target.shape))  # in the strides of the value
        self.outside = float(weight.square().sum() - target.square().sum())  # elements that are zero in every member
        self.least, self.done = torch.full((count,), math.inf), 0

    def value(self) -> Tensor:
        """The matrices, one dimension an axis."""
        return torch.einsum(self.equation, *self.cores)

    def run(self, steps: int) -> None:
        """Adam with the usual constants on the squared distance, whose gradient in the matrix is twice the difference."""
        for _ in range(steps):
            value = self.value()
            off = value.detach() - self.target
            gradients = torch.autograd.grad(value, self.cores, off)
            self.done += 1
            for core, gradient, (mean, square) in zip(self.cores, gradients, self.moments, strict=True):
                mean.lerp_(gradient, 0.1)
                square.mul_(0.999).addcmul_(gradient, gradient, value=0.001)
                size = (square / (1 - 0.999**self.done)).sqrt_().add_(1e-8)
                rate = self.rates.reshape(-1, *[1] * (core.dim() - 1)) / (1 - 0.9**self.done)
                with torch.no_grad():
                    core.sub_(rate * mean / size)
            if self.done % _LOOK == 0:
                self.least = torch.minimum(self.least, off.flatten(1).square().sum(1) + self.outside)


def fit_rows(case: str, kind: str, seeds: Iterable[int], steps: int, alone: float) -> Iterator[Row]:
    """A row for each matrix of a kind: our time and error, and over those the fits'.

    Args:
        seeds: numbers of the matrices.
        alone: seconds that fifteen fits take one by one: the time of the fits is this or that of the batch, whichever is less.
    """
    for seed in seeds:
        weight, times = matrix(kind, seed, SHAPE), []
        for _ in range(_REPEATS):
            begun = time.perf_counter()
            found = tn.project(weight, structure=case.split(" ")[0], **CASES[case])
            times.append(time.perf_counter() - begun)
        seconds = statistics.median(times)
        begun = time.perf_counter()
        fits = AdamFits(found.built, weight, RATES * STARTS, seed)
        fits.run(steps)
        batch = time.perf_counter() - begun
        errors = (fits.least / weight.square().sum()).sqrt()
        best = int(errors.argmin())
        yield Row(
            bench="projection",
            case=case,
            what=f"{kind} {seed}",
            seconds=seconds,
            low=min(times),
            high=max(times),
            samples=len(times),
            bytes=4 * found.built.parameters,
            ratio=min(batch, alone) / seconds,
            peer=f"{len(errors)} Adam fits of {steps} steps",
            settings={"error": found.error, "adam_error": float(errors[best]), "adam_rate": fits.rates[best].item(),
                      "adam_seconds": {"batched": batch, "one by one": alone}, "sizes": dict(found.sizes)},
        )  # fmt: skip


def one_by_one(case: str, steps: int) -> float:
    """Seconds of all fits one after the other, from a few steps of one."""
    weight = matrix("gaussian", 0, SHAPE)
    built = tn.structures.get(case.split(" ")[0]).build(SHAPE[1], SHAPE[0], tn.structures.Options(**CASES[case]))
    fit, few = AdamFits(built, weight, RATES[:1], 0), 20
    fit.run(few)
    begun = time.perf_counter()
    fit.run(few)
    return (time.perf_counter() - begun) / few * steps * STARTS * len(RATES)


def main(arguments: list[str]) -> int:
    """Project, fit, print and store; returns 0, or 1 where a projection is worse than 1.01 × the best fit or slower than a tenth of the
    fits' time."""
    parser = Parser(prog="python -m bench projection", description=__doc__)
    parser.add_argument("--family", nargs="*", default=list(CASES), help=f"only these (default: all of {', '.join(CASES)})")
    parser.add_argument("--matrices", type=int, default=10, help="of each kind, 256 × 384 (default: 10)")
    parser.add_argument("--first", type=int, default=0, help="number of the first matrix (default: 0)")
    parser.add_argument("--kind", nargs="*", default=["gaussian", "spectrum"], choices=["gaussian", "spectrum"], help="(default: both)")
    parser.add_argument("--steps", type=int, default=STEPS, help=f"of Adam (default: {STEPS})")
    parser.add_argument("--out", type=Path, default=RESULTS / "projection.jsonl", help="file the rows are added to")
    given = parser.parse_args(arguments)
    for case in given.family:
        if case not in CASES:
            raise ValueError(unknown("family", case, CASES))
    if min(given.matrices, given.steps // _LOOK) < 1:
        raise ValueError(f"takes at least 1 matrix and {_LOOK} steps, got {given.matrices} and {given.steps}")
    found: list[Row] = []
    for case in given.family:
        tn.project(matrix("gaussian", 0, SHAPE), structure=case.split(" ")[0], **CASES[case])  # first calls import and plan
        alone = one_by_one(case, given.steps)
        for kind in given.kind:
            for row in fit_rows(case, kind, range(given.first, given.first + given.matrices), given.steps, alone):
                append([row], given.out)  # at once: a sweep takes an hour
                found.append(row)
    console = wide_console()
    console.print(_table(found))
    console.print(f"rows: {given.out}", highlight=False)
    return int(any(_ratio(row) > 1.01 or (row.ratio or 0) < 10 for row in found))


def _ratio(row: Row) -> float:
    """Our error over the best fit's; of errors that are rounding, 1."""
    ours, theirs = float(str(row.settings["error"])), float(str(row.settings["adam_error"]))
    return 1.0 if max(ours, theirs) < 1e-5 else ours / theirs


def _table(rows: list[Row]) -> Table:
    table = Table(title=f"{torch.get_num_threads()} threads, 256 × 384, fp32", title_justify="left", pad_edge=False)
    for heading in ("structure", "matrices", "error", "of the best fit: worst", "mean", "seconds: worst", "times faster: least", "median"):
        table.add_column(heading, justify="left" if heading in ("structure", "matrices") else "right")
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.case, row.what.split(" ")[0]), []).append(row)
    for (case, kind), group in groups.items():
        errors = statistics.mean(float(str(row.settings["error"])) for row in group)
        ratios, times = [_ratio(row) for row in group], [row.ratio or 0 for row in group]
        seconds = max(row.seconds or 0 for row in group)
        cells = (f"{errors:.4f}", f"{max(ratios):.4f}", f"{statistics.mean(ratios):.4f}", f"{seconds:.3f}")
        table.add_row(case, f"{len(group)} {kind}", *cells, f"{min(times):,.0f}", f"{statistics.median(times):,.0f}")
    return table
