"""Splitting sizes into factors, padding a size that has no reasonable split, and choosing among the splits."""

import functools
import itertools
import math
from collections.abc import Callable

Split = tuple[int, ...]

_SKEW = 4  # a size whose best split is more uneven than this is padded; splits into three and more are searched up to it


@functools.lru_cache(maxsize=4096)
def splits(size: int, parts: int = 2) -> tuple[Split, ...]:
    """Every ordered split of a size into factors, first factors ascending.

    >>> splits(6)
    ((1, 6), (2, 3), (3, 2), (6, 1))
    """
    if parts == 1:
        return ((size,),)
    low = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    divisors = sorted({*low, *(size // d for d in low)})
    return tuple((d, *rest) for d in divisors for rest in splits(size // d, parts - 1))


@functools.lru_cache(maxsize=4096)
def even(size: int, parts: int = 2) -> Split:
    """The most even split, smallest factor first.

    >>> even(768), even(1024, 3)
    ((24, 32), (8, 8, 16))
    """
    return min(_ascending(size, parts, 1), key=lambda split: (split[-1] / split[0], split[-1]))


def _ascending(size: int, parts: int, least: int) -> list[Split]:
    """Splits whose factors do not descend."""
    if parts == 1:
        return [(size,)] if size >= least else []
    top = math.floor(size ** (1 / parts) + 1e-9)
    return [(d, *rest) for d in range(least, top + 1) if size % d == 0 for rest in _ascending(size // d, parts - 1, d)]


def padded(size: int, parts: int = 2) -> int:
    """The smallest size ≥ the given one with a split no more uneven than 1 : 4.

    >>> padded(768), padded(431), padded(50257)
    (768, 432, 50260)
    """
    while True:
        split = even(size, parts)
        if split[-1] <= _SKEW * split[0]:
            return size
        size += 1


def greedy(size: int, parts: int = 2) -> Split:
    """The split of the paper's code (arXiv:2406.06248): primes ascending, each into the smallest factor so far; ascending.

    >>> greedy(768), greedy(7)
    ((16, 48), (1, 7))
    """
    bins = [1] * parts
    prime = 2
    while size > 1:
        while size % prime:
            prime = prime + 1 if prime * prime <= size else size
        bins[bins.index(min(bins))] *= prime
        size //= prime
    return tuple(sorted(bins))


def cheapest(
    ins: Split, outs: Split, parameters: Callable[[Split, Split], int], widths: Callable[[Split, Split], Split]
) -> tuple[Split, Split]:
    """The splits of the same two sizes with the fewest parameters among those whose intermediates are nowhere narrower than here.

    Args:
        ins, outs: the most even splits, in the order the family wants them. parameters, widths: of a layer with given splits; widths are
            those of its intermediates.
    """
    least = widths(ins, outs)
    found = [(ins, outs)]
    for pair in itertools.product(_near(ins), _near(outs)):
        if all(width >= floor for width, floor in zip(widths(*pair), least, strict=True)):
            found.append(pair)
    return min(found, key=lambda pair: (parameters(*pair), sum(widths(*pair)), pair != (ins, outs), _skew(*pair)))


def _near(split: Split) -> list[Split]:
    """All splits of the product into two, into more those that are at most 4 times as uneven."""
    skew = _SKEW * max(split) / min(split) if len(split) > 2 else math.inf
    return [other for other in splits(math.prod(split), len(split)) if max(other) <= skew * min(other)]


def _skew(ins: Split, outs: Split) -> float:
    return max(ins) / min(ins) + max(outs) / min(outs)


def blocks(size_in: int, size_out: int, most: int) -> int:
    """The largest number of blocks ≤ `most` of which none is padding alone, on either side.

    >>> blocks(8, 5, 4)
    3
    """
    return next(count for count in range(most, 0, -1) if full_blocks(size_in, count) and full_blocks(size_out, count))


def full_blocks(size: int, count: int) -> bool:
    """Whether each of `count` equal blocks holds a part of `size`."""
    return (count - 1) * -(-size // count) < size
