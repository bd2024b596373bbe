"""tn.einsum and tn.contract as calls: letters and lists, broadcasting, dtypes, numpy, keywords, refusals."""

import itertools
import threading

import numpy as np
import opt_einsum
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import tn


class Shaped:
    """An array of a library that neither torch nor NumPy reads."""

    shape = (2,)


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
        (lambda: tn.contract("...ij,...jk->...ik", torch.zeros(2, 2), torch.zeros(2, 2)), "call tn.einsum for letters"),
        (lambda: tn.contract("ij,ij->ij", torch.zeros(2, 2), torch.zeros(2, 2)), "call tn.einsum for letters"),
        (lambda: tn.contract("ij,jk->", torch.zeros(2, 2), torch.zeros(2, 2)), "call tn.einsum for letters"),
        (lambda: tn.network("ij,jk"), "tn.einsum reads letters"),
        (lambda: tn.network("ij,jk->ik"), "call tn.einsum for letters"),
        (lambda: tn.Contraction("bij,bjk->bik", sizes={}), "call tn.einsum for letters"),
        (lambda: tn.einsum(), "needs an equation"),
        (lambda: tn.einsum("ij"), "has 1 terms for 0 operands"),
        (lambda: tn.einsum("i...i...->i", torch.zeros(2, 2)), "cannot read '.' in operand 0"),
        (lambda: tn.einsum("ij->i->j", torch.zeros(2, 2)), "cannot read '-' in the output"),
        (lambda: tn.einsum(torch.zeros(2), [0], torch.zeros(3), [0], []), "operand 1 has size 3 for '0', another has 2"),
        (lambda: tn.einsum(torch.zeros(2, 2), [..., ...]), "operand 0 has '...' twice"),
        (lambda: tn.einsum("ij,jk->ik", torch.zeros(2, 3), torch.zeros(3, 2), optimize=[(0, 2)]), "step (0, 2) is not possible"),
        (lambda: tn.einsum("i,i,i->", *[torch.zeros(2)] * 3, optimize=[(0, 1)]), "leaves 2 tensors of 3 operands"),
        (lambda: tn.einsum("i,i->", torch.zeros(2), torch.zeros(2), order="F"), "order='F' acts on NumPy operands"),
        (lambda: tn.einsum("i,i->", torch.zeros(2), torch.zeros(2), casting="safe"), "casting='safe' acts on NumPy operands"),
        (lambda: tn.einsum("i,i->", np.zeros(2), np.zeros(2), order="W"), "unknown order 'W'"),
        (lambda: tn.einsum("i,i->", np.zeros(2), np.zeros(2), casting="safely"), "did you mean 'safe'"),
        (lambda: tn.einsum("i,j->ij", torch.zeros(2), torch.zeros(2), out=torch.zeros(2)), "out has shape (2,), expected (2, 2)"),
        (lambda: tn.einsum("i,j->ij", torch.ones(2, requires_grad=True), torch.zeros(2), out=torch.zeros(2, 2)), "out= has no gradient"),
        (lambda: tn.tensordot(torch.zeros(2, 3), torch.zeros(3), axes=([1], [0, 1])), "differ in number"),
        (lambda: tn.tensordot(torch.zeros(2, 3), torch.zeros(3), axes=([1], [1])), "axis 1 of operand 1 does not exist"),
        (lambda: tn.tensordot(torch.zeros(2, 2), torch.zeros(2, 2), axes=([0, -2], [0, 1])), "name a dimension twice"),
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


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tn.einsum(0, 0), "operand 0 has the labels 0"),
        (lambda: tn.einsum(0), "the equation is a int"),
        (lambda: tn.einsum(torch.zeros(2), "i"), "operand 0 has the labels 'i'"),
        (lambda: tn.einsum(torch.zeros(2, 2), [0, "a"]), "cannot be sorted"),
        (lambda: tn.einsum("i,i->", torch.zeros(2), 1.0), "operand 1 is a float"),
        (lambda: tn.einsum("i,i->", np.zeros(2), Shaped()), "operand 1 is a Shaped"),
        (lambda: tn.einsum("i,i->", torch.zeros(2), np.zeros(2)), "operand 1 is a ndarray"),
        (lambda: tn.einsum("i,i->", torch.zeros(2), torch.zeros(2), optimize=3), "optimize=3"),
        (lambda: tn.einsum("i,i->", torch.zeros(2), torch.zeros(2), optimize=["ab"]), "is no path"),
        (lambda: tn.einsum("i,i->", torch.zeros(2), torch.zeros(2), dtype="float64"), "expected a torch.dtype"),
        (lambda: tn.einsum("i,i->", torch.zeros(2), torch.zeros(2), out=np.zeros(())), "out is a ndarray"),
        (lambda: tn.einsum("i,i->", torch.zeros(2), torch.zeros(2), out=torch.zeros((), dtype=torch.int64)), "cannot hold"),
        (lambda: tn.einsum("i,i->", np.zeros(2), np.zeros(2), out=torch.zeros(())), "out is a Tensor"),
        (lambda: tn.einsum("i,i->", np.zeros(2), np.zeros(2), out=np.zeros((), int)), "the result cannot be cast from float64 to int64"),
        (lambda: tn.einsum("i,i->", np.zeros(2), np.zeros(2, "f4"), casting="no"), "operand 1 cannot be cast from float32 to float64"),
        (lambda: tn.einsum("i,i->", np.zeros(2), np.zeros(2), dtype=torch.float32), "no dtype for the operands"),
    ],
)
def test_wrong_kinds(call, message):
    """TypeErrors, as elsewhere, and ours."""
    with pytest.raises(TypeError) as error:
        call()
    assert isinstance(error.value, tn.TnError) and message in str(error.value)


