"""The RMS clamp of cores with learned gains (arXiv:2406.06248): M ← γ M / max(1, RMS(M) / σ), σ the standard deviation a core starts with.

A contraction is linear in each core, so the clamp of all of them is one number times what the stored ones make.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tn.program import again, fits_fast, see_through

_EPS = 1e-8  # the paper's, added to the mean square


def factor(stds: Sequence[float], gains: Tensor | None, cores: Sequence[Tensor]) -> Tensor:
    """The number, differentiable.

    Args:
        stds: σ of each core. gains: γ of each core, or None for ones.
    """
    total = None
    for std, core in zip(stds, cores, strict=True):
        wide = core.float() if core.dtype.itemsize < 4 else core
        rms = (wide.abs() if wide.is_complex() else wide).square().mean().add(_EPS).sqrt()
        one = (rms / std).clamp(min=1).reciprocal()
        total = one if total is None else total * one
    assert total is not None
    return total if gains is None else total * gains.prod()


def scaled(result: Tensor, stds: Sequence[float], gains: Tensor | None, cores: Sequence[Tensor]) -> Tensor:
    """What the stored cores make, times the factor.

    On a CPU the number is a Python one and its gradient written out: the same through autograd takes 26 small operations.
    """
    operands = (result, *cores) if gains is None else (result, gains, *cores)
    if result.device.type != "cpu" or see_through() or not fits_fast(operands):
        return result * factor(stds, gains, cores).to(result.dtype)
    return _Scaled.apply(tuple(stds), result, gains, *cores)


class _Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, stds: tuple[float, ...], result: Tensor, gains: Tensor | None, *cores: Tensor) -> Tensor:
        squares = [float(torch.linalg.vector_norm(core)) ** 2 + _EPS * core.numel() for core in cores]
        ctx.stds, ctx.gammas = stds, [] if gains is None else gains.tolist()
        # what each core is divided by, and numel · RMS² where that is not one: the gradient of its logarithm is M over that
        ratios = [math.sqrt(square / core.numel()) / std for square, core, std in zip(squares, cores, stds, strict=True)]
        ctx.clamps = [square if ratio >= 1 else 0.0 for square, ratio in zip(squares, ratios, strict=True)]
        ctx.clamped = 1 / math.prod(max(ratio, 1.0) for ratio in ratios)
        ctx.total = ctx.clamped * math.prod(ctx.gammas)
        ctx.save_for_backward(result, gains, *cores)
        return result * ctx.total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Any, ...]:
        result, gains, *cores = ctx.saved_tensors
        if torch.is_grad_enabled():
            return None, *_again(ctx, gradient, result, gains, cores)
        needs, gammas = ctx.needs_input_grad, ctx.gammas
        found: list[Tensor | None] = [gradient * ctx.total if needs[1] else None]
        along = float((gradient * result).sum()) if any(needs[2:]) else 0.0  # the gradient in the number
        others = [math.prod(gammas[:i] + gammas[i + 1 :]) for i in range(len(gammas))]
        found.append(torch.tensor([along * ctx.clamped * other for other in others], dtype=result.dtype) if needs[2] else None)
        for core, clamp, need in zip(cores, ctx.clamps, needs[3:], strict=True):
            found.append(core * (-along * ctx.total / clamp) if clamp and need else None)
        return None, *found


def _again(ctx: Any, gradient: Tensor, result: Tensor, gains: Tensor | None, cores: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Gradients that can be differentiated themselves."""

    def plain(*tensors: Tensor) -> Tensor:
        given = tensors[1] if gains is not None else None
        return tensors[0] * factor(ctx.stds, given, tensors[1 if gains is None else 2 :])

    operands = [result, *([] if gains is None else [gains]), *cores]
    needs = [need for need, operand in zip(ctx.needs_input_grad[1:], (result, gains, *cores), strict=True) if operand is not None]
    found = list(again(plain, operands, needs, (gradient,)))
    return found if gains is not None else [found[0], None, *found[1:]]
