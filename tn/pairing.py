"""One pairwise contraction as matrix products of views: which groups of axes are flattened, what is copied, and what it costs.

A value is a contiguous buffer with an axis order. A contraction C = A·B splits its axes into batch H (on A, B and C), left M
(A and C), right N (B and C) and contracted K (A and B). It is one batched matrix product without a copy iff every group is a run of
adjacent axes, in the same order, in each tensor that has it, and no operand has its unit stride in H. The condition is
symmetric in A, B and C, so a copy-free forward step is copy-free backward.

Where a plain product (no H) would copy, three more forms are tried: some axes of M, or of N, as a batch that the other operand
does not have (stride 0), or some axes of K as a batch that is summed afterwards.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tn.cost import step_flops, volume
from tn.machine import Machine
from tn.order import Axes

_BYTES = 4
_VIEW = 5e-7  # seconds of making a transposed view; it decides between layouts that are otherwise alike


@dataclass(frozen=True, slots=True)
class Pairing:
    """How one pairwise contraction runs.

    Attributes:
        kind: "mm", "bmm", "dot" (nothing kept on either side) or "multiply" (nothing contracted).
        batch, left, right, contracted: the axis groups H, M, N, K, each in the order in which it is flattened.
        batch_on: "all" tensors; "left" or "right" operand only, and the result (the other operand is broadcast); "operands", both of
            them and not the result, which is summed over it.
        swap: the product is taken as (N, K) × (K, M), so that the result comes out transposed.
        out: "native" (the product's own order is the wanted one), "strided" (written through a strided view), "copy".
        copy_left, copy_right: operands that must be copied first.
        flops, bytes, copied: work of the step; `copied` counts the bytes of copied tensors. seconds: predicted.
    """

    kind: str
    batch: Axes
    left: Axes
    right: Axes
    contracted: Axes
    batch_on: str
    swap: bool
    out: str
    copy_left: bool
    copy_right: bool
    flops: int
    bytes: int
    copied: int
    seconds: float

    @property
    def copies(self) -> int:
        """Number of tensors this step copies."""
        return self.copy_left + self.copy_right + (self.out == "copy")


def is_run(order: Axes, group: Axes, sizes: Mapping[str, int]) -> bool:
    """Whether the group's axes lie next to each other in the order, in this sequence; axes of size one are ignored."""
    if len(group) <= 1:
        return True
    start = order.index(group[0])
    if order[start : start + len(group)] == group:
        return True
    wide = tuple(axis for axis in group if sizes[axis] != 1)
    if not wide:
        return True
    kept = tuple(axis for axis in order if sizes[axis] != 1)
    start = kept.index(wide[0])
    return kept[start : start + len(wide)] == wide


def pair(left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int], machine: Machine, tape: bool = False) -> Pairing:
    """The cheapest way to contract two buffers into a third of the given orders.

    Args:
        tape: autograd will differentiate the product itself; then no operand is broadcast, because the gradient of a broadcast
            operand is first made for every batch item.
    """
    axes = tuple(dict.fromkeys((*left, *right)))
    return _pair(left, right, out, tuple((axis, sizes[axis]) for axis in axes), machine, tape)


def ideal(left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int], machine: Machine) -> float:
    """Seconds of a step that copies nothing: no layout is faster."""
    return _free(*_groups(left, right, out), left, right, out, sizes, machine)


@functools.lru_cache(maxsize=1 << 16)
def _pair(left: Axes, right: Axes, out: Axes, known: tuple[tuple[str, int], ...], machine: Machine, tape: bool) -> Pairing:
    sizes = dict(known)
    groups = _groups(left, right, out)
    if all(sizes[axis] == 1 for axis in groups[3]):
        return _multiply(left, right, out, sizes, machine)
    free = _free(*groups, left, right, out, sizes, machine)
    sources = ((left, right, out), (left, out), (right, out), (left, right))
    choices = [
        dict.fromkeys(tuple(axis for axis in source if axis in group) for source in orders)
        for group, orders in zip(groups, sources, strict=True)
    ]
    found = []
    for h, m, n, k in itertools.product(*choices):
        found.append(_product(left, right, out, h, m, n, k, sizes, machine, free))
        if found[-1].seconds <= free:  # nothing to improve
            return found[-1]
    best = min(found, key=_rank)
    if best.copies and best.kind == "mm" and not best.batch:
        others = itertools.chain.from_iterable(
            _batched(left, right, out, m, n, k, sizes, machine, tape) for _, m, n, k in itertools.product(*choices)
        )
        best = min([best, *others], key=_rank)
    return best


def _rank(p: Pairing) -> tuple[float, int]:
    return p.seconds, p.copied


def _batched(
    left: Axes, right: Axes, out: Axes, rows: Axes, columns: Axes, summed: Axes, sizes: Mapping[str, int], machine: Machine, tape: bool
) -> Iterator[Pairing]:
    """The same product with some axes of one group as a batch that one of the three tensors does not have."""
    for group, batch_on in ((rows, "left"), (columns, "right"), (summed, "operands")):
        if tape and batch_on != "operands":
            continue
        for batch, rest in _cuts(group):
            m, n, k = (rest if g is group else g for g in (rows, columns, summed))
            on_left, on_right, on_out = (
                batch if batch_on in where else () for where in (("left", "operands"), ("right", "operands"), ("left", "right"))
            )
            if not (_viewable(left, (on_left, m, k), sizes) and _viewable(right, (on_right, n, k), sizes)):
                continue
            swap, placed = _placement(out, on_out, m, n, sizes)
            if placed != "copy":
                yield _partial(left, right, out, batch, m, n, k, batch_on, swap, placed, sizes, machine)


