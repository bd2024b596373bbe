"""Layouts: the memory order of every intermediate, chosen over the whole tree so that matrix products need no copy.

A value is a contiguous buffer with an axis order. A pairwise contraction C = A·B splits its axes into batch H (on A, B and C), left M
(A and C), right N (B and C) and contracted K (A and B). It is one batched matrix product without a copy iff every group is a run of
adjacent axes, in the same order, in each tensor that has it, and no operand has its unit stride in H. The condition is
symmetric in A, B and C, so a copy-free forward step is copy-free backward.
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tn.cost import step_flops, volume
from tn.machine import Machine
from tn.order import Axes, Path, steps_of

_ORDERS = 24  # orders of an intermediate that are tried
_ORDERS_INNER = 8  # the same when both of its operands are intermediates: the search is cubic in it
_BYTES = 4

Costs = dict[Axes, tuple[float, Axes, Axes]]  # order of a value → (seconds of its subtree, orders of its operands)


@dataclass(frozen=True, slots=True)
class Pairing:
    """How one pairwise contraction runs.

    Attributes:
        kind: "mm", "bmm", "dot" (nothing kept on either side) or "multiply" (nothing contracted).
        batch, left, right, contracted: the axis groups H, M, N, K, each in the order in which it is flattened.
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
    wide = tuple(axis for axis in group if sizes[axis] != 1)
    if not wide:
        return True
    kept = tuple(axis for axis in order if sizes[axis] != 1)
    start = kept.index(wide[0])
    return kept[start : start + len(wide)] == wide


def pair(left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int], machine: Machine) -> Pairing:
    """The cheapest way to contract two buffers into a third of the given orders."""
    axes = tuple(dict.fromkeys((*left, *right)))
    return _pair(left, right, out, tuple((axis, sizes[axis]) for axis in axes), machine)


@functools.lru_cache(maxsize=1 << 16)
def _pair(left: Axes, right: Axes, out: Axes, known: tuple[tuple[str, int], ...], machine: Machine) -> Pairing:
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
    found = [_product(left, right, out, h, m, n, k, sizes, machine, free) for h, m, n, k in itertools.product(*choices)]
    return min(found, key=lambda p: (p.seconds, p.copied))


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
    return Pairing("multiply", batch, rows, columns, (), False, "native", False, False, flops, moved, 0, seconds)


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
    moved = sum(volumes) + 2 * copied
    return Pairing(kind, batch, rows, columns, summed, swap, placed, copy_left, copy_right, flops, moved, copied, seconds)


def _viewable(order: Axes, groups: tuple[Axes, Axes, Axes], sizes: Mapping[str, int]) -> bool:
    """Whether a buffer can be read as a batch of matrices: the batch group first, then two groups in any order."""
    if not all(is_run(order, group, sizes) for group in groups):
        return False
    wide = [axis for axis in order if sizes[axis] != 1]
    return not wide or wide[-1] not in groups[0] or volume(groups[1] + groups[2], sizes) == 1


def _placement(out: Axes, batch: Axes, rows: Axes, columns: Axes, sizes: Mapping[str, int]) -> tuple[bool, str]:
    """(swap, "native" | "strided" | "copy") for a result wanted in the order `out`."""
    wide = tuple(axis for axis in out if sizes[axis] != 1)
    for swap, order in ((False, batch + rows + columns), (True, batch + columns + rows)):
        if tuple(axis for axis in order if sizes[axis] != 1) == wide:
            return swap, "native"
    if _viewable(out, (batch, rows, columns), sizes):
        return wide[-1] in rows, "strided"
    return False, "copy"


