"""Counting: a step costs 2 × the product of its axis sizes, elementwise products included (DESIGN, "Counting")."""

import math
from collections.abc import Iterable, Mapping


def volume(axes: Iterable[str], sizes: Mapping[str, int]) -> int:
    """Product of the sizes of axes; each axis counts as often as it is given."""
    return math.prod(map(sizes.__getitem__, axes))


def step_flops(left: Iterable[str], right: Iterable[str], sizes: Mapping[str, int]) -> int:
    """FLOPs of contracting two tensors: 2 × the product of every axis on either."""
    return 2 * volume({*left, *right}, sizes)


def contraction_flops(left: Iterable[str], right: Iterable[str], out: Iterable[str], sizes: Mapping[str, int]) -> int:
    """FLOPs of one pairwise step that really contracts; 0 for an elementwise or outer product, which no matrix unit runs."""
    summed = {axis for axis in (set(left) & set(right)) - set(out) if sizes[axis] != 1}
    return step_flops(left, right, sizes) if summed else 0
