"""monarch: two block-diagonal matrices with a permutation between them (Dao et al. 2022, arXiv:2204.00595).

`blocks` blocks on both sides (4 by default). With no more blocks than a block is wide, this is a grid of blocks × blocks matrices of rank
q, as wide in the middle as the narrower side: y_ls = Σ_kq second_lkqs Σ_p first_kpql x_kp. With more blocks than that, the middle can no
longer join all of them and the map falls into m parallel parts. The output order is (l m s).
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from tn.errors import StructureError
from tn.structures.factors import blocks, full_blocks
from tn.structures.registry import Built, Factors, Options, Structure, checked_count, register

_BLOCKS = 4


def default_factors(d_in: int, d_out: int, options: Options) -> Factors:
    """((k, m, p), (l, m, s)) for the wanted number of blocks k·m = m·l.

    >>> default_factors(1024, 4096, Options()), default_factors(1024, 1024, Options(blocks=64))
    (((4, 1, 256), (4, 1, 1024)), ((16, 4, 16), (16, 4, 16)))
    """
    if isinstance(options.blocks, tuple | list):
        raise StructureError(f"monarch has one number of blocks, got {options.blocks}")
    count = blocks(d_in, d_out, _BLOCKS) if options.blocks is None else options.blocks
    count = checked_count("monarch", "blocks", count, max(d_in, d_out))
    p, s = -(-d_in // count), -(-d_out // count)
    joined = min(n for n in range(1, count + 1) if count % n == 0 and n >= min(p, s, count))
    if joined < count and not (full_blocks(d_in, count) and full_blocks(d_out, count)):
        raise StructureError(f"monarch with {count} blocks of {d_in} → {d_out} has blocks that are padding alone; take fewer blocks")
    m = count // joined
    return (joined, m, p), (joined, m, s)


def default_rank(factors: Factors, options: Options) -> int:
    """The middle as wide as the narrower side."""
    (k, _, p), (_, _, s) = factors
    return -(-min(p, s) // k)


def from_block_diagonal(built: Built, cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Parallel parts of one block each: the matrix on its narrower side, nothing on the other."""
    weight = cores["weight"]  # (b, i, o)
    count, i, o = weight.shape
    eye = torch.eye(min(i, o), dtype=weight.dtype, device=weight.device).expand(count, -1, -1)
    first, second = (eye, weight) if i <= o else (weight, eye)
    return {"first": first[None, ..., None], "second": second[None, :, None]}


register(
    Structure(
        name="monarch",
        summary="two block-diagonal matrices and a permutation",
        spec=lambda _: "x: ... (k m p), first: k m p q l, second: l m k q s -> ... (l m s)",
        factors=default_factors,
        rank=default_rank,
        takes=("rank", "factors", "blocks"),
        varies="blocks",
        contains={"block_diagonal": from_block_diagonal},
    )
)
