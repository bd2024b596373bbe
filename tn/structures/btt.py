"""btt: two-core block tensor train (Qiu et al. 2024, arXiv:2406.06248).

With d_in = i·j and d_out = k·l, every block (k, i) of the matrix is an independent l × j matrix of rank r:
y_kl = Σ_i Σ_r second_kirl Σ_j first_ijrk x_ij. Parameters = multiply-adds = r·(k·d_in + i·d_out). Rank 1 is Monarch.
"""

from tn.errors import StructureError
from tn.structures.factors import even, padded, splits
from tn.structures.registry import Built, Factors, Structure, checked_rank, register

SPEC = "x: ... (i j), first: i j r k, second: k i r l -> ... (k l)"


def build(d_in: int, d_out: int, rank: int | None, factors: Factors | None) -> Built:
    """Cores `first` (i, j, r, k) and `second` (k, i, r, l).

    Default factors are the fewest parameters among those whose intermediate r·i·k is at least as wide as that of the most even
    split; sizes without a reasonable split are padded.
    """
    (i, j), (k, l) = _given(d_in, d_out, factors) if factors is not None else default_factors(padded(d_in), padded(d_out))
    r = checked_rank("btt", rank, 1, full=min(j, l))
    return Built(SPEC, dict(i=i, j=j, r=r, k=k, l=l), ("first", "second"), r, ((i, j), (k, l)), i * j, k * l)


def default_factors(d_in: int, d_out: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """((i, j), (k, l)) as `build` chooses them.

    >>> default_factors(768, 3072)
    ((24, 32), (64, 48))
    """
    _j, i = even(d_in)
    k, _l = even(d_out)
    width, spread = i * k, (i, k)

    def parameters(i: int, k: int) -> int:
        return k * d_in + i * d_out

    wide = [(i, k) for i, _ in splits(d_in) for k, _ in splits(d_out) if i * k >= width]
    i, k = min(wide, key=lambda pair: (parameters(*pair), pair != spread, abs(pair[0] - spread[0])))
    return (i, d_in // i), (k, d_out // k)


def _given(d_in: int, d_out: int, factors: Factors) -> Factors:
    for what, size, split in (("d_in", d_in, factors[0]), ("d_out", d_out, factors[1])):
        if len(split) != 2 or any(f < 1 for f in split):
            raise StructureError(f"btt takes two positive factors of {what}, slowest first, got {split}")
        if split[0] * split[1] < size:
            raise StructureError(f"btt factors {split} of {what} make {split[0] * split[1]}, less than {size}")
    return factors


register(Structure("btt", "block tensor train: blocks of independent low-rank matrices", build))
