"""btt: block tensor train (Qiu et al. 2024, arXiv:2406.06248).

Two cores, d_in = i·j and d_out = k·l: every block (k, i) of the matrix is an independent l × j matrix of rank r,
y_kl = Σ_i Σ_r second_kirl Σ_j first_ijrk x_ij. Parameters = multiply-adds = r·(k·d_in + i·d_out). Rank 1 is Monarch with √d blocks.

More cores: the n-th turns the fastest input axis that is left into the next output axis, with one matrix for each value of all the
other axes: nothing is shared, so parameters = multiply-adds always.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tn.structures import chain
from tn.structures.factors import Split
from tn.structures.registry import Built, Factors, Options, Structure, register


def spec(count: int) -> str:
    """The spec of a chain of `count` cores.

    >>> spec(2)
    'x: ... (i j), first: i j r k, second: k i r l -> ... (k l)'
    """
    ins, outs, ranks = chain.words(count)
    links = ("", *ranks, "")
    cores = []
    for n in range(count):
        left = count - 1 - n  # input axes still to come
        axes = (*outs[:n], *ins[:left], ins[left], links[n], links[n + 1], outs[n])
        cores.append(tuple(axis for axis in axes if axis))
    return chain.text(ins, cores, outs)


def _parameters(ins: Split, outs: Split, ranks: tuple[int, ...]) -> int:
    links, count = (1, *ranks, 1), len(ins)
    return sum(math.prod(ins[: count - n]) * math.prod(outs[: n + 1]) * links[n] * links[n + 1] for n in range(count))


def _widths(ins: Split, outs: Split, ranks: tuple[int, ...]) -> Split:
    return chain.train_widths(ins[::-1], outs, ranks)


def default_factors(d_in: int, d_out: int, options: Options) -> Factors:
    """See `chain.default_factors`.

    >>> default_factors(768, 3072, Options())
    ((24, 32), (64, 48))
    """

    def ranks(factors: Factors) -> Split:
        return chain.given_ranks(options, 1, len(factors[0]))

    return chain.default_factors("btt", d_in, d_out, options, descending=True, ranks=ranks, cost=_parameters, widths=_widths)


def from_monarch(built: Built, cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A Monarch matrix whose blocks meet all of each other is a BTT with its rank; the blocks between parallel parts are zero."""
    s = built.network.sizes
    first, second = (cores[name].reshape([s[a] for a in built.network.term(name).axes]) for name in ("first", "second"))
    parts = torch.eye(s["m"], dtype=first.dtype, device=first.device)
    a = torch.einsum("kmpql,mn->kmpqln", first, parts).reshape(s["k"] * s["m"], s["p"], s["q"], s["l"] * s["m"])
    c = torch.einsum("lmkqs,mn->lmknqs", second, parts).reshape(s["l"] * s["m"], s["k"] * s["m"], s["q"], s["s"])
    return {"first": a, "second": c}


def from_low_rank(built: Built, cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Every block of a matrix of rank r has rank r at most: one block."""
    first, second = cores["first"], cores["second"]
    (d_in, r), d_out = first.shape, second.shape[1]
    return {"first": first.reshape(1, d_in, r, 1), "second": second.reshape(1, 1, r, d_out)}


def same(built: Built, cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """btt and btt_norm have the same matrices; gains make up for what a clamp divides by."""
    return dict(cores)


register(
    Structure(
        name="btt",
        summary="block tensor train: blocks of independent low-rank matrices",
        spec=spec,
        factors=default_factors,
        rank=lambda factors, options: 1,
        takes=("rank", "factors", "cores"),
        contains={"monarch": from_monarch, "low_rank": from_low_rank, "btt_norm": same},
    )
)
register(
    Structure(
        name="btt_norm",
        summary="block tensor train whose cores are RMS-clamped, with learned gains",
        spec=spec,
        factors=default_factors,
        rank=lambda factors, options: 1,
        takes=("rank", "factors", "cores"),
        clamped=True,
        contains={"btt": same},
    )
)
