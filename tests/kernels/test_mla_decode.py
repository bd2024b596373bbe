"""mla_decode: latent attention over a compressed cache, in parts."""

import pytest
import torch

from tests.kernels.oracle import DEVICE, DTYPES, strided
from tn.errors import OperatorError
from tn.testing import assert_close
from tn_kernels import mla_decode, tuning
from tn_kernels.launch import config


def exact(q, qr, latent, rope, lengths, scale):
    """(value, the same with absolute latents, largest score of absolute values)"""
    b, s, h, c = q.shape
    scores = scale * (torch.einsum("bshc,btc->bsht", q, latent) + torch.einsum("bshr,btr->bsht", qr, rope))
    size = scale * (torch.einsum("bshc,btc->bsht", q.abs(), latent.abs()) + torch.einsum("bshr,btr->bsht", qr.abs(), rope.abs()))
    out, bound = torch.zeros(b, s, h, c, dtype=q.dtype), torch.zeros(b, s, h, c, dtype=q.dtype)
    for i, length in enumerate(lengths.tolist()):
        for j in range(s):
            seen = length - s + j + 1
            if seen > 0:
                p = scores[i, j, :, :seen].softmax(-1)
                out[i, j], bound[i, j] = p @ latent[i, :seen], p @ latent[i, :seen].abs()
    return out, bound, size.amax().item() if size.numel() else 0.0


# b s h t c r lengths
CASES = {
    "one token": (2, 1, 4, 70, 20, 5, (70, 33)),
    "several tokens, odd heads": (1, 3, 5, 40, 8, 4, (37,)),
    "parts without a token": (3, 1, 2, 100, 16, 8, (100, 1, 20)),
    "nothing seen": (2, 2, 2, 20, 4, 2, (0, 1)),
    "ones": (1, 1, 1, 1, 1, 1, (1,)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_mla_decode(name, dtype):
    b, s, h, t, c, r, lengths = CASES[name]
    tensors = [strided(b, s, h, c, order=(0, 2, 1, 3)), strided(b, s, h, r, order=(3, 2, 1, 0)), strided(b, t, c), strided(b, t, r, step=2)]
    cast, filled = [tensor.to(DEVICE, dtype) for tensor in tensors], torch.tensor(lengths, device=DEVICE)
    with tuning.using(mla_decode=config(BM=16, BN=16)):
        got = mla_decode(*cast, filled, scale=0.3)
    want, bound, largest = exact(*(tensor.cpu().double() for tensor in cast), filled.cpu(), 0.3)
    roundings = 4 + (2 * (c + r) + t) * (1 + largest) if dtype is torch.float32 else 4
    assert_close(got.cpu(), want, bound=bound, roundings=roundings)


def test_all_of_the_cache_and_the_usual_blocks():
    tensors = [strided(1, 1, 3, 8), strided(1, 1, 3, 4), strided(1, 300, 8), strided(1, 300, 4)]
    got = mla_decode(*(tensor.float().to(DEVICE) for tensor in tensors), scale=0.3)
    want, bound, largest = exact(*(tensor.float().double() for tensor in tensors), torch.tensor([300]), 0.3)
    assert_close(got.cpu(), want, bound=bound, roundings=int(4 + 330 * (1 + largest)))


@pytest.mark.parametrize("sizes", [(0, 1, 2, 3, 2, 2), (1, 0, 2, 3, 2, 2), (1, 1, 0, 3, 2, 2), (1, 1, 2, 0, 2, 2), (1, 1, 2, 3, 2, 0)])
def test_size_zero(sizes):
    b, s, h, t, c, r = sizes
    tensors = [strided(b, s, h, c), strided(b, s, h, r), strided(b, t, c), strided(b, t, r)]
    got = mla_decode(*(tensor.float().to(DEVICE) for tensor in tensors), scale=1.0)
    want, _, _ = exact(*(tensor.float().double() for tensor in tensors), torch.full((b,), t), 1.0)
    torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)


def test_unfilled_tokens_are_never_read():
    q, qr, latent, rope = (
        tensor.float().to(DEVICE) for tensor in (strided(1, 1, 2, 8), strided(1, 1, 2, 4), strided(1, 64, 8), strided(1, 64, 4))
    )
    want = mla_decode(q, qr, latent[:, :20], rope[:, :20], scale=0.3)
    latent[:, 20:], rope[:, 20:] = float("nan"), float("nan")
    torch.testing.assert_close(mla_decode(q, qr, latent, rope, torch.tensor([20], device=DEVICE), scale=0.3), want)


def test_gradients_come_from_the_torch_path():
    tensors = [t.to(DEVICE).requires_grad_() for t in (strided(1, 2, 2, 3), strided(1, 2, 2, 2), strided(1, 5, 3), strided(1, 5, 2))]
    wide = [t.detach().clone().requires_grad_() for t in tensors]
    small = [t.detach().float().requires_grad_() for t in tensors]
    lengths = torch.tensor([4], device=DEVICE)
    wants = torch.autograd.grad(mla_decode(*wide, lengths, scale=0.5).sum(), wide)
    gots = torch.autograd.grad(mla_decode(*small, lengths, scale=0.5).sum(), small)
    for got, want in zip(gots, wants, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


def test_opcheck():
    tensors = [
        t.to(DEVICE, torch.float32).requires_grad_() for t in (strided(1, 2, 2, 3), strided(1, 2, 2, 2), strided(1, 5, 3), strided(1, 5, 2))
    ]
    torch.library.opcheck(torch.ops.tn.mla_decode.default, (*tensors, torch.tensor([4], device=DEVICE), 0.5))


def test_wrong_operands():
    q, latent = torch.ones(1, 1, 2, 4, device=DEVICE), torch.ones(1, 3, 4, device=DEVICE)
    with pytest.raises(OperatorError, match=r"expected \(b s h c\), \(b s h r\), \(b t c\), \(b t r\)"):
        mla_decode(q, q, latent, latent[..., :2], scale=1.0)
    with pytest.raises(OperatorError, match="lengths torch.float32"):
        mla_decode(q, q, latent, latent, torch.ones(1, device=DEVICE), scale=1.0)
    with pytest.raises(OperatorError, match="c up to 512, r up to 128"):
        mla_decode(torch.ones(1, 1, 2, 600, device=DEVICE), q, torch.ones(1, 3, 600, device=DEVICE), latent, scale=1.0)
