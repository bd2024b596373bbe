"""Small models for the tests of zoo, with every parameter random so that no error can hide behind a zero."""

import torch

from zoo import GPT, GPTConfig

SMALL = {"vocab": 97, "context": 24, "layers": 2, "width": 32, "heads": 4}

VARIANTS = {
    "dense tied": {},
    "dense untied": {"tied": False},
    "no bias": {"bias": False, "tied": False},
    "qk_norm": {"qk_norm": True},
    "free head_dim": {"heads": 3, "head_dim": 12, "hidden": 50},
    "btt": {"structure": "btt", "rank": 2},
    "btt rank 1": {"structure": "btt"},
    "btt head": {"structure": "btt", "rank": 2, "structured": "all", "tied": False},
    "low_rank": {"structure": "low_rank", "rank": 5},
    "low_rank ffn": {"structure": "low_rank", "rank": 5, "structured": "ffn", "qk_norm": True, "bias": False},
}


def small(seed=0, dtype=torch.float32, **fields):
    """A small GPT in evaluation mode; nothing in it is zero."""
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**{**SMALL, **fields}), dtype=dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter) * (0.1 if parameter.dim() == 1 else 0.3)
            parameter.copy_(1 + noise if name.endswith("norm.weight") else noise)
    return model.eval()


def tokens(*shape, seed=1, vocab=SMALL["vocab"]):
    """Random token ids, int64."""
    return torch.randint(0, vocab, shape, generator=torch.Generator().manual_seed(seed))
