"""squared_attention in its quadratic and its linear form."""

import pytest
import torch

from tests.kernels.oracle import DEVICE, DTYPES, check, strided
from tn.errors import OperatorError
from tn_kernels import chunked, pair_read, pair_write, rotary, squared_attention, tuning
from tn_kernels.launch import config
from tn_kernels.squared_attention import cheaper_chunked, flops


def pattern(q, k, v, q2=None, k2=None, causal=True):
    """One sum over everything, heads of k repeated."""
    q2, k2 = (q, k) if q2 is None else (q2, k2)
    k, k2, v = (t.repeat_interleave(q.shape[1] // max(t.shape[1], 1), 1) for t in (k, k2, v))
    p = torch.einsum("bhsd,bhtd->bhst", q, k) * torch.einsum("bhsd,bhtd->bhst", q2, k2) / max(q.shape[3], 1) ** 2
    s, t = q.shape[2], k.shape[2]
    allow = torch.arange(t)[None, :] <= torch.arange(s)[:, None] + t - s if causal else torch.ones(s, t, dtype=torch.bool)
    return torch.einsum("bhst,bhte->bhse", p * allow.to(p), v)


SMALL = {name: config(BM=16, BN=16) for name in ("squared_attention_forward", "squared_attention_queries", "squared_attention_keys")}
# b h g s t d e
CASES = {
    "square": (2, 2, 2, 35, 35, 8, 8),
    "grouped, more keys": (1, 4, 2, 18, 37, 5, 20),
    "one query": (2, 3, 1, 1, 19, 16, 3),
    "ones": (1, 1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_squared(name, dtype, pairs, causal):
    b, h, g, s, t, d, e = CASES[name]
    tensors = [strided(b, h, s, d, order=(0, 2, 1, 3)), strided(b, g, t, d, order=(3, 0, 1, 2)), strided(b, g, t, e, step=2)]
    tensors += [strided(b, h, s, d), strided(b, g, t, d, order=(2, 1, 0, 3))] if pairs == 2 else []
    with tuning.using(**SMALL):
        check(
            lambda *o: squared_attention(*o, causal=causal),
            lambda *o: pattern(*o, causal=causal),
            tensors, dtype, terms=3 * d + s * h + t + e, stages=6,
        )  # fmt: skip


def test_with_the_usual_blocks():
    check(squared_attention, pattern, (strided(1, 1, 70, 8), strided(1, 1, 70, 8), strided(1, 1, 70, 8)), torch.float32, terms=200)


EMPTY = [(0, 1, 1, 3, 3, 2, 2), (1, 2, 1, 0, 3, 2, 2), (1, 1, 1, 2, 2, 0, 2), (1, 1, 1, 2, 2, 2, 0), (1, 0, 1, 2, 2, 2, 2)]


@pytest.mark.parametrize("sizes", EMPTY)
def test_size_zero(sizes):
    b, h, g, s, t, d, e = sizes
    check(squared_attention, pattern, (strided(b, h, s, d), strided(b, g, t, d), strided(b, g, t, e)), torch.float32, terms=20)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pairs", [1, 2])
def test_chunked(pairs, dtype):
    """Grouped heads, a last chunk that is not whole."""
    b, h, g, t, d, e = 1, 4, 2, 37, 5, 6
    tensors = [strided(b, h, t, d), strided(b, g, t, d, order=(0, 2, 1, 3)), strided(b, g, t, e)]
    tensors += [strided(b, h, t, d), strided(b, g, t, d)] if pairs == 2 else []
    check(lambda *o: chunked(*o, chunk=16), pattern, tensors, dtype, terms=3 * d + h * t + d * d, stages=10)


def test_chunked_is_chosen_where_it_is_cheaper():
    def choice(t, d):
        q = torch.empty(1, 8, t, d, device="meta")
        return cheaper_chunked(q, q, q)

    assert choice(2048, 16)
    assert not choice(512, 64)
    assert choice(16384, 64)
    q = torch.empty(2, 4, 10, 8, device="meta")
    assert flops(q, q, q) == 2 * 2 * 4 * 55 * (8 + 8)  # 55 pairs of a query and a key it sees


def write(x, y, z):
    return torch.einsum("pta,ptb,ptc->pabc", x, y, z)


def read(x, y, s):
    return torch.einsum("pta,ptb,pabc->ptc", x, y, s)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 20, 3, 5, 17), (1, 1, 1, 1, 1), (2, 0, 3, 2, 2), (0, 3, 2, 2, 2), (2, 3, 0, 2, 2)])
def test_pair_state(sizes, dtype):
    p, t, a, b, c = sizes
    terms = 2 * t + a * b + c
    check(pair_write, write, (strided(p, t, a), strided(p, t, b, order=(2, 0, 1)), strided(p, t, c, step=2)), dtype, terms=terms, stages=3)
    check(
        pair_read, read, (strided(p, t, a), strided(p, t, b, step=3), strided(p, a, b, c, order=(3, 1, 0, 2))), dtype, terms=terms, stages=3
    )


OPERANDS = {
    "squared_attention": lambda: (
        strided(1, 2, 3, 4), strided(1, 1, 5, 4), strided(1, 1, 5, 2, order=(3, 2, 1, 0)),
        strided(1, 2, 3, 4), strided(1, 1, 5, 4), 0.5, True,
    ),
    "rotary": lambda: (strided(1, 2, 5, 6), *angles(5, 2), False),
    "pair_write": lambda: (strided(2, 3, 2), strided(2, 3, 4), strided(2, 3, 5)),
    "pair_read": lambda: (strided(2, 3, 2), strided(2, 3, 4), strided(2, 2, 4, 5)),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERANDS)
def test_opcheck(name):
    operands = [
        value.to(DEVICE, torch.float32).requires_grad_() if isinstance(value, torch.Tensor) else value for value in OPERANDS[name]()
    ]
    torch.library.opcheck(getattr(torch.ops.tn, name).default, operands)


def test_wrong_operands():
    q, k = torch.ones(1, 4, 3, 2, device=DEVICE), torch.ones(1, 3, 3, 2, device=DEVICE)
    with pytest.raises(OperatorError, match="4 heads of q do not share 3 heads of k evenly"):
        squared_attention(q, k, k)
    with pytest.raises(OperatorError, match=r"expected \(b h s d\), \(b g t d\), \(b g t e\)"):
        squared_attention(q, q[..., :1], q)
    with pytest.raises(OperatorError, match="a causal pattern needs at least as many keys as queries"):
        squared_attention(q, q[:, :, :2], q[:, :, :2])
    with pytest.raises(OperatorError, match="both q2 and k2, or neither"):
        squared_attention(q, q, q, q)
    with pytest.raises(OperatorError, match="head widths up to 256"):
        squared_attention(*torch.ones(3, 1, 1, 2, 300, device=DEVICE))
    with pytest.raises(OperatorError, match="of 3 queries and 4 keys: expected as many of both"):
        chunked(q[:, :, :3], *torch.ones(2, 1, 4, 4, 2, device=DEVICE))


def turned(x, cos, sin):
    """Complex numbers times e^{iφ}: an oracle that has no halves to mix up."""
    r, s = cos.shape[1], x.shape[2]
    z = torch.complex(x[..., :r], x[..., r : 2 * r]) * torch.complex(cos, sin)[-s:]
    return torch.cat([z.real, z.imag, x[..., 2 * r :]], -1)


def turned_pattern(q, k, v, *rest, causal=True):
    *pair, cos, sin = rest
    return pattern(turned(q, cos, sin), turned(k, cos, sin), v, *(turned(t, cos, sin) for t in pair), causal=causal)


def angles(positions, r):
    phi = torch.arange(positions, dtype=torch.float64)[:, None] * 10000.0 ** -torch.linspace(0, 1, r, dtype=torch.float64)
    return phi.cos(), phi.sin()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(2, 3, 35, 8, 4), (1, 1, 70, 20, 5), (1, 2, 1, 16, 8), (1, 1, 5, 6, 0)])
