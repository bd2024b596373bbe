"""GPT-2 of any size, built from contractions: pre-norm blocks, learned positions, tanh GELU, causal attention.

Radford et al., "Language Models are Unsupervised Multitask Learners" (2019). The axes are
B batch, S sequence, W width, H heads, D head_dim, V vocab; a suffix names the axes of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import tn
from zoo.cache import KVCache
from zoo.config import GPTConfig
from zoo.errors import ConfigError
from zoo.parts import Norm, linear

Device = torch.device | str | None
Dtype = torch.dtype | None


class Attention(nn.Module):
    """Causal softmax attention: separate query, key and value maps, H heads, one output map."""

    def __init__(self, config: GPTConfig, *, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        width, inner, bias = config.width, config.attention_width, config.bias
        self.heads, self.head_dim = config.heads, config.attention_head_dim
        self.query = linear(config, "attention.qkv", width, inner, bias=bias, device=device, dtype=dtype)
        self.key = linear(config, "attention.qkv", width, inner, bias=bias, device=device, dtype=dtype)
        self.value = linear(config, "attention.qkv", width, inner, bias=bias, device=device, dtype=dtype)
        self.query_norm = self.key_norm = None
        if config.qk_norm:
            self.query_norm = Norm(self.head_dim, bias=bias, device=device, dtype=dtype)
            self.key_norm = Norm(self.head_dim, bias=bias, device=device, dtype=dtype)
        self.out = linear(config, "attention.out", inner, width, bias=bias, zero_init=config.zero_init, device=device, dtype=dtype)

    def forward(self, x_BSW: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x (batch, seq, width) → (batch, seq, width); with a cache, keys and values of earlier calls are seen too."""
        q_BSHD = self.query(x_BSW).unflatten(-1, (self.heads, self.head_dim))
        k_BSHD = self.key(x_BSW).unflatten(-1, (self.heads, self.head_dim))
        v_BSHD = self.value(x_BSW).unflatten(-1, (self.heads, self.head_dim))
        if self.query_norm is not None and self.key_norm is not None:
            q_BSHD, k_BSHD = self.query_norm(q_BSHD), self.key_norm(k_BSHD)
        q_BHSD, k_BHSD, v_BHSD = (t.transpose(1, 2) for t in (q_BSHD, k_BSHD, v_BSHD))
        if cache is not None:
            k_BHSD, v_BHSD = cache.append(layer, k_BHSD, v_BHSD)
        y_BHSD = tn.ops.attention(q_BHSD, k_BHSD, v_BHSD, mask=tn.ops.Mask(causal=True))
        return self.out(y_BHSD.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """width → hidden, tanh GELU, hidden → width."""

    def __init__(self, config: GPTConfig, *, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        width, hidden, bias = config.width, config.mlp_hidden, config.bias
        self.fc_in = linear(config, "mlp.in", width, hidden, bias=bias, device=device, dtype=dtype)
        self.fc_out = linear(config, "mlp.out", hidden, width, bias=bias, zero_init=config.zero_init, device=device, dtype=dtype)

    def forward(self, x_BSW: Tensor) -> Tensor:
        """x (..., width) → (..., width)."""
        return self.fc_out(tn.ops.gelu(self.fc_in(x_BSW), approximate="tanh"))


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, *, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attention_norm = Norm(config.width, bias=config.bias, device=device, dtype=dtype)
        self.attention = Attention(config, device=device, dtype=dtype)
        self.mlp_norm = Norm(config.width, bias=config.bias, device=device, dtype=dtype)
        self.mlp = MLP(config, device=device, dtype=dtype)

    def forward(self, x_BSW: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """x (batch, seq, width) → (batch, seq, width)."""
        x_BSW = tn.ops.add(x_BSW, self._drop(self.attention(self.attention_norm(x_BSW), cache, layer)))
        return tn.ops.add(x_BSW, self._drop(self.mlp(self.mlp_norm(x_BSW))))

    def _drop(self, x: Tensor) -> Tensor:
        return tn.ops.dropout(x, self.dropout, self.training) if self.dropout else x


class GPT(nn.Module):
    """A GPT-2 style language model whose every layer is a contraction.

    Parameters are attributes: `model.blocks[0].attention.query.weight` (dense) or `.first`, `.second` (structured).

    Args:
        config: sizes and choices.
        device: where the parameters live; "meta" builds the model without memory.
        dtype: of the parameters; default torch's.

    Example:
        >>> model = GPT(GPTConfig(vocab=64, context=16, layers=1, width=32, heads=2))
        >>> model(torch.zeros(1, 4, dtype=torch.long)).shape
        torch.Size([1, 4, 64])
    """

    def __init__(self, config: GPTConfig, device: Device = None, dtype: Dtype = None) -> None:
        super().__init__()
        self.config = config
        self.token_table = tn.Embedding(config.vocab, config.width, device=device, dtype=dtype)
        self.position_table = tn.Embedding(config.context, config.width, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(Block(config, device=device, dtype=dtype) for _ in range(config.layers))
        self.norm = Norm(config.width, bias=config.bias, device=device, dtype=dtype)
        if config.tied:
            self.head = tn.Contraction(
                "x: ... width, table: vocab width -> ... vocab", sizes={"width": config.width, "vocab": config.vocab}
            )
        else:
            self.head = linear(
                config,
                "head",
                config.width,
                config.vocab,
                bias=False,
                zero_init=config.zero_init,
                device=device,
                dtype=dtype,
            )

    @property
    def width(self) -> int:
        """Features of the residual stream; `tn.param_groups` compares it with a base width."""
        return self.config.width

    def reset_parameters(self) -> None:
        """Draw all parameters anew, as at construction (needed after `model.to_empty(device=…)`)."""
        for module in self.modules():
            if module is not self and isinstance(module, Norm | tn.Embedding | tn.StructuredLinear):
                module.reset_parameters()

    def forward(self, tokens: Tensor, cache: KVCache | None = None, *, last_only: bool = False) -> Tensor:
        """Logits of the next token at every place.

        Args:
            tokens: (batch, seq) of int64, each in [0, vocab).
            cache: keys and values of the tokens before these (`new_cache`); it takes in these ones too.
            last_only: give only the logits after the last token, (batch, 1, vocab): all that generation needs.

        Returns:
            (batch, seq, vocab) in the parameters' dtype (or autocast's).

        Raises:
            ConfigError: `tokens` has another shape or dtype, or goes past the context.
            CacheError: the cache is full or was made for another batch.
        """
        start = 0 if cache is None else cache.length
        self._check(tokens, start)
        positions_S = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        x_BSW = tn.ops.add(self.token_table(tokens), self.position_table(positions_S))
        if self.config.dropout:
            x_BSW = tn.ops.dropout(x_BSW, self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x_BSW = block(x_BSW, cache, layer)
        if cache is not None:
            cache.advance(tokens.shape[1])
        x_BSW = self.norm(x_BSW[:, -1:] if last_only else x_BSW)
        return self.head(x_BSW, self.token_table.weight) if self.config.tied else self.head(x_BSW)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per real token, as a scalar in fp32.

        Args:
            tokens: (batch, seq) of int64.
            targets: (batch, seq) of int64: the token that follows; -100 where there is none to count.
        """
        return tn.ops.cross_entropy(self(tokens), targets)

    def new_cache(self, batch: int, length: int | None = None, device: Device = None, dtype: Dtype = None) -> KVCache:
        """An empty key-value cache for `batch` sequences of up to `length` tokens (default: the context).

        Raises:
            ConfigError: `length` is longer than the context.
        """
        length = self.config.context if length is None else length
        if length > self.config.context:
            raise ConfigError(f"a cache of {length} tokens is longer than the model's context of {self.config.context}")
        weight = self.token_table.weight
        return KVCache(
            layers=self.config.layers,
            batch=batch,
            heads=self.config.heads,
            length=length,
            head_dim=self.config.attention_head_dim,
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def _check(self, tokens: Tensor, start: int) -> None:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ConfigError(
                f"tokens must be whole numbers (int64) of shape (batch, seq), got {tokens.dtype} of shape {tuple(tokens.shape)}"
            )
        if start + tokens.shape[1] > self.config.context:
            raise ConfigError(f"{start + tokens.shape[1]} tokens do not fit the model's context of {self.config.context}")
