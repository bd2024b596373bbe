"""batch_reduced_gemm, strided_gemm, gated: products of two, with what surrounds them."""

import math

import pytest
import torch

from tests.kernels.oracle import DEVICE, DTYPES, check, strided
from tn.errors import OperatorError
from tn_kernels import batch_reduced_gemm, gated, strided_gemm, tuning
from tn_kernels.launch import config
from tn_kernels.pointwise import ACTIVATIONS


def summed(a, b):
    return torch.einsum("bmk,bkn->mn", a, b)


REDUCED = {
    "long k": ((3, 20, 70, 17), None, None),
    "short k": ((40, 5, 3, 6), None, None),
    "batch last": ((4, 18, 33, 5), (1, 2, 0), (2, 1, 0)),
    "ones": ((1, 1, 1, 1), None, None),
}


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", REDUCED)
def test_batch_reduced(name, dtype, deterministic):
    (b, m, k, n), a_order, b_order = REDUCED[name]
    tensors = strided(b, m, k, order=a_order), strided(b, k, n, order=b_order, step=2)
    cut = config(BM=16, BN=16, BK=16)
    with tuning.using(batch_reduced_gemm=cut):  # several parts of the sum
        check(lambda a, b: batch_reduced_gemm(a, b, deterministic=deterministic), summed, tensors, dtype, terms=b * k + m + n, stages=1)


def test_batch_reduced_with_the_usual_blocks():
    check(batch_reduced_gemm, summed, (strided(2, 40, 50), strided(2, 50, 60)), torch.float32, terms=200)


def test_batch_reduced_repeats():
    a, b = (t.float().to(DEVICE) for t in (strided(60, 5, 9), strided(60, 9, 6)))
    assert torch.equal(batch_reduced_gemm(a, b), batch_reduced_gemm(a, b))


@pytest.mark.parametrize("empty", range(4))
def test_batch_reduced_size_zero(empty):
    sizes = [2, 3, 4, 5]
    sizes[empty] = 0
    b, m, k, n = sizes
    check(batch_reduced_gemm, summed, (strided(b, m, k), strided(b, k, n)), torch.float32, terms=20)


def product(a, b, bias=None, other=None, scale=1.0, activation="none"):
    y = scale * torch.einsum("abcdefgh,abfghijk->abcdeijk", a, b)
    y = ACTIVATIONS[activation](y if bias is None else y + (bias[:, :, None, None, None] if bias.dim() == 5 else bias))
    return y if other is None else y * other


