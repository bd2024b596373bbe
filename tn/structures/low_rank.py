"""low_rank: W = second ∘ first through a narrow middle. y_o = Σ_r second_ro Σ_i first_ir x_i.

The default rank is ⌈√min(d_in, d_out)⌉ (arXiv:2406.06248).
"""

import math

from tn.structures.registry import Factors, Options, Structure, register


def default_rank(factors: Factors, options: Options) -> int:
    """⌈√min(d_in, d_out)⌉."""
    return math.isqrt(min(factors[0][0], factors[1][0]) - 1) + 1


register(
    Structure(
        name="low_rank",
        summary="two matrices with a narrow middle",
        spec=lambda _: "x: ... i, first: i r, second: r o -> ... o",
        factors=lambda d_in, d_out, _: ((d_in,), (d_out,)),
        rank=default_rank,
        takes=("rank",),
    )
)
