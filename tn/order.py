"""Contraction order: trees for a network, the most promising first. The only file that imports cotengra.

A tree is a path: a sequence of pairs in SSA form, operands numbered first, every pair appending one tensor. Trees are ranked by a *bound*:
the sum over their steps, and over the gradients that are needed, of what each would cost in its own best layout.

Up to eight operands, an exact search over all subsets of them gives the trees in the order of their bound, as many as asked for. Beyond,
cotengra's greedy sampler is scored by the same bound, and the best of its trees are improved piece by piece with the exact search.
"""

import heapq
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tn.cost import volume
from tn.errors import PlanError, unknown

Axes = tuple[str, ...]
Path = tuple[tuple[int, int], ...]

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
        sizes: of every axis. weigh: cost of one contraction with batch, left, right and contracted extents (H, M, N, K).
    """

    inputs: tuple[Axes, ...]
    output: Axes
    sizes: Mapping[str, int]
    grads: tuple[bool, ...]
    weigh: Callable[[int, int, int, int], float]

    def step(self, h: int, m: int, n: int, k: int, left_needs: bool, right_needs: bool) -> float:
        """Cost of a step and of the gradients of its operands: contractions of the same extents in other roles."""
        cost = self.weigh(h, m, n, k)
        if left_needs:
            cost += self.weigh(h, m, k, n)
        return cost + self.weigh(h, k, n, m) if right_needs else cost


def flops(h: int, m: int, n: int, k: int) -> float:
    """FLOPs of a contraction, as a Task weighs them."""
    return 2 * h * m * n * k


def search(task: Task, *, method: str = "auto", seed: int = 0) -> Iterator[tuple[float, Path]]:
    """Trees with their bounds, the least first; up to eight operands every tree there is, else those that were found.

    Args:
        method: "auto", "cotengra" (its trees alone), "left_to_right" (the order as written).
        seed: of cotengra's sampler.

    Returns:
        At least one path, none twice. Raises PlanError for an unknown method.
    """
    count = len(task.inputs)
    if method not in SEARCHES:
        raise PlanError(unknown("search", method, SEARCHES))
    if count == 1:
        return iter([(0.0, ())])
    if method == "left_to_right":
        ids = [0, *range(count, 2 * count - 2)]
        return iter(_ranked(task, [tuple((ids[i], i + 1) for i in range(count - 1))]))
    if method == "auto" and count <= _EXACT:
        return _Subsets(task).trees()
    found = _ranked(task, _cotengra_paths(task, seed))
    if method == "auto":
        found = _ranked(task, [path for _, path in found] + [_improve(path, task) for _, path in found[:_IMPROVED]])
    return iter(found)


def familiar(task: Task) -> list[Path]:
    """The trees other planners take, so that no plan is slower for not having tried them: the fewest FLOPs, and FLOPs traded against
    elements written as cotengra's "auto" does. Found by opt_einsum and cotengra themselves, and for few operands by the exact search."""
    count = len(task.inputs)
    if count < 3:
        return []
    plain = replace(task, grads=(False,) * count)
    if count <= _EXACT:
        return [next(_Subsets(replace(plain, weigh=weigh)).trees())[1] for weigh in (flops, _combo)]
    from tn.bridge.opt_einsum import pairs_of  # late: keeps `import tn` light

    name = "dp" if count <= _DP else "auto"
    sizes = {axis: max(size, 1) for axis, size in task.sizes.items()}
    paths = [pairs_of(("named", name, None), task.inputs, task.output, sizes)]
    if count <= _DP:
        paths.append(_optimal(task, "combo"))
    return [_canonical(path, count) for path in paths]