STRIDED = {
    "two batches": ((2, 3, 5, 1, 1, 7, 1, 1, 6, 1, 1), None, None, range(8)),
    "three of each": ((2, 1, 2, 3, 4, 3, 2, 3, 5, 2, 2), (5, 2, 0, 6, 3, 1, 7, 4), (3, 7, 0, 5, 2, 6, 1, 4), (5, 2, 6, 0, 3, 1, 7, 4)),
    "off the grid": ((1, 1, 33, 1, 1, 40, 1, 1, 35, 1, 1), None, (5, 6, 7, 0, 1, 2, 3, 4), (5, 6, 7, 0, 1, 2, 3, 4)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", STRIDED)
def test_strided(name, dtype):
    (h, g, m1, m2, m3, k1, k2, k3, n1, n2, n3), a_order, b_order, order = STRIDED[name]
    tensors = strided(h, g, m1, m2, m3, k1, k2, k3, order=a_order), strided(h, g, k1, k2, k3, n1, n2, n3, order=b_order)
    with tuning.using(strided_gemm=config(BM=16, BN=16, BK=16)):
        check(lambda a, b: strided_gemm(a, b, order=order), product, tensors, dtype, terms=64, stages=1)
    y = strided_gemm(*(t.float().to(DEVICE) for t in tensors), order=order)
    assert y.permute(*order).is_contiguous()


def _slopes(x, kind):
    return torch.autograd.functional.jacobian(lambda x: ACTIVATIONS[kind](x).sum(), x).abs()


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_bias, with_other", [(True, True), (True, False), (False, True), (False, False)])
def test_epilogues(activation, with_bias, with_other):
    """fp32 against float64 with torch's derivatives. Slopes are below 1.2 except the square's: errors of the inside pass through them."""
    a, b = strided(1, 2, 3, 2, 1, 5, 1, 1), strided(1, 2, 5, 1, 1, 4, 1, 1)
    bias = [strided(4, 1, 1)] if with_bias else []
    other = [strided(1, 2, 3, 2, 1, 4, 1, 1, order=(7, 6, 5, 4, 3, 2, 1, 0))] if with_other else []

    def named(function):
        def call(a, b, *rest):
            given = iter(rest)
            bias_of, other_of = next(given) if with_bias else None, next(given) if with_other else None
            return function(a, b, bias=bias_of, other=other_of, scale=0.25, activation=activation)

        return call

    def positive(a, b, *rest):
        given = iter(rest)
        inside = 0.25 * torch.einsum("abcdefgh,abfghijk->abcdeijk", a, b) + (next(given) if with_bias else 0)
        outside = {"square": 2 * inside * inside, "sigmoid": 2 * inside + 1}.get(activation, 2 * inside + inside * inside)
        return outside * (next(given) if with_other else 1)

    check(named(strided_gemm), named(product), (a, b, *bias, *other), torch.float32, terms=20, positive=positive)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bias_of_each_product(dtype):
    def positive(a, b, bias):
        return product(a, b, bias.abs())

    tensors = strided(2, 3, 33, 1, 1, 5, 1, 1), strided(2, 3, 5, 1, 1, 4, 1, 5), strided(2, 3, 4, 1, 5, order=(4, 1, 0, 3, 2))
    check(lambda a, b, bias: strided_gemm(a, b, bias=bias), product, tensors, dtype, terms=60, stages=2, positive=positive)


def test_strided_wrong_operands():
    a, b = torch.ones(1, 1, 2, 1, 1, 3, 1, 1, device=DEVICE), torch.ones(1, 1, 3, 1, 1, 4, 1, 1, device=DEVICE)
    with pytest.raises(OperatorError, match=r"expected \(h h m m m k k k\) and \(h h k k k n n n\)"):
        strided_gemm(a, a)
    with pytest.raises(OperatorError, match=r"with bias \(1, 1, 3, 1, 1\): expected \(1, 1, 4, 1, 1\)"):
        strided_gemm(a, b, bias=torch.ones(3, 1, 1, device=DEVICE))
    with pytest.raises(OperatorError, match="unknown activation 'swish': one of none, relu"):
        strided_gemm(a, b, activation="swish")
    with pytest.raises(OperatorError, match="expected a permutation of the result's eight dimensions"):
        strided_gemm(a, b, order=(0, 1, 2))


def two_products(x, w, v):
    return (x @ w) * (x @ v)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [(20, 33, 17), (1, 1, 1), (3, 5, 40), (0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_bilinear(sizes, dtype):
    n, d, e = sizes
    tensors = strided(n, d, order=(1, 0)), strided(d, e, step=2), strided(d, e, order=(1, 0))
    with tuning.using(gated=config(BN=16, BD=16, BE=16)):
        check(gated, two_products, tensors, dtype, terms=3 * (d + e + n), stages=4)


@pytest.mark.parametrize("activation", ["relu", "silu", "gelu", "gelu_tanh"])
def test_gates(activation):
    def exact(x, w, v):
        return ACTIVATIONS[activation](x @ w) * (x @ v)

    def positive(x, w, v):
        inside = x @ w
        return (2 * inside + inside * inside) * (x @ v)

    tensors = strided(9, 6), strided(6, 18), strided(6, 18)
    check(lambda x, w, v: gated(x, w, v, activation), exact, tensors, torch.float32, terms=60, positive=positive)


OPERANDS = {
    "batch_reduced_gemm": lambda: (strided(2, 3, 4, order=(2, 1, 0)), strided(2, 4, 5), True),
    "strided_gemm": lambda: (
        strided(1, 2, 3, 2, 1, 5, 1, 1), strided(1, 2, 5, 1, 1, 4, 1, 1), strided(1, 2, 4, 1, 1), None, 0.5, "silu",
        [5, 2, 6, 0, 3, 1, 7, 4],
    ),
    "gated": lambda: (strided(5, 3), strided(3, 4), strided(3, 4, order=(1, 0)), "silu"),
}  # fmt: skip


@pytest.mark.parametrize("name", OPERANDS)
def test_opcheck(name):
    operands = [
        value.to(DEVICE, torch.float32).requires_grad_() if isinstance(value, torch.Tensor) else value for value in OPERANDS[name]()
    ]
    torch.library.opcheck(getattr(torch.ops.tn, name).default, operands)


def test_mean_of_a_sum_is_not_special():
    """A product with one column: a matrix-vector product."""
    a, b = strided(7, 1, 19), strided(7, 19, 1)
    check(batch_reduced_gemm, summed, (a, b), torch.float32, terms=math.prod((7, 19)))