def test_rotary(sizes, dtype):
    b, h, s, d, r = sizes
    x, tables = strided(b, h, s, d, order=(0, 2, 1, 3)), angles(s, r)
    check(rotary, turned, (x, *tables), dtype, terms=4, stages=4, positive=positive_turn)
    back = rotary(rotary(x, *tables), *tables, inverse=True)
    torch.testing.assert_close(back, x)


def positive_turn(x, cos, sin):
    r = cos.shape[1]
    one, two, rest = x.split([r, r, x.shape[3] - 2 * r], -1)
    return torch.cat([one * cos + two * sin, two * cos + one * sin, rest], -1)


@pytest.mark.parametrize("pairs", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_squared_attention_of_turned_queries_and_keys(dtype, pairs):
    b, h, g, s, t, d, e, r = 1, 4, 2, 18, 37, 10, 6, 4
    tensors = [strided(b, h, s, d), strided(b, g, t, d), strided(b, g, t, e)]
    tensors += [strided(b, h, s, d), strided(b, g, t, d)] if pairs == 2 else []

    def bound(q, k, v, *rest):
        *pair, cos, sin = rest
        first = t - s

        def turn(x):
            return positive_turn(x, *(table[first if x.shape[2] == s else 0 :] for table in (cos, sin)))

        return pattern(turn(q), turn(k), v, *map(turn, pair))

    check(
        lambda *o: squared_attention(*o[:-2], rotary=o[-2:]),
        turned_pattern, [*tensors, *angles(t, r)], dtype, terms=3 * d + s * h + t + e, stages=12, positive=bound,
    )  # fmt: skip


def test_the_linear_form_of_turned_queries_and_keys():
    q, k, v = (torch.randn(1, 2, 37, 8, device=DEVICE) for _ in range(3))
    tables = tuple(table.float().to(DEVICE) for table in angles(40, 3))
    torch.testing.assert_close(
        chunked(q, k, v, chunk=16, rotary=tables), squared_attention(q, k, v, rotary=tables), rtol=1e-4, atol=1e-4
    )


def test_tables_that_do_not_fit():
    q = torch.randn(1, 1, 9, 8, device=DEVICE)
    cos, sin = (table.float().to(DEVICE) for table in angles(5, 3))
    with pytest.raises(OperatorError, match=r"cos \(5, 3\) and sin \(5, 3\): expected two of \(at least 9 positions, at most 4\)"):
        squared_attention(q, q, q, rotary=(cos, sin))
    with pytest.raises(OperatorError, match="rotary of 9 queries and 4 keys"):
        squared_attention(q, q[:, :, :4], q[:, :, :4], causal=False, rotary=(cos, sin))
    wide = torch.ones(9, 5, device=DEVICE)
    with pytest.raises(OperatorError, match="at most 4"):
        squared_attention(q, q, q, rotary=(wide, wide))
