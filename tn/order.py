"""Contraction order: trees for a network, the most promising first. The only file that imports cotengra.

A tree is a path: a sequence of pairs in SSA form, operands numbered first, every pair appending one tensor. Trees are ranked by a *bound*:
the sum over their steps, and over the gradients that are needed, of what each would cost in its own best layout.

Up to eight operands, an exact search over all subsets of them gives the trees in the order of their bound, as many as asked for. Beyond,
cotengra's greedy sampler is scored by the same bound, and the best of its trees are improved piece by piece with the exact search.
"""

import functools
import heapq
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tn.cost import volume
from tn.errors import PlanError, unknown

Array = np.ndarray
Axes = tuple[str, ...]
Path = tuple[tuple[int, int], ...]
Extents = tuple[int, int, int, int]  # of a contraction: batch, left, right and contracted (H, M, N, K)

SEARCHES = ("auto", "cotengra", "left_to_right")
_EXACT = 8  # operands up to which all subsets are searched: 3,025 ways to split them
_REGION = 6  # subtrees that a piece of a larger tree is cut into, to be put together again in the best way
_SAMPLES = 64  # trees that cotengra's sampler draws
_IMPROVED = 3  # of them that are improved
_DP = 10  # operands up to which opt_einsum and cotengra search exactly


@dataclass(frozen=True, slots=True)
class Task:
    """What trees are ranked for.

    Attributes:
        inputs: axes of each operand (no repeated axis inside one). output: axes that survive. grads: which operands need a gradient.
        sizes: of every axis. weigh: costs of contractions from arrays of their batch, left, right and contracted extents (H, M, N, K).
    """

    inputs: tuple[Axes, ...]
    output: Axes
    sizes: Mapping[str, int]
    grads: tuple[bool, ...]
    weigh: Callable[[Array, Array, Array, Array], Array]

    def turns(self, extents: Sequence[Extents]) -> Array:
        """Costs of contractions, of the gradients of their left and of those of their right operands (three lines): contractions of the
        same extents in other roles."""
        h, m, n, k = np.array(extents, float).reshape(-1, 4).T
        return self.weigh(np.tile(h, 3), np.r_[m, m, k], np.r_[n, k, n], np.r_[k, n, m]).reshape(3, -1)

    def costs(self, extents: Sequence[Extents], needs: Sequence[tuple[bool, bool]]) -> list[float]:
        """Costs of steps, and of the gradients of their operands where `needs` says so."""
        step, left, right = self.turns(extents)
        needs_left, needs_right = np.array(needs, bool).reshape(-1, 2).T
        return (step + left * needs_left + right * needs_right).tolist()


def flops(h: Array, m: Array, n: Array, k: Array) -> Array:
    """FLOPs of contractions, as a Task weighs them."""
    return 2 * h * m * n * k


def search(task: Task, *, method: str = "auto", seed: int = 0) -> tuple[Iterable[tuple[float, Path]], list[Path]]:
    """Trees worth laying out.

    Args:
        method: "auto", "cotengra" (its trees alone), "left_to_right" (the order as written).
        seed: of cotengra's sampler.

    Returns:
        (trees with their bounds, the least first; up to eight operands every tree there is, else those that were found, at least one
        and none twice; trees to try whatever their bound: those that other planners take, so that no plan is slower for not knowing
        them: opt_einsum's of the fewest FLOPs, and cotengra's "auto", which trades FLOPs against elements written).

    Raises:
        PlanError: an unknown method.
    """
    count = len(task.inputs)
    if method not in SEARCHES:
        raise PlanError(unknown("search", method, SEARCHES))
    if count == 1:
        return [(0.0, ())], []
    if method == "left_to_right":
        ids = [0, *range(count, 2 * count - 2)]
        return _ranked(task, [tuple((ids[i], i + 1) for i in range(count - 1))]), []
    if method == "cotengra":
        return _ranked(task, _cotengra_paths(task, seed)), []
    plain = replace(task, grads=(False,) * count)
    if count <= _EXACT:
        subsets = _Subsets(task.inputs, task.output, task.sizes)
        return subsets.ranking(task), [subsets.ranking(replace(plain, weigh=weigh)).best() for weigh in (flops, _combo)]
    found = _ranked(task, _cotengra_paths(task, seed))
    return _ranked(task, [path for _, path in found] + [_improve(path, task) for _, path in found[:_IMPROVED]]), _familiar(task)


