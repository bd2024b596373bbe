"""dense: one core, the full matrix. y_o = Σ_i W_oi x_i."""

from tn.errors import StructureError
from tn.structures.registry import Built, Factors, Structure, register


def build(d_in: int, d_out: int, rank: int | None, factors: Factors | None) -> Built:
    """One core `weight` (out, in)."""
    if rank is not None or factors is not None:
        raise StructureError(f"dense has neither rank nor factors, got rank={rank}, factors={factors}")
    return Built("x: ... i, weight: o i -> ... o", dict(i=d_in, o=d_out), ("weight",), None, (), d_in, d_out)


register(Structure("dense", "one full matrix", build))