def choose(
    path: Path, inputs: Sequence[Axes], output: Axes, sizes: Mapping[str, int], grads: Sequence[bool], machine: Machine
) -> tuple[float, tuple[Axes, ...]]:
    """Memory orders of all values of a tree, operands and output fixed, by dynamic programming over the tree.

    Returns:
        (predicted seconds of the forward steps and of the gradients that are needed, the order of every SSA value).
    """
    steps = [*steps_of(path, inputs, output)]
    count = len(inputs)
    parent = {operand: number for number, (left, right, _) in enumerate(steps) for operand in (left, right)}
    needs = list(grads)
    table: list[Costs] = [{tuple(t): (0.0, (), ())} for t in inputs]
    axes = [*map(tuple, inputs), *(out for _, _, out in steps)]
    for number, (left, right, _out) in enumerate(steps):
        value = count + number
        orders = [tuple(output)] if value not in parent else _orders(value, steps, parent, axes, count, output)
        needs.append(needs[left] or needs[right])
        table.append({order: _best(table[left], table[right], order, needs[left], needs[right], sizes, machine) for order in orders})
    chosen: list[Axes] = [()] * len(axes)
    chosen[-1] = next(iter(table[-1]))
    for number in reversed(range(len(steps))):
        left, right, _ = steps[number]
        _, chosen[left], chosen[right] = table[count + number][chosen[count + number]]
    if not steps:
        chosen = [*table[0]]
    return next(iter(table[-1].values()))[0], tuple(chosen)


def _best(
    lefts: Costs, rights: Costs, order: Axes, left_needs: bool, right_needs: bool, sizes: Mapping[str, int], machine: Machine
) -> tuple[float, Axes, Axes]:
    """The cheapest orders of both operands for one order of the result. Pairs that could not win even without a copy are left out."""
    found: tuple[float, Axes, Axes] = (math.inf, (), ())
    floor = 0.0
    for left, (left_cost, *_) in sorted(lefts.items(), key=_cost):
        for right, (right_cost, *_) in sorted(rights.items(), key=_cost):
            floor = floor or _ideal(left, right, order, left_needs, right_needs, sizes, machine)
            if left_cost + right_cost + floor >= found[0]:
                break
            seconds = left_cost + right_cost + pair(left, right, order, sizes, machine).seconds
            if left_needs:
                seconds += pair(order, right, left, sizes, machine).seconds
            if right_needs:
                seconds += pair(left, order, right, sizes, machine).seconds
            if seconds < found[0]:
                found = (seconds, left, right)
    return found


def _cost(entry: tuple[Axes, tuple[float, Axes, Axes]]) -> float:
    return entry[1][0]


def _ideal(left: Axes, right: Axes, out: Axes, left_needs: bool, right_needs: bool, sizes: Mapping[str, int], machine: Machine) -> float:
    """Seconds of a step and its gradients if no layout were in the way."""
    total = 0.0
    needed = ((left, right, out, True), (out, right, left, left_needs), (left, out, right, right_needs))
    for a, b, c, wanted in needed:
        if wanted:
            total += _free(*_groups(a, b, c), a, b, c, sizes, machine)
    return total * (1 - 1e-9)


def _orders(value: int, steps: list, parent: Mapping[int, int], axes: list[Axes], count: int, output: Axes) -> list[Axes]:
    """Orders worth trying for an intermediate: permutations of the atoms that its own step and its consumer both keep together."""
    left, right, out = steps[value - count]
    up_left, up_right, up_out = steps[parent[value]]
    sibling = up_right if up_left == value else up_left
    top = output if count + parent[value] not in parent else up_out
    hints = [*(axes[sibling] if sibling < count else ()), *top]
    hints += [axis for child in (left, right) if child < count for axis in axes[child]]
    ranked = [axis for axis in dict.fromkeys((*hints, *out)) if axis in out]

    def group(axis: str) -> tuple[bool, bool, bool, bool]:
        return axis in axes[left], axis in axes[right], axis in axes[sibling], axis in up_out

    atoms: dict[tuple, Axes] = {}
    for axis in ranked:
        atoms[group(axis)] = (*atoms.get(group(axis), ()), axis)
    keys = sorted(atoms, key=lambda key: ranked.index(atoms[key][0]))

    def broken(order: Sequence[tuple]) -> int:
        """How many groups of either step are split in this order: 0 is copy-free on both sides."""
        return sum(_changes([key[side : side + 2] for key in order]) for side in (0, 2))

    limit = _ORDERS if left < count or right < count else _ORDERS_INNER
    tried = itertools.islice(itertools.permutations(keys), 5040)
    best = sorted(tried, key=broken)[:limit]
    return [tuple(axis for key in order for axis in atoms[key]) for order in best]


def _changes(labels: Sequence[tuple]) -> int:
    """Runs of equal labels beyond one run a label."""
    return sum(1 for _ in itertools.groupby(labels)) - len(set(labels))
