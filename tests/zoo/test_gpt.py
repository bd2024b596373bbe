"""The GPT: equal to a plain torch.nn GPT with the same weights; starts where it should; trains."""

import copy
import math

import pytest
import torch

import tn
import zoo
from tests.zoo.models import SMALL, VARIANTS, small, tokens
from tests.zoo.plain_gpt import plain_twin
from zoo import GPT, ConfigError, GPTConfig


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_logits_and_loss_equal_a_plain_torch_gpt(fields):
    model = small(**fields)
    plain = plain_twin(model)
    x, y = tokens(3, 17), tokens(3, 17, seed=2)
    y[0, :5] = -100
    torch.testing.assert_close(model(x), plain(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.loss(x, y), plain.loss(x, y), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fields", [{}, {"tied": False, "qk_norm": True}], ids=str)
def test_gradients_equal_a_plain_torch_gpt(fields):
    model = small(dtype=torch.float64, **fields)
    plain = plain_twin(model)
    x, y = tokens(2, 11), tokens(2, 11, seed=2)
    model.loss(x, y).backward()
    plain.loss(x, y).backward()
    theirs = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        expected = theirs[name.replace(".attention.", ".").replace(".mlp.", ".")].grad
        # Only our loss rounds to fp32.
        torch.testing.assert_close(parameter.grad, expected, atol=1e-7, rtol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_qk_norm_makes_attention_blind_to_the_scale_of_queries():
    model = small(qk_norm=True, bias=False)
    louder = copy.deepcopy(model)
    with torch.no_grad():
        louder.blocks[0].attention.query.weight.mul_(50)
    x = tokens(2, 9)
    torch.testing.assert_close(louder(x), model(x), atol=1e-4, rtol=1e-4)
    without = small(bias=False)
    louder = copy.deepcopy(without)
    with torch.no_grad():
        louder.blocks[0].attention.query.weight.mul_(50)
    assert (louder(x) - without(x)).abs().max() > 1e-2


@pytest.mark.parametrize("structure", ["dense", "btt", "low_rank"])
def test_an_untied_head_starts_at_zero_so_that_the_first_loss_is_ln_vocab(structure):
    fields = {"structured": "all"} if structure != "dense" else {}
    model = GPT(GPTConfig(**SMALL, tied=False, structure=structure, **fields))
    assert model.loss(tokens(2, 9), tokens(2, 9, seed=3)).item() == pytest.approx(math.log(SMALL["vocab"]), rel=1e-6)


def test_output_projections_start_at_zero_so_that_blocks_pass_their_input_on():
    model = GPT(GPTConfig(**SMALL, structure="btt"))
    x = torch.randn(2, 5, SMALL["width"])
    assert torch.equal(model.blocks[0](x), x)
    model = GPT(GPTConfig(**SMALL, structure="btt", zero_init=False))
    assert not torch.equal(model.blocks[0](x), x)


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_every_parameter_gets_a_gradient(fields):
    model = small(**fields).train()
    model.loss(tokens(2, 9), tokens(2, 9, seed=3)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        # The softmax does not change when all of a query's scores move together, as a key bias makes them.
        if not name.endswith(("key.bias", "key_norm.bias")):
            assert parameter.grad.abs().max() > 0, name


def test_a_few_steps_learn_a_batch_by_heart():
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, structure="btt", rank=2, tied=False, structured="all"))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    x = tokens(2, 17)
    for _ in range(60):
        optimizer.zero_grad()
        loss = model.loss(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss.item() < 1.0


def test_dropout_only_while_training():
    model = small(dropout=0.5)
    x = tokens(2, 9)
    assert torch.equal(model(x), model(x))
    model.train()
    assert not torch.equal(model(x), model(x))


def test_last_only_is_the_last_row():
    model, x = small(), tokens(2, 9)
    torch.testing.assert_close(model(x, last_only=True), model(x)[:, -1:])


def test_named_parameters():
    model = zoo.create("gpt-tiny", layers=1, structure="btt", structured="ffn")
    block = model.blocks[0]
    assert block.attention.query.weight.shape == (128, 128)
    assert block.mlp.fc_in.to_dense().shape == (512, 128)
    names = [name for name, _ in model.named_parameters()]
    assert names[:2] == ["token_table.weight", "position_table.weight"]
    assert {"blocks.0.mlp.fc_in.first", "blocks.0.mlp.fc_in.second", "blocks.0.mlp.fc_in.bias"} <= set(names)


def test_reset_parameters_after_meta():
    model = GPT(GPTConfig(**SMALL, tied=False), device="meta").to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(math.nan)
    model.reset_parameters()
    assert model.loss(tokens(2, 9), tokens(2, 9)).item() == pytest.approx(math.log(SMALL["vocab"]), rel=1e-6)


def test_bfloat16_autocast():
    model = small()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens(2, 9), tokens(2, 9, seed=3))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model.loss(tokens(2, 9), tokens(2, 9, seed=3)).item(), rel=0.05)


@pytest.mark.parametrize(
    "bad, message",
    [
        (torch.zeros(3, dtype=torch.int64), r"shape \(batch, seq\), got torch.int64 of shape \(3,\)"),
        (torch.zeros(1, 3), "must be whole numbers"),
        (torch.zeros(1, 25, dtype=torch.int64), "25 tokens do not fit the model's context of 24"),
    ],
)
def test_refused_tokens(bad, message):
    with pytest.raises(ConfigError, match=message):
        small()(bad)


def test_cache_longer_than_the_context_is_refused():
    with pytest.raises(ConfigError, match="a cache of 25 tokens is longer than the model's context of 24"):
        small().new_cache(1, 25)


@pytest.mark.parametrize("fields", [{}, VARIANTS["btt head"]], ids=["dense", "btt"])
def test_compiles_as_one_graph(fields):
    model, x, y = small(**fields), tokens(2, 9), tokens(2, 9, seed=3)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x), atol=1e-5, rtol=1e-5)
    torch.nn.functional.cross_entropy(compiled(x).flatten(0, 1), y.flatten()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_learning_rate_groups_hold_every_parameter_once(fields):
    model = small(**fields)
    groups = tn.param_groups(model, lr=1.0, weight_decay=0.1, base=model.width // 2)
    grouped = {name: group for group in groups for name in group["names"]}
    assert sorted(name for group in groups for name in group["names"]) == sorted(dict(model.named_parameters()))
    for name in ("token_table.weight", "position_table.weight", "norm.weight"):
        assert (grouped[name]["multiplier"], grouped[name]["weight_decay"]) == (1.0, 0.0)
    if model.config.structure == "dense":
        query = grouped["blocks.0.attention.query.weight"]
        assert (query["multiplier"], query["weight_decay"]) == (0.5, 0.1)
