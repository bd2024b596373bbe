"""One pairwise contraction as matrix products of views: which groups of axes are flattened, what is copied, and what it costs.

A value is a contiguous buffer with an axis order. A contraction C = A·B splits its axes into batch H (on A, B and C), left M
(A and C), right N (B and C) and contracted K (A and B). It is one batched matrix product without a copy iff every group is a run of
adjacent axes, in the same order, in each tensor that has it, and no tensor has its unit stride in H. The condition is
symmetric in A, B and C, so a copy-free forward step is copy-free backward.

Where there is no H, three more forms are tried: some axes of M, or of N, as a batch that the other operand does not have (stride 0),
or some axes of K as a batch that is summed afterwards.

The ways to run a step depend on the pattern of its orders alone, not on sizes: `_forms` lists them once for a pattern, `pair` prices them.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tn.cost import step_flops, volume
from tn.machine import READS, Machine
from tn.order import Axes

_BYTES = 4
_SCATTER = 2.5  # times as long takes what lies out of cache when an item of a batch is not one block of memory (two CPU cores)


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


@dataclass(frozen=True, slots=True)
class _Form:
    """One way to run a pattern; the groups hold atoms.

    Attributes:
        views: made for it. scattered: tensors of which an item of the batch is not one block of memory.
        moves: see `_move`, for each tensor that is copied. reads: how the product's own operands lie in memory (see tn.machine).
    """

    batch: str
    left: str
    right: str
    contracted: str
    batch_on: str
    swap: bool
    out: str
    copy_left: bool
    copy_right: bool
    views: int
    scattered: tuple[bool, bool, bool]
    moves: tuple[tuple[str, str] | None, ...]
    reads: str


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
    return _pair(left, right, out, tuple([sizes[axis] for axis in axes]), machine, tape)


def ideal(left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int], machine: Machine) -> float:
    """Seconds of a step in its best layout: no layout is faster."""
    batch, rows, columns, summed = _groups(left, right, out)
    return _ideal(*(volume(group, sizes) for group in (batch, rows, columns, summed)), machine)


@functools.lru_cache(maxsize=1 << 16)
def _pair(left: Axes, right: Axes, out: Axes, extents: tuple[int, ...], machine: Machine, tape: bool) -> Pairing:
    sizes = dict(zip(dict.fromkeys((*left, *right)), extents, strict=True))
    groups = [set(group) for group in _groups(left, right, out)]
    flops = step_flops(left, right, sizes)
    if all(sizes[axis] == 1 for axis in groups[3]):
        batch, rows, columns = (tuple(axis for axis in out if axis in group) for group in groups[:3])
        moved = _BYTES * sum(volume(t, sizes) for t in (left, right, out))
        seconds = _multiply_seconds(left, right, out, sizes, machine)
        return Pairing("multiply", batch, rows, columns, (), "all", False, "native", False, False, flops, moved, 0, seconds)
    atoms, patterns = _fuse((left, right, out), groups, sizes)
    extent = {letter: volume(axes, sizes) for letter, axes in atoms.items()}
    volumes = [_BYTES * volume(t, sizes) for t in (left, right, out)]
    ones = [tuple(axis for axis in sizes if sizes[axis] == 1 and axis in group) for group in groups]
    forms = [form for form in _forms(*patterns, tape) if form.batch_on == "all" or not ones[0]]
    streams = [machine.traffic(size) for size in volumes]
    fresh = machine.traffic(volumes[2], new=True) - streams[2]
    form, kind, seconds = min(((form, *_price(form, extent, volumes, streams, machine)) for form in forms), key=_third)
    parts = (form.batch, form.left, form.right, form.contracted)
    h, m, n, k = (_axes(part, atoms) + one for part, one in zip(parts, ones, strict=True))
    copies = (form.copy_left, form.copy_right, form.out == "copy")
    seconds += fresh
    copied = sum(size for size, copy in zip(volumes, copies, strict=True) if copy)
    moved = sum(volumes) + 2 * copied
    return Pairing(kind, h, m, n, k, form.batch_on, form.swap, form.out, form.copy_left, form.copy_right, flops, moved, copied, seconds)


def _groups(left: Axes, right: Axes, out: Axes) -> tuple[Axes, Axes, Axes, Axes]:
    """Batch, left, right and contracted axes."""
    in_right, in_out, in_left = set(right), set(out), set(left)
    batch = tuple([axis for axis in left if axis in in_right and axis in in_out])
    rows = tuple([axis for axis in left if axis in in_out and axis not in in_right])
    summed = tuple([axis for axis in left if axis in in_right and axis not in in_out])
    return batch, rows, tuple([axis for axis in right if axis not in in_left]), summed


def _fuse(orders: tuple[Axes, Axes, Axes], groups: list[set[str]], sizes: Mapping[str, int]) -> tuple[dict[str, Axes], list[str]]:
    """Merge axes that follow each other wherever they occur into atoms, one letter each, without axes of size one.

    Returns:
        (letter → axes, the orders of the three tensors in letters). Letters say the group: h, m, n and k with a running number
        make one character.
    """
    wide = [[axis for axis in order if sizes[axis] != 1] for order in orders]
    count: dict[str, int] = {}
    follows: dict[tuple[str, str], int] = {}
    for order in wide:
        for axis in order:
            count[axis] = count.get(axis, 0) + 1
        for both in itertools.pairwise(order):
            follows[both] = follows.get(both, 0) + 1
    after = {a: b for (a, b), times in follows.items() if times == count[a] == count[b]}
    inner = set(after.values())
    used = [0, 0, 0, 0]
    letters: dict[str, str] = {}
    atoms: dict[str, Axes] = {}
    for axis in count:
        if axis in inner:
            continue
        which = next(i for i, group in enumerate(groups) if axis in group)
        letter = chr(_FIRST[which] + used[which])
        used[which] += 1
        run = [axis]
        while run[-1] in after:
            run.append(after[run[-1]])
        letters[axis] = letter
        atoms[letter] = tuple(run)
    return atoms, ["".join([letters[axis] for axis in order if axis in letters]) for order in wide]


_FIRST = (0x1000, 0x2000, 0x3000, 0x4000)  # first letter of the groups H, M, N and K; letters are never shown


def _axes(part: str, atoms: Mapping[str, Axes]) -> Axes:
    return tuple([axis for letter in part for axis in atoms[letter]])


def _of(group: int, order: str) -> str:
    return "".join([letter for letter in order if ord(letter) >> 12 == group + 1])


@functools.lru_cache(maxsize=1 << 14)
def _forms(left: str, right: str, out: str, tape: bool) -> tuple[_Form, ...]:
    """Every way to run a pattern that could be the cheapest; one of the ways that differ in nothing that costs time."""
    sources = ((left, right, out), (left, out), (right, out), (left, right))
    choices = [dict.fromkeys(_of(group, order) for order in orders) for group, orders in enumerate(sources)]
    found: list[_Form] = []
    for h, m, n, k in itertools.product(*choices):
        found += _whole(left, right, out, h, m, n, k)
        found += () if h else _partial(left, right, out, m, n, k, tape)
    least = min(form.copy_left + form.copy_right for form in found if form.batch_on == "all")
    kept: dict[tuple, _Form] = {}
    for form in sorted(found, key=lambda form: form.views):
        batch = form.batch if form.batch_on != "all" else ""
        alike = (batch, form.batch_on, form.swap, form.out, form.copy_left, form.copy_right, form.scattered, form.moves, form.reads)
        if form.copy_left + form.copy_right <= least:
            kept.setdefault(alike, form)
    return tuple(kept.values())


def _whole(left: str, right: str, out: str, batch: str, rows: str, columns: str, summed: str) -> Iterator[_Form]:
    """The product with all of H as its batch, written in place or copied there."""
    copy_left = not _viewable(left, batch, rows, summed)
    copy_right = not _viewable(right, batch, columns, summed)
    for swap, placed in _placements(out, batch, rows, columns):
        outer, inner = (columns, rows) if swap else (rows, columns)
        (first, copy_first), (second, copy_second) = ((left, copy_left), (right, copy_right))[:: -1 if swap else 1]
        views = 2 + (first != batch + outer + summed) + (second != batch + summed + inner)
        scattered = _scattered(left, batch), _scattered(right, batch), placed == "strided" and _scattered(out, batch)
        move_first = _move(first, batch + outer + summed) if copy_first else None
        move_second = _move(second, batch + summed + inner) if copy_second else None
        move_out = _move(batch + outer + inner, out) if placed == "copy" else None
        moves = (move_second, move_first, move_out) if swap else (move_first, move_second, move_out)
        reads = _read(first, summed, outer, copy_first) + _read(second, inner, summed, copy_second)
        yield _Form(batch, rows, columns, summed, "all", swap, placed, copy_left, copy_right, views, scattered, moves, reads)


def _partial(left: str, right: str, out: str, rows: str, columns: str, summed: str, tape: bool) -> Iterator[_Form]:
    """Copy-free products with some axes of one group as a batch that one of the three tensors does not have."""
    for group, batch_on in ((rows, "left"), (columns, "right"), (summed, "operands")):
        if tape and batch_on != "operands":
            continue
        for batch, rest in _cuts(group):
            m, n, k = (rest if g is group else g for g in (rows, columns, summed))
            on_left, on_right, on_out = (
                batch if batch_on in where else "" for where in (("left", "operands"), ("right", "operands"), ("left", "right"))
            )
            if not (_viewable(left, on_left, m, k) and _viewable(right, on_right, n, k)):
                continue
            for swap, placed in _placements(out, on_out, m, n):
                if placed == "copy":
                    continue
                (first, outer), (second, inner) = ((left, m), (right, n))[:: -1 if swap else 1]
                reads = _read(first, k, outer, False) + _read(second, inner, k, False)
                scattered = _scattered(left, on_left), _scattered(right, on_right), _scattered(out, on_out)
                yield _Form(batch, m, n, k, batch_on, swap, placed, False, False, 5, scattered, (None, None, None), reads)


def _move(source: str, target: str) -> tuple[str, str]:
    """(the longest common end of two orders, the atoms that lie behind the target's last atom in the source)."""
    length = 0
    while length < len(source) and source[-1 - length] == target[-1 - length]:
        length += 1
    return source[len(source) - length :], source[source.index(target[-1]) + 1 :] if target else ""


def _scattered(order: str, batch: str) -> bool:
    return bool(batch) and not order.startswith(batch)


def _cuts(group: str) -> Iterator[tuple[str, str]]:
    """(batch, rest): every way to take atoms off the front or the back of a group, neither part empty."""
    for i in range(1, len(group)):
        yield group[:i], group[i:]
        yield group[i:], group[:i]


def _viewable(order: str, batch: str, rows: str, columns: str) -> bool:
    """Whether a buffer can be read as a batch of matrices: the batch group first, then two groups in any order."""
    if not (batch in order and rows in order and columns in order):  # each group is a run
        return False
    return not order or order[-1] not in batch or not (rows or columns)


def _read(order: str, last: str, first: str, copied: bool) -> str:
    """ "N" if the matrix has its last extent adjacent in memory, "T" if its first. Copies are made the first way."""
    return "N" if copied or not order or order[-1] in last or not first else "T"


def _placements(out: str, batch: str, rows: str, columns: str) -> Iterator[tuple[bool, str]]:
    """(swap, "native" | "strided" | "copy") for a result wanted in the order `out`."""
    native = [swap for swap, order in ((False, batch + rows + columns), (True, batch + columns + rows)) if order == out]
    if native:
        yield from ((swap, "native") for swap in native)
        return
    if _viewable(out, batch, rows, columns):
        yield out[-1] in rows, "strided"
    yield from ((False, "copy"), (True, "copy"))


def _third(entry: tuple[_Form, str, float]) -> float:
    return entry[2]


def _price(form: _Form, extent: Mapping[str, int], volumes: list[int], streams: list[float], machine: Machine) -> tuple[str, float]:
    """(kind, seconds) of a form: arithmetic, and what lies out of cache (`streams`: seconds of reading or writing each tensor once)."""
    h, m, n, k = (_product(part, extent) for part in (form.batch, form.left, form.right, form.contracted))
    a, b = (n, m) if form.swap else (m, n)
    kind, seconds = "bmm", 0.0
    if h == 1:
        kind, seconds = "mm", machine.product(a, b, k, form.reads)
    else:
        seconds = machine.call + h * machine.item(a, b, k, form.reads, form.out == "strided")
    if m == n == 1 and form.batch_on == "all":
        elementwise = 2 * machine.element + (volumes[0] + volumes[1] + 2 * _BYTES * h * k) / machine.multiply
        if elementwise < seconds or h == 1:
            kind, seconds = "dot", elementwise
    seconds += machine.view * form.views
    for stream, scattered in zip(streams, form.scattered, strict=True):
        seconds += stream * (_SCATTER if scattered else 1.0)
    if form.batch_on == "operands":  # every item's product is written and read once more
        size = _BYTES * h * m * n
        seconds += machine.element + 2 * size / machine.multiply + machine.traffic(size) + machine.traffic(size, new=True)
    for size, move in zip(volumes, form.moves, strict=True):
        if move is not None:
            length, stride = (_product(part, extent) for part in move)
            seconds += machine.element + machine.reorder(size, size // _BYTES // max(length, 1), _BYTES * stride if length == 1 else None)
    return kind, seconds


def _product(part: str, extent: Mapping[str, int]) -> int:
    size = 1
    for letter in part:
        size *= extent[letter]
    return size


def _multiply_seconds(left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int], machine: Machine) -> float:
    """An elementwise product, written in the wanted order; an operand whose last axis lies elsewhere is read against the grain."""
    seconds = machine.element
    wide = [[axis for axis in order if sizes[axis] != 1] for order in (left, right, out)]
    last = wide[2][-1:]
    for order in wide[:2]:
        along = not last or last[0] not in order or order[-1:] == last
        elements = volume(order, sizes)
        seconds += _BYTES * elements / machine.multiply + (0.0 if along else elements * machine.run / 4)
    size = _BYTES * volume(out, sizes)
    return seconds + max(size / machine.multiply, machine.traffic(size)) + machine.traffic(size, new=True)


@functools.lru_cache(maxsize=1 << 16)
def _ideal(h: int, m: int, n: int, k: int, machine: Machine) -> float:
    """Seconds of the fastest way to run a step of these extents."""
    if k == 1:
        return machine.element + 2 * _BYTES * h * m * n / machine.multiply
    shapes = [(a, b, reads) for a, b in ((m, n), (n, m)) for reads in READS]
    fastest = min(machine.product(a, b, k, reads) for a, b, reads in shapes) * h
    items = machine.call + h * min(machine.item(a, b, k, reads) for a, b, reads in shapes)
    best = min(fastest, items) if h > 1 else fastest
    if m == n == 1:
        best = min(best, 2 * machine.element + 2 * _BYTES * h * k / machine.multiply)
    return best
