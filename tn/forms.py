"""The ways to run one pairwise contraction as matrix products of views. They depend on the pattern of memory orders, not on sizes.

A pattern is three strings, the memory orders of A, B and C in C = A·B, one character an *atom*: axes that stay together are one atom, axes
of size one are left out. Its atoms form a batch H (on A, B and C), left M (A and C), right N (B and C) and contracted K (A and B).

The contraction is one batched matrix product without a copy iff every group is a run of adjacent atoms, in the same order, in each
tensor that has it, and no tensor has its unit stride in H. The condition is symmetric in A, B and C, so a copy-free forward step is
copy-free backward. Where there is no H, three more forms are tried: some atoms of M, or of N, as a batch that the other operand does not
have (stride 0), or some atoms of K as a batch that is summed afterwards.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

Axes = tuple[str, ...]


class Form(NamedTuple):
    """One way to run a pattern; the groups hold atoms.

    Attributes:
        batch, left, right, contracted: H, M, N and K, each in the order in which it is flattened.
        batch_on: "all" tensors; "left" or "right" operand only, and the result; "operands", both of them and not the result.
        swap: the product is taken as (N, K) × (K, M). out: "native", "strided" or "copy" (see tn.pairing.Pairing).
        copy_left, copy_right: operands that must be copied first.
        views: made for it. scattered: tensors of which an item of the batch is not one block of memory.
        moves: see `move`, for each tensor that is copied. reads: how the product's own operands lie in memory (see tn.machine).
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


def fuse(orders: Sequence[Sequence[Axes]], sizes: Mapping[str, int]) -> tuple[dict[str, Axes], list[dict[Axes, str]]]:
    """Write the orders of several tensors, any number of orders each, in atoms.

    Returns:
        (atom → its axes, for each tensor: order → the order in atoms). Axes that follow each other in every order that has them are one.
    """
    count: dict[str, int] = {}
    follows: dict[tuple[str, str], int] = {}
    wide = {order: [axis for axis in order if sizes[axis] != 1] for several in orders for order in several}
    for several in orders:
        for order in several:
            for axis in wide[order]:
                count[axis] = count.get(axis, 0) + 1
            for both in itertools.pairwise(wide[order]):
                follows[both] = follows.get(both, 0) + 1
    after = {a: b for (a, b), times in follows.items() if times == count[a] == count[b]}
    inner = set(after.values())
    letters: dict[str, str] = {}
    atoms: dict[str, Axes] = {}
    for axis in count:
        if axis not in inner:
            letters[axis] = letter = chr(_FIRST + len(letters))
            run = [axis]
            while run[-1] in after:
                run.append(after[run[-1]])
            atoms[letter] = tuple(run)
    return atoms, [{order: "".join([letters[axis] for axis in wide[order] if axis in letters]) for order in several} for several in orders]


_FIRST = 0x61  # the first atom; there can be more than letters in the alphabet, and they are never shown


def groups(left: str, right: str, out: str) -> tuple[str, str, str, str]:
    """H, M, N and K of a pattern, the atoms of each in the order in which the first tensor has them."""
    batch = "".join([atom for atom in left if atom in right and atom in out])
    rows = "".join([atom for atom in left if atom not in right])
    summed = "".join([atom for atom in left if atom not in out])
    return batch, rows, "".join([atom for atom in right if atom not in left]), summed


@functools.lru_cache(maxsize=1 << 15)
def forms(left: str, right: str, out: str, tape: bool, whole: bool) -> tuple[Form, ...]:
    """Every way to run a pattern that could be the cheapest; one of the ways that differ in nothing that costs time.

    Args:
        tape: autograd will differentiate the product itself; then no operand is broadcast. whole: only with all of H as the batch.
    """
    sources = ((left, right, out), (left, out), (right, out), (left, right))
    choices = [_sequences(group, orders) for group, orders in zip(groups(left, right, out), sources, strict=True)]
    copied: dict[tuple[str, ...], tuple[bool, bool]] = {}
    for parts in itertools.product(*choices):
        h, m, n, k = parts
        copied[parts] = not _viewable(left, h, m, k), not _viewable(right, h, n, k)
    least = min([sum(copies) for copies in copied.values()])
    found = [form for parts, copies in copied.items() if sum(copies) == least for form in _whole((left, right, out), parts, copies)]
    perfect = not least and any(form.out == "native" for form in found)
    if not (perfect or whole or choices[0] != [""]):
        found += _partial(left, right, out, choices[1:], tape, copies=least > 0)
    kept: dict[tuple, Form] = {}
    for form in sorted(found, key=_views):
        batch = form.batch if form.batch_on != "all" else ""
        alike = (batch, form.batch_on, form.swap, form.out, form.copy_left, form.copy_right, form.scattered, form.moves, form.reads)
        kept.setdefault(alike, form)
    return tuple(kept.values())


def _views(form: Form) -> int:
    return form.views


def _sequences(group: str, orders: Sequence[str]) -> list[str]:
    """The different sequences that a group's atoms have in some orders."""
    if len(group) < 2:
        return [group]
    return list(dict.fromkeys("".join([atom for atom in order if atom in group]) for order in orders))


