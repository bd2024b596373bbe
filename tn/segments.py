"""Segments: ranges of a dynamic size, or cells of two, each served by one plan.

Dynamic axes that always occur together count as one size, the product of theirs. In every step of a tree such a size occurs once or not at
all, so that the FLOPs of a tree are c0 + c1·n: the best trees of all sizes are the lower envelope of lines, and their breakpoints exact.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from tn.bridge.paths import along
from tn.cost import step_flops
from tn.errors import PlanError, SizeError, unknown
from tn.frugal import score
from tn.network import Network
from tn.order import Axes, Path, every, steps_of
from tn.plan import Plan, leaf_axes
from tn.planner import plan
from tn.spec import ROWS

_PLANS = 4  # at most, for the goal "time" and for two axes
_GRID = (2, 8, 32, 128, 512, 2048, 8192)  # sizes planned for, of one axis
_GRID_OF_TWO = (4, 32, 256, 2048)
_EVERY = 7  # operands up to which every tree is a candidate: 10,395
_ENOUGH = 1.02  # fewer plans do if they are nowhere this many times dearer than the best of all
# Of a layer with one dynamic size: below the first number, the plan for the second, near the geometric middle of the range. At the ends of
# these ranges the plans of 26 structured layers lost least, on the tables of both a CPU and a GPU (LOG.md).
ROW_RANGES = ((16, 4), (96, 48), (512, 256), (math.inf, 2048))
_BATCH = 8  # size that a layer is planned for of a batch that every input and output has, beside other dynamic axes
_RANGES = {1: ROW_RANGES, 2: ((256, 64), (math.inf, 1024))}


def merged(network: Network) -> tuple[Axes, ...]:
    """Groups of dynamic axes that always occur together.

    >>> from tn import network
    >>> merged(network("q: b h s d, k: b h t d, v: b h t e -> b h s e", dict(h=4, d=8, e=8)))
    (('b',), ('s',), ('t',))
    """
    terms = [*network.spec.operands, *network.spec.outputs]
    groups: dict[tuple[int, ...], Axes] = {}
    for axis in network.dynamic:
        places = tuple(place for place, term in enumerate(terms) if axis in term.axes)
        groups[places] = (*groups.get(places, ()), axis)
    return tuple(groups.values())


def _telling(network: Network) -> tuple[Axes, ...]:
    """The groups that decide between orders: without a batch, which every input and output has, if there are others."""
    terms = [term for term in (*network.spec.operands, *network.spec.outputs) if term.name not in (*network.cores, *network.consts)]
    groups = merged(network)
    return tuple(axes for axes in groups if not all(axes[0] in term.axes for term in terms)) or groups


Reader = tuple[int, tuple[slice, ...], int]  # place of an operand, its dimensions to multiply, what to divide by


@dataclass(frozen=True)
class Cells:
    """The ranges of sizes for which a layer has a plan each: of one merged size, or of two.

    Attributes:
        groups: the axes of each size. ranges: (below, size planned for), the same for every size. readers: how a call's sizes are found.
        others: dynamic axes that are left out.
    """

    groups: tuple[Axes, ...] = ()
    ranges: tuple[tuple[float, int], ...] = ()
    readers: tuple[Reader, ...] = ()
    others: Axes = ()

    def __len__(self) -> int:
        return len(self.ranges) ** len(self.groups)

    def sizes(self, cell: int) -> dict[str, int]:
        """axis → size that a cell is planned for."""
        found = dict.fromkeys(self.others, _BATCH)
        for axes, place in zip(self.groups, self._places(cell), strict=True):
            each = max(2, round(self.ranges[place][1] ** (1 / len(axes))))
            found |= dict.fromkeys(axes, each)
        return found

    def words(self, cell: int) -> str:
        """Which sizes a cell is for."""
        parts = []
        for axes, place in zip(self.groups, self._places(cell), strict=True):
            below, name = self.ranges[place][0], " · ".join("rows" if axis == ROWS else axis for axis in axes)
            parts.append(f"fewer than {below} {name}" if below < math.inf else f"any other number of {name}")
        return ", ".join(parts) or "any sizes"

    def find(self, operands: Sequence[Tensor]) -> int:
        """The cell of a call."""
        cell = 0
        for place, dims, known in self.readers:
            shape, at = operands[place].shape, 0
            size = math.prod([size for dim in dims for size in shape[dim]]) // known
            while size >= self.ranges[at][0]:
                at += 1
            cell = cell * len(self.ranges) + at
        return cell

    def _places(self, cell: int) -> list[int]:
        width = len(self.ranges)
        return [cell // width**power % width for power in reversed(range(len(self.groups)))]


@functools.lru_cache(maxsize=4096)
def cells(network: Network) -> Cells:
    """The cells of a layer: four ranges of one dynamic size, 2 × 2 of two, else one for all sizes."""
    groups = _telling(network)
    readers = tuple(reader for axes in groups if (reader := _reader(network, axes)))
    if len(groups) not in _RANGES or len(readers) < len(groups):
        return Cells()
    others = tuple(axis for axis in network.dynamic if not any(axis in axes for axes in groups))
    return Cells(groups, _RANGES[len(groups)], readers, others)


def _reader(network: Network, axes: Axes) -> Reader | None:
    """The first operand from which a merged size can be read: its dimensions hold these axes and known ones only."""
    for term in network.spec.operands:
        dims = {place: dim for place, dim in enumerate(term.dims, start=-len(term.dims)) if set(dim) & set(axes)}
        held = [axis for dim in dims.values() for axis in dim if axis not in network.sizes]
        if sorted(held) == sorted(axes) and (ROWS not in axes or len(dims) == 1):
            known = max(math.prod(network.sizes[axis] for dim in dims.values() for axis in dim if axis in network.sizes), 1)
            where = [slice(None if ROWS in axes else place, place + 1 or None) for place in dims]
            return network.names.index(term.name), tuple(where), known
    return None


def segments(
    network: Network,
    *,
    axis: str | tuple[str, str] = ROWS,
    goal: str = "time",
    grad: Iterable[str] = (),
    sizes: Mapping[str, int] | None = None,
    up_to: int = 1 << 20,
    **options: Any,
) -> list[tuple[Any, Plan]]:
    """The plans of a network for every size of a dynamic axis, or of two.

    Args:
        axis: whose size changes; axes that always occur with it stay as `sizes` has them. Two axes give a grid of 2 × 2 cells.
        goal: "flops" gives exact breakpoints where the search is exact (trees of five operands or fewer, no tensor used twice); otherwise
            at most four plans, by a grid of sizes and bisection of what is predicted.
        grad, sizes, options: as in `tn.plan`. up_to: sizes beyond this are not looked at.

    Returns:
        (first size, plan), ascending; each holds up to the next one's first size. For two axes ((first, first), plan): the last entry that
        both sizes reach holds.

    Raises:
        SizeError: an axis that is unknown or not dynamic. PlanError: another goal; with goal="flops" several outputs, another search or
            table; a memory limit, or a size for the axis itself.

    >>> import tn
    >>> net = tn.network("x: ... i, a: i r, b: r o -> ... o", dict(i=64, r=48, o=64), cores=("a", "b"))
    >>> [(first, plan.path) for first, plan in tn.segments(net, goal="flops")]
    [(1, ((0, 1), (3, 2))), (97, ((1, 2), (0, 3)))]
    """
    if not isinstance(network, Network):
        raise PlanError(f"tn.segments takes a network, such as tn.network(spec, sizes) gives, got {network!r}")
    axes = (axis,) if isinstance(axis, str) else tuple(axis) if isinstance(axis, Sequence) else ()
    if len(axes) not in (1, 2) or len(set(axes)) < len(axes):
        raise SizeError(f"axis is {axis!r}, expected a dynamic axis, or two different ones")
    for name in axes:
        if name not in network.dynamic:
            raise SizeError(unknown("dynamic axis", name, network.dynamic))
    if goal not in ("time", "flops"):
        raise PlanError(unknown("goal of segments", goal, ("time", "flops")))
    refused = [name for name in ("rows", "memory_limit") if options.get(name) is not None] + [
        name for name in axes if name in (sizes or {})
    ]
    if refused:
        raise PlanError(f"segments takes no {refused[0]!r}: the sizes of {', '.join(axes)} change, and a limit holds for one size")
    if goal == "flops" and (len(network.parts) > 1 or options.get("search", "auto") != "auto" or options.get("table") is not None):
        raise PlanError('segments with goal="flops" are of one output, with search "auto" and the table in use')
    fixed = {**dict.fromkeys(network.dynamic, 1024), **(sizes or {})}

    def planned(*extents: int) -> Plan:
        given = {name: size for name, size in {**fixed, **dict(zip(axes, extents, strict=True))}.items() if name in network.dynamic}
        return plan(network, goal=goal, grad=grad, sizes=given, **options)

    if len(axes) == 2:
        return _of_two(axes, planned)
    if goal == "flops" and len(network.names) == len(network.spec.operands):  # equal steps bend the lines
        return _envelope(network, axes[0], fixed, planned, up_to)
    return _by_time(axes[0], planned, up_to)


def _envelope(network: Network, axis: str, fixed: Mapping[str, int], planned: Callable[..., Plan], up_to: int) -> list[tuple[Any, Plan]]:
    """The plans of fewest FLOPs, forward and needed gradients: the lower envelope of the lines of all trees."""
    leaves, output, sample = leaf_axes(network), network.output.axes, planned(up_to)
    size, needs = {**fixed, **network.sizes}, sample.needs[: len(leaves)]

    @functools.cache
    def line(path: Path) -> tuple[int, int]:
        """(FLOPs for size 0, FLOPs for every one more)."""
        one, two = (_flops(path, leaves, output, {**size, axis: n}, needs) for n in (1, 2))
        return 2 * one - two, two - one

    def at(entry: tuple[tuple[int, int], Path], n: int) -> tuple[int, int, Path]:
        (constant, slope), path = entry
        return constant + slope * n, slope, path

    if len(leaves) <= _EVERY:
        lines = {line(path): path for path in reversed(every(len(leaves)))}
    else:
        lines = {line(path): path for path in {planned(2**power).path for power in range(1, up_to.bit_length())}}
    found, first = [], 1
    while first <= up_to:
        (constant, slope), path = min(lines.items(), key=lambda entry: at(entry, first))
        crossings = [(c - constant) // (slope - s) + 1 for c, s in lines if s < slope]
        following = min([n for n in crossings if n > first], default=up_to + 1)
        middle = math.isqrt(first * (following - 1))
        made = planned(middle)
        found.append((first, made if line(made.path) == (constant, slope) else _along(made, path)))
        first = following
    return found


def _along(like: Plan, path: Path) -> Plan:
    """A plan with another order."""
    free = {axis: size for axis, size in like.size.items() if axis in like.network.dynamic}
    made = along(like.network, path, grad=like.grad, sizes=free)
    return dataclasses.replace(made, goal=like.goal, machine=like.machine, itemsize=like.itemsize)


def _flops(path: Path, leaves: Sequence[Axes], output: Axes, size: Mapping[str, int], grads: Sequence[bool]) -> int:
    axes, needs, total = [*leaves], [*grads], 0
    for left, right, out in steps_of(path, leaves, output):
        total += step_flops(axes[left], axes[right], size) * (1 + needs[left] + needs[right])
        axes.append(out)
        needs.append(needs[left] or needs[right])
    return total


def _cost(made: Plan, axes: Sequence[str], extents: Sequence[int]) -> float:
    """What the goal of a plan costs at other sizes."""
    return score(made.at(dict(zip(axes, extents, strict=True))))[0]


def _by_time(axis: str, planned: Callable[..., Plan], up_to: int) -> list[tuple[Any, Plan]]:
    """At most four plans: the grid cut into the runs that lose least, and the cuts moved to where one plan overtakes the other."""
    grid = [size for size in _GRID if size <= up_to] or [up_to]
    plans = [planned(size) for size in grid]
    cost = [[_cost(made, (axis,), (size,)) for made in plans] for size in grid]
    chosen: list[tuple[int, int]] = []
    for count in range(1, min(_PLANS, len(grid)) + 1):
        worst, chosen = min(_runs(cost, cuts) for cuts in itertools.combinations(range(1, len(grid)), count - 1))
        if worst <= _ENOUGH:
            break
    found = [(1, plans[chosen[0][1]])]
    for start, p in chosen[1:]:
        before, after = found[-1][1], plans[p]
        low, high = grid[start - 1], grid[start]  # the later plan is better at the upper end
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if _cost(after, (axis,), (middle,)) < _cost(before, (axis,), (middle,)) else (middle, high)
        found.append((high, after))
    return found


def _runs(cost: Sequence[Sequence[float]], cuts: Sequence[int]) -> tuple[float, list[tuple[int, int]]]:
    """(How many times dearer than the best plan somewhere on the grid, (start, plan) of every run), each run with its best plan.

    Args:
        cost: of every plan, at every point of the grid.
    """
    worst, runs = 1.0, []
    for start, stop in itertools.pairwise((0, *cuts, len(cost))):
        run = cost[start:stop]
        loss, best = min((max(line[p] / min(line) for line in run), p) for p in range(len(cost)))
        runs.append((start, best))
        worst = max(worst, loss)
    return worst, runs


def _of_two(axes: Sequence[str], planned: Callable[..., Plan]) -> list[tuple[Any, Plan]]:
    """2 × 2 cells, cut where the best plans of the cells lose least over a grid."""
    points = [*itertools.product(_GRID_OF_TWO, repeat=2)]
    plans = list({(made.path, made.orders, made.tile): made for made in (planned(*point) for point in points)}.values())
    cost = {point: [math.log(_cost(made, axes, point)) for made in plans] for point in points}

    def cell(cuts: tuple[int, ...], corner: tuple[int, ...]) -> tuple[float, int]:
        inside = [point for point in points if all((n >= cut) == bool(c) for n, cut, c in zip(point, cuts, corner, strict=True))]
        return min((sum(cost[point][p] for point in inside), p) for p in range(len(plans)))

    def total(cuts: tuple[int, ...]) -> float:
        return sum(cell(cuts, corner)[0] for corner in corners)

    corners = [*itertools.product((0, 1), repeat=2)]
    cuts = min(itertools.product(_GRID_OF_TWO[1:], repeat=2), key=total)
    return [(tuple(cut if c else 1 for cut, c in zip(cuts, corner, strict=True)), plans[cell(cuts, corner)[1]]) for corner in corners]
