"""Attention masks, losses, lookups, and what a trace says of them."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tn
from tn import ops


def brute(mask: tn.Mask, queries: int, keys: int) -> torch.Tensor:
    seen = torch.zeros(queries, keys, dtype=torch.bool)
    for i in range(queries):
        q = keys - queries + i
        for k in range(keys):
            near = mask.window is None or abs(q - k) <= mask.window or k < mask.sink
            seen[i, k] = near and (k <= q or not mask.causal)
    return seen


@pytest.mark.parametrize(
    "mask",
    [tn.Mask(), tn.Mask(causal=False), tn.Mask(window=2), tn.Mask(window=1, sink=2), tn.Mask(window=0), tn.Mask(causal=False, window=1)],
    ids=str,
)
@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (1, 5), (3, 5)])
def test_attention_is_a_masked_softmax(mask, queries, keys):
    assert torch.equal(mask.matrix(queries, keys), brute(mask, queries, keys))
    q, k, v = (torch.randn(2, 3, n, 4, dtype=torch.float64) for n in (queries, keys, keys))
    scores = (q @ k.mT / 2).masked_fill(~brute(mask, queries, keys), -torch.inf)
    assert torch.allclose(ops.attention(q, k, v, mask), scores.softmax(-1) @ v)


def test_attention_refuses_what_does_not_fit():
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(tn.SizeError, match="expected"):
        ops.attention(q, torch.zeros(1, 2, 3, 5), q)
    with pytest.raises(tn.SizeError, match="at least as many keys"):
        ops.attention(q, q[:, :, :2], q[:, :, :2])
    with pytest.raises(tn.SizeError, match="window is -1"):
        tn.Mask(window=-1)


def test_heads_share_keys_in_groups():
    q, k, v = torch.randn(2, 6, 5, 4, dtype=torch.float64), *(torch.randn(2, 2, 5, 4, dtype=torch.float64) for _ in range(2))
    each = [t.repeat_interleave(3, 1) for t in (k, v)]
    for mask in (tn.Mask(), tn.Mask(window=2, sink=1), tn.Mask(causal=False)):
        torch.testing.assert_close(ops.attention(q, k, v, mask), ops.attention(q, *each, mask))
    with pytest.raises(tn.SizeError, match="groups that divide the heads"):
        ops.attention(q, k[:, :0], v[:, :0])
    with pytest.raises(tn.SizeError, match="groups that divide the heads"):
        ops.attention(q[:, :5], k, v)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_gated_is_two_products(activation):
    gates = {
        "none": lambda x: x,
        "relu": lambda x: x.clamp(min=0),
        "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
        "gelu_tanh": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
        "silu": lambda x: x / (1 + torch.exp(-x)),
        "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
        "square": lambda x: x**2,
    }
    x, w, v = (torch.randn(shape, dtype=torch.float64) for shape in ((2, 3, 5), (5, 4), (5, 4)))
    want = gates[activation](torch.einsum("abd,de->abe", x, w)) * torch.einsum("abd,de->abe", x, v)
    torch.testing.assert_close(ops.gated(x, w, v, activation), want)


def test_gated_refuses_what_does_not_fit():
    x, w = torch.ones(2, 5), torch.ones(5, 4)
    with pytest.raises(tn.SizeError, match=r"expected \(..., d\), \(d, e\), \(d, e\)"):
        ops.gated(x, w, w.mT)
    with pytest.raises(tn.OperatorError, match="unknown activation 'sillu': did you mean 'silu'"):
        ops.gated(x, w, w, "sillu")
    with pytest.raises(tn.OperatorError, match="unknown gated backend 'cuda'"):
        ops.gated(x, w, w, backend="cuda")


def test_latent_attention_is_attention_over_what_the_cache_stands_for():
    """Keys are up-projected latents beside rotated keys that all heads share, values up-projected latents; nothing absorbed."""
    up_k, up_v = (torch.randn(3, 7, n, dtype=torch.float64) for n in (4, 6))  # head, latent, width
    q, qr = torch.randn(2, 2, 3, 4, dtype=torch.float64), torch.randn(2, 2, 3, 5, dtype=torch.float64)
    latent, rope = torch.randn(2, 9, 7, dtype=torch.float64), torch.randn(2, 9, 5, dtype=torch.float64)
    got = ops.mla_decode(torch.einsum("bshn,hcn->bshc", q, up_k), qr, latent, rope, torch.tensor([9, 6]), scale=0.3)
    for i, length in enumerate((9, 6)):
        seen = latent[i, :length]
        keys = torch.cat([torch.einsum("tc,hcn->htn", seen, up_k), rope[i, :length].expand(3, -1, -1)], -1)
        queries = torch.cat([q[i], qr[i]], -1).transpose(0, 1)
        want = ops.attention(queries, keys, torch.einsum("tc,hcn->htn", seen, up_v), scale=0.3)
        torch.testing.assert_close(torch.einsum("shc,hcn->hsn", got[i], up_v), want)
    assert ops.mla_decode(q, q, latent[:, :, :4], latent[:, :, :4], torch.tensor([1, 0]), scale=0.3)[:, 0].eq(0).all()  # sees nothing


def test_latent_attention_refuses_what_does_not_fit():
    q, latent = torch.ones(1, 1, 2, 4), torch.ones(1, 3, 4)
    with pytest.raises(tn.SizeError, match=r"mla_decode of q \(1, 1, 2, 4\).*expected \(batch, queries, heads, c\)"):
        ops.mla_decode(q, q, latent, latent[..., :2], scale=1.0)
    with pytest.raises(tn.SizeError, match="lengths torch.float32 .*expected 1 integers"):
        ops.mla_decode(q, q, latent, latent, torch.ones(1), scale=1.0)
    with pytest.raises(tn.OperatorError, match="unknown mla_decode backend 'tritn': did you mean 'triton'"):
        ops.mla_decode(q, q, latent, latent, scale=1.0, backend="tritn")


class Decoder(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.backend = backend

    def forward(self, x: torch.Tensor, w: torch.Tensor, latent: torch.Tensor) -> torch.Tensor:
        q = ops.gated(x, w, w, "silu", backend=self.backend).unflatten(-1, (2, -1))
        return ops.mla_decode(q, q, latent, latent, scale=0.5, backend=self.backend)


@pytest.mark.parametrize("backend", ops.BACKENDS)
def test_a_trace_of_gates_and_latents(backend):
    """The FLOPs that torch counts; asking for kernels is no obstacle where nothing runs."""
    inputs = torch.randn(2, 1, 6), torch.randn(6, 8), torch.randn(2, 5, 4)
    trace = tn.trace(Decoder(backend), *inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        Decoder("torch")(*inputs)
    assert trace.flops == counter.get_total_flops()
    what = [n.what for n in trace.nodes if n.kind == "pointwise"]
    assert what == ["silu", "multiply", "add", "softmax"]


def test_cross_entropy_counts_real_targets_only():
    logits, targets = torch.randn(2, 3, 5), torch.tensor([[1, -100, 2], [-100, 0, 4]])
    each = ops.cross_entropy(logits, targets, reduction="none")
    assert torch.allclose(ops.cross_entropy(logits, targets), each.sum() / 4)
    assert ops.cross_entropy(logits.bfloat16(), targets).dtype is torch.float32


def test_embedding_is_the_one_hot_contraction():
    table, numbers = torch.randn(7, 3), torch.tensor([[0, 6], [2, 2]])
    onehot = torch.nn.functional.one_hot(numbers, 7).float()
    assert torch.equal(ops.embedding(numbers, table), tn.contract("... v, v w -> ... w", onehot, table))
    with pytest.raises(tn.OperatorError, match="takes integers"):
        ops.embedding(numbers.float(), table)


class Tiny(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = tn.Embedding(11, 8)
        self.lin = tn.StructuredLinear(8, 8, structure="btt", rank=2)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        x = self.lin(self.table(numbers))
        heads = x.unflatten(-1, (2, 4)).transpose(-2, -3)
        return ops.add(x, ops.attention(heads, heads, heads).transpose(-2, -3).flatten(-2))


def test_a_trace_accounts_for_every_flop():
    model, numbers = Tiny(), torch.randint(11, (2, 5))
    trace = tn.trace(model, numbers)
    with tn.backend("einsum"), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(numbers)
    assert trace.flops == counter.get_total_flops() == tn.flops(model, numbers)
    assert [n.kind for n in trace.nodes] == ["gather", "contraction", "contraction", "pointwise", "contraction", "pointwise"]
    assert [n.path for n in trace.nodes][:2] == ["table", "lin"]
    assert sum(n.parameters for n in trace.nodes) == sum(p.numel() for p in model.parameters())
    assert "softmax" in str(trace)


def test_a_trace_leaves_the_model_as_it_was():
    model = Tiny()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    tn.trace(model, torch.randint(11, (2, 5)))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not model.lin._forward_hooks and not tn.tracing.recording()


def test_a_failing_trace_stops_recording():
    with pytest.raises(tn.SizeError):
        tn.trace(tn.StructuredLinear(3, 3), torch.zeros(2, 4))
    assert not tn.tracing.recording()


def test_unsigned_lengths_of_latent_decoding_do_not_wrap_around():
    torch.manual_seed(0)
    q, qr, latent, rope = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 4), torch.randn(1, 6, 8), torch.randn(1, 6, 4)
    signed = tn.ops.mla_decode(q, qr, latent, rope, torch.tensor([1]), scale=0.3)
    assert torch.equal(tn.ops.mla_decode(q, qr, latent, rope, torch.tensor([1], dtype=torch.uint8), scale=0.3), signed)
    with pytest.raises(tn.SizeError, match="lengths torch.bool"):
        tn.ops.mla_decode(q, qr, latent, rope, torch.tensor([True]), scale=0.3)