def test_an_impossible_path_is_the_error_that_numpy_raises():
    with pytest.raises(RuntimeError):
        np.einsum("i,i,i->", *[np.zeros(2)] * 3, optimize=["einsum_path", (0, 1)])
    with pytest.raises(RuntimeError):
        tn.einsum("i,i,i->", *[np.zeros(2)] * 3, optimize=["einsum_path", (0, 1)])


def test_lists_of_labels():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    for call in (
        lambda: tn.einsum(a, [0, 1], b, [1, 2], [0, 2]),
        lambda: tn.einsum(a, [0, 1], b, [1, 2]),
        lambda: tn.einsum(a, ["row", "in"], b, ["in", "column"], ["row", "column"]),
        lambda: tn.einsum(a, [..., 100], b, [100, -3], [..., -3]),
        lambda: tn.einsum(a, (np.int64(7), np.int64(60)), b, np.array([60, 8]), [7, 8]),
        lambda: tn.einsum("ij,jk->ik", [a, b]),  # torch's older form
    ):
        torch.testing.assert_close(call(), a @ b)
    assert tn.einsum(a, ["row", "in"], b, ["in", "column"]).shape == (5, 3)  # sorted: column, row


def test_more_axes_than_letters():
    """A chain of 60 matrices has 61 axes: as labels and as letters of other alphabets."""
    matrices = [torch.randn(2, 2, dtype=torch.float64) for _ in range(60)]
    want = matrices[0]
    for matrix in matrices[1:]:
        want = want @ matrix
    interleaved = [item for i, matrix in enumerate(matrices) for item in (matrix, [i, i + 1])]
    torch.testing.assert_close(tn.einsum(*interleaved, [0, 60], optimize=False), want)
    letters = [chr(0x4E00 + i) for i in range(61)]
    equation = ",".join(map("".join, itertools.pairwise(letters))) + f"->{letters[0]}{letters[60]}"
    torch.testing.assert_close(tn.einsum(equation, *matrices), want)
    ring = [(opt_einsum.get_symbol(i), opt_einsum.get_symbol(i + 1)) for i in range(20, 80)]  # × is among them
    torch.testing.assert_close(tn.einsum(",".join(map("".join, ring)) + f"->{ring[0][0]}{ring[-1][1]}", *matrices, optimize="greedy"), want)


def test_letters_that_python_reads_as_one_are_two():
    """The Kelvin sign and K, the ligature fi and fi: names in Python are normalised, letters here are not."""
    a, b = torch.randn(2, 3), torch.randn(3, 4)
    torch.testing.assert_close(tn.einsum("\u212aK,KA->\u212aA", a, b), a @ b)
    torch.testing.assert_close(tn.einsum("\ufb01j,jk->\ufb01k", a, b), a @ b)


@pytest.mark.parametrize(
    "shapes", [[(2, 3), (3, 4)], [(1, 3), (3, 4)], [(2, 1), (3, 4)], [(2, 0), (0, 4)], [(0, 3), (3, 4)], [(2, 1), (0, 4)]]
)
def test_sizes_one_and_zero(shapes):
    a, b = (np.random.default_rng(0).standard_normal(shape) for shape in shapes)
    for dtype in ("f8", "i4", "longdouble"):
        x, y = a.astype(dtype), b.astype(dtype)
        np.testing.assert_allclose(tn.einsum("ij,jk->ik", x, y), np.einsum("ij,jk->ik", x, y), rtol=1e-12)
        np.testing.assert_allclose(tn.einsum("ij,jk,ij->ki", x, y, x), np.einsum("ij,jk,ij->ki", x, y, x), rtol=1e-12)