def _cuts(group: Axes) -> Iterator[tuple[Axes, Axes]]:
    """(batch, rest): every way to take axes off the front or the back of a group, neither part empty."""
    for i in range(1, len(group)):
        yield group[:i], group[i:]
        yield group[i:], group[:i]


def _partial(
    left: Axes,
    right: Axes,
    out: Axes,
    batch: Axes,
    rows: Axes,
    columns: Axes,
    summed: Axes,
    batch_on: str,
    swap: bool,
    placed: str,
    sizes: Mapping[str, int],
    machine: Machine,
) -> Pairing:
    """A copy-free product with a batch that one tensor does not have; a summed batch is written and read once more."""
    h, m, n, k = (volume(group, sizes) for group in (batch, rows, columns, summed))
    moved = _BYTES * sum(volume(tensor, sizes) for tensor in (left, right, out))
    if batch_on == "operands":
        moved += 2 * _BYTES * h * m * n
    seconds = max(machine.product(h, m, n, k), moved / machine.copy) + machine.launch * (1 + (batch_on == "operands"))
    if placed == "strided":
        seconds += h * machine.item
    flops = step_flops(left, right, sizes)
    return Pairing("bmm", batch, rows, columns, summed, batch_on, swap, placed, False, False, flops, moved, 0, seconds)


def _groups(left: Axes, right: Axes, out: Axes) -> tuple[set[str], set[str], set[str], set[str]]:
    """Batch, left, right and contracted axes."""
    a, b, c = set(left), set(right), set(out)
    return a & b & c, (a & c) - b, (b & c) - a, (a & b) - c


def _free(
    batch: set[str],
    rows: set[str],
    columns: set[str],
    summed: set[str],
    left: Axes,
    right: Axes,
    out: Axes,
    sizes: Mapping[str, int],
    machine: Machine,
) -> float:
    """Seconds of a step that copies nothing: arithmetic at the rate of its shape, or memory traffic."""
    moved = _BYTES * sum(volume(tensor, sizes) for tensor in (left, right, out))
    if all(sizes[axis] == 1 for axis in summed):
        return moved / machine.permute + machine.launch
    h, m, n, k = (volume(group, sizes) for group in (batch, rows, columns, summed))
    return max(machine.product(h, m, n, k), moved / machine.copy) + machine.launch


def _multiply(left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int], machine: Machine) -> Pairing:
    """Nothing is contracted: a broadcast product, written in the wanted order."""
    groups = _groups(left, right, out)
    batch, rows, columns = (tuple(axis for axis in out if axis in group) for group in groups[:3])
    moved = _BYTES * sum(volume(t, sizes) for t in (left, right, out))
    seconds = _free(*groups, left, right, out, sizes, machine)
    flops = step_flops(left, right, sizes)
    return Pairing("multiply", batch, rows, columns, (), "all", False, "native", False, False, flops, moved, 0, seconds)


def _product(
    left: Axes,
    right: Axes,
    out: Axes,
    batch: Axes,
    rows: Axes,
    columns: Axes,
    summed: Axes,
    sizes: Mapping[str, int],
    machine: Machine,
    free: float,
) -> Pairing:
    """The matrix product with these flattened groups, and what it has to copy; `free` is its time without copies."""
    h, m, n = (volume(group, sizes) for group in (batch, rows, columns))
    kind = "dot" if m == n == 1 else "mm" if h == 1 else "bmm"
    copy_left = not _viewable(left, (batch, rows, summed), sizes)
    copy_right = not _viewable(right, (batch, columns, summed), sizes)
    swap, placed = _placement(out, batch, rows, columns, sizes)
    flops = step_flops(left, right, sizes)
    volumes = [_BYTES * volume(tensor, sizes) for tensor in (left, right, out)]
    copies = (copy_left, copy_right, placed == "copy")
    copied = sum(size for size, copy in zip(volumes, copies, strict=True) if copy)
    seconds = free + 2 * copied / machine.permute + machine.launch * sum(copies)
    if placed == "strided":
        seconds += h * machine.item
    outer, inner = (columns, rows) if swap else (rows, columns)
    first, second = (right, left) if swap else (left, right)
    seconds += _VIEW * (_turned(first, batch + outer + summed, sizes) + _turned(second, batch + summed + inner, sizes))
    moved = sum(volumes) + 2 * copied
    return Pairing(kind, batch, rows, columns, summed, "all", swap, placed, copy_left, copy_right, flops, moved, copied, seconds)


def _viewable(order: Axes, groups: tuple[Axes, Axes, Axes], sizes: Mapping[str, int]) -> bool:
    """Whether a buffer can be read as a batch of matrices: the batch group first, then two groups in any order."""
    if not all(is_run(order, group, sizes) for group in groups):
        return False
    wide = [axis for axis in order if sizes[axis] != 1]
    return not wide or wide[-1] not in groups[0] or volume(groups[1] + groups[2], sizes) == 1


def _turned(order: Axes, wanted: Axes, sizes: Mapping[str, int]) -> bool:
    """Whether a buffer has to be read through a transposed view to have its groups in the wanted sequence."""
    return order != wanted and [axis for axis in order if sizes[axis] != 1] != [axis for axis in wanted if sizes[axis] != 1]


def _placement(out: Axes, batch: Axes, rows: Axes, columns: Axes, sizes: Mapping[str, int]) -> tuple[bool, str]:
    """(swap, "native" | "strided" | "copy") for a result wanted in the order `out`."""
    wide = tuple(axis for axis in out if sizes[axis] != 1)
    for swap, order in ((False, batch + rows + columns), (True, batch + columns + rows)):
        if tuple(axis for axis in order if sizes[axis] != 1) == wide:
            return swap, "native"
    if _viewable(out, (batch, rows, columns), sizes):
        return wide[-1] in rows, "strided"
    return False, "copy"
