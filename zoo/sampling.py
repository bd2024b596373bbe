"""From logits to the next token: temperature, top-k, top-p and min-p.

V is the vocabulary, B the batch. The filters work one after the other, each on the probabilities the one before left,
renormalised: temperature, top-k, top-p (Holtzman et al., 2019, arXiv:1904.09751), min-p (Nguyen et al., 2024,
arXiv:2407.01082).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from zoo.errors import GenerateError


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """How to choose the next token.

    Args:
        temperature: logits are divided by it; 0 takes the most likely token.
        top_k: keep the k most likely tokens (and ties with the last of them).
        top_p: keep the fewest most likely tokens whose probabilities reach p.
        min_p: keep tokens at least min_p times as likely as the most likely one.

    Raises:
        GenerateError: a value is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise GenerateError(f"temperature={self.temperature} must be 0 (most likely token) or a positive number")
        if self.top_k is not None and self.top_k < 1:
            raise GenerateError(f"top_k={self.top_k} must be at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise GenerateError(f"top_p={self.top_p} must be above 0 and at most 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise GenerateError(f"min_p={self.min_p} must be between 0 and 1")

    def probabilities(self, logits_BV: Tensor) -> Tensor:
        """The distribution to draw from.

        Args:
            logits_BV: (..., vocab), any floating dtype.

        Returns:
            (..., vocab) in fp32 (fp64 stays); rows sum to 1, and tokens that were filtered out have 0.

        Raises:
            GenerateError: a logit is NaN or +inf.
        """
        logits_BV = logits_BV.to(torch.promote_types(logits_BV.dtype, torch.float32))
        if torch.isnan(logits_BV).any() or torch.isposinf(logits_BV).any():
            raise GenerateError("the model's logits are not finite: its parameters are damaged or it diverged")
        if self.temperature == 0:
            best_B1 = logits_BV.argmax(-1, keepdim=True)
            return torch.zeros_like(logits_BV).scatter_(-1, best_B1, 1.0)
        # Subtracting the largest first keeps a tiny temperature from overflowing; one that the dtype rounds to 0 would give 0 / 0.
        temperature = max(self.temperature, torch.finfo(logits_BV.dtype).tiny)
        logits_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperature
        if self.top_k is not None and self.top_k < logits_BV.shape[-1]:
            kth_B1 = logits_BV.topk(self.top_k, dim=-1).values[..., -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < kth_B1, -math.inf)
        p_BV = logits_BV.softmax(-1)
        if self.top_p is not None and self.top_p < 1:
            p_BV = _renormalise(p_BV.masked_fill(_beyond(p_BV, self.top_p), 0.0))
        if self.min_p is not None:
            p_BV = _renormalise(p_BV.masked_fill(p_BV < self.min_p * p_BV.amax(-1, keepdim=True), 0.0))
        return p_BV

    def draw(self, logits_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """One token per row: (batch, vocab) → (batch,) of int64, on the CPU, so that a seed means the same everywhere."""
        p_BV = self.probabilities(logits_BV.cpu())
        if self.temperature == 0:
            return p_BV.argmax(-1)
        return torch.multinomial(p_BV, 1, generator=generator).squeeze(-1)


def _beyond(p_BV: Tensor, top_p: float) -> Tensor:
    """Which tokens are outside the fewest most likely ones whose probabilities reach `top_p`."""
    sorted_BV, order_BV = p_BV.sort(dim=-1, descending=True, stable=True)
    before_BV = sorted_BV.cumsum(-1) - sorted_BV
    outside_BV = before_BV >= top_p
    outside_BV[..., 0] = False
    return torch.zeros_like(outside_BV).scatter_(-1, order_BV, outside_BV)


def _renormalise(p_BV: Tensor) -> Tensor:
    return p_BV / p_BV.sum(-1, keepdim=True)