NUMPY_DTYPES = [
    "?",
    "i1",
    "i2",
    "i4",
    "i8",
    "u1",
    "u2",
    "u4",
    "u8",
    "f2",
    "f4",
    "f8",
    "longdouble",
    "c8",
    "c16",
    "clongdouble",
    "object",
    ">f8",
    ">i2",
]


@pytest.mark.parametrize("dtype", NUMPY_DTYPES)
def test_every_numpy_dtype(dtype):
    generator = np.random.default_rng(0)
    a, b, c = (generator.integers(0, 3, shape).astype(dtype) for shape in ((3, 4), (4, 5), (5, 3)))
    for equation, operands in (("ij,jk,ki->", (a, b, c)), ("ij,jk,kl->il", (a, b, c)), ("ij,ij->j", (a, a)), ("ij->i", (a,))):
        got, want = tn.einsum(equation, *operands), np.einsum(equation, *operands)
        np.testing.assert_array_equal(got, want)
        assert np.asarray(got).dtype == np.asarray(want).dtype.newbyteorder("=") or np.asarray(got).dtype == np.asarray(want).dtype
    assert type(tn.einsum("ij,jk,ki->", a, b, c)) is type(np.einsum("ij,jk,ki->", a, b, c))


TORCH_DTYPES = [
    *(torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64),
    *(torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex32, torch.complex64, torch.complex128),
]


@pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental")
@pytest.mark.parametrize("dtype", TORCH_DTYPES, ids=str)
def test_every_torch_dtype(dtype):
    a, b, c = (torch.randint(0, 3, shape).to(dtype) for shape in ((3, 4), (4, 5), (5, 2)))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    got = tn.einsum("ij,jk,kl->il", a, b, c)
    want = a.to(wide) @ b.to(wide) @ c.to(wide)
    assert got.dtype is dtype and torch.equal(got.to(wide), (want != 0).to(wide) if dtype is torch.bool else want)


def test_mixed_numpy_dtypes_promote_as_numpy_says():
    a, b = np.ones((2, 3), "i4"), np.ones((3, 2), "f4")
    assert tn.einsum("ij,jk->ik", a, b).dtype == np.einsum("ij,jk->ik", a, b).dtype == np.float64
    assert tn.einsum("ij,->ij", a, 2).dtype == np.einsum("ij,->ij", a, 2).dtype


@pytest.mark.parametrize("order", ["C", "F", "A", "K", None])
@pytest.mark.parametrize("made", ["C", "F"])
def test_memory_order(order, made):
    a, b = np.ones((2, 3, 5), order=made), np.ones((4, 3), order=made)
    got = tn.einsum("aft,mf->amt", a, b, order=order)
    assert (got == 3).all()
    if order in ("C", "F"):
        assert got.flags.forc and getattr(got.flags, f"{order.lower()}_contiguous")
    if order == "A":
        assert getattr(got.flags, f"{made.lower()}_contiguous")


def test_out():
    a, b = torch.randn(3, 4), torch.randn(4, 3)
    out = torch.empty(3, 3)
    assert tn.einsum("ij,jk->ik", a, b, out=out) is out
    torch.testing.assert_close(out, a @ b)
    square = torch.randn(3, 3)
    want = square @ square
    tn.einsum("ij,jk->ik", square, square, out=square)  # over an operand
    torch.testing.assert_close(square, want)
    strided = np.zeros((3, 6))[:, ::2]
    assert tn.einsum("ij,jk->ik", a.numpy(), b.numpy(), out=strided) is strided
    np.testing.assert_allclose(strided, (a @ b).numpy(), rtol=1e-6)


def test_dtype_is_what_is_computed_in():
    a = torch.full((2, 300), 100, dtype=torch.int8)
    assert tn.einsum("ij,ij->i", a, a, dtype=torch.int64).tolist() == [3_000_000] * 2
    assert tn.einsum("ij,ij->i", a.numpy(), a.numpy(), dtype="i8").tolist() == [3_000_000] * 2


def test_one_operand_gives_views():
    x = torch.randn(3, 3, 4)
    for equation in ("iij->ij", "ijk->kij", "...->...", "ijk->ijk"):
        got = tn.einsum(equation, x)
        torch.testing.assert_close(got, torch.einsum(equation, x))
        assert got.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()
    assert tn.einsum("iij->", x.to(torch.int32)).dtype is torch.int32
    array = x.numpy()
    assert np.shares_memory(tn.einsum("iij->ji", array), array)