def bound(path: Path, task: Task) -> float:
    """Cost of a tree whose every step runs in its own best layout."""
    axes, needs, total = [*task.inputs], list(task.grads), 0.0
    for left, right, out in steps_of(path, task.inputs, task.output):
        a, b, c = {*axes[left]}, {*axes[right]}, {*out}
        extents = [volume(group, task.sizes) for group in (a & b & c, a - b, b - a, (a & b) - c)]
        total += task.step(*extents, needs[left], needs[right])
        axes.append(out)
        needs.append(needs[left] or needs[right])
    return total


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
    """The cheapest trees over every subset of the operands, made as far as they are asked for.

    Subsets of operands and sets of axes are bit masks. A tree over a subset is the r-th best tree of one part and the s-th best of the
    other; the candidates for the next best are kept in a heap (Huang and Chiang 2005, "Better k-best parsing").
    """

    def __init__(self, task: Task) -> None:
        self.task, count = task, len(task.inputs)
        axes = [*dict.fromkeys(axis for term in (*task.inputs, task.output) for axis in term)]
        bits = {axis: 1 << place for place, axis in enumerate(axes)}
        masks = [sum(bits[axis] for axis in term) for term in task.inputs]
        self.all = (1 << count) - 1
        inside = [0] * (self.all + 1)  # axes of the operands in a subset
        for subset in range(1, self.all + 1):
            low = subset & -subset
            inside[subset] = inside[subset ^ low] | masks[low.bit_length() - 1]
        output = sum(bits[axis] for axis in task.output)
        self.axes = [inside[subset] & (output | inside[self.all ^ subset]) for subset in range(self.all + 1)]
        for place, mask in enumerate(masks):
            self.axes[1 << place] = mask
        self.needs = [any(subset >> place & 1 and need for place, need in enumerate(task.grads)) for subset in range(self.all + 1)]
        self.volumes = {bit: task.sizes[axis] for axis, bit in bits.items()} | {0: 1}
        self.found: dict[int, list[tuple]] = {1 << place: [(0.0, 0, 0, 0, 0, 0.0)] for place in range(count)}
        self.heaps: dict[int, list[tuple]] = {1 << place: [] for place in range(count)}

    def trees(self) -> Iterator[tuple[float, Path]]:
        """Every tree over all operands with its cost, the cheapest first."""
        for rank in itertools.count():
            best = self._get(self.all, rank)
            if best is None:
                return
            yield best[0], _to_path(self._nested(self.all, rank), len(self.task.inputs))

    def _get(self, subset: int, rank: int) -> tuple | None:
        """(cost, part, its rank, other part, its rank, cost of the last step) of a tree over a subset, None if there are fewer."""
        found = self.found.get(subset)
        if found is None:
            found = self.found[subset] = []
            self.heaps[subset] = [*self._splits(subset)]
            heapq.heapify(self.heaps[subset])
        heap = self.heaps[subset]
        while len(found) <= rank and heap:
            best = heapq.heappop(heap)
            found.append(best)
            _, part, i, other, j, step = best
            for i_next, j_next in ((i + 1, j), (i, j + 1)) if i == 0 else ((i + 1, j),):
                first, second = self._get(part, i_next), self._get(other, j_next)
                if first and second:
                    heapq.heappush(heap, (first[0] + second[0] + step, part, i_next, other, j_next, step))
        return found[rank] if rank < len(found) else None

    def _splits(self, subset: int) -> Iterator[tuple]:
        """The best tree of each way to split a subset in two, its first operand in the first part."""
        out, rest = self.axes[subset], subset ^ (subset & -subset)
        other = rest
        while other:
            part = subset ^ other
            a, b = self.axes[part], self.axes[other]
            both = a & b
            extents = self._volume(both & out), self._volume(a & ~b), self._volume(b & ~a), self._volume(both & ~out)
            step = self.task.step(*extents, self.needs[part], self.needs[other])
            first, second = self._get(part, 0), self._get(other, 0)
            assert first and second
            yield first[0] + second[0] + step, part, 0, other, 0, step
            other = (other - 1) & rest

    def _volume(self, mask: int) -> int:
        found = self.volumes.get(mask)
        if found is None:
            low = mask & -mask
            found = self.volumes[mask] = self.volumes[low] * self._volume(mask ^ low)
        return found

    def _nested(self, subset: int, rank: int) -> object:
        best = self._get(subset, rank)
        assert best
        _, part, i, other, j, _ = best
        return (self._nested(part, i), self._nested(other, j)) if part else subset.bit_length() - 1


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
        best = next(_Subsets(replace(task, inputs=terms, output=out, grads=needed)).trees())[1]
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
