"""tt: tensor train (matrix product operator): core n turns input axis n into output axis n.

y_{m_1…} = Σ x_{n_1…} Π_n core_n[r_{n-1}, i_n, o_n, r_n]. Parameters Σ r·i·o·r; every one is used many times a row. The default rank is 16,
the paper's for MLPs (arXiv:2406.06248).
"""

from collections.abc import Mapping

from torch import Tensor

from tn.structures import chain
from tn.structures.factors import Split
from tn.structures.registry import Built, Factors, Options, Structure, register

_RANK = 16


def spec(count: int) -> str:
    """The spec of a chain of `count` cores.

    >>> spec(2)
    'x: ... (i j), first: i k r, second: r j l -> ... (k l)'
    """
    ins, outs, ranks = chain.words(count)
    links = ("", *ranks, "")
    cores = [tuple(axis for axis in (links[n], ins[n], outs[n], links[n + 1]) if axis) for n in range(count)]
    return chain.text(ins, cores, outs)


def parameters(ins: Split, outs: Split, ranks: tuple[int, ...]) -> int:
    """Elements of all cores."""
    links = (1, *ranks, 1)
    return sum(left * i * o * right for left, i, o, right in zip(links, ins, outs, links[1:], strict=False))


def default_factors(d_in: int, d_out: int, options: Options) -> Factors:
    """See `chain.default_factors`.

    >>> default_factors(1024, 4096, Options())
    ((32, 32), (64, 64))
    """

    def ranks(factors: Factors) -> Split:
        return chain.given_ranks(options, _RANK, len(factors[0]))

    return chain.default_factors("tt", d_in, d_out, options, descending=False, ranks=ranks, cost=parameters, widths=chain.train_widths)


def from_kronecker(built: Built, cores: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A sum of r Kronecker products is a train of rank r whose middle cores are diagonal in the rank."""
    found: dict[str, Tensor] = {}
    names = list(cores)
    for name in names:
        core = cores[name]  # (r, i, o)
        if name == names[0]:
            found[name] = core.permute(1, 2, 0)
        elif name == names[-1]:
            found[name] = core
        else:
            found[name] = core.permute(1, 2, 0).diag_embed().permute(2, 0, 1, 3)
    return found


register(
    Structure(
        name="tt",
        summary="tensor train: a chain of small cores",
        spec=spec,
        factors=default_factors,
        rank=lambda factors, options: _RANK,
        takes=("rank", "factors", "cores"),
        contains={"kronecker": from_kronecker},
    )
)
