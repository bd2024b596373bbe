"""Splitting a size into two factors, padding it where it has no reasonable split."""

import functools
import math

_SKEW = 4  # a size whose best split is more uneven than this is padded


@functools.lru_cache(maxsize=4096)
def splits(size: int) -> tuple[tuple[int, int], ...]:
    """Every (slow, fast) with slow × fast = size, slow ascending.

    >>> splits(6)
    ((1, 6), (2, 3), (3, 2), (6, 1))
    """
    low = [d for d in range(1, math.isqrt(size) + 1) if size % d == 0]
    divisors = sorted({*low, *(size // d for d in low)})
    return tuple((d, size // d) for d in divisors)


def even(size: int) -> tuple[int, int]:
    """The most even split, smaller factor first.

    >>> even(768)
    (24, 32)
    """
    low = max(slow for slow, fast in splits(size) if slow <= fast)
    return low, size // low


def padded(size: int) -> int:
    """The smallest size ≥ the given one with a split no more uneven than 1 : 4.

    >>> padded(768), padded(431), padded(50257)
    (768, 432, 50260)
    """
    while True:
        low, high = even(size)
        if high <= _SKEW * low:
            return size
        size += 1
