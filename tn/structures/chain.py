"""What the families made of a chain of cores share: names of axes, splits of both sizes, the default choice among them."""

import math
from collections.abc import Callable

from tn.checks import positive
from tn.errors import StructureError
from tn.structures.factors import Split, cheapest, even, greedy, padded
from tn.structures.registry import ORDINALS, Factors, Options, checked_count

Cost = Callable[[Split, Split, tuple[int, ...]], int]
Widths = Callable[[Split, Split, tuple[int, ...]], Split]


def words(count: int) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """(input axes, output axes, rank axes) of a chain, slowest first: letters for two cores, numbered words otherwise.

    Raises:
        StructureError: fewer than two cores, or more than there are names for.
    """
    checked_count("a chain's", "number of cores", count, len(ORDINALS), 2)
    if count == 2:
        return ("i", "j"), ("k", "l"), ("r",)
    numbers = range(1, count + 1)
    return tuple(f"i{n}" for n in numbers), tuple(f"o{n}" for n in numbers), tuple(f"r{n}" for n in range(1, count))


def text(ins: tuple[str, ...], cores: list[tuple[str, ...]], outs: tuple[str, ...]) -> str:
    """The spec of a chain from the axes of its input, cores and output."""
    operands = [f"{name}: {' '.join(axes)}" for name, axes in zip(ORDINALS, cores, strict=False)]
    return f"x: ... ({' '.join(ins)}), {', '.join(operands)} -> ... ({' '.join(outs)})"


def default_factors(
    structure: str,
    d_in: int,
    d_out: int,
    options: Options,
    *,
    descending: bool,
    ranks: Callable[[Factors], Split],
    cost: Cost,
    widths: Widths,
) -> Factors:
    """Factors of both sizes for `options.cores` cores (two by default).

    The fewest parameters among the splits whose intermediates are at least as wide as those of the most even ones; sizes without a
    reasonable split are padded. "compat" takes the greedy split of the paper's code, which pads nothing.

    Args:
        descending: whether the family has the largest factor of d_in first. ranks: factors → the ranks at which they are compared.
        cost, widths: (of d_in, of d_out, ranks) → parameters, sizes of the intermediates.
    """
    count = checked_count(structure, "cores", 2 if options.cores is None else options.cores, len(ORDINALS), 2)
    order = -1 if descending else 1
    if options.factors == "compat":
        return greedy(d_in, count)[::order], greedy(d_out, count)
    ins, outs = even(padded(d_in, count), count)[::order], even(padded(d_out, count), count)
    at = ranks((ins, outs))
    return cheapest(ins, outs, lambda a, b: cost(a, b, at), lambda a, b: widths(a, b, at))


def given_ranks(options: Options, default: int, count: int) -> Split:
    """The ranks asked for, for comparing splits; nonsense is refused later, where the family knows its full ranks."""
    rank = default if options.rank is None else options.rank
    if not isinstance(rank, tuple | list):
        return (rank if positive(rank) else default,) * (count - 1)
    if len(rank) != count - 1 or not all(map(positive, rank)):
        raise StructureError(f"{count} cores take {count - 1} integer ranks ≥ 1, got {tuple(rank)}")
    return tuple(rank)


def train_widths(ins: Split, outs: Split, ranks: tuple[int, ...]) -> Split:
    """Widths after each core but the last, each core turning the next input axis into an output axis."""
    return tuple(rank * math.prod(outs[:n]) * math.prod(ins[n:]) for n, rank in enumerate(ranks, 1))
