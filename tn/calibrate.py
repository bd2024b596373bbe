"""Measure a machine table: every product in `tn.machine.SHAPES`, copies, and new memory. Only ever run when asked."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from tn import measured
from tn.machine import READS, SHAPES, Machine
from tn.plan import Plan

_ELEMENTS = 1 << 20  # of all operands of one measurement: they stay in cache
_PASSES = 3
# glibc hands a freed block of 32 MB back to the system, and the end of the heap once a few smaller ones are free.
_PAGED = 8 << 20


class _Clock:
    """Times functions within a budget of seconds for each."""

    def __init__(self, device: torch.device, budget: float) -> None:
        self.device, self.budget = device, budget

    def __call__(self, run: Callable[[], object]) -> float:
        """Seconds of a call: the lower quartile of as many samples as fit the budget, two at least."""
        run()
        once = self._sample(run, 1)
        repeats = max(1, int(self.budget / 6 / max(once, 1e-7)))
        samples: list[float] = []
        begun = time.perf_counter()
        while len(samples) < 2 or time.perf_counter() - begun < self.budget:
            samples.append(self._sample(run, repeats))
        return sorted(samples)[len(samples) // 4]

    def _sample(self, run: Callable[[], object], repeats: int) -> float:
        self._wait()
        begun = time.perf_counter()
        for _ in range(repeats):
            run()
        self._wait()
        return (time.perf_counter() - begun) / repeats

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def calibrate(
    device: torch.device | str = "cpu",
    *,
    dtype: torch.dtype = torch.float32,
    budget: float = 0.002,
    name: str = "",
    plans: Iterable[Plan] | None = None,
    tune: bool = False,
) -> Machine:
    """Measure the machine table of a device, in about half a minute on a CPU. Nothing else should run meanwhile.

    On CUDA each kernel is also timed against the torch path, which takes a minute more to compile them; plans that use the table then
    take the kernels that were faster.

    Args:
        device, dtype: to measure; the number of threads is torch's current one.
        budget: seconds spent on each of about 3,500 products, three times. name: of the table.
        plans: whose parts operators are timed on, such as `[layer.plan(2048)]`, made for this device and dtype; on CUDA those of common
            layers if None. tune: first measure how each kernel is best cut into blocks, and keep that on disk; minutes.

    Returns:
        A Machine; keep it with `to_json`, use it with `tn.use_table` or as `tn.plan(..., table=...)`. Its source says whether kernels were
        timed, and whether that was on hardware.
    """
    where = torch.device(device)
    clock = _Clock(where, budget)

    def new(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=where)

    def least(measure: Callable[..., list[float]], *arguments: object) -> tuple[float, ...]:
        """The least of several passes, apart in time: what else the machine does disturbs some of them."""
        return _round([min(times) for times in zip(*(measure(clock, new, *arguments) for _ in range(_PASSES)), strict=True)])

    mm = tuple(least(_mm, reads) for reads in READS)
    bmm = tuple(least(_bmm, reads, line, False) for reads, line in zip(READS, mm, strict=True))
    loop = tuple(least(_bmm, reads, line, True) for reads, line in zip(READS, mm, strict=True))
    flat, wide = new(1024, 256), new(1024, 1024)
    wider = torch.empty_like(wide)
    pages, small, turned = new(64, 64, 64), new(1024, 16, 16), new(16, 16, 1024)
    large = new(1 << 24)
    larger = torch.empty_like(large)
    width = flat.element_size()
    tiny = new(8, 1, 8), new(8, 8, 1)
    element = clock(lambda: flat[0] * flat[0])
    touched = large.element_size() * large.numel() / max(clock(lambda: large.clone()) - clock(lambda: larger.copy_(large)), 1e-9)
    rates = {
        "call": clock(lambda: torch.bmm(*tiny)),
        "copy": 2 * width * pages.numel() / clock(lambda: pages.clone()),
        "run": clock(lambda: turned.copy_(small.permute(1, 2, 0))) / small.numel(),
        "multiply": 2 * width * wide.numel() / clock(lambda: torch.mul(wide, wide[0], out=wider)),
        "element": element,
        "view": clock(lambda: flat.reshape(64, 16, 256).permute(1, 0, 2)) / 2,
        "far": 2 * width * large.numel() / clock(lambda: larger.copy_(large)),
        "fresh": min(touched, 1e15) if where.type == "cpu" else 1e15,
    }
    source = f"measured: {where.type}, {dtype}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    # what several cores made, each reads from the other's cache, so that little is near
    near, tiles = (1 << 16 if torch.get_num_threads() > 1 else 1 << 20, True) if where.type == "cpu" else (0, False)
    rounded = {key: float(f"{value:.3g}") for key, value in rates.items()}
    table = Machine(name=name or where.type, mm=mm, bmm=bmm, loop=loop, near=near, paged=_PAGED, tiles=tiles, source=source, **rounded)
    return with_operators(table, where, dtype, clock, plans, tune=tune)


def with_operators(
    table: Machine,
    device: torch.device,
    dtype: torch.dtype,
    clock: Callable[[Callable[[], object]], float],
    plans: Iterable[Plan] | None = None,
    *,
    tune: bool = False,
) -> Machine:
    """The table with rows of operators timed by a clock, which its source mentions; see `calibrate`."""
    if plans is None and device.type != "cuda":
        return dataclasses.replace(table, source=f"{table.source}; kernels not measured")
    timed = measured.rows(measured.common(table, dtype, device) if plans is None else plans, clock, tune=tune and device.type == "cuda")
    how = f"{len(timed)} cases of kernels measured" if device.type == "cuda" else "kernels not measured on hardware, but interpreted"
    return dataclasses.replace(table, operators={**table.operators, **timed}, source=f"{table.source}; {how}")


def _operand(new: Callable[..., Tensor], letter: str, *shape: int) -> Tensor:
    """Matrices of a shape whose last ("N") or first ("T") extent is adjacent in memory; the strides say so even where an extent is 1."""
    *batch, rows, columns = shape
    return new(*shape) if letter == "N" else new(*batch, columns, rows).mT


def _mm(clock: _Clock, new: Callable[..., Tensor], reads: str) -> list[float]:
    found = []
    for m, n, k in SHAPES:
        a, b, c = _operand(new, reads[0], m, k), _operand(new, reads[1], k, n), new(m, n)
        found.append(clock(functools.partial(torch.mm, a, b, out=c)))
    return found


def _bmm(clock: _Clock, new: Callable[..., Tensor], reads: str, single: tuple[float, ...], strided: bool) -> list[float]:
    found = []
    for (m, n, k), alone in zip(SHAPES, single, strict=True):
        size = m * k + k * n + m * n
        if 2 * size > _ELEMENTS:  # one item fills the machine
            found.append(alone)
            continue
        batch = max(2, min(32 if strided else 1024, _ELEMENTS // size, 40_000_000 // (m * n * k)))
        a, b = _operand(new, reads[0], batch, m, k), _operand(new, reads[1], batch, k, n)
        c = new(m, batch, n).permute(1, 0, 2) if strided else new(batch, m, n)
        found.append(clock(functools.partial(torch.bmm, a, b, out=c)) / batch)
    return found


def _round(values: list[float]) -> tuple[float, ...]:
    return tuple(float(f"{value:.3g}") for value in values)
