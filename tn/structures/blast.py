"""blast: blocks that share their factors and differ in a diagonal between them (Lee et al. 2024, arXiv:2410.21262).

Block (i, j) is left_i diag(mix_ij) right_j: y_ip = Σ_r left_irp Σ_j mix_ijr Σ_q right_jqr x_jq. Parameters = multiply-adds =
r·(d_in + d_out + blocks²). `blocks` is a number (4 by default) or (of the output, of the input). The default rank is ⌈√min(d_in, d_out)⌉.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tn.errors import StructureError
from tn.structures import low_rank
from tn.structures.factors import blocks, full_blocks
from tn.structures.registry import Built, Factors, Options, Structure, checked_count, register

_BLOCKS = 4


def default_factors(d_in: int, d_out: int, options: Options) -> Factors:
    """((blocks of the input, width), (blocks of the output, width))."""
    given = options.blocks
    if isinstance(given, tuple | list) and len(given) != 2:
        raise StructureError(f"blast blocks are a number or (of the output, of the input), got {given}")
    counts = tuple(given) if isinstance(given, tuple | list) else (given, given)
    found = []
    for what, size, count in (("output", d_out, counts[0]), ("input", d_in, counts[1])):
        count = checked_count("blast", f"blocks of the {what}", blocks(size, size, _BLOCKS) if count is None else count, size)
        if not full_blocks(size, count):
            raise StructureError(f"blast with {count} blocks of {size} has blocks that are padding alone; take fewer blocks")
        found.append((count, -(-size // count)))
    return found[1], found[0]


def default_rank(factors: Factors, options: Options) -> int:
    """⌈√min(d_in, d_out)⌉."""
    return math.isqrt(min(math.prod(factors[0]), math.prod(factors[1])) - 1) + 1


def from_low_rank(built: Built, cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One block whose diagonal is one."""
    first, second = cores["first"], cores["second"]
    return {"right": first[None], "mix": torch.ones_like(first[:1])[None], "left": second[None]}


def from_block_diagonal(built: Built, cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The blocks' own factors, and a diagonal that is zero off the blocks: one on the narrower side, the matrix on the other."""
    weight = cores["weight"]  # (b, i, o)
    count, i, o = weight.shape
    eye = torch.eye(min(i, o), dtype=weight.dtype, device=weight.device).expand(count, -1, -1)
    right, left = (eye, weight) if i <= o else (weight, eye)
    mix = torch.eye(count, dtype=weight.dtype, device=weight.device)[:, :, None].expand(-1, -1, min(i, o))
    return {"right": right, "mix": mix, "left": left}


def start(built: Built, weight: Tensor, white: Tensor | None) -> dict[str, Tensor]:
    """The nearest matrix of the same rank: a BLAST whose diagonals are all one."""
    s = built.network.sizes
    first, second = low_rank.nearest(weight, s["r"], white)
    cores = {"right": first.reshape(s["j"], s["q"], -1), "left": second.reshape(-1, s["i"], s["p"]).transpose(0, 1)}
    return {**cores, "mix": torch.ones(s["i"], s["j"], s["r"], dtype=weight.dtype, device=weight.device)}


register(
    Structure(
        name="blast",
        summary="blocks that share factors, with a diagonal each",
        spec=lambda _: "x: ... (j q), right: j q r, mix: i j r, left: i r p -> ... (i p)",
        factors=default_factors,
        rank=default_rank,
        full=lambda factors: min(math.prod(factors[0]), math.prod(factors[1])),
        takes=("rank", "factors", "blocks"),
        contains={"low_rank": from_low_rank, "block_diagonal": from_block_diagonal},
        start=start,
    )
)
