"""zoo.describe accounts for every parameter and every FLOP."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import tn
import zoo
from tests.zoo.models import VARIANTS, small, tokens
from zoo import ConfigError


@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_flops_equal_the_flop_counter(fields, training):
    model = small(**fields).train(training)
    counter = FlopCounterMode(display=False)
    with torch.set_grad_enabled(training), tn.backend("einsum"), sdpa_kernel(SDPBackend.MATH), counter:
        model(tokens(3, 17))
    assert zoo.describe(model, batch=3, sequence=17).flops == counter.get_total_flops()


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_parameters_sum_to_the_models(fields):
    model = small(**fields)
    description = zoo.describe(model)
    assert description.parameters == sum(p.numel() for p in model.parameters())
    assert description.parameter_bytes == 4 * description.parameters
    assert not any(row.path == "(not run)" for row in description.rows)


def test_dense_gpt2_small_by_hand():
    """2 FLOPs a weight and token, and attention's two products over all pairs of tokens."""
    d = zoo.describe("gpt2-small", sequence=1024)
    weights = 12 * (4 * 768**2 + 8 * 768**2) + 50257 * 768
    assert d.flops == 2 * 1024 * weights + 12 * 2 * 2 * 1024**2 * 768
    assert d.parameters == 124_439_808
    assert d.cache_bytes == 2 * 12 * 1024 * 768 * 4


def test_the_table_names_every_part():
    text = str(zoo.describe("gpt2-small", batch=2, sequence=64))
    for word in ("gpt2-small: 2 × 64 tokens, float32", "blocks.0-11.mlp.fc_in", "head", "gather", "pointwise", "124,439,808", "100.0"):
        assert word in text, text
    assert "blocks.3" not in text, "blocks that are alike are one row"


def test_blocks_that_differ_are_rows_of_their_own():
    model = small(layers=4)
    model.blocks[2].mlp.fc_in = tn.StructuredLinear(32, 128, structure="low_rank", rank=2)
    rows = {row.path: row for row in zoo.describe(model).rows if row.path.endswith("fc_in")}
    assert [(path, row.count) for path, row in rows.items()] == [("blocks.0-1,3.mlp.fc_in", 3), ("blocks.2.mlp.fc_in", 1)]


def test_equal_nodes_of_one_block_stay_apart():
    """The two residual additions of a block are two rows, each of all blocks."""
    adds = [row for row in zoo.describe(small(layers=3)).rows if row.path == "blocks.0-2" and row.spec == "add"]
    assert [row.count for row in adds] == [3, 3]


def test_describing_changes_nothing(tmp_path):
    model = small(dropout=0.5).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    zoo.describe(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_saved_folder(tmp_path):
    model = small(structure="btt", rank=2)
    zoo.save(model, tmp_path)
    assert zoo.describe(tmp_path).rows == zoo.describe(model).rows
    assert zoo.describe(str(tmp_path)).rows == zoo.describe(model).rows


def test_structure_saves_flops():
    dense, btt = (
        zoo.describe(zoo.create("gpt2-small", device="meta")),
        zoo.describe(zoo.create("gpt2-small", device="meta", structure="btt")),
    )
    assert btt.flops < dense.flops
    assert btt.parameters < dense.parameters


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("gpt2-smal",), "unknown model 'gpt2-smal': did you mean 'gpt2-small'"),
        (("gpt2-small", 0), "batch=0 must be at least 1"),
        (("gpt2-small", 1, 0), "sequence=0 must be at least 1"),
        (("gpt2-small", 1, 1025), "sequence=1025 is longer than the model's context of 1024"),
    ],
)
def test_refused(arguments, message):
    name, *sizes = arguments
    with pytest.raises(ConfigError, match=message):
        zoo.describe(name, **dict(zip(("batch", "sequence"), sizes, strict=False)))
