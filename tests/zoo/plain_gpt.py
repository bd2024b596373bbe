"""A GPT-2 in plain torch.nn, written independently of zoo: the oracle of the model tests."""

import torch
import torch.nn.functional as F
from torch import nn


class PlainBlock(nn.Module):
    def __init__(self, width, heads, head_dim, hidden, bias, qk_norm):
        super().__init__()
        inner = heads * head_dim
        self.heads, self.head_dim = heads, head_dim
        self.attention_norm = nn.LayerNorm(width, bias=bias)
        self.query, self.key, self.value = (nn.Linear(width, inner, bias=bias) for _ in range(3))
        self.query_norm = nn.LayerNorm(head_dim, bias=bias) if qk_norm else nn.Identity()
        self.key_norm = nn.LayerNorm(head_dim, bias=bias) if qk_norm else nn.Identity()
        self.out = nn.Linear(inner, width, bias=bias)
        self.mlp_norm = nn.LayerNorm(width, bias=bias)
        self.fc_in, self.fc_out = nn.Linear(width, hidden, bias=bias), nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        batch, seq, _ = x.shape
        h = self.attention_norm(x)
        q, k, v = (f(h).view(batch, seq, self.heads, self.head_dim) for f in (self.query, self.key, self.value))
        q, k, v = (t.transpose(1, 2) for t in (self.query_norm(q), self.key_norm(k), v))
        scores = q @ k.transpose(-1, -2) / self.head_dim**0.5
        scores = scores.masked_fill(torch.ones(seq, seq).triu(1).bool(), float("-inf"))
        x = x + self.out((scores.softmax(-1) @ v).transpose(1, 2).reshape(batch, seq, -1))
        return x + self.fc_out(F.gelu(self.fc_in(self.mlp_norm(x)), approximate="tanh"))


class PlainGPT(nn.Module):
    def __init__(self, *, vocab, context, layers, width, heads, head_dim, hidden, bias, qk_norm, tied):
        super().__init__()
        self.token_table, self.position_table = nn.Embedding(vocab, width), nn.Embedding(context, width)
        self.blocks = nn.ModuleList(PlainBlock(width, heads, head_dim, hidden, bias, qk_norm) for _ in range(layers))
        self.norm = nn.LayerNorm(width, bias=bias)
        self.head = nn.Linear(width, vocab, bias=False)
        if tied:
            self.head.weight = self.token_table.weight

    def forward(self, tokens):
        x = self.token_table(tokens) + self.position_table(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens, targets):
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten(), ignore_index=-100)


def plain_twin(model):
    """A PlainGPT with the weights of a zoo GPT; structured layers become the matrices they stand for."""
    c = model.config
    plain = PlainGPT(
        vocab=c.vocab,
        context=c.context,
        layers=c.layers,
        width=c.width,
        heads=c.heads,
        head_dim=c.attention_head_dim,
        hidden=c.mlp_hidden,
        bias=c.bias,
        qk_norm=c.qk_norm,
        tied=c.tied,
    ).to(model.token_table.weight.dtype)
    state = {}
    for name, module in model.named_modules():
        theirs = name.replace(".attention.", ".").replace(".mlp.", ".")
        if hasattr(module, "to_dense"):
            state[f"{theirs}.weight"] = module.to_dense().detach()
        elif isinstance(getattr(module, "weight", None), nn.Parameter):
            state[f"{theirs}.weight"] = module.weight.detach()
        if isinstance(getattr(module, "bias", None), nn.Parameter):
            state[f"{theirs}.bias"] = module.bias.detach()
    if c.tied:
        state["head.weight"] = state["token_table.weight"]
    plain.load_state_dict(state)
    return plain
