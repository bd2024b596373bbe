"""AdamW over the structure-aware parameter groups, and the precision a training step computes in."""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import tn
from train.config import RunConfig


def adamw(model: nn.Module, config: RunConfig) -> torch.optim.AdamW:
    """Return AdamW over `tn.param_groups`; each group keeps its `names`, `multiplier` and `peak_lr` (config.lr · multiplier).

    One fused kernel per group where torch has one (CPU and CUDA).
    Source: Loshchilov & Hutter, arXiv 1711.05101; the rates: Qiu et al., arXiv 2406.06248.
    """
    groups = tn.param_groups(model, lr=config.lr, weight_decay=config.weight_decay, base=config.base_width)
    for group in groups:
        group["peak_lr"] = group["lr"]
    fused = all(parameter.device.type in ("cpu", "cuda") for parameter in model.parameters())
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to `factor` times its peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


@torch.no_grad()
def update_ratio(optimizer: torch.optim.AdamW) -> float:
    """Return ‖last update‖ / ‖weights‖ over all parameters, from AdamW's own state: no copy of the weights is kept.

    With u = m̂ / (√v̂ + eps), the update from weights w to w′ is lr·(u + decay·w) = lr·(u + decay·w′) / (1 - lr·decay).
    A healthy run is near 1e-3.
    """
    update, weight = [], []
    for group in optimizer.param_groups:
        beta1, beta2 = group["betas"]
        for parameter in group["params"]:
            state = optimizer.state.get(parameter)
            if not state:
                continue
            count = float(state["step"])
            scale = (1 - beta2**count) ** 0.5
            denominator = state["exp_avg_sq"].sqrt().div_(scale).add_(group["eps"])
            direction = torch.div(state["exp_avg"], denominator, out=denominator).div_(1 - beta1**count)
            direction.add_(parameter, alpha=group["weight_decay"])
            update.append(group["lr"] / (1 - group["lr"] * group["weight_decay"]) * torch.linalg.vector_norm(direction))
            weight.append(torch.linalg.vector_norm(parameter))
    if not update:
        return 0.0
    return float(torch.linalg.vector_norm(torch.stack(update)) / torch.linalg.vector_norm(torch.stack(weight)).clamp_min(1e-30))


def gradient_norm(parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return the global gradient norm as a 0-d tensor. `clip` scales the gradients once it is known to be finite.

    The two halves of `torch.nn.utils.clip_grad_norm_`: nothing is scaled when the norm is within bounds.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return nn.utils.get_total_norm(gradients)


def clip(parameters: Sequence[nn.Parameter], largest: float, norm: float) -> None:
    """Scale the gradients so that their global norm is at most `largest`, given their `norm`; 0 means no bound."""
    if largest and norm > largest:
        nn.utils.clip_grads_with_norm_(parameters, largest, torch.tensor(norm))


@contextlib.contextmanager
def tf32(enabled: bool) -> Iterator[None]:
    """Let float32 CUDA matrix products round to TF32 (or not) inside the block, and restore the setting after it."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if enabled else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """Return bfloat16 autocast, or nothing for float32 (entering an idle autocast costs time)."""
    if dtype == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=torch.bfloat16)