def _familiar(task: Task) -> list[Path]:
    """The trees of opt_einsum and of cotengra's exact search; above its reach, cotengra's sample stands for it."""
    from tn.bridge.opt_einsum import pairs_of  # late: keeps `import tn` light

    exact = len(task.inputs) <= _DP
    sizes = {axis: max(size, 1) for axis, size in task.sizes.items()}
    paths = [pairs_of(("named", "dp" if exact else "auto", None), task.inputs, task.output, sizes)]
    paths += [_optimal(task, "combo")] if exact else []
    return [_canonical(path, len(task.inputs)) for path in paths]


def bound(path: Path, task: Task) -> float:
    """Cost of a tree whose every step runs in its own best layout."""
    return sum(task.costs(*roles(path, task)))


def roles(path: Path, task: Task) -> tuple[list[Extents], list[tuple[bool, bool]]]:
    """Of every step: its extents (H, M, N, K), and whether its operands need a gradient."""
    sizes, axes, needs, extents = task.sizes, [*task.inputs], [*task.grads], []
    for left, right, out in steps_of(path, task.inputs, task.output):
        a, b, c = {*axes[left]}, {*axes[right]}, {*out}
        extents.append((volume(a & b & c, sizes), volume(a - b, sizes), volume(b - a, sizes), volume((a & b) - c, sizes)))
        axes.append(out)
        needs.append(needs[left] or needs[right])
    return extents, [(needs[left], needs[right]) for left, right in path]


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
    """Every way to split every subset of a few operands in two, and the extents of the contraction that joins the parts.

    Subsets of operands and sets of axes are bit masks.
    """

    def __init__(self, inputs: Sequence[Axes], output: Axes, sizes: Mapping[str, int]) -> None:
        self.count = count = len(inputs)
        bits = {axis: 1 << place for place, axis in enumerate(dict.fromkeys(axis for term in (*inputs, output) for axis in term))}
        every, inside = (1 << count) - 1, [0] * (1 << count)  # axes of the operands in a subset
        for subset in range(1, every + 1):
            low = subset & -subset
            inside[subset] = inside[subset ^ low] | sum(bits[axis] for axis in inputs[low.bit_length() - 1])
        kept = sum(bits[axis] for axis in output)
        axes = [inside[subset] & (kept | inside[every ^ subset]) for subset in range(every + 1)]
        volumes = {0: 1} | {bit: sizes[axis] for axis, bit in bits.items()}

        def product(mask: int) -> int:
            found = volumes.get(mask)
            if found is None:
                low = mask & -mask
                found = volumes[mask] = volumes[low] * product(mask ^ low)
            return found

        self.splits = _splits(count)
        self.extents = []
        for subset, part, other in self.splits:
            a, b, out = axes[part], axes[other], axes[subset]
            both = a & b
            self.extents.append((product(both & out), product(a & ~b), product(b & ~a), product(both & ~out)))

    def ranking(self, task: Task) -> "_Ranking":
        """The trees of these operands in the order of a task's costs."""
        needs = [any(subset >> place & 1 and need for place, need in enumerate(task.grads)) for subset in range(1 << self.count)]
        costs = task.costs(self.extents, [(needs[part], needs[other]) for _, part, other in self.splits])
        return _Ranking(self.count, self.splits, costs)


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


