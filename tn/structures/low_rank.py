"""low_rank: W = second ∘ first through a narrow middle. y_o = Σ_r second_ro Σ_i first_ir x_i.

The default rank is ⌈√min(d_in, d_out)⌉ (arXiv:2406.06248).
"""

import math

import torch
from torch import Tensor

from tn.structures.registry import Built, Factors, Options, Structure, register


def default_rank(factors: Factors, options: Options) -> int:
    """⌈√min(d_in, d_out)⌉."""
    return math.isqrt(min(factors[0][0], factors[1][0]) - 1) + 1


def nearest(weight: Tensor, rank: int, white: Tensor | None) -> tuple[Tensor, Tensor]:
    """(first (in, rank), second (rank, out)) nearest to a matrix (out, in): Eckart and Young, with inputs whitened by SVD-LLM."""
    u, s, v = torch.linalg.svd(weight if white is None else weight @ white, full_matrices=False)
    u, s, v = u[:, :rank], s[:rank, None].sqrt(), v[:rank]
    if white is not None:
        v = torch.linalg.solve(white, v, left=False)
    return (s * v).mT, s * u.mT


def start(built: Built, weight: Tensor, white: Tensor | None) -> dict[str, Tensor]:
    """The closed form."""
    first, second = nearest(weight, built.network.sizes["r"], white)
    return {"first": first, "second": second}


register(
    Structure(
        name="low_rank",
        summary="two matrices with a narrow middle",
        spec=lambda _: "x: ... i, first: i r, second: r o -> ... o",
        factors=lambda d_in, d_out, _: ((d_in,), (d_out,)),
        rank=default_rank,
        takes=("rank",),
        start=start,
    )
)
