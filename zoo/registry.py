"""Models by name."""

from __future__ import annotations

from typing import Any

import torch

import tn
from zoo.config import GPTConfig
from zoo.errors import ConfigError
from zoo.gpt import GPT

_PRESETS: dict[str, GPTConfig] = {
    "gpt-tiny": GPTConfig(vocab=4096, context=256, layers=4, width=128, heads=4),
    "gpt2-small": GPTConfig(layers=12, width=768, heads=12),
    "gpt2-medium": GPTConfig(layers=24, width=1024, heads=16),
    "gpt2-large": GPTConfig(layers=36, width=1280, heads=20),
    "gpt2-xl": GPTConfig(layers=48, width=1600, heads=25),
}


def names() -> tuple[str, ...]:
    """The names that `create` knows, the smallest model first.

    Example:
        >>> "gpt2-small" in names()
        True
    """
    return tuple(_PRESETS)


def config(name: str, **fields: Any) -> GPTConfig:
    """The configuration behind a name, with some fields changed.

    Raises:
        ConfigError: no such name or field; the nearest is named.
    """
    if name not in _PRESETS:
        raise ConfigError(tn.errors.unknown("model", name, names()))
    return _PRESETS[name].override(fields)


def create(name: str, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **fields: Any) -> GPT:
    """A new model with random parameters.

    Args:
        name: one of `names()`.
        device: where its parameters live; "meta" builds it without memory.
        dtype: of its parameters.
        fields: fields of `GPTConfig` to change, as `structure="btt", rank=2`.

    Raises:
        ConfigError: no such name or field (the nearest is named), or a value that is not valid.

    Example:
        >>> create("gpt-tiny", device="meta", structure="btt").config.structure
        'btt'
    """
    return GPT(config(name, **fields), device=device, dtype=dtype)
