"""kronecker: a sum of `rank` Kronecker products of small matrices, W = Σ_r first_r ⊗ second_r ⊗ …; one product by default."""

import heapq
import math

import torch
from torch import Tensor

from tn.structures import chain
from tn.structures.factors import Split
from tn.structures.registry import Built, Factors, Options, Structure, register


def spec(count: int) -> str:
    """The spec of products of `count` matrices.

    >>> spec(2)
    'x: ... (i j), first: r i k, second: r j l -> ... (k l)'
    """
    ins, outs, _ = chain.words(count)
    return chain.text(ins, [("r", i, o) for i, o in zip(ins, outs, strict=True)], outs)


def _parameters(ins: Split, outs: Split, ranks: tuple[int, ...]) -> int:
    return sum(i * o for i, o in zip(ins, outs, strict=True))


def default_factors(d_in: int, d_out: int, options: Options) -> Factors:
    """See `chain.default_factors`."""

    def ranks(factors: Factors) -> Split:
        return (1,) * (len(factors[0]) - 1)

    return chain.default_factors(
        "kronecker", d_in, d_out, options, descending=False, ranks=ranks, cost=_parameters, widths=chain.train_widths
    )


def full(factors: Factors) -> int:
    """As many products as all matrices but the largest have elements together."""
    sizes = sorted(i * o for i, o in zip(*factors, strict=True))
    return math.prod(sizes[:-1])


def _terms(tensor: Tensor, most: int) -> list[tuple[float, list[Tensor]]]:
    """The largest products of vectors, one for each dimension, that repeated singular value decompositions find: (size, vectors)."""
    if tensor.dim() == 1:
        size = float(torch.linalg.norm(tensor))
        return [(size, [tensor / size if size else tensor])]
    u, s, v = torch.linalg.svd(tensor.flatten(1), full_matrices=False)
    found = [
        (float(s[n]) * size, [u[:, n], *vectors])
        for n in range(min(most, len(s)))
        for size, vectors in _terms(v[n].reshape(tensor.shape[1:]), most)
    ]
    return heapq.nlargest(most, found, key=lambda term: term[0])


def start(built: Built, weight: Tensor, white: Tensor | None) -> dict[str, Tensor]:
    """The largest terms of repeated decompositions; all of them together are the matrix."""
    assert built.factors is not None
    ins, outs = built.factors
    count, rank = len(ins), built.network.sizes["r"]
    order = sorted(range(count), key=lambda n: ins[n] * outs[n])  # the largest last: then all terms are as many as the full rank
    pairs = [axis for n in order for axis in (count + n, n)]  # (in, out) of each matrix beside each other
    tensor = weight.reshape(*outs, *ins).permute(pairs).reshape([ins[n] * outs[n] for n in order])
    terms = _terms(tensor, rank)
    return {
        name: torch.stack([size ** (1 / count) * vectors[order.index(n)] for size, vectors in terms]).reshape(rank, ins[n], outs[n])
        for n, name in enumerate(built.network.cores)
    }


register(
    Structure(
        name="kronecker",
        summary="a sum of Kronecker products",
        spec=spec,
        factors=default_factors,
        rank=lambda factors, options: 1,
        full=full,
        takes=("rank", "factors", "cores"),
        start=start,
    )
)
