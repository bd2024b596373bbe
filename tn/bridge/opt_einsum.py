"""What opt_einsum calls `optimize=`, read into contraction orders, and its `PathInfo` of our plans."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import opt_einsum
from opt_einsum.contract import PathInfo

from tn.bridge.paths import to_pairs, to_path
from tn.errors import KindError, OperatorError, unknown
from tn.letters import spell
from tn.order import Path

NAMES = ("auto", "auto-hq", "branch-1", "branch-2", "branch-all", "dp", "eager", "greedy", "optimal", "random-greedy")

Axes = tuple[str, ...]


def route(optimize: Any) -> Hashable:
    """What `optimize=` asks for, as a value that plans are found by.

    Returns:
        "auto" for None, True and "auto": the planner here. "left_to_right" for False: the order as written. Otherwise
        ("path", …), ("named", name, memory limit) or ("optimizer", object), for `pairs_of`.

    Raises:
        OperatorError: a name nobody knows. KindError: a value that is no path and cannot search for one.

    >>> route([(0, 2), (0, 1)])
    ('path', ((0, 2), (0, 1)))
    """
    if optimize is None or optimize is True:
        return "auto"
    if optimize is False:
        return "left_to_right"
    if isinstance(optimize, str):
        return "auto" if optimize == "auto" else ("named", _known(optimize), None)
    if callable(optimize):  # PathOptimizer objects of opt_einsum and cotengra, functions of the same form
        return "optimizer", optimize
    for attribute in ("get_path", "path"):  # a ContractionTree; a PathInfo
        found = getattr(optimize, attribute, None)
        if found is not None:
            return route(found() if callable(found) else found)
    if not isinstance(optimize, Sequence):
        raise KindError(f"optimize={optimize!r}: expected True, False, a name ({', '.join(NAMES)}), a path or an optimizer")
    if len(optimize) == 2 and optimize[0] in NAMES:  # NumPy's ("greedy", memory limit)
        return "named", optimize[0], optimize[1]
    steps = optimize[1:] if optimize and optimize[0] == "einsum_path" else optimize
    if not all(isinstance(step, Sequence) and all(hasattr(position, "__index__") for position in step) for step in steps):
        raise KindError(f"optimize={optimize!r} is no path: expected positions to contract, such as [(0, 1), (0, 1)]")
    return "path", tuple(tuple(int(position) for position in step) for step in steps)


def pairs_of(asked: Hashable, inputs: Sequence[Axes], output: Axes, sizes: Mapping[str, int]) -> Path:
    """The order that a route other than ours stands for, as pairs of SSA values."""
    assert isinstance(asked, tuple)
    kind, value, *rest = asked
    if kind == "path":
        return to_pairs(value, len(inputs))
    letters, size = _letters(inputs, output, sizes)
    search = opt_einsum.paths.get_path_fn(value) if kind == "named" else value
    terms, result = letters.split("->")
    found = search([frozenset(term) for term in terms.split(",")], frozenset(result), size, *rest)
    return to_pairs([tuple(step) for step in found], len(inputs))


class PathReport(PathInfo):
    """opt_einsum's `PathInfo` of one of our plans. It unpacks into (path, info), as what `opt_einsum.contract_path` returns does."""

    def __init__(self, info: PathInfo) -> None:
        self.__dict__.update(vars(info))

    def __iter__(self) -> Iterator[Any]:
        return iter((self.path, self))

    def __len__(self) -> int:
        return 2

    def __getitem__(self, position: int) -> Any:
        return (self.path, self)[position]


def report(equation: str, shapes: Sequence[Sequence[int]], pairs: Path) -> PathReport:
    """The costs of an order as opt_einsum counts them: FLOPs of multiplications and additions, elements, scaling."""
    path: list[tuple[int, ...]] = [*to_path(pairs, len(shapes))] or [(0,)]
    return PathReport(opt_einsum.contract_path(equation, *map(tuple, shapes), shapes=True, optimize=path)[1])


def _known(name: str) -> str:
    try:
        opt_einsum.paths.get_path_fn(name)
    except KeyError:
        raise OperatorError(unknown("optimize", name, NAMES)) from None
    return name


def _letters(inputs: Sequence[Axes], output: Axes, sizes: Mapping[str, int]) -> tuple[str, dict[str, int]]:
    """The equation in letters, which some optimizers insist on, and the size of each letter."""
    letters = spell(inputs, output)
    terms = letters.split("->")[0].split(",")
    pairs = (pair for term, words in zip(terms, inputs, strict=True) for pair in zip(term, words, strict=True))
    return letters, {letter: sizes[word] for letter, word in pairs}