def _whole(orders: tuple[str, str, str], parts: tuple[str, ...], copies: tuple[bool, bool]) -> Iterator[Form]:
    """The product with all of H as its batch, written in place or copied there."""
    (left, right, out), (batch, rows, columns, summed), (copy_left, copy_right) = orders, parts, copies
    scattered_left, scattered_right = _scattered(left, batch), _scattered(right, batch)
    for swap, placed in _placements(out, batch, rows, columns):
        if swap:
            outer, inner, first, copy_first, second, copy_second = columns, rows, right, copy_right, left, copy_left
        else:
            outer, inner, first, copy_first, second, copy_second = rows, columns, left, copy_left, right, copy_right
        as_first, as_second = batch + outer + summed, batch + summed + inner
        views = 2 + (first != as_first) + (second != as_second)
        scattered = scattered_left, scattered_right, placed == "strided" and _scattered(out, batch)
        move_first = move(first, as_first) if copy_first else None
        move_second = move(second, as_second) if copy_second else None
        move_out = move(batch + outer + inner, out) if placed == "copy" else None
        moves = (move_second, move_first, move_out) if swap else (move_first, move_second, move_out)
        reads = _read(first, summed, outer, copy_first) + _read(second, inner, summed, copy_second)
        yield Form(batch, rows, columns, summed, "all", swap, placed, copy_left, copy_right, views, scattered, moves, reads)


def _partial(left: str, right: str, out: str, choices: Sequence[Sequence[str]], tape: bool, copies: bool) -> Iterator[Form]:
    """Products with some atoms of one group as a batch that one of the three tensors does not have. That one must be a matrix as it is,
    which decides the sequences of the two other groups, or, an operand, is copied into one.

    Args:
        choices: the sequences that M, N and K have. copies: whether such a copy is worth a try.
    """
    orders = (left, right, out)
    for group, batch_on, owners, other in ((0, "left", (left, out), 1), (1, "right", (right, out), 0), (2, "operands", (left, right), 2)):
        if len(choices[group][0]) < 2 or (tape and other != 2):
            continue
        own = [_only(choices[place][0], orders[other]) for place in range(3)]
        ways = [(own, False)] if all(part in orders[other] for part in own) else []
        if copies and other != 2:  # the sequences that the two others have
            ways.append(([_only(choices[place][0], orders[_OWNER[other, place]]) for place in range(3)], True))
        for (parts, copy), sequence in itertools.product(ways, choices[group]):
            for batch, rest in _cuts(sequence, owners):
                three = [*parts]
                three[group] = rest
                m, n, k = three
                on_left, on_right, on_out = batch if other != 0 else "", batch if other != 1 else "", batch if other != 2 else ""
                copy_left, copy_right = copy and other == 0, copy and other == 1
                if not ((copy_left or _viewable(left, on_left, m, k)) and (copy_right or _viewable(right, on_right, n, k))):
                    continue
                scattered = _scattered(left, on_left), _scattered(right, on_right), _scattered(out, on_out)
                for swap, placed in _placements(out, on_out, m, n):
                    if placed == "copy":
                        continue
                    move_left = move(left, k + m if swap else m + k) if copy_left else None
                    move_right = move(right, n + k if swap else k + n) if copy_right else None
                    if swap:
                        reads = _read(right, k, n, copy_right) + _read(left, m, k, copy_left)
                    else:
                        reads = _read(left, k, m, copy_left) + _read(right, n, k, copy_right)
                    moves = (move_left, move_right, None)
                    yield Form(batch, m, n, k, batch_on, swap, placed, copy_left, copy_right, 5, scattered, moves, reads)


_OWNER = {(1, 0): 0, (1, 1): 2, (1, 2): 0, (0, 0): 2, (0, 1): 1, (0, 2): 1}  # (tensor copied, group) → tensor whose sequence it gets


def _only(group: str, order: str) -> str:
    """A group's atoms in the sequence that a tensor has them."""
    return "".join([atom for atom in order if atom in group]) if len(group) > 1 else group


def move(source: str, target: str) -> tuple[str, str]:
    """What decides how long a copy from one order into another takes: the atoms that both end with, a run, and those between runs that
    were neighbours, in the target."""
    length = 0
    while length < len(source) and source[-1 - length] == target[-1 - length]:
        length += 1
    if length == len(source):
        return source, ""
    return source[len(source) - length :], target[target.index(source[-1 - length]) + 1 :]


def _scattered(order: str, batch: str) -> bool:
    return bool(batch) and not order.startswith(batch)


def _cuts(group: str, owners: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """(batch, rest): every way to take atoms off the front or the back of a group, neither part empty, where they part in some tensor."""
    for i in range(1, len(group)):
        if group[i - 1 : i + 1] not in owners[0] or group[i - 1 : i + 1] not in owners[1]:
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
        if len(native) == 1 and not batch:  # a product with few columns is slow, with few rows fast
            yield not native[0], "copy"
        return
    if _viewable(out, batch, rows, columns):
        yield out[-1] in rows, "strided"
    yield from ((False, "copy"), (True, "copy"))
