"""Contraction order: candidate trees for a network. The only file that imports cotengra.

A tree is a sequence of pairs in SSA form: operands are numbered first, every pair appends one tensor.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from tn.errors import PlanError, unknown

Axes = tuple[str, ...]
Path = tuple[tuple[int, int], ...]

SEARCHES = ("auto", "cotengra", "left_to_right")
_EXHAUSTIVE = 5  # operands up to which every tree is enumerated: 105 trees at five
_HYPER = 10  # operands above which cotengra's dynamic programming gives way to its seeded hyper-optimiser


def search(inputs: Sequence[Axes], output: Axes, sizes: Mapping[str, int], *, method: str = "auto", seed: int = 0) -> list[Path]:
    """Trees worth laying out: every tree of few operands, cotengra's otherwise.

    Args:
        inputs: axes of each operand (no repeated axis inside one). output: axes that survive.
        method: "auto", "cotengra" (its trees alone), "left_to_right" (the order as written).
        seed: of cotengra's search when there are many operands.

    Returns:
        At least one path, none twice. Raises PlanError for an unknown method.
    """
    count = len(inputs)
    if method not in SEARCHES:
        raise PlanError(unknown("search", method, SEARCHES))
    if count == 1:
        return [()]
    if method == "left_to_right":
        ids = [0, *range(count, 2 * count - 2)]
        return [tuple((ids[i], i + 1) for i in range(count - 1))]
    if method == "auto" and count <= _EXHAUSTIVE:
        return list(_every_path(count))
    return list(dict.fromkeys(_canonical(path, count) for path in _cotengra_paths(inputs, output, sizes, seed)))


def steps_of(path: Path, inputs: Sequence[Axes], output: Axes) -> Iterator[tuple[int, int, Axes]]:
    """(left, right, axes of the result) of each pair: an axis survives while another tensor or the output needs it."""
    alive = dict(enumerate(inputs))
    for number, (left, right) in enumerate(path):
        a, b = alive.pop(left), alive.pop(right)
        needed = set(output).union(*alive.values())
        out = tuple(axis for axis in dict.fromkeys((*a, *b)) if axis in needed)
        alive[len(inputs) + number] = out
        yield left, right, out


def tree(path: Path, inputs: Sequence[Axes], output: Axes, sizes: Mapping[str, int]) -> Any:
    """The path as a `cotengra.ContractionTree`."""
    import cotengra  # late: keeps `import tn` light

    return cotengra.ContractionTree.from_path(inputs, output, dict(sizes), ssa_path=path)


def _cotengra_paths(inputs: Sequence[Axes], output: Axes, sizes: Mapping[str, int], seed: int) -> Iterator[Path]:
    import cotengra  # late: keeps `import tn` light

    searched = {axis: max(size, 1) for axis, size in sizes.items()}
    for minimize in ("flops", "write", "combo"):
        if len(inputs) <= _HYPER:
            optimizer = cotengra.OptimalOptimizer(minimize=minimize)
        else:
            optimizer = cotengra.HyperOptimizer(
                methods=["greedy"], minimize=minimize, optlib="random", parallel=False, max_repeats=32, seed=seed, progbar=False
            )
        found = cotengra.array_contract_tree([tuple(t) for t in inputs], tuple(output), searched, optimize=optimizer)
        yield tuple((left, right) for left, right in found.get_ssa_path())


@functools.cache
def _every_path(count: int) -> tuple[Path, ...]:
    """Every binary tree over so many operands."""
    return tuple(_canonical(_to_path(tree, count), count) for tree in _trees(tuple(range(count))))


@functools.lru_cache(maxsize=16)
def _trees(leaves: tuple[int, ...]) -> tuple:
    """Every binary tree over the leaves, as nested pairs."""
    if len(leaves) == 1:
        return (leaves[0],)
    first, rest = leaves[0], leaves[1:]
    found = []
    for size in range(len(rest)):
        for chosen in itertools.combinations(rest, size):
            others = tuple(leaf for leaf in rest if leaf not in chosen)
            found += [(left, right) for left in _trees((first, *chosen)) for right in _trees(others)]
    return tuple(found)


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
