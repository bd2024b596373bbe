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
    """(first (in, rank), second (rank, out)) nearest to a matrix (out, in): Eckart and Young, with inputs whitened by SVD-LLM.

    Q, the left singular vectors, from eigenvectors of the smaller Gram matrix is several times faster than a decomposition of the matrix,
    and Q Qᵀ W has the same error to rounding."""
    matrix = weight if white is None else weight @ white
    if matrix.shape[0] <= matrix.shape[1]:
        basis = torch.linalg.eigh(matrix @ matrix.mT)[1].flip(-1)[:, :rank]
    else:
        basis = torch.linalg.qr(matrix @ torch.linalg.eigh(matrix.mT @ matrix)[1].flip(-1)[:, :rank])[0]
    first = weight.mT @ basis
    size = first.norm(dim=0).sqrt()
    size = torch.where(size > 0, size, 1)
    return first / size, (basis * size).mT


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
