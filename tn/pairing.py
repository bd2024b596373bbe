"""One pairwise contraction: how it runs in given memory orders, and what it costs (the ways to run it: tn.forms).

A value is a contiguous buffer with an axis order. A contraction C = A·B splits its axes into batch H (on A, B and C), left M
(A and C), right N (B and C) and contracted K (A and B).
"""

import functools
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from tn.cost import step_flops, volume
from tn.forms import Form, forms, fuse, groups, move
from tn.machine import Array, Machine
from tn.order import Axes

_BYTES = 4
_PART = 256.0  # rows of a part, see `ideal`
_SHORT = 16  # elements that vector instructions take at once
_SCATTER = 2.5  # times as long takes what lies out of cache when an item of a batch is not one block of memory (two CPU cores)


@dataclass(frozen=True, slots=True)
class Pairing:
    """How one pairwise contraction runs.

    Attributes:
        kind: "mm", "bmm", "dot" (an elementwise product, then summed) or "multiply" (nothing contracted).
        batch, left, right, contracted: the axis groups H, M, N, K, each in the order in which it is flattened.
        batch_on: "all" tensors; "left" or "right" operand only, and the result (the other operand is broadcast); "operands", both of
            them and not the result, which is summed over it.
        swap: the product is taken as (N, K) × (K, M), so that the result comes out transposed.
        out: "native" (the product's own order is the wanted one), "strided" (written through a strided view), "copy".
        copy_left, copy_right: operands that must be copied first.
        flops, bytes, copied: work of the step; `copied` counts the bytes of copied tensors. seconds: predicted.
        whole: of a "dot" the axes of the elementwise product in the order it is written in, that of the larger operand.
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
    whole: Axes = ()

    @property
    def copies(self) -> int:
        """Number of tensors this step copies."""
        return self.copy_left + self.copy_right + (self.out == "copy")

    def natural(self, out: Axes) -> Axes:
        """The axes of the result in the order that the product itself has, where it is wanted in the order `out`."""
        if self.kind == "multiply":
            return out
        if self.kind == "dot":
            return tuple(axis for axis in self.whole if axis in out)
        outer, inner = (self.right, self.left) if self.swap else (self.left, self.right)
        return (*outer, *inner) if self.batch_on == "operands" else (*self.batch, *outer, *inner)


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


def same_memory(first: Axes, second: Axes, sizes: Mapping[str, int]) -> bool:
    """Whether two orders of the same axes are one in memory: they differ in axes of size one at most."""
    return first == second or [axis for axis in first if sizes[axis] != 1] == [axis for axis in second if sizes[axis] != 1]


def pair(left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int], machine: Machine, tape: bool = False) -> Pairing:
    """The cheapest way to contract two buffers into a third of the given orders.

    Args:
        tape: autograd will differentiate the product itself; then no operand is broadcast, because the gradient of a broadcast
            operand is first made for every batch item.
    """
    axes = tuple(dict.fromkeys((*left, *right)))
    return _pair(left, right, out, tuple([sizes[axis] for axis in axes]), machine, tape)


@functools.lru_cache(maxsize=1 << 14)
def _pair(left: Axes, right: Axes, out: Axes, extents: tuple[int, ...], machine: Machine, tape: bool) -> Pairing:
    sizes = dict(zip(dict.fromkeys((*left, *right)), extents, strict=True))
    flops, volumes = step_flops(left, right, sizes), [_BYTES * volume(t, sizes) for t in (left, right, out)]
    of = ({*left} & {*right} & {*out}, {*left} - {*right}, {*right} - {*left}, {*left} - {*out})
    atoms, codes = fuse(([left], [right], [out]), sizes)
    a, b, c = (code[order] for code, order in zip(codes, (left, right, out), strict=True))
    one_batch = any(sizes[axis] == 1 for axis in of[0])
    prices = Prices(a, b, c, {atom: volume(axes, sizes) for atom, axes in atoms.items()}, machine, whole=one_batch, tape=tape)
    form, kind, seconds = prices.cheapest(a, b, c)
    if form is None:
        h, m, n = (tuple(axis for axis in out if axis in group) for group in of[:3])
        if kind == "multiply":
            return Pairing(kind, h, m, n, (), "all", False, "native", False, False, flops, sum(volumes), 0, seconds)
        k = tuple(axis for axis in left if axis in of[3])
        large, other = (left, right) if volumes[0] >= volumes[1] else (right, left)
        whole = tuple(_spread(large, other))
        native = same_memory(tuple(axis for axis in whole if axis in out), out, sizes)
        return Pairing(kind, h, m, n, k, "all", False, "native" if native else "copy", False, False, flops, sum(volumes), 0, seconds, whole)
    ones = [tuple(axis for axis in sizes if sizes[axis] == 1 and axis in group) for group in of]
    parts = (form.batch, form.left, form.right, form.contracted)
    h, m, n, k = (tuple(axis for atom in part for axis in atoms[atom]) + one for part, one in zip(parts, ones, strict=True))
    copied = sum(size for size, copy in zip(volumes, (form.copy_left, form.copy_right, form.out == "copy"), strict=True) if copy)
    moved = sum(volumes) + 2 * copied
    return Pairing(kind, h, m, n, k, form.batch_on, form.swap, form.out, form.copy_left, form.copy_right, flops, moved, copied, seconds)


def _spread(large: Sequence[str], other: Sequence[str]) -> list[str]:
    """The axes, or atoms, of an elementwise product: the order of the larger operand, behind what only the other one has."""
    return [*(axis for axis in other if axis not in large), *large]


def turning(source: Axes, target: Axes, sizes: Mapping[str, int], machine: Machine) -> float:
    """Seconds of copying a tensor from one memory order into another."""
    atoms, (codes,) = fuse([(source, target)], sizes)
    a, b = codes[source], codes[target]
    if a == b:
        return 0.0
    length, apart = (math.prod([volume(atoms[atom], sizes) for atom in part]) for part in move(a, b))
    return machine.reorder(_BYTES * volume(source, sizes), length, apart)


class Prices:
    """Seconds of one contraction for any memory orders of its three tensors, all written in the same atoms (see tn.forms).

    Args:
        left, right, out: an order of each. extent: of every atom.
        whole: only forms with all of H as the batch. tape: see `pair`.
    """

    def __init__(self, left: str, right: str, out: str, extent: Mapping[str, int], machine: Machine, *, whole: bool, tape: bool = False):
        self.extent, self.machine, self.whole, self.tape = extent, machine, whole, tape
        self.extents = tuple([self._product(group) for group in groups(left, right, out)])
        h, m, n, k = self.extents
        self.sizes = (_BYTES * h * m * k, _BYTES * h * n * k, _BYTES * h * m * n)
        self.streams = [machine.traffic(size) for size in self.sizes]
        self.fresh = machine.traffic(self.sizes[2], new=True) - self.streams[2]
        size = _BYTES * h * m * n * k  # of an elementwise product, before its sum
        self.elementwise = 2 * machine.element + (self.sizes[0] + self.sizes[1] + 2 * size) / machine.multiply + sum(self.streams)
        self.elementwise += self.fresh + machine.traffic(size) + machine.traffic(size, new=True)
        self.contracts = not {*left} <= {*out}
        self._known: dict[tuple[str, str, str], float] = {}
        self._products: dict[tuple[bool, str, str], tuple[str, float]] = {}
        self._moves: dict[tuple[int, tuple[str, str]], float] = {}

    def seconds(self, left: str, right: str, out: str) -> float:
        """Seconds of the cheapest way."""
        found = self._known.get((left, right, out))
        if found is None:
            found = self._known[left, right, out] = self.cheapest(left, right, out)[2]
        return found

    def cheapest(self, left: str, right: str, out: str) -> tuple[Form | None, str, float]:
        """(form, kind, seconds) of the cheapest way; no form for elementwise products."""
        if not self.contracts:
            return None, "multiply", self._multiply(left, right, out)
        if self.extents[:3] == (1, 1, 1):
            return None, "dot", self._dot(left, right, out)
        best: tuple[Form | None, str, float] = (None, "dot", math.inf)
        for form in forms(left, right, out, self.tape, self.whole):
            kind, seconds = self._price(form)
            seconds += self.fresh
            if seconds < best[2]:
                best = form, kind, seconds
        if self.elementwise < best[2]:
            seconds = self._dot(left, right, out)
            best = (None, "dot", seconds) if seconds < best[2] else best
        return best

    def _price(self, form: Form) -> tuple[str, float]:
        """(kind, seconds) of a form: arithmetic, and what lies out of cache (`streams`: seconds of reading or writing each tensor once)."""
        if form.batch_on == "all":
            key = (form.swap, form.reads, form.out)
            if key not in self._products:
                self._products[key] = self._product_seconds(form, *self.extents)
            kind, seconds = self._products[key]
        else:
            extents = [self._product(part) for part in (form.batch, form.left, form.right, form.contracted)]
            kind, seconds = self._product_seconds(form, *extents)
        seconds += self.machine.view * form.views
        for stream, scattered in zip(self.streams, form.scattered, strict=True):
            seconds += stream * _SCATTER if scattered else stream
        for which, parts in enumerate(form.moves):
            if parts is not None:
                seconds += self._move(which, parts)
        return kind, seconds

    def _product_seconds(self, form: Form, h: int, m: int, n: int, k: int) -> tuple[str, float]:
        machine = self.machine
        a, b = (n, m) if form.swap else (m, n)
        if h == 1:
            kind, seconds = "mm", machine.product(a, b, k, form.reads)
        else:
            kind, seconds = "bmm", machine.call + h * machine.item(a, b, k, form.reads, form.out == "strided")
        if form.batch_on == "operands":  # every item's product is written and read once more
            size = _BYTES * h * m * n
            seconds += machine.element + 2 * size / machine.multiply + machine.traffic(size) + machine.traffic(size, new=True)
        return kind, seconds

    def _move(self, which: int, parts: tuple[str, str]) -> float:
        """Seconds of copying one of the three tensors."""
        found = self._moves.get((which, parts))
        if found is None:
            found = self._moves[which, parts] = self.machine.reorder(self.sizes[which], *map(self._product, parts))
        return found

    def _multiply(self, left: str, right: str, out: str) -> float:
        """An elementwise product, written in the wanted order; an operand whose last axis lies elsewhere is read against the grain."""
        machine = self.machine
        seconds = machine.element
        for order, size in ((left, self.sizes[0]), (right, self.sizes[1])):
            along = not out or out[-1] not in order or order[-1] == out[-1]
            seconds += size / machine.multiply + (0.0 if along else size / _BYTES * machine.run / 4)
        size = self.sizes[2]
        return seconds + max(size / machine.multiply, machine.traffic(size)) + machine.traffic(size, new=True)

    def _dot(self, left: str, right: str, out: str) -> float:
        """An elementwise product in the order of the larger operand, as a new tensor, and its sum over K."""
        machine, (h, m, n, k) = self.machine, self.extents
        large, other = (left, right) if self.sizes[0] >= self.sizes[1] else (right, left)
        elements, seconds = h * m * n * k, self.elementwise
        together = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reversed(large), reversed(other), strict=False))
        alone = itertools.takewhile(lambda atom: atom not in other, reversed(large))
        run = max(self._product("".join(atom for atom, _ in together)), self._product("".join(alone)))  # elements before a stride changes
        seconds += elements * machine.run * min(1.0, _SHORT / 2 / run)
        ends = [*itertools.takewhile(lambda atom: (atom in out) == (large[-1] in out), reversed(large))]
        if self._product("".join(ends)) < _SHORT:  # of what is summed or kept, little lies together
            seconds += elements * machine.run
        if [atom for atom in _spread(large, other) if atom in out] != [*out]:
            seconds += machine.reorder(self.sizes[2])
        return seconds

    def _product(self, part: str) -> int:
        size = 1
        for atom in part:
            size *= self.extent[atom]
        return size


def ideal(h: Array, m: Array, n: Array, k: Array, machine: Machine) -> Array:
    """Seconds of contractions of these extents, each in its best layout: hardly any layout is faster. (A product without a batch can also
    run as a batch of parts of M or N; parts of one size stand for all of them.)"""
    sizes = [_BYTES * h * m * k, _BYTES * h * n * k, _BYTES * h * m * n]
    far = [_traffic(size, machine) for size in sizes]
    fresh = np.where(sizes[2] >= machine.paged, sizes[2] / machine.fresh, 0.0)
    mm, item = _either(m, n, k, machine)
    product = np.where(h > 1, np.minimum(h * mm, machine.call + h * item), mm)
    wide = np.flatnonzero((h == 1) & (np.maximum(m, n) > _PART))
    for whole, other in ((m[wide], n[wide]), (n[wide], m[wide])) if len(wide) else ():
        part = np.minimum(whole, _PART)
        _, item = _either(part, other, k[wide], machine)
        product[wide] = np.minimum(product[wide], machine.call + item * (whole / part))
    whole = _BYTES * h * m * n * k  # an elementwise product before its sum
    elementwise = 2 * machine.element + (sizes[0] + sizes[1] + 2 * whole) / machine.multiply
    elementwise += 2 * _traffic(whole, machine) + np.where(whole >= machine.paged, whole / machine.fresh, 0.0)
    product = np.minimum(product + 2 * machine.view, elementwise) + far[0] + far[1] + far[2]
    multiply = machine.element + (sizes[0] + sizes[1]) / machine.multiply + np.maximum(sizes[2] / machine.multiply, far[2])
    return fresh + np.where(k == 1, multiply + far[2], product)


def _traffic(size: Array, machine: Machine) -> Array:
    """`Machine.traffic` of many tensors."""
    return np.maximum(size - machine.near, 0) / machine.far


def _either(m: Array, n: Array, k: Array, machine: Machine) -> tuple[Array, Array]:
    """`Machine.fastest` of products taken in either direction."""
    both = machine.fastest(*(np.concatenate(pair) for pair in ((m, n), (n, m), (k, k))))
    mm, item = (np.minimum(t[: len(m)], t[len(m) :]) for t in both)
    return mm, item
