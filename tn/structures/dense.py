"""dense: one core, the full matrix. y_o = Σ_i W_oi x_i."""

from tn.structures.registry import Structure, register

register(
    Structure(
        name="dense",
        summary="one full matrix",
        spec=lambda _: "x: ... i, weight: o i -> ... o",
        factors=lambda d_in, d_out, _: ((d_in,), (d_out,)),
        takes=(),
    )
)
