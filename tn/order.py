"""Contraction order: trees for a network, the most promising first. The only file that imports cotengra.

A tree is a path: a sequence of pairs in SSA form, operands numbered first, every pair appending one tensor. Trees are compared by a
*bound*: the sum over their steps, and over the gradients that are needed, of what each would cost in its own best layout. Layouts then say
what a tree really costs, and correct the bounds of others (`Trees`).

Up to eight operands the tree of the least bound is found among all trees, by dynamic programming over the subsets of the operands. Beyond,
cotengra's greedy search is sampled, the trees are compared by the same bound, and the best of them improved piece by piece by that exact
search.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tn.cost import volume
from tn.errors import PlanError, unknown
from tn.spec import ROWS

Array = np.ndarray
Axes = tuple[str, ...]
Path = tuple[tuple[int, int], ...]
Weights = tuple[float, float, float]  # of a step, of the gradient of its left and of its right operand
Extents = tuple[int, int, int, int]  # of a contraction: batch, left, right and contracted (H, M, N, K)

SEARCHES = ("auto", "cotengra", "left_to_right")
EXACT = 8  # operands up to which all subsets are searched: 3,025 ways to split them
_REGION = 6  # subtrees that a piece of a larger tree is cut into, to be put together again in the best way
_SAMPLES = 64  # trees that cotengra's sampler draws
_OWN_SAMPLES = 16  # of them from which cotengra improves the best under its own objectives
_IMPROVED = 4  # of them that are improved
_DP = 10  # operands up to which opt_einsum and cotengra search exactly


@dataclass(frozen=True, slots=True)
class Task:
    """What trees are ranked for.

    Attributes:
        inputs: axes of each operand (no repeated axis inside one). output: axes that survive. grads: which operands need a gradient.
        sizes: of every axis; with tiles, the rows are those of a tile. tiles: how often a step with rows runs.
        weigh: costs of contractions from arrays of their batch, left, right and contracted extents (H, M, N, K).
    """

    inputs: tuple[Axes, ...]
    output: Axes
    sizes: Mapping[str, int]
    grads: tuple[bool, ...]
    weigh: Callable[[Array, Array, Array, Array], Array]
    tiles: float = 1.0

    def weights(self, rows: bool, last: bool, left_needs: bool, right_needs: bool) -> Weights:
        """How often a step runs, with rows or without, and the gradients of its operands. A tile makes its intermediates again."""
        often = self.tiles if rows else 1.0
        again = rows and not last and self.tiles > 1 and any(self.grads)
        return often * (1 + again), often * left_needs, often * right_needs

    def turns(self, extents: Sequence[Extents] | Array) -> Array:
        """Costs of contractions, of the gradients of their left and of those of their right operands (three lines): contractions of the
        same extents in other roles."""
        h, m, n, k = np.array(extents, float).reshape(-1, 4).T
        return self.weigh(*(np.concatenate(roles) for roles in ((h, h, h), (m, m, k), (n, k, n), (k, n, m)))).reshape(3, -1)

    def costs(self, extents: Sequence[Extents] | Array, weights: Sequence[Weights] | Array) -> list[float]:
        """Costs of steps with the gradients of their operands, each turn as often as its weight says."""
        return (self.turns(extents).T * np.array(weights).reshape(-1, 3)).sum(axis=1).tolist()


def flops(h: Array, m: Array, n: Array, k: Array) -> Array:
    """FLOPs of contractions, as a Task weighs them."""
    return 2 * h * m * n * k


class Trees:
    """Trees worth laying out, one after the other, while layouts teach what the rest may cost.

    Iterating gives first the tree of the least bound and the trees that other planners would take, so that no plan is slower for not
    knowing them: the fewest FLOPs as opt_einsum's "dp", and FLOPs traded against elements written as cotengra's "auto". Then come all
    others, each time the one of the least cost: its bound and what was learnt. After `learn`, every tree in which the same two sets of
    operands meet is charged for their step what its layout cost beyond the bound.

    Attributes:
        task: what is searched. least: the smallest bound of all trees (up to eight operands), else of those found.
    """

    def __init__(self, task: Task, pool: "_Subsets | _Found", familiar: Sequence[Path] = ()) -> None:
        self.task, self._pool, self._others = task, pool, familiar
        self.least, self._first = next(pool.ranked({}))
        self._learnt: dict[tuple[int, int], float] = {}

    def of(self, task: Task, familiar: Sequence[Path]) -> "Trees":
        """The same trees, compared for another task with the same operands."""
        return Trees(task, self._pool.of(task), familiar)

    def all(self) -> Iterator[Path]:
        """Every tree, the one of the least bound first."""
        return (path for _, path in self._pool.ranked({}))

    def learn(self, path: Path, excess: Sequence[float]) -> None:
        """Charge for the steps of a tree what each of them cost beyond its bound."""
        self._learnt.update(zip(_joined(path, len(self.task.inputs)), excess, strict=True))

    def __iter__(self) -> Iterator[Path]:
        known = {self._first, *self._others}
        yield from dict.fromkeys((self._first, *self._others))
        while (path := next((path for _, path in self._pool.ranked(self._learnt) if path not in known), None)) is not None:
            known.add(path)
            yield path


def search(task: Task, *, method: str = "auto", seed: int = 0) -> Trees:
    """The trees of a task.

    Args:
        method: "auto", "cotengra" (its trees alone), "left_to_right" (the order as written).
        seed: of cotengra's sampler.

    Raises:
        PlanError: an unknown method.
    """
    count = len(task.inputs)
    if method not in SEARCHES:
        raise PlanError(unknown("search", method, SEARCHES))
    if count == 1:
        return given(task, [()])
    if method == "left_to_right":
        ids = [0, *range(count, 2 * count - 2)]
        return given(task, [tuple((ids[i], i + 1) for i in range(count - 1))])
    if method == "cotengra":
        return given(task, _cotengra_paths(task, seed))
    plain = replace(task, grads=(False,) * count)
    if count <= EXACT:
        subsets = _Subsets(task)
        others = [subsets.of(replace(plain, weigh=weigh)).best() for weigh in (flops, _combo)] if count > 3 else []
        return Trees(task, subsets, others)
    found = _Found(task, _cotengra_paths(task, seed))
    improved = [_improve(path, task) for _, path, _ in found.trees[:_IMPROVED]]
    return Trees(task, _Found(task, [path for _, path, _ in found.trees] + improved), _familiar(plain))


def given(task: Task, paths: Sequence[Path]) -> Trees:
    """Trees that were found elsewhere."""
    return Trees(task, _Found(task, paths))


class _Found:
    """Some trees: (bound, tree, the parts its steps join), the least bound first."""

    def __init__(self, task: Task, paths: Sequence[Path]) -> None:
        count = len(task.inputs)
        different = dict.fromkeys(_canonical(path, count) for path in paths)
        self.trees = sorted((bound(path, task), path, [*_joined(path, count)]) for path in different)

    def of(self, task: Task) -> "_Found":
        """The same trees for another task."""
        return _Found(task, [path for _, path, _ in self.trees])

    def ranked(self, learnt: Mapping[tuple[int, int], float]) -> Iterator[tuple[float, Path]]:
        """The trees with their costs including what was learnt, the cheapest first."""
        yield from sorted((least + sum([learnt.get(both, 0.0) for both in joined]), path) for least, path, joined in self.trees)


def _joined(path: Path, count: int) -> Iterator[tuple[int, int]]:
    """The subsets of operands that each step joins, as bit masks, the one with the first operand first."""
    subsets = [1 << place for place in range(count)]
    for left, right in path:
        a, b = subsets[left], subsets[right]
        subsets.append(a | b)
        yield (a, b) if a & -a < b & -b else (b, a)


def _familiar(task: Task) -> list[Path]:
    """The trees of opt_einsum and of cotengra's exact search; above its reach, cotengra's sample stands for it."""
    from tn.bridge.opt_einsum import pairs_of  # late: keeps `import tn` light

    exact = len(task.inputs) <= _DP
    sizes = {axis: max(size, 1) for axis, size in task.sizes.items()}
    paths = [pairs_of(("named", "dp" if exact else "auto", None), task.inputs, task.output, sizes)]
    return paths + ([_optimal(task, "combo")] if exact else [])


def bound(path: Path, task: Task, without: Collection[int] = ()) -> float:
    """Cost of a tree whose every step runs in its own best layout, but for some steps that do not run."""
    return sum(cost for number, cost in enumerate(task.costs(*roles(path, task))) if number not in without)


def roles(path: Path, task: Task) -> tuple[list[Extents], list[Weights]]:
    """Extents and weights of every step."""
    sizes, axes, needs = task.sizes, [*task.inputs], [*task.grads]
    extents: list[Extents] = []
    weights: list[Weights] = []
    for left, right, out in steps_of(path, task.inputs, task.output):
        a, b, c = {*axes[left]}, {*axes[right]}, {*out}
        extents.append((volume(a & b & c, sizes), volume(a - b, sizes), volume(b - a, sizes), volume((a & b) - c, sizes)))
        weights.append(task.weights(ROWS in a or ROWS in b, len(weights) == len(path) - 1, needs[left], needs[right]))
        axes.append(out)
        needs.append(needs[left] or needs[right])
    return extents, weights


def steps_of(path: Path, inputs: Sequence[Axes], output: Axes) -> Iterator[tuple[int, int, Axes]]:
    """(left, right, axes of the result) of each pair: an axis survives while another tensor or the output needs it."""
    alive = dict(enumerate(inputs))
    for number, (left, right) in enumerate(path):
        a, b = alive.pop(left), alive.pop(right)
        needed = set(output).union(*alive.values())
        out = tuple([axis for axis in dict.fromkeys((*a, *b)) if axis in needed])
        alive[len(inputs) + number] = out
        yield left, right, out


def tree(path: Path, inputs: Sequence[Axes], output: Axes, sizes: Mapping[str, int]) -> Any:
    """The path as a `cotengra.ContractionTree`."""
    import cotengra  # late: keeps `import tn` light

    return cotengra.ContractionTree.from_path(inputs, output, dict(sizes), ssa_path=path)


class _Subsets:
    """All trees of a few operands: every way to split every subset of them in two, with the cost of the step that joins the parts.

    Subsets of operands and sets of axes are bit masks.
    """

    def __init__(self, task: Task, like: "_Subsets | None" = None) -> None:
        self.count = count = len(task.inputs)
        self.structure: tuple[list[str], Array, Array, Array] = like.structure if like else _structure(task)
        axes, has, groups, rows = self.structure
        volumes = np.where(has, np.array([float(task.sizes[axis]) for axis in axes]), 1.0).prod(axis=1)
        needs = np.array([any(need and subset >> place & 1 for place, need in enumerate(task.grads)) for subset in range(1 << count)])
        subset, part, other = _columns(count)
        kinds = np.array([task.weights(*kind) for kind in itertools.product((False, True), repeat=4)])
        weights = kinds[8 * rows + 4 * (subset == subset[-1]) + 2 * needs[part] + needs[other]]
        self.costs = task.costs(volumes[groups], weights)

    def of(self, task: Task) -> "_Subsets":
        """The same trees for another task."""
        return _Subsets(task, self)

    def best(self) -> Path:
        """The cheapest tree."""
        least, parts = [math.inf] * (1 << self.count), [0] * (1 << self.count)
        for place in range(self.count):
            least[1 << place] = 0.0
        for (subset, part, other), cost in zip(_splits(self.count), self.costs, strict=True):
            total = least[part] + least[other] + cost
            if total < least[subset]:
                least[subset], parts[subset] = total, part

        def nested(subset: int) -> object:
            return (nested(parts[subset]), nested(subset ^ parts[subset])) if parts[subset] else subset.bit_length() - 1

        return to_path(nested((1 << self.count) - 1), self.count)

    def ranked(self, learnt: Mapping[tuple[int, int], float]) -> Iterator[tuple[float, Path]]:
        """The trees with their costs including what was learnt, the cheapest first."""
        costs = self.costs
        if learnt:
            costs = [*costs]
            for both, more in learnt.items():
                costs[_places(self.count)[both]] += more
        return iter(_Ranking(self.count, costs))


class _Ranking:
    """The trees over every subset of the operands, the cheapest first, made as far as they are asked for.

    A tree over a subset is the i-th best tree of one part and the j-th best of the other; the candidates for the next best are kept in a
    heap (Huang and Chiang 2005, "Better k-best parsing").
    """

    def __init__(self, count: int, costs: Sequence[float]) -> None:
        self.count = count
        leaf = (0.0, 0, 0, 0, 0, 0.0)
        self.found: list[list[tuple]] = [[leaf] if subset.bit_count() == 1 else [] for subset in range(1 << count)]
        self.heaps: list[list[tuple] | None] = [None if subset.bit_count() == 1 else [] for subset in range(1 << count)]
        least = [0.0 if found else math.inf for found in self.found]
        for (subset, part, other), cost in zip(_splits(count), costs, strict=True):
            total = least[part] + least[other] + cost
            self.heaps[subset].append((total, part, 0, other, 0, cost))
            if total < least[subset]:
                least[subset] = total

    def __iter__(self) -> Iterator[tuple[float, Path]]:
        every = (1 << self.count) - 1
        for rank in itertools.count():
            best = self._get(every, rank)
            if best is None:
                return
            yield best[0], to_path(self._nested(every, rank), self.count)

    def _get(self, subset: int, rank: int) -> tuple | None:
        """(cost, part, its rank, other part, its rank, cost of the last step) of a tree over a subset, None if there are fewer."""
        found, heap = self.found[subset], self.heaps[subset]
        while len(found) <= rank and heap is not None:
            if found:
                self._expand(found[-1], heap)
            else:
                heapq.heapify(heap)
            if heap:
                found.append(heapq.heappop(heap))
            else:
                heap = self.heaps[subset] = None
        return found[rank] if rank < len(found) else None

    def _expand(self, tree: tuple, heap: list[tuple]) -> None:
        """Add the candidates that may follow a tree."""
        _, part, i, other, j, step = tree
        for i_next, j_next in ((i + 1, j), (i, j + 1)) if i == 0 else ((i + 1, j),):
            first, second = self._get(part, i_next), self._get(other, j_next)
            if first and second:
                heapq.heappush(heap, (first[0] + second[0] + step, part, i_next, other, j_next, step))

    def _nested(self, subset: int, rank: int) -> object:
        best = self._get(subset, rank)
        assert best
        _, part, i, other, j, _ = best
        return (self._nested(part, i), self._nested(other, j)) if part else subset.bit_length() - 1


def _structure(task: Task) -> tuple[list[str], Array, Array, Array]:
    """(axes, which of them are in each of some sets, which sets are H, M, N and K of every split, whether a split has rows)."""
    count = len(task.inputs)
    bits = {axis: 1 << place for place, axis in enumerate(dict.fromkeys(axis for term in (*task.inputs, task.output) for axis in term))}
    every, inside = (1 << count) - 1, [0] * (1 << count)  # axes of the operands in a subset
    for subset in range(1, every + 1):
        low = subset & -subset
        inside[subset] = inside[subset ^ low] | sum([bits[axis] for axis in task.inputs[low.bit_length() - 1]])
    kept = sum([bits[axis] for axis in task.output])
    axes = [inside[subset] & (kept | inside[every ^ subset]) for subset in range(every + 1)]
    number: dict[int, int] = {}
    groups: list[list[int]] = []
    rows: list[bool] = []
    rows_bit = bits.get(ROWS, 0)
    for subset, part, other in _splits(count):
        a, b, out = axes[part], axes[other], axes[subset]
        both = a & b
        groups.append([number.setdefault(mask, len(number)) for mask in (both & out, a & ~b, b & ~a, both & ~out)])
        rows.append((a | b) & rows_bit != 0)
    sets = np.array([*number], dtype=np.int64 if len(bits) < 63 else object)
    has = (sets[:, None] >> np.arange(len(bits))) & 1
    return [*bits], has.astype(bool), np.array(groups), np.array(rows)


@functools.cache
def _splits(count: int) -> list[tuple[int, int, int]]:
    """(subset, part, other part) of every subset of so many operands, subsets of a subset first; the first operand is in `part`."""
    found = []
    for subset in range(1, 1 << count):
        rest = subset & (subset - 1)
        other = rest
        while other:
            found.append((subset, subset ^ other, other))
            other = (other - 1) & rest
    return found


@functools.cache
def _columns(count: int) -> Array:
    """The splits as three arrays: subsets, parts, other parts."""
    return np.array(_splits(count)).T


@functools.cache
def _places(count: int) -> dict[tuple[int, int], int]:
    """Both parts of a split → its place among the splits."""
    return {(part, other): place for place, (_, part, other) in enumerate(_splits(count))}


def _combo(h: int, m: int, n: int, k: int) -> float:
    return h * m * n * (k + 64)  # cotengra's "combo": multiply-adds and 64 × elements written


def _optimal(task: Task, minimize: str) -> Path:
    """cotengra's exact search."""
    import cotengra  # late: keeps `import tn` light

    sizes = {axis: max(size, 1) for axis, size in task.sizes.items()}
    optimizer = cotengra.OptimalOptimizer(minimize=minimize)
    return tuple(cotengra.array_contract_tree(task.inputs, task.output, sizes, optimize=optimizer).get_ssa_path())


