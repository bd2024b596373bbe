"""tn.einsum and tn.contract as calls: letters, broadcasting, numpy, refusals."""

import numpy as np
import pytest
import torch

import tn

EQUATIONS = [
    ("ij,jk->ik", [(3, 4), (4, 5)]),
    ("ij,jk", [(3, 4), (4, 5)]),
    ("ii->i", [(4, 4)]),
    ("ii", [(4, 4)]),
    ("ij->ji", [(3, 4)]),
    ("ij->", [(3, 4)]),
    ("i,i->", [(4,), (4,)]),
    ("i,j->ij", [(3,), (4,)]),
    (",ij->ij", [(), (3, 4)]),
    ("...ij,...jk->...ik", [(2, 1, 3, 4), (5, 4, 5)]),
    ("...i->...", [(2, 3, 4)]),
    ("b...,b...->b...", [(2, 3), (2, 3)]),
    ("bij,bjk->bik", [(1, 3, 4), (2, 4, 5)]),
    ("ij,ij->i", [(3, 1), (3, 4)]),
    ("ij,ij->ij", [(1, 4), (3, 1)]),
    ("abc,cd,def->abef", [(2, 3, 4), (4, 5), (5, 2, 3)]),
    ("αβ,βγ->αγ", [(2, 3), (3, 4)]),
    ("aBc,Bd->acd", [(2, 3, 4), (3, 5)]),
    ("iij,jk->ik", [(3, 3, 4), (4, 2)]),
    ("i,i,i->i", [(3,), (3,), (3,)]),
    ("ab,bc,cd,de->ae", [(2, 3), (3, 4), (4, 5), (5, 2)]),
]


@pytest.mark.parametrize(("equation", "shapes"), EQUATIONS)
@pytest.mark.parametrize("optimize", [None, False])
def test_equals_numpy(equation, shapes, optimize):
    arrays = [np.random.default_rng(i).standard_normal(shape) for i, shape in enumerate(shapes)]
    want = np.einsum(equation, *arrays) if equation.isascii() else arrays[0] @ arrays[1]
    got = tn.einsum(equation, *arrays, optimize=optimize)
    assert isinstance(got, np.ndarray | np.generic) and got.shape == want.shape
    np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-12)
    tensor = tn.einsum(equation, *map(torch.from_numpy, map(np.asarray, arrays)), optimize=optimize)
    assert isinstance(tensor, torch.Tensor) and torch.allclose(tensor, torch.as_tensor(want))


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex128, torch.float32], ids=str)
def test_other_dtypes(dtype):
    a, b = torch.arange(12).reshape(3, 4).to(dtype), torch.arange(20).reshape(4, 5).to(dtype)
    assert torch.equal(tn.einsum("ij,jk->ik", a, b), a @ b)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tn.einsum("ij,jk->ik", torch.zeros(2, 3)), "has 2 terms for 1 operands"),
        (lambda: tn.einsum("ij,jk->ik", torch.zeros(2, 3), torch.zeros(4, 5)), "operand 1 has size 4 for 'j', another has 3"),
        (lambda: tn.einsum("ij->ik", torch.zeros(2, 3)), "output 'k' is on no operand"),
        (lambda: tn.einsum("ij->ii", torch.zeros(2, 3)), "output 'i' is repeated"),
        (lambda: tn.einsum("ij->i", torch.zeros(2)), "operand 0 has 1 dimension, its term 'ij' names 2"),
        (lambda: tn.einsum("i1->i", torch.zeros(2, 2)), "cannot read '1'"),
        (lambda: tn.einsum("i,i->i", torch.zeros(2), [1.0, 2.0]), "operand 1 is a list"),
        (lambda: tn.einsum("ij->i", torch.zeros(2, 2), optimize="gredy"), "did you mean 'greedy'"),
        (lambda: tn.einsum("i,i->i", torch.zeros(2), torch.zeros(2, dtype=torch.float64)), "different dtypes"),
        (lambda: tn.contract("ij,jk->ik", torch.zeros(2, 2), torch.zeros(2, 2)), "call tn.einsum for letters"),
        (lambda: tn.contract("i -> i", torch.zeros(2), backend="einsm"), "did you mean 'einsum'"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_contract_takes_and_returns_numpy():
    x, w = np.ones((2, 3)), np.ones((3, 4))
    got = tn.contract("... i, i o -> ... o", x, w)
    assert isinstance(got, np.ndarray) and (got == 3).all()


def test_a_tensor_used_twice_is_passed_once():
    x, w = torch.randn(4, 3), torch.randn(3, 3)
    assert torch.allclose(tn.contract("x: b i, w: i j, x: b j -> b", x, w), ((x @ w) * x).sum(-1), atol=1e-6)


def test_numpy_views_are_read_as_they_are():
    a = np.arange(12.0).reshape(3, 4)
    for view in (a[::-1], a.T, a[:, ::2], a[::-1, ::-2]):
        np.testing.assert_array_equal(tn.einsum("ij->ji", view), view.T)


def test_result_is_a_new_tensor():
    x = torch.zeros(2, 3)
    y = tn.contract("i j -> i j", x)
    y += 1
    assert x.abs().max() == 0
