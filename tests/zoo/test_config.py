"""GPTConfig and the registry: values, overrides and what they refuse."""

import dataclasses
import json

import pytest

import zoo
from zoo import ConfigError, GPTConfig


def test_defaults_are_gpt2_small():
    config = GPTConfig()
    assert (config.vocab, config.context, config.layers, config.width, config.heads) == (50257, 1024, 12, 768, 12)
    assert (config.attention_head_dim, config.attention_width, config.mlp_hidden) == (64, 768, 3072)


def test_head_dim_is_free_of_width_and_heads():
    config = GPTConfig(width=100, heads=7, head_dim=24)
    assert (config.attention_head_dim, config.attention_width) == (24, 168)


def test_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().width = 3


def test_override_by_name_path_and_both():
    config = GPTConfig()
    assert config.override({"attention.heads": 8}) == config.override(heads=8) == config.override(**{"attention.heads": 8})
    changed = config.override({"mlp.hidden": 100}, heads=4)
    assert (changed.hidden, changed.heads, changed.width) == (100, 4, 768)
    assert config.override() == config


def test_round_trip_through_json():
    config = GPTConfig(structure="btt", rank=2, tied=False, structured="all", head_dim=32, dropout=0.1)
    assert GPTConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"hedas": 8}, "unknown model field 'hedas': did you mean 'heads'?"),
        ({"attention.head": 8}, "did you mean 'attention.heads'?"),
        ({"structure": "bbt"}, "unknown structure 'bbt': did you mean 'btt'?"),
        ({"structured": "al"}, "did you mean 'all'?"),
        ({"heads": 7}, "width=768 is not a multiple of heads=7: give head_dim=, or a width such as 770"),
        ({"layers": 0}, "layers=0 must be a whole number of at least 1"),
        ({"layers": 2.0}, "layers=2.0 must be a whole number"),
        ({"layers": True}, "layers=True must be a whole number"),
        ({"tied": 1}, "tied=1 must be True or False"),
        ({"dropout": 1.0}, "dropout=1.0 must be at least 0 and below 1"),
        ({"dropout": "a"}, "dropout='a' must be a number"),
        ({"rank": 4}, "rank=4 is for a structured layer, and structure is 'dense'"),
        ({"structure": "btt", "structured": "all"}, "tied and structured together"),
        ({"heads": 4, "attention.heads": 8}, "'heads' is given twice: 4 and 8"),
    ],
)
def test_refused(fields, message):
    with pytest.raises(ConfigError) as error:
        GPTConfig().override(fields)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_tied_dense_head_may_be_called_structured():
    assert GPTConfig(structured="all").structure_of("head") == ("dense", None)


@pytest.mark.parametrize(
    "structured, roles",
    [
        ("all", {"attention.qkv", "attention.out", "mlp.in", "mlp.out", "head"}),
        ("all_but_last", {"attention.qkv", "attention.out", "mlp.in", "mlp.out"}),
        ("attn", {"attention.qkv", "attention.out"}),
        ("ffn", {"mlp.in", "mlp.out"}),
    ],
)
def test_structured_chooses_layers(structured, roles):
    model = zoo.create("gpt-tiny", layers=1, tied=False, structure="low_rank", rank=2, structured=structured)
    found = {m.tn_role: m.structure for m in model.modules() if hasattr(m, "tn_role")}
    assert set(found) == {"attention.qkv", "attention.out", "mlp.in", "mlp.out", "head"}
    assert {role for role, structure in found.items() if structure == "low_rank"} == roles


def test_unknown_role():
    with pytest.raises(ConfigError, match=r"did you mean 'mlp.out'"):
        GPTConfig().structure_of("mlp.uot")


def test_names_and_create():
    assert {"gpt2-small", "gpt2-medium", "gpt2-large", "gpt2-xl", "gpt-tiny"} <= set(zoo.names())
    model = zoo.create("gpt2-small", device="meta", structure="btt", rank=2)
    assert model.config == GPTConfig(structure="btt", rank=2)
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(ConfigError, match="unknown model 'gpt2-smal': did you mean 'gpt2-small'"):
        zoo.create("gpt2-smal")
    with pytest.raises(ConfigError, match="did you mean 'structure'"):
        zoo.create("gpt2-small", device="meta", structur="btt")


@pytest.mark.parametrize(
    "name, parameters",
    # The sizes of the four published checkpoints, tied table counted once.
    [("gpt2-small", 124_439_808), ("gpt2-medium", 354_823_168), ("gpt2-large", 774_030_080), ("gpt2-xl", 1_557_611_200)],
)
def test_parameters_of_the_published_sizes(name, parameters):
    assert sum(p.numel() for p in zoo.create(name, device="meta").parameters()) == parameters