def _cotengra_paths(task: Task, seed: int) -> list[Path]:
    """cotengra's trees: the exact ones of few operands under its own objectives, otherwise a sample of its greedy search, the best of it
    improved by cotengra too. (Its HyperOptimizer would draw the same parameters, but its trials are not seeded: no run would repeat.)"""
    from cotengra.pathfinders.path_basic import optimize_random_greedy_track_flops  # late: keeps `import tn` light

    if len(task.inputs) <= _DP:
        return [_optimal(task, minimize) for minimize in ("flops", "write", "combo")]
    sizes = {axis: max(size, 1) for axis, size in task.sizes.items()}
    draws = [optimize_random_greedy_track_flops(task.inputs, task.output, sizes, use_ssa=True, seed=seed + i) for i in range(_SAMPLES)]
    found: list[Path] = [tuple(map(tuple, path)) for path, _ in draws]
    for minimize in ("flops", "combo"):
        best = min((tree(path, task.inputs, task.output, sizes) for path in found[:_OWN_SAMPLES]), key=lambda t: t.get_score(minimize))
        found.append(tuple(best.subtree_reconfigure(minimize=minimize, seed=seed).get_ssa_path()))
    return found


def _improve(path: Path, task: Task) -> Path:
    """A tree of no greater bound: from the leaves up, every subtree, cut off below into a few parts, is put together in the best way."""
    count = len(task.inputs)
    axes, needs, children = [*task.inputs], [*task.grads], [(value, value) for value in range(count)]

    def add(left: int, right: int, out: Axes) -> int:
        children.append((left, right))
        axes.append(out)
        needs.append(needs[left] or needs[right])
        return len(children) - 1

    values = [*range(count)]  # the improved subtree of every value of the path
    for left, right, out in steps_of(path, task.inputs, task.output):
        parts = [values[left], values[right]]
        while len(parts) < _REGION and max(parts) >= count:
            widest = max((part for part in parts if part >= count), key=lambda part: volume(axes[part], task.sizes))
            parts.remove(widest)
            parts += children[widest]
        terms, needed = tuple([axes[part] for part in parts]), tuple([needs[part] for part in parts])
        inner = replace(task, inputs=terms, output=out, grads=needed)
        best = _Subsets(inner).best()
        for first, second, made in steps_of(best, terms, out):
            parts.append(add(parts[first], parts[second], made))
        values.append(parts[-1])

    def nested(value: int) -> object:
        return value if value < count else tuple(map(nested, children[value]))

    return _canonical(to_path(nested(values[-1]), count), count)


