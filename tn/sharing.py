"""Values of a plan that are equal up to the names of their axes: they are computed once.

Squared attention needs its scores twice, a quadratic form its projections, several outputs their common start. A contraction tree
makes each of them again; two of its values are *alike* when their subtrees contract the same tensors in the same way.
"""

from collections.abc import Mapping, Sequence

from tn.order import Axes, Path
from tn.spec import ROWS, Term


def alike(
    terms: Sequence[Term], leaves: Sequence[Axes], path: Path, outs: Sequence[Axes], sizes: Mapping[str, int]
) -> dict[int, tuple[int, dict[str, str]]]:
    """Values that equal an earlier one.

    Args:
        terms, leaves: the operands, and the axes they bring to the steps. path: pairs of SSA values. outs: axes of every step's result.
        sizes: the sizes that hold at every call.

    Returns:
        value → (the first value it equals, that one's axes → its own axes).
    """
    numbers: dict[tuple, int] = {}
    forms = [_leaf(term, axes, sizes) for term, axes in zip(terms, leaves, strict=True)]
    known = [(numbers.setdefault(key, len(numbers)), axes) for key, axes in forms]
    for (left, right), out in zip(path, outs, strict=True):
        key, axes = min(_step(known[a], known[b], out) for a, b in ((left, right), (right, left)))
        known.append((numbers.setdefault(key, len(numbers)), axes))
    first: dict[int, int] = {}
    found = {}
    for value, (number, axes) in enumerate(known):
        original = first.setdefault(number, value)
        if original != value:
            found[value] = (original, dict(zip(known[original][1], axes, strict=True)))
    return found


def _leaf(term: Term, axes: Axes, sizes: Mapping[str, int]) -> tuple[tuple, Axes]:
    """(what makes an operand the same, its axes in an order that does not depend on their names)."""
    places = {axis: place for place, axis in enumerate(dict.fromkeys(term.axes))}
    pattern = tuple(tuple(ROWS if axis == ROWS else places[axis] for axis in dim) for dim in term.dims)
    grouped = tuple(sizes.get(axis, axis) for dim in term.dims if len(dim) > 1 for axis in dim)
    return ("operand", term.name, pattern, grouped, tuple(places[axis] for axis in axes)), axes


def _step(left: tuple[int, Axes], right: tuple[int, Axes], out: Axes) -> tuple[tuple, Axes]:
    """The same for a contraction of two values."""
    places = {axis: place for place, axis in enumerate(dict.fromkeys((*left[1], *right[1])))}
    kept = tuple(axis for axis in places if axis in out)
    wiring = tuple(places[axis] for axis in right[1]), tuple(places[axis] for axis in kept)
    return ("step", left[0], right[0], *wiring), kept
