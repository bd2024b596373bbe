"""low_rank: W = second ∘ first through a narrow middle. y_o = Σ_r second_ro Σ_i first_ir x_i."""

import math

from tn.errors import StructureError
from tn.structures.registry import Built, Factors, Structure, checked_rank, register


def build(d_in: int, d_out: int, rank: int | None, factors: Factors | None) -> Built:
    """Cores `first` (in, rank) and `second` (rank, out); the default rank is ⌈√min(d_in, d_out)⌉ (arXiv:2406.06248)."""
    if factors is not None:
        raise StructureError(f"low_rank has no factors, got {factors}")
    least = min(d_in, d_out)
    r = checked_rank("low_rank", rank, math.isqrt(least - 1) + 1, least)
    return Built("x: ... i, first: i r, second: r o -> ... o", dict(i=d_in, r=r, o=d_out), ("first", "second"), r, (), d_in, d_out)


register(Structure("low_rank", "two matrices with a narrow middle", build))
