"""What surrounds the kernels: compiled graphs, threads, poisoned memory, failures and examples in docstrings."""

import doctest
import subprocess
import sys
import threading

import pytest
import torch

import tn_kernels
from tests.kernels.oracle import DEVICE
from tn.errors import OperatorError
from tn_kernels import launch


def test_the_poison_works():
    """Otherwise an unwritten element could pass as a zero."""
    x = torch.ones(3, device=DEVICE)
    for fresh in (torch.empty(3, device=DEVICE), x.new_empty(3), torch.empty_like(x), x.new_empty(3, dtype=torch.float16)):
        assert fresh.isnan().all()


@pytest.mark.parametrize("name", sorted(name for name in sys.modules if name.startswith("tn_kernels.")))
def test_examples_run(name):
    assert doctest.testmod(sys.modules[name]).failed == 0


def test_a_compiled_graph_is_whole_and_trains():
    """Every operator in one graph, forward and backward; two sizes."""

    def model(x, a, c, w, q):
        y = tn_kernels.chain(x, a, c).flatten(1)
        y = tn_kernels.gated(y, w, w, "silu")
        y = y + tn_kernels.batch_reduced_gemm(y[None], w[None] @ w.mT @ w)
        z = tn_kernels.window_attention(q, q, q, window=2) + tn_kernels.squared_attention(q, q, q)
        return y.sum() + z.sum()

    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (5, 9):
        shapes = (rows, 2, 3), (2, 3, 2, 2), (2, 2, 2, 3), (6, 6), (1, 2, rows, 4)
        operands = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
        value, expected = compiled(*operands), model(*operands)
        torch.testing.assert_close(value, expected)
        for got, want in zip(torch.autograd.grad(value, operands), torch.autograd.grad(expected, operands), strict=True):
            torch.testing.assert_close(got, want)


def test_forced_blocks_belong_to_a_thread():
    """Two threads, one of which forces blocks that another never sees."""
    seen, entered, done = [], threading.Event(), threading.Event()

    def other():
        entered.wait(5)
        seen.append(tn_kernels.tuning._forced.get())
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with tn_kernels.tuning.using(gated=launch.config(BN=16)):
        entered.set()
        assert done.wait(5)
    thread.join()
    assert seen == [None]


def test_a_kernel_that_cannot_run_says_why():
    raised = [launch.TritonError("out of resource: shared memory, Required: 300000")]

    class Broken:
        __name__ = "broken_kernel"

        def __getitem__(self, grid):
            def run(*arguments, **constants):
                raise raised[-1]

            return run

    with pytest.raises(OperatorError, match=r"broken_kernel with {'BM': 64}: out of resource: shared memory, Required: 300000"):
        launch.launch(Broken(), (1,), torch.ones(1, device=DEVICE), cut=launch.config(BM=64))
    for error in (RuntimeError("Triton Error [CUDA]: invalid argument"), subprocess.CalledProcessError(1, ["gcc"])):
        raised.append(error)
        with pytest.raises(OperatorError, match="invalid argument|returned non-zero exit status 1"):
            launch.launch(Broken(), (1,), torch.ones(1, device=DEVICE), cut=launch.config(BM=64))


def test_operands_too_large_for_their_offsets_are_refused():
    x, a = torch.empty(1 << 20, 64, 64, device="meta"), torch.empty(64, 64, 1, 64, device="meta")
    with launch.recording(), pytest.raises(OperatorError, match=r"spans 4,294,967,296 elements, its offsets have 32 bits"):
        tn_kernels.chain(x, a, a)
    cache = torch.empty(1 << 10, 1 << 14, 512, dtype=torch.bfloat16, device="meta")
    q, lengths = (
        torch.empty(1 << 10, 1, 16, 512, dtype=torch.bfloat16, device="meta"),
        torch.empty(1 << 10, dtype=torch.int32, device="meta"),
    )
    with launch.recording() as calls:
        tn_kernels.mla_decode(q, q[..., :64], cache, cache[..., :64], lengths, scale=1.0)
    assert len(calls) == 2


def test_a_gradient_of_stride_zero():
    """What y.sum() sends back is one number, expanded."""
    x = torch.randn(1, 1, 5, 4, device=DEVICE, requires_grad=True)
    for f in (lambda x: tn_kernels.squared_attention(x, x, x), lambda x: tn_kernels.window_attention(x, x, x, window=2)):
        (zero_stride,) = torch.autograd.grad(f(x).sum(), x)
        (dense,) = torch.autograd.grad(f(x), x, torch.ones(1, 1, 5, 4, device=DEVICE))
        torch.testing.assert_close(zero_stride, dense)


def test_double_precision_takes_the_torch_path_and_gradcheck_passes():
    x, a, c = (
        torch.randn(shape, dtype=torch.float64, device=DEVICE, requires_grad=True) for shape in ((2, 2, 2), (2, 2, 1, 2), (2, 2, 1, 2))
    )
    torch.autograd.gradcheck(tn_kernels.chain, (x, a, c))
    torch.autograd.gradgradcheck(tn_kernels.chain, (x, a, c))
