"""What a user would write without this project: a GPT-2 of torch.nn modules, as fast as plain torch makes it."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tn
import zoo

Cache = list[tuple[Tensor, Tensor]]


class TorchBlock(nn.Module):
    """One pre-norm block; queries, keys and values come from a single nn.Linear."""

    def __init__(self, config: zoo.GPTConfig) -> None:
        super().__init__()
        inner = config.attention_width
        self.heads = config.heads
        self.attention_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.qkv = nn.Linear(config.width, 3 * inner, bias=config.bias)
        self.out = nn.Linear(inner, config.width, bias=config.bias)
        self.mlp_norm = nn.LayerNorm(config.width, bias=config.bias)
        self.fc_in = nn.Linear(config.width, config.mlp_hidden, bias=config.bias)
        self.fc_out = nn.Linear(config.mlp_hidden, config.width, bias=config.bias)

    def forward(self, x: Tensor, cache: tuple[Tensor, Tensor] | None = None, start: int = 0) -> Tensor:
        """x (batch, seq, width) → the same shape; `cache` holds keys and values (batch, heads, context, head_dim)."""
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.attention_norm(x)).chunk(3, dim=-1))
        if cache is not None:
            end = start + x.shape[1]
            cache[0][:, :, start:end], cache[1][:, :, start:end] = k, v
            k, v = cache[0][:, :, :end], cache[1][:, :, :end]
        y = F.scaled_dot_product_attention(q, k, v, is_causal=x.shape[1] > 1)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.fc_out(F.gelu(self.fc_in(self.mlp_norm(x)), approximate="tanh"))


class TorchGPT(nn.Module):
    """A dense GPT-2 in plain torch.nn, with the shapes of a zoo configuration.

    Args:
        config: a GPTConfig; its structure is ignored, every map is an nn.Linear.

    Raises:
        ValueError: a configuration with QK-norm, which this twin does not have.
    """

    def __init__(self, config: zoo.GPTConfig) -> None:
        super().__init__()
        if config.qk_norm:
            raise ValueError("the plain-torch twin has no QK-norm; use qk_norm=False")
        self.config = config
        self.tokens = nn.Embedding(config.vocab, config.width)
        self.positions = nn.Embedding(config.context, config.width)
        self.blocks = nn.ModuleList(TorchBlock(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width, bias=config.bias)
        self.head = nn.Linear(config.width, config.vocab, bias=False)
        if config.tied:
            self.head.weight = self.tokens.weight

    @classmethod
    def from_zoo(cls, model: zoo.GPT) -> "TorchGPT":
        """The plain twin of a zoo GPT, with copies of its weights (structured ones multiplied out), on its device and in its dtype.

        Cost: one dense matrix per structured layer.
        """
        weight = model.token_table.weight
        twin = cls(model.config).to(device=weight.device, dtype=weight.dtype)
        with torch.no_grad():
            twin.tokens.weight.copy_(weight)
            twin.positions.weight.copy_(model.position_table.weight)
            if not model.config.tied:
                twin.head.weight.copy_(model.head.to_dense())
            _copy(twin.norm, model.norm)
            for ours, theirs in zip(twin.blocks, model.blocks, strict=True):
                attention, mlp = theirs.attention, theirs.mlp
                parts: list[tn.StructuredLinear] = [attention.query, attention.key, attention.value]  # type: ignore[list-item]
                ours.qkv.weight.copy_(torch.cat([part.to_dense() for part in parts]))
                if model.config.bias:
                    ours.qkv.bias.copy_(torch.cat([part.get_parameter("bias") for part in parts]))
                for mine, its in ((ours.out, attention.out), (ours.fc_in, mlp.fc_in), (ours.fc_out, mlp.fc_out)):
                    mine.weight.copy_(its.to_dense())
                    if mine.bias is not None:
                        mine.bias.copy_(its.bias)
                _copy(ours.attention_norm, theirs.attention_norm)
                _copy(ours.mlp_norm, theirs.mlp_norm)
        return twin.train(model.training)

    def forward(self, tokens: Tensor, cache: Cache | None = None, start: int = 0) -> Tensor:
        """Logits (batch, seq, vocab) of tokens (batch, seq); with a cache they are at positions start, start + 1, …

        A call with several tokens must be the first one of its cache (start = 0).
        """
        x = self.tokens(tokens) + self.positions.weight[start : start + tokens.shape[1]]
        for number, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[number], start)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats per real token; targets (batch, seq) of -100 are not counted."""
        return F.cross_entropy(self(tokens).flatten(0, 1).float(), targets.flatten(), ignore_index=-100)

    def new_cache(self, batch: int) -> Cache:
        """Empty keys and values of every layer, for `batch` sequences as long as the context."""
        weight = self.tokens.weight
        shape = (batch, self.config.heads, self.config.context, self.config.attention_head_dim)
        return [(weight.new_zeros(shape), weight.new_zeros(shape)) for _ in range(self.config.layers)]


def _copy(mine: nn.LayerNorm, its: nn.Module) -> None:
    mine.weight.copy_(its.weight)
    if mine.bias is not None:
        mine.bias.copy_(its.bias)