def test_operands_are_left_as_they_are():
    arrays = [np.arange(6.0).reshape(2, 3), np.broadcast_to(np.arange(3.0), (2, 3)), np.arange(12.0).reshape(4, 3)[::-2]]
    before = [array.copy() for array in arrays]
    got = tn.einsum("ij,ij,ij->ij", *arrays)
    got += 1
    for array, kept in zip(arrays, before, strict=True):
        np.testing.assert_array_equal(array, kept)


def test_autocast_casts_as_torch_does():
    a, b = torch.randn(3, 4), torch.randn(4, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tn.einsum("ij,jk->ik", a, b).dtype is torch.einsum("ij,jk->ik", a, b).dtype is torch.bfloat16


def test_meta_tensors():
    assert tn.einsum("ij,jk->ik", torch.empty(3, 4, device="meta"), torch.empty(4, 5, device="meta")).shape == (3, 5)


def test_threads_agree():
    a, b = torch.randn(6, 7), torch.randn(7, 8)
    wrong: list[str] = []

    def work(number: int) -> None:
        for rows in range(1, 40):
            x = torch.full((rows, 6), float(number))
            if not torch.allclose(tn.einsum("xi,ij,jk->xk", x, a, b), x @ a @ b, atol=1e-3):
                wrong.append(f"thread {number}, {rows} rows")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_what_is_remembered_is_bounded(monkeypatch):
    space = tn.einsum.__globals__  # of the module, which the function's name hides
    monkeypatch.setitem(space, "_BOUND", {})
    monkeypatch.setitem(space, "_BOUND_LIMIT", 10)
    for rows in range(1, 40):
        tn.einsum("ij,ij->i", torch.ones(rows, 2), torch.ones(rows, 2))
    assert 0 < len(space["_BOUND"]) <= 10


@pytest.mark.parametrize("dtype", ["u2", "longdouble", "f4"])
def test_contract_in_every_numpy_dtype(dtype):
    x, a, c = (np.arange(np.prod(shape)).reshape(shape).astype(dtype) % 3 for shape in ((2, 5, 6), (2, 3, 2, 4), (4, 2, 2, 3)))
    want = np.einsum("bsij,ijrk,kirl->bskl", x.reshape(2, 5, 2, 3), a, c).reshape(2, 5, 12)
    got = tn.contract("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", x, a, c)
    assert got.dtype == np.dtype(dtype)
    np.testing.assert_array_equal(got, want)


def test_contract_reads_numpy_views():
    x, w = np.arange(12.0).reshape(3, 4)[::-1], np.broadcast_to(np.arange(4.0), (2, 4)).T
    np.testing.assert_array_equal(tn.contract("... i, i o -> ... o", x, w), x @ w)


class Copies(TorchDispatchMode):
    """Counts the calls that copy a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in (torch.ops.aten.clone.default, torch.ops.aten.copy_.default, torch.ops.aten._to_copy.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("equation", ["ij,jk,kl->il", "ji,jk,lk->il", "bij,bjk->bik", "bij,jk->bik", "bji,jk->bik", "i,j->ij", "ij,ij->i"])
@pytest.mark.parametrize("kind", ["torch", "numpy"])
def test_no_operand_is_copied(equation, kind):
    sizes = dict(b=4, i=5, j=6, k=7, l=8)
    operands = [torch.randn([sizes[letter] for letter in term]) for term in equation.split("->")[0].split(",")]
    given = operands if kind == "torch" else [t.numpy() for t in operands]
    with Copies() as copies:
        tn.einsum(equation, *given)
    assert copies.count == 0


def test_copies_are_counted():
    with Copies() as copies:
        torch.randn(3, 4).mT.contiguous()
    assert copies.count == 1


@pytest.mark.parametrize("shapes", [((0, 4), (4, 3), (5, 3)), ((2, 0), (0, 3), (5, 3)), ((0, 0), (0, 0), (0, 0))])
def test_empty_operands_are_planned_first(shapes):
    operands = [np.ones(shape) for shape in shapes]
    assert np.array_equal(tn.einsum("bi,ir,or->bo", *operands), np.einsum("bi,ir,or->bo", *operands))
    tn.contract_path("bi,ir,or->bo", *shapes, shapes=True)


def test_contract_takes_truth_values():
    a, b = torch.rand(4, 5) > 0.5, torch.rand(5, 3) > 0.5
    got = tn.contract("i j, j k -> i k", a, b)
    assert got.dtype is torch.bool and torch.equal(got, (a.double() @ b.double()) != 0)
