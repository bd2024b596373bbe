"""chain: two contractions in one kernel."""

import pytest
import torch

from tests.kernels.oracle import DEVICE, DTYPES, check, strided
from tn.errors import OperatorError
from tn_kernels import chain, chain_panels, tuning
from tn_kernels.launch import config, recording


def exact(x, a, c):
    return torch.einsum("nij,ijrk,kirl->nkl", x, a, c)


# name: sizes n i j r k l, memory orders of x, a, c (None: as it stands), step between elements
CASES = {
    "btt": ((37, 5, 7, 2, 6, 9), None, None, None, 1),
    "odd rank": ((20, 3, 18, 5, 3, 17), None, None, None, 1),
    "low rank": ((50, 1, 33, 20, 1, 40), None, None, None, 1),
    "batch last, permuted cores": ((33, 4, 5, 1, 17, 3), (1, 2, 0), (3, 0, 2, 1), (1, 3, 0, 2), 1),
    "every second element": ((17, 3, 4, 3, 2, 5), None, (0, 2, 3, 1), None, 2),
    "ones": ((1, 1, 1, 1, 1, 1), None, None, None, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_chain(name, dtype):
    (n, i, j, r, k, l), x_order, a_order, c_order, step = CASES[name]
    x = strided(n, i, j, order=x_order, step=step)
    a, c = strided(i, j, r, k, order=a_order), strided(k, i, r, l, order=c_order, step=step)
    check(chain, exact, (x, a, c), dtype, terms=i * j * r + n, stages=3)


def with_bias(x, a, c, bias):
    return exact(x, a, c) + bias


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cut", [{}, {"chain_panels": config(ROWS=16, AHEAD=1, BM=16, BRK=16, BL=16)}], ids=("registers", "panels"))
@pytest.mark.parametrize("whole", [True, False])
def test_chain_with_bias(cut, whole, dtype):
    i = 3 if whole else 70
    tensors = strided(37, i, 7), strided(i, 7, 2, 6), strided(6, i, 2, 19), strided(6, 19, order=(1, 0), step=2)
    with tuning.using(**cut):
        check(chain, with_bias, tensors, dtype, terms=14 * i + 37, stages=3)


def test_a_bias_alone():
    """A sum over nothing is zero, and the bias is still added."""
    check(chain, with_bias, (strided(3, 0, 2), strided(0, 2, 2, 4), strided(4, 0, 2, 5), strided(4, 5)), torch.float32, terms=10)


def test_pieces_of_everything():
    """Blocks smaller than every axis: several groups of k, pieces of i and j, blocks of rows and l, parts of the weights' sum."""
    cut = config(BN=16, BI=4, BJ=16, BR=4, BK=4, BL=16)
    with tuning.using(chain=cut, chain_weight=cut):
        check(chain, exact, (strided(33, 5, 18), strided(5, 18, 3, 6), strided(6, 5, 3, 17)), torch.float32, terms=300)


def test_rows_in_parts():
    """The sum over rows of the weights' gradients is cut into parts that are added afterwards."""
    cut = config(BN=16, BI=16, BJ=16, BR=1, BK=16, BL=16)
    with tuning.using(chain_weight=cut):
        check(chain, exact, (strided(300, 2, 3), strided(2, 3, 1, 2), strided(2, 2, 1, 3)), torch.float32, terms=310)


def test_broadcast_cores():
    """Two tensor-train cores: the first has no i, the second no k."""
    n, i, j, r, k, l = 19, 3, 4, 2, 5, 6

    def run(x, a, c):
        return chain(x, a.expand(i, j, r, k), c.expand(k, i, r, l))

    tensors = (strided(n, i, j), strided(j, r, k), strided(i, r, l))
    check(run, lambda x, a, c: torch.einsum("nij,jrk,irl->nkl", x, a, c), tensors, torch.float32, terms=i * j * r + n * i * k)


@pytest.fixture
def panels():
    """z goes through memory, in panels of 32 rows and slots for three of them."""
    with tuning.using(chain_panels=config(ROWS=32, AHEAD=1, BM=16, BRK=16, BL=16)):
        yield


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_panels(name, dtype, panels):
    test_chain(name, dtype)


@pytest.mark.parametrize("ahead", [1, 2])
def test_slots_of_panels_are_used_again(ahead):
    """Five panels, the last of six rows. Programs run one by one here: one that waited for a later one would never end."""
    with tuning.using(chain_panels=config(ROWS=16, AHEAD=ahead, BM=16, BRK=32, BL=32)):
        check(chain, exact, (strided(70, 2, 5), strided(2, 5, 2, 3), strided(3, 2, 2, 17)), torch.float32, terms=90, stages=3)


@pytest.mark.skipif(DEVICE == "cuda", reason="looks inside the interpreter")
def test_programs_of_panels_wait_for_each_other_and_say_when_they_are_done(panels, monkeypatch):
    waited, flags = [], []

    def wait(flag, count):
        waited.append(int(count))

    def zeros(*shape, **options):
        flags.append(torch.full(shape, 0, **options))
        return flags[-1]

    monkeypatch.setattr(chain_panels, "_wait", wait)
    monkeypatch.setattr(chain_panels.torch, "zeros", zeros)
    x, a, c = (t.float() for t in (strided(150, 3, 5), strided(3, 5, 2, 10), strided(10, 3, 2, 20)))
    chain(x, a, c)
    of_first, of_second, count, slots = 3 * 2, 10 * 2, 5, 3  # programs of a panel, panels, panels at once
    assert sorted(waited) == [of_first] * (of_second * count) + [of_second] * (of_first * (count - slots))
    (found,) = flags
    assert found.tolist() == [(count + 1) * (of_first + of_second), *[of_first] * count, *[of_second] * count]


@pytest.mark.parametrize(
    "side, rank, dtype, forward, weight",
    [
        (64, 1, torch.float16, "_panels_kernel", "_panels_kernel"),
        (64, 4, torch.float16, "_panels_kernel", "_weight_kernel"),
        (32, 1, torch.float16, "_forward_kernel", "_weight_kernel"),
        (64, 1, torch.float32, "_forward_kernel", "_weight_kernel"),
    ],
)
def test_wide_layers_take_panels(side, rank, dtype, forward, weight):
    """Where they move clearly fewer bytes, and their slots stay in L2."""
    shapes = (16384, side, side), (side, side, rank, side), (side, side, rank, side)
    with recording() as calls:
        chain(*(torch.empty(shape, dtype=dtype, device="meta") for shape in shapes))
    assert [call.kernel.__name__ for call in calls] == [forward, forward, weight, weight]
    for call in calls:
        if call.kernel.__name__ == "_panels_kernel":
            scratch = call.arguments[4]
            assert scratch.numel() * scratch.element_size() <= chain_panels.SCRATCH


@pytest.mark.parametrize("empty", range(6))
def test_size_zero(empty):
    sizes = [3, 2, 4, 2, 3, 2]
    sizes[empty] = 0
    n, i, j, r, k, l = sizes
    check(chain, exact, (strided(n, i, j), strided(i, j, r, k), strided(k, i, r, l)), torch.float32, terms=20)


def test_only_some_gradients():
    x, a, c = (t.float().to(DEVICE) for t in (strided(5, 2, 3), strided(2, 3, 2, 2), strided(2, 2, 2, 3)))
    (gradient,) = torch.autograd.grad(chain(x, a.requires_grad_(), c).sum(), a)
    (want,) = torch.autograd.grad(exact(x, a, c).sum(), a)
    torch.testing.assert_close(gradient, want)


def test_second_derivative():
    x, a, c = (t.to(DEVICE).float().requires_grad_() for t in (strided(3, 2, 2), strided(2, 2, 1, 2), strided(2, 2, 1, 2)))
    found = []
    for f in (chain, exact):
        (first,) = torch.autograd.grad(f(x, a, c).square().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(first.square().sum(), (x, a, c)))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


def test_forward_mode_is_not_silently_zero():
    x, a, c = (t.to(DEVICE).float() for t in (strided(3, 2, 2), strided(2, 2, 1, 2), strided(2, 2, 1, 2)))
    _, tangent = torch.func.jvp(lambda x: chain(x, a, c), (x,), (x,))
    torch.testing.assert_close(tangent, chain(x, a, c))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype):
    """float64 takes the torch path."""
    operands = [t.to(DEVICE, dtype).requires_grad_() for t in (strided(5, 2, 3, order=(2, 1, 0)), strided(2, 3, 2, 2), strided(2, 2, 2, 3))]
    bias = operands[2][:, 0, 0].detach().requires_grad_() if dtype is torch.float32 else None
    torch.library.opcheck(torch.ops.tn.chain.default, (*operands, bias))


def test_wrong_shapes_and_dtypes():
    x, a, c = torch.ones(5, 2, 3, device=DEVICE), torch.ones(2, 3, 2, 2, device=DEVICE), torch.ones(2, 2, 2, 3, device=DEVICE)
    with pytest.raises(OperatorError, match=r"chain of x \(5, 2, 3\), a \(2, 3, 2, 2\), c \(2, 2, 3\): expected \(n i j\)"):
        chain(x, a, c[0])
    with pytest.raises(OperatorError, match="chain of torch.float32, torch.float32 and torch.float16: expected one dtype"):
        chain(x, a, c.half())
    with pytest.raises(OperatorError, match="torch.float32, bias torch.float16: expected one dtype"):
        chain(x, a, c, torch.ones(2, 3, device=DEVICE).half())
    with pytest.raises(OperatorError, match=r"chain with bias \(3, 2\): expected \(2, 3\)"):
        chain(x, a, c, torch.ones(3, 2, device=DEVICE))
