"""Meeting a budget: the largest layer of a family that costs at most a fraction of the dense one."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from tn.checks import positive
from tn.errors import StructureError, unknown
from tn.planner import DEFAULT_ROWS, plan
from tn.structures.factors import splits
from tn.structures.registry import ACTIVE, Built, Options, Structure, axes_of, get


def _seconds(built: Built) -> float:
    net = built.reference
    return plan(net, grad=net.names, rows=DEFAULT_ROWS * (built.active or 1)).seconds


_COSTS: dict[str, Callable[[Built], float]] = {
    "params": lambda built: built.parameters,
    "flops": lambda built: built.macs,
    "time": _seconds,
}


def cost(built: Built, match: str) -> float:
    """Parameters, multiply-adds a row, or predicted seconds of a training step of 1024 rows. Raises StructureError for another name."""
    if not isinstance(match, str) or match not in _COSTS:
        raise StructureError(unknown("match", match, _COSTS))
    return _COSTS[match](built)


def fit(family: Structure, d_in: int, d_out: int, options: Options, *, match: str | None = None, budget: float | None = None) -> Built:
    """The family at these sizes; with `match`, its largest member that costs at most `budget` × the dense layer.

    What is varied is the number of blocks where that is what the family varies, the rank otherwise; where rank 1 is too much, the factors,
    towards narrower intermediates.

    Raises:
        StructureError: an option that cannot be, a budget without match, or one that nothing meets: with the least that does.
    """
    if match is None:
        if budget is not None:
            raise StructureError(f"budget={budget} needs match: one of {', '.join(_COSTS)}")
        return family.build(d_in, d_out, options)
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
        raise StructureError(f"match={match!r} needs a budget, a positive fraction of the dense layer's, got {budget!r}")
    most = budget * cost(get("dense").build(d_in, d_out), match)
    if options.rank is not None:
        raise StructureError(f"match={match!r} chooses the rank: leave out rank={options.rank}")
    least = math.inf
    for built in _descending(family, d_in, d_out, options, lambda built: cost(built, match) <= most):
        if cost(built, match) <= most:
            return built
        least = min(least, cost(built, match))
    raise StructureError(
        f"{family.name} of {d_in} → {d_out} cannot do with {budget} of the dense layer's {match}; "
        f"the least tried takes {least / most * budget:.3g}"
    )


def matching_width(structure: str, width: int, *, match: str = "flops", multiple: int = 1, options: Options | None = None) -> int:
    """A width at which a square layer of a family costs what a dense one of `width` does, or little less.

    For comparing structured and dense models at equal cost.

    Args:
        match: "params", "flops" or "time". multiple: of what the width shall be, such as the number of heads. options: of the family.

    Raises:
        StructureError: where not even `multiple` is cheap enough.

    >>> matching_width("btt", 64, multiple=16)
    144
    """
    for what, value in (("width", width), ("multiple", multiple)):
        if not positive(value):
            raise StructureError(f"{what} is {value!r}, expected an integer ≥ 1")
    if not isinstance(options, Options | None):
        raise StructureError(f"options is {options!r}, expected tn.structures.Options")
    family = get(structure)
    most = cost(get("dense").build(width, width), match)

    def fits(count: int) -> bool:
        return cost(family.build(count * multiple, count * multiple, options), match) <= most

    if not fits(1):
        raise StructureError(f"a {structure} layer of width {multiple} costs more {match} than a dense one of {width}")
    low, high = 1, 2
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * multiple


def _descending(family: Structure, d_in: int, d_out: int, options: Options, fits: Callable[[Built], bool]) -> Iterator[Built]:
    """Members of the family, larger ones first; among ranks the largest that fits comes first, found by bisection."""
    if family.varies == "blocks" and options.blocks is None and options.factors is None:
        for count in range(1, min(d_in, d_out) + 1):
            try:
                yield family.build(d_in, d_out, dataclasses.replace(options, blocks=count))
            except StructureError:
                continue  # blocks that would be padding alone
        return
    if "rank" not in family.takes:
        yield family.build(d_in, d_out, options)
        return

    def at(rank: int) -> Built:
        return family.build(d_in, d_out, dataclasses.replace(options, rank=rank))

    low = 1 if family.gated is None else options.active if positive(options.active) else ACTIVE  # experts, where a rank is their number
    high = max(full_ranks(family, at(low)))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(at(middle)) else (low, middle - 1)
    smallest = at(low)
    yield smallest
    if "factors" in family.takes and options.factors is None and smallest.factors is not None:
        ins, outs = smallest.factors
        pairs = itertools.product(splits(smallest.d_in, len(ins)), splits(smallest.d_out, len(outs)))
        others = (family.build(d_in, d_out, Options(rank=low, factors=pair, active=options.active)) for pair in pairs)
        yield from sorted(others, key=lambda built: (-_width(built), built.macs))


def full_ranks(family: Structure, built: Built) -> tuple[int, ...]:
    """For each rank axis of a family at some sizes, the rank from which nothing is gained."""
    ins, outs, _ = axes_of(built.network)
    sizes = built.network.sizes
    return family.full_ranks((tuple(sizes[axis] for axis in ins), tuple(sizes[axis] for axis in outs)))


def _width(built: Built) -> int:
    """The narrowest intermediate when the cores are applied in spec order."""
    net = built.network
    current = {axis for axis in net.term("x").axes if axis in net.sizes}
    widths = []
    for position, name in enumerate(net.cores[:-1]):
        later = {axis for other in net.cores[position + 1 :] for axis in net.term(other).axes} | set(net.output.axes)
        current = (current | set(net.term(name).axes)) & later
        widths.append(math.prod(net.sizes[axis] for axis in current))
    return min(widths, default=0)
