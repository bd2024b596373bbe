"""The plain-torch twin is the zoo's dense GPT: same loss, same gradients, same cached logits."""

import pytest
import torch

import zoo
from bench.peers import TorchGPT

SHAPE = {"vocab": 61, "context": 16, "layers": 2, "width": 24, "heads": 3, "zero_init": False}
VARIANTS = [
    {},
    {"tied": False},
    {"bias": False},
    {"head_dim": 5, "hidden": 31},
    {"structure": "btt", "rank": 2},
    {"structure": "low_rank", "rank": 3},
]


def _pair(dtype=torch.float64, **fields):
    model = zoo.GPT(zoo.GPTConfig(**SHAPE, **fields), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms away from 0 and 1
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model, TorchGPT.from_zoo(model)


def _batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = (torch.randint(0, SHAPE["vocab"], (3, SHAPE["context"]), generator=generator) for _ in range(2))
    targets[0, 5:] = -100
    return tokens, targets


@pytest.mark.parametrize("fields", VARIANTS, ids=str)
def test_loss_is_the_same(fields):
    model, twin = _pair(**fields)
    assert abs(model.loss(*_batch()) - twin.loss(*_batch())) < 1e-10


def test_loss_is_the_same_in_float32():
    model, twin = _pair(torch.float32)
    assert abs(model.loss(*_batch()) - twin.loss(*_batch())) < 1e-5


def test_gradients_are_the_same():
    model, twin = _pair()
    model.loss(*_batch()).backward()
    twin.loss(*_batch()).backward()
    block, theirs = model.blocks[1], twin.blocks[1]
    for ours, other in [
        (model.token_table.weight.grad, twin.tokens.weight.grad),
        (model.position_table.weight.grad, twin.positions.weight.grad),
        (block.mlp.fc_in.weight.grad, theirs.fc_in.weight.grad),
        (block.attention.out.bias.grad, theirs.out.bias.grad),
        (block.attention.key.weight.grad, theirs.qkv.weight.grad.chunk(3)[1]),
        (model.norm.weight.grad, twin.norm.weight.grad),
    ]:
        torch.testing.assert_close(ours, other, rtol=1e-9, atol=1e-12)


def test_a_changed_weight_is_noticed():
    model, twin = _pair()
    with torch.no_grad():
        twin.blocks[0].fc_out.weight[0, 0] += 0.1
    assert abs(model.loss(*_batch()) - twin.loss(*_batch())) > 1e-8


def test_cached_logits_are_the_same():
    _, twin = _pair()
    tokens, _ = _batch()
    with torch.no_grad():
        whole = twin(tokens)
        cache = twin.new_cache(tokens.shape[0])
        parts = [twin(tokens[:, :9], cache)] + [twin(tokens[:, i : i + 1], cache, i) for i in range(9, tokens.shape[1])]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)


def test_qk_norm_is_refused():
    with pytest.raises(ValueError, match="QK-norm"):
        TorchGPT(zoo.GPTConfig(**SHAPE, qk_norm=True))
