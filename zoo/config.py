"""The configuration of a GPT: a frozen value that checks itself once and can be printed, changed and stored."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import tn
from zoo.errors import ConfigError

STRUCTURED = ("all", "all_but_last", "attn", "ffn")
"""Which linear layers take `structure`: all of them, all but the head, those of attention, those of the MLP."""

_LARGEST = 2**31 - 1
"""Of a size: what every kernel can index."""

_ROLES = {
    "all": ("attention.qkv", "attention.out", "mlp.in", "mlp.out", "head"),
    "all_but_last": ("attention.qkv", "attention.out", "mlp.in", "mlp.out"),
    "attn": ("attention.qkv", "attention.out"),
    "ffn": ("mlp.in", "mlp.out"),
}

_DOTTED = {
    "attention.heads": "heads",
    "attention.head_dim": "head_dim",
    "attention.qk_norm": "qk_norm",
    "mlp.hidden": "hidden",
    "head.tied": "tied",
    "embedding.vocab": "vocab",
    "embedding.context": "context",
}
"""Fields by the part of the model they belong to; the plain names are always accepted too."""


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Sizes and choices of a GPT-2 style decoder.

    Example:
        >>> GPTConfig(width=512, heads=8).override({"attention.heads": 4}).heads
        4

    Raises:
        ConfigError: a value is of the wrong type or out of range, or two values contradict each other.
    """

    vocab: int = 50257
    """number of tokens the model knows"""
    context: int = 1024
    """longest sequence, in tokens"""
    layers: int = 12
    """number of blocks"""
    width: int = 768
    """features of the residual stream"""
    heads: int = 12
    """attention heads of a block"""
    head_dim: int | None = None
    """features of one head (default: width / heads)"""
    hidden: int | None = None
    """features inside the MLP (default: 4 × width)"""
    qk_norm: bool = False
    """normalise every query and key over its head's features"""
    tied: bool = True
    """the head reads out through the token table"""
    bias: bool = True
    """biases in linear layers and norms"""
    structure: str = "dense"
    """family of the linear layers: blast, block_diagonal, btt, btt_moe, btt_norm, dense, einsum2, kronecker, low_rank, monarch or tt"""
    rank: int | None = None
    """rank of the structure (default: the structure's own)"""
    structured: str = "all_but_last"
    """which linear layers are structured: all, all_but_last, attn or ffn"""
    zero_init: bool = True
    """start output projections, and an untied head, at zero"""
    dropout: float = 0.0
    """share of features dropped while training"""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        if self.structure not in tn.structures.names():
            raise ConfigError(tn.errors.unknown("structure", self.structure, tn.structures.names()))
        if self.structured not in STRUCTURED:
            raise ConfigError(tn.errors.unknown("choice of structured layers", self.structured, STRUCTURED))
        if self.head_dim is None and self.width % self.heads:
            raise ConfigError(
                f"width={self.width} is not a multiple of heads={self.heads}: give head_dim=, or a width such as "
                f"{self.heads * -(-self.width // self.heads)}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.structure == "dense" and self.rank is not None:
            raise ConfigError(f"rank={self.rank} is for a structured layer, and structure is 'dense'; leave rank out")
        if self.tied and self.structured == "all" and self.structure != "dense":
            raise ConfigError(
                f"tied and structured together: a tied head is the token table and cannot be {self.structure!r}; "
                "use tied=False, or structured='all_but_last'"
            )

    @property
    def attention_head_dim(self) -> int:
        """Features of one head: `head_dim`, or width / heads where it is not given."""
        return self.width // self.heads if self.head_dim is None else self.head_dim

    @property
    def attention_width(self) -> int:
        """Features of all heads together; free of `width` when `head_dim` is given."""
        return self.heads * self.attention_head_dim

    @property
    def mlp_hidden(self) -> int:
        """Features inside the MLP: `hidden`, or 4 × width where it is not given."""
        return 4 * self.width if self.hidden is None else self.hidden

    def structure_of(self, role: str) -> tuple[str, int | None]:
        """(structure, rank) of the linear layers with this role.

        Args:
            role: "attention.qkv", "attention.out", "mlp.in", "mlp.out" or "head".
        """
        if role not in _ROLES["all"]:
            raise ConfigError(tn.errors.unknown("role", role, _ROLES["all"]))
        return (self.structure, self.rank) if role in _ROLES[self.structured] else ("dense", None)

    def override(self, changes: Mapping[str, Any] | None = None, /, **fields: Any) -> GPTConfig:
        """A copy with some fields changed, checked again as a whole.

        Args:
            changes: new values by field name or dotted path, as `{"attention.heads": 8}`.
            fields: new values by field name; dotted paths work through `**{"attention.heads": 8}`.

        Raises:
            ConfigError: a field is unknown (the nearest is named), given twice, or its value is not valid.
        """
        new: dict[str, Any] = {}
        for name, value in [*(changes or {}).items(), *fields.items()]:
            field = field_name(name)
            if field in new:
                raise ConfigError(f"{field!r} is given twice: {new[field]!r} and {value!r}")
            new[field] = value
        return dataclasses.replace(self, **new)

    def to_dict(self) -> dict[str, Any]:
        """Every field by name: plain values, ready for JSON or YAML."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> GPTConfig:
        """The configuration that `to_dict` wrote; missing fields take their defaults.

        Raises:
            ConfigError: a field is unknown (the nearest is named) or its value is not valid.
        """
        return cls().override(fields)


def field_name(name: str) -> str:
    """The field that a plain name or a dotted path stands for.

    Raises:
        ConfigError: no such field; the message names the nearest and lists all.
    """
    plain = tuple(field.name for field in dataclasses.fields(GPTConfig))
    if name in plain:
        return name
    if name in _DOTTED:
        return _DOTTED[name]
    candidates = (*plain, *_DOTTED) if "." in name else plain
    raise ConfigError(tn.errors.unknown("model field", name, candidates))


def _check_type(field: dataclasses.Field[Any], value: object) -> None:
    kind, _, optional = str(field.type).partition(" | ")
    if value is None and optional:
        return
    if kind == "int":
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConfigError(f"{field.name}={value!r} must be a whole number of at least 1")
        if value > _LARGEST:
            raise ConfigError(f"{field.name}={value!r} must be at most {_LARGEST}")
    elif kind == "float":
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"{field.name}={value!r} must be a number")
    elif kind == "bool":
        if not isinstance(value, bool):
            raise ConfigError(f"{field.name}={value!r} must be True or False")
    elif not isinstance(value, str):
        raise ConfigError(f"{field.name}={value!r} must be a string")
