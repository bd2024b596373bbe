"""btt_moe: experts of one block tensor train each, of which a gate takes a few for every row (arXiv:2410.02117).

The rank axis counts experts: y = Σ_s gate_s(x) · second_s first_s x, each expert a BTT of rank 1, gate_s the softmax over the largest
`active` of W_gate x and zero for the others. `rank` is the number of experts, 8 by default. Not a linear map: it has no matrix.
"""

from tn.structures.btt import default_factors, spec
from tn.structures.registry import Factors, Options, Structure, register

_EXPERTS = 8


def _factors(d_in: int, d_out: int, options: Options) -> Factors:
    return default_factors(d_in, d_out, Options(factors=options.factors))


register(
    Structure(
        name="btt_moe",
        summary="a few of many block tensor trains, chosen for every row",
        spec=lambda _: spec(2),
        factors=_factors,
        rank=lambda factors, options: _EXPERTS,
        full=lambda factors: 4096,  # any number of experts makes sense
        takes=("rank", "factors", "active"),
        clamped=True,
        gated="r",
    )
)