@functools.cache
def every(count: int) -> tuple[Path, ...]:
    """Every binary tree over so many operands, as pairs of SSA values."""

    def trees(leaves: tuple[int, ...]) -> Iterator[object]:
        if len(leaves) == 1:
            yield leaves[0]
        for size in range(len(leaves) - 1):
            for chosen in itertools.combinations(leaves[1:], size):
                rest = tuple(leaf for leaf in leaves[1:] if leaf not in chosen)
                yield from itertools.product(trees((leaves[0], *chosen)), trees(rest))

    return tuple(to_path(nested, count) for nested in trees(tuple(range(count))))


def to_path(nested: object, count: int) -> Path:
    """A tree as nested pairs of operands' numbers → pairs of SSA values."""
    pairs: list[tuple[int, int]] = []

    def visit(node) -> int:
        if isinstance(node, int):
            return node
        pair = (visit(node[0]), visit(node[1]))
        pairs.append(pair)
        return count + len(pairs) - 1

    visit(nested)
    return tuple(pairs)


def _canonical(path: Path, count: int) -> Path:
    """The same tree with its pairs in depth-first order and the smaller leaf first, so that equal trees compare equal."""
    nodes: list = [*range(count)]
    lowest: list[int] = [*range(count)]
    for left, right in path:
        if lowest[left] > lowest[right]:
            left, right = right, left
        nodes.append((nodes[left], nodes[right]))
        lowest.append(lowest[left])
    return to_path(nodes[-1], count)
