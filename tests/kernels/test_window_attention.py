"""window_attention: softmax over a sliding window and sinks."""

import pytest
import torch

import tn
from tests.kernels.oracle import DEVICE, DTYPES, strided
from tn.errors import OperatorError
from tn.testing import assert_close
from tn_kernels import tuning, window_attention
from tn_kernels.launch import config

SMALL = {name: config(BM=16, BN=16) for name in ("window_attention_forward", "window_attention_queries", "window_attention_keys")}


def exact(q, k, v, window, sink, scale=None):
    k, v = (t.repeat_interleave(q.shape[1] // max(t.shape[1], 1), 1) for t in (k, v))
    scores = torch.einsum("bhsd,bhtd->bhst", q, k) * (q.shape[3] ** -0.5 if scale is None else scale)
    seen = tn.Mask(window=window, sink=sink).matrix(q.shape[2], k.shape[2])
    return torch.einsum("bhst,bhte->bhse", scores.masked_fill(~seen, float("-inf")).softmax(-1), v)


def bounds(q, k, v, g, window, sink, scale):
    """For y, dq, dk, dv: the computation on absolute values, the weights p as they are; and how much an exponential magnifies."""
    share = q.shape[1] // max(k.shape[1], 1)
    wide_k, wide_v = (t.repeat_interleave(share, 1) for t in (k, v))
    scale = q.shape[3] ** -0.5 if scale is None else scale
    seen = tn.Mask(window=window, sink=sink).matrix(q.shape[2], k.shape[2])
    p = (scale * q @ wide_k.mT).masked_fill(~seen, float("-inf")).softmax(-1)
    q, wide_k, wide_v, g = q.abs(), wide_k.abs(), wide_v.abs(), g.abs()
    y, each = p @ wide_v, g @ wide_v.mT
    a = scale * p * (each + (g * y).sum(-1, keepdim=True))  # what ds = p (g·v − δ) is a difference of
    of_k, of_v = (t.unflatten(1, (k.shape[1], share)).sum(2) for t in (a.mT @ q, p.mT @ g))
    largest = (scale * q @ wide_k.mT).amax().item() if p.numel() else 0.0
    return (y, a @ wide_k, of_k, of_v), 1 + largest


def compare(tensors, window, sink, dtype, scale=None):
    """Value and gradients against float64. An error of a score in fp32, at most |q||k| roundings, is a relative error of its weight."""
    cast = [tensor.to(DEVICE, dtype).detach().requires_grad_() for tensor in tensors]
    wide = [tensor.detach().double().cpu().requires_grad_() for tensor in cast]
    got, want = window_attention(*cast, window=window, sink=sink, scale=scale), exact(*wide, window, sink, scale)
    g = torch.randn(want.shape, dtype=torch.float64).to(dtype)
    gots, wants = torch.autograd.grad(got, cast, g.to(DEVICE)), torch.autograd.grad(want, wide, g.double())
    if not got.numel() or not wide[1].numel():
        assert all(gradient.shape == tensor.shape and not gradient.any() for gradient, tensor in zip(gots, cast, strict=True))
        return
    limits, magnified = bounds(*(tensor.detach() for tensor in wide), g.double(), window, sink, scale)
    terms = 2 * wide[0].shape[3] + wide[1].shape[2] + wide[0].shape[1] * wide[0].shape[2]
    roundings = 4 + terms * magnified if dtype is torch.float32 else 4
    for what, a, b, bound in zip(("result", "q", "k", "v"), (got, *gots), (want, *wants), limits, strict=True):
        assert_close(a.cpu(), b, bound=bound, roundings=roundings, name=what)


# b h g s t d e window sink
CASES = {
    "window": (1, 2, 2, 50, 50, 8, 8, 9, 0),
    "window and sinks": (2, 2, 1, 50, 50, 8, 5, 7, 3),
    "sinks over two blocks": (1, 2, 2, 70, 70, 5, 8, 4, 20),
    "more keys than queries": (1, 4, 2, 20, 53, 8, 8, 10, 2),
    "one query": (2, 2, 2, 1, 40, 16, 16, 5, 4),
    "everything": (1, 1, 1, 37, 37, 8, 8, None, 0),
    "itself alone": (1, 1, 1, 20, 20, 4, 4, 0, 0),
    "wide window": (1, 1, 1, 20, 20, 4, 4, 1000, 1000),
    "ones": (1, 1, 1, 1, 1, 1, 1, 1, 1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_window(name, dtype):
    b, h, g, s, t, d, e, window, sink = CASES[name]
    tensors = strided(b, h, s, d, order=(0, 2, 1, 3)), strided(b, g, t, d, order=(3, 0, 1, 2)), strided(b, g, t, e, step=2)
    with tuning.using(**SMALL):
        compare(tensors, window, sink, dtype)


def test_with_the_usual_blocks_and_a_scale():
    compare((strided(1, 1, 150, 8), strided(1, 1, 150, 8), strided(1, 1, 150, 8)), 20, 2, torch.float32, scale=0.1)


EMPTY = [(0, 1, 1, 3, 3, 2, 2), (1, 2, 1, 0, 3, 2, 2), (1, 1, 1, 0, 0, 2, 2), (1, 1, 1, 2, 2, 2, 0), (1, 0, 1, 2, 2, 2, 2)]


@pytest.mark.parametrize("sizes", EMPTY)
def test_size_zero(sizes):
    b, h, g, s, t, d, e = sizes
    compare((strided(b, h, s, d), strided(b, g, t, d), strided(b, g, t, e)), 1, 1, torch.float32)


def test_large_scores_do_not_overflow():
    q = 100 * strided(1, 1, 40, 4)
    x = q.float().to(DEVICE)
    wide = x.cpu().double()
    got = window_attention(x, x, x, window=5, sink=1)
    torch.testing.assert_close(got.cpu().double(), exact(wide, wide, wide, 5, 1), rtol=1e-4, atol=1e-3)


def test_work_is_proportional_to_the_window():
    """Keys outside window and sinks are never read: they may be NaN."""
    q, k, v = (torch.randn(1, 1, 96, 8, device=DEVICE) for _ in range(3))
    want = window_attention(q[:, :, 80:], k, v, window=8, sink=2)
    k[:, :, 16:64], v[:, :, 16:64] = float("nan"), float("nan")
    with tuning.using(**SMALL):
        got = window_attention(q[:, :, 80:], k, v, window=8, sink=2)
    torch.testing.assert_close(got, want)


def test_opcheck():
    q, k, v = (
        t.to(DEVICE, torch.float32).requires_grad_() for t in (strided(1, 2, 3, 4), strided(1, 1, 5, 4), strided(1, 1, 5, 2, step=2))
    )
    torch.library.opcheck(torch.ops.tn.window_attention.default, (q, k, v, 2, 1, 0.5))


def test_wrong_operands():
    q = torch.ones(1, 2, 3, 4, device=DEVICE)
    with pytest.raises(OperatorError, match="window -1, sink 0: expected integers of at least 0"):
        window_attention(q, q, q, window=-1)
    with pytest.raises(OperatorError, match="window_attention of q"):
        window_attention(q, q[:, :, :2], q[:, :, :2], window=1)