class _Ranking:
    """The cheapest trees over every subset of the operands, made as far as they are asked for.

    A tree over a subset is the i-th best tree of one part and the j-th best of the other; the candidates for the next best are kept in a
    heap (Huang and Chiang 2005, "Better k-best parsing").
    """

    def __init__(self, count: int, splits: Sequence[tuple[int, int, int]], costs: Sequence[float]) -> None:
        self.count = count
        leaf = (0.0, 0, 0, 0, 0, 0.0)
        self.found: list[list[tuple]] = [[leaf] if subset.bit_count() == 1 else [] for subset in range(1 << count)]
        self.heaps: list[list[tuple] | None] = [None] * (1 << count)
        for subset, ways in itertools.groupby(zip(splits, costs, strict=True), key=_subset):
            heap = [(self.found[part][0][0] + self.found[other][0][0] + cost, part, 0, other, 0, cost) for (_, part, other), cost in ways]
            heapq.heapify(heap)
            self.heaps[subset] = heap
            self._get(subset, 0)

    def best(self) -> Path:
        """The cheapest tree."""
        return next(iter(self))[1]

    def __iter__(self) -> Iterator[tuple[float, Path]]:
        """Every tree over all operands with its cost, the cheapest first."""
        every = (1 << self.count) - 1
        for rank in itertools.count():
            best = self._get(every, rank)
            if best is None:
                return
            yield best[0], _to_path(self._nested(every, rank), self.count)

    def _get(self, subset: int, rank: int) -> tuple | None:
        """(cost, part, its rank, other part, its rank, cost of the last step) of a tree over a subset, None if there are fewer."""
        found, heap = self.found[subset], self.heaps[subset]
        while len(found) <= rank and heap is not None:
            if found:
                self._expand(found[-1], heap)
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


def _subset(way: tuple[tuple[int, int, int], float]) -> int:
    return way[0][0]


def _ranked(task: Task, paths: Sequence[Path]) -> list[tuple[float, Path]]:
    return sorted((bound(path, task), path) for path in dict.fromkeys(_canonical(path, len(task.inputs)) for path in paths))


def _combo(h: int, m: int, n: int, k: int) -> float:
    return h * m * n * (k + 64)  # cotengra's "combo": multiply-adds and 64 × elements written


def _optimal(task: Task, minimize: str) -> Path:
    """cotengra's exact search."""
    import cotengra  # late: keeps `import tn` light

    sizes = {axis: max(size, 1) for axis, size in task.sizes.items()}
    optimizer = cotengra.OptimalOptimizer(minimize=minimize)
    return tuple(cotengra.array_contract_tree(task.inputs, task.output, sizes, optimize=optimizer).get_ssa_path())


def _cotengra_paths(task: Task, seed: int) -> list[Path]:
    """cotengra's trees: the exact ones of few operands under its own objectives, otherwise a seeded sample scored by our bound."""
    import cotengra  # late: keeps `import tn` light

    if len(task.inputs) <= _DP:
        return [_optimal(task, minimize) for minimize in ("flops", "write", "combo")]
    found: list[Path] = []

    def score(trial: Mapping[str, Any]) -> float:
        path = tuple(trial["tree"].get_ssa_path())
        found.append(path)
        return math.log2(1 + bound(path, task))

    options = dict(methods=["greedy"], optlib="random", parallel=False, max_repeats=_SAMPLES, seed=seed, progbar=False)
    sizes = {axis: max(size, 1) for axis, size in task.sizes.items()}
    cotengra.array_contract_tree(task.inputs, task.output, sizes, optimize=cotengra.HyperOptimizer(minimize=score, **options))
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
        best = _Subsets(terms, out, task.sizes).ranking(inner).best()
        for first, second, made in steps_of(best, terms, out):
            parts.append(add(parts[first], parts[second], made))
        values.append(parts[-1])

    def nested(value: int) -> object:
        return value if value < count else tuple(map(nested, children[value]))

    return _canonical(_to_path(nested(values[-1]), count), count)


def _to_path(nested: object, count: int) -> Path:
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
    return _to_path(nodes[-1], count)
