"""kronecker: a sum of `rank` Kronecker products of small matrices, W = Σ_r first_r ⊗ second_r ⊗ …; one product by default."""

import math

from tn.structures import chain
from tn.structures.factors import Split
from tn.structures.registry import Factors, Options, Structure, register


def spec(count: int) -> str:
    """The spec of products of `count` matrices.

    >>> spec(2)
    'x: ... (i j), first: r i k, second: r j l -> ... (k l)'
    """
    ins, outs, _ = chain.words(count)
    return chain.text(ins, [("r", i, o) for i, o in zip(ins, outs, strict=True)], outs)


def _parameters(ins: Split, outs: Split, ranks: tuple[int, ...]) -> int:
    return sum(i * o for i, o in zip(ins, outs, strict=True))


def default_factors(d_in: int, d_out: int, options: Options) -> Factors:
    """See `chain.default_factors`."""

    def ranks(factors: Factors) -> Split:
        return (1,) * (len(factors[0]) - 1)

    return chain.default_factors(
        "kronecker", d_in, d_out, options, descending=False, ranks=ranks, cost=_parameters, widths=chain.train_widths
    )


def full(factors: Factors) -> int:
    """As many products as all matrices but the largest have elements together."""
    sizes = sorted(i * o for i, o in zip(*factors, strict=True))
    return math.prod(sizes[:-1])


register(
    Structure(
        name="kronecker",
        summary="a sum of Kronecker products",
        spec=spec,
        factors=default_factors,
        rank=lambda factors, options: 1,
        full=full,
        takes=("rank", "factors", "cores"),
    )
)
