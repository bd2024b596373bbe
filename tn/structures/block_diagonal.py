"""block_diagonal: `blocks` independent matrices (4 by default). y_bo = Σ_i weight_bio x_bi."""

from tn.errors import StructureError
from tn.structures.factors import blocks, full_blocks
from tn.structures.registry import Factors, Options, Structure, checked_count, register

_BLOCKS = 4


def default_factors(d_in: int, d_out: int, options: Options) -> Factors:
    """((blocks, width in), (blocks, width out))."""
    if isinstance(options.blocks, tuple | list):
        raise StructureError(f"block_diagonal has one number of blocks, got {options.blocks}")
    count = blocks(d_in, d_out, _BLOCKS) if options.blocks is None else options.blocks
    count = checked_count("block_diagonal", "blocks", count, min(d_in, d_out))
    if not (full_blocks(d_in, count) and full_blocks(d_out, count)):
        raise StructureError(f"block_diagonal with {count} blocks of {d_in} → {d_out} has blocks that are padding alone; take fewer blocks")
    return (count, -(-d_in // count)), (count, -(-d_out // count))


register(
    Structure(
        name="block_diagonal",
        summary="independent matrices beside each other",
        spec=lambda _: "x: ... (b i), weight: b i o -> ... (b o)",
        factors=default_factors,
        takes=("factors", "blocks"),
        varies="blocks",
    )
)
