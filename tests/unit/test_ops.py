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
