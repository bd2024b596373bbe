"""An operator against float64: forward and every gradient, with the error bound of the computation."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from tn.testing import assert_close

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if DEVICE == "cuda" else [])]


def strided(*shape: int, order: Sequence[int] | None = None, step: int = 1, generator: torch.Generator | None = None) -> Tensor:
    """Random float64 numbers, dimensions in memory in the given order, and every `step`-th element used."""
    order = list(range(len(shape))) if order is None else list(order)
    memory = [shape[place] for place in order]
    wide = torch.randn(*memory[:-1], memory[-1] * step, dtype=torch.float64, generator=generator)[..., ::step]
    return wide.permute([order.index(place) for place in range(len(shape))])


def check(
    run: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    tensors: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    terms: int,
    stages: int = 2,
    positive: Callable[..., Tensor] | None = None,
) -> None:
    """Compare value and gradients of `run` in `dtype` with those of `exact` in float64.

    Args:
        tensors: float64 operands; those that are not floating point are passed as they are.
        terms: numbers in the longest sum, all added in fp32. stages: roundings to `dtype` from an operand to a result.
        positive: `exact` on absolute values, where it has to be told so; the bound is its value and its gradients.
    """
    cast = [_like(tensor, dtype) for tensor in tensors]
    wide = [tensor.detach().double().cpu().requires_grad_() if tensor.is_floating_point() else tensor.cpu() for tensor in cast]
    size = [tensor.detach().abs().requires_grad_() if tensor.is_floating_point() else tensor for tensor in wide]
    want, bound = exact(*wide), (positive or exact)(*size)
    got = run(*cast)
    roundings = stages + (terms if dtype is torch.float32 else 1)
    assert_close(got.cpu(), want, bound=bound, roundings=roundings)
    cotangent = torch.randn(want.shape, dtype=torch.float64).to(dtype)
    places = [place for place, tensor in enumerate(cast) if tensor.is_floating_point()]
    gots = torch.autograd.grad(got, [cast[place] for place in places], cotangent.to(DEVICE))
    wants = torch.autograd.grad(want, [wide[place] for place in places], cotangent.double())
    bounds = torch.autograd.grad(bound, [size[place] for place in places], cotangent.double().abs())
    for place, g, w, b in zip(places, gots, wants, bounds, strict=True):
        assert_close(g.cpu(), w, bound=b, roundings=roundings + terms * (dtype is torch.float32), name=f"gradient of operand {place}")


def _like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor on the device in a dtype with its strides kept, as a leaf."""
    if not tensor.is_floating_point():
        return tensor.to(DEVICE)
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) if tensor.numel() else 0
    memory = torch.full((max(span, 1),), float("nan"), dtype=dtype, device=DEVICE)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor).detach().requires_grad_()
