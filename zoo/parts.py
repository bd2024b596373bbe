"""Parts that zoo models share: the norm, and the linear layer with its role."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tn
from zoo.config import GPTConfig


class Norm(nn.Module):
    """Layer norm over the last axis with a learned scale and, where asked, a learned shift."""

    def __init__(
        self,
        width: int,
        *,
        bias: bool = True,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(width, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Scale 1, shift 0."""
        nn.init.ones_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """x (..., width) → (..., width)."""
        return tn.ops.layer_norm(x, self.weight, self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, bias={self.bias is not None}, eps={self.eps}"


def linear(
    config: GPTConfig,
    role: str,
    in_features: int,
    out_features: int,
    *,
    bias: bool,
    zero_init: bool = False,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> tn.StructuredLinear:
    """The linear layer that `config` wants for a role, marked with it as `tn_role` (read by `tn.restructure`)."""
    structure, rank = config.structure_of(role)
    layer = tn.StructuredLinear(
        in_features,
        out_features,
        bias=bias,
        structure=structure,
        rank=rank,
        zero_init=zero_init,
        device=device,
        dtype=dtype,
    )
    layer.tn_role = role
    return layer
