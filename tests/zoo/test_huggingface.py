"""GPT-2 folders of Hugging Face: transformers itself is the oracle, both ways."""

import json
import os

import pytest
import safetensors.torch
import torch

import zoo
from tests.zoo.models import small, tokens
from zoo import SavedModelError

SIZES = {"vocab_size": 97, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4}


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


def _random(transformers, **settings):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**SIZES, **settings})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture(scope="module")
def reference(transformers, tmp_path_factory):
    """A random GPT2LMHeadModel and the folder that transformers saved it in."""
    model = _random(transformers)
    folder = tmp_path_factory.mktemp("hf")
    model.save_pretrained(folder)
    return model, folder


@torch.no_grad()
def _equal(ours, theirs):
    x = tokens(3, 17)
    torch.testing.assert_close(ours(x), theirs(x).logits, atol=1e-4, rtol=1e-4)


def test_logits_equal_transformers(reference):
    theirs, folder = reference
    ours = zoo.from_pretrained(folder)
    assert not ours.training
    assert ours.config.tied
    _equal(ours, theirs)


@pytest.mark.parametrize("settings", [{"n_inner": 50}, {"tie_word_embeddings": False}, {"n_head": 1}], ids=str)
def test_other_shapes(transformers, settings, tmp_path):
    theirs = _random(transformers, **settings)
    theirs.save_pretrained(tmp_path)
    _equal(zoo.from_pretrained(tmp_path), theirs)


def test_shards(reference, tmp_path):
    theirs, _ = reference
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert not (tmp_path / "model.safetensors").exists()
    _equal(zoo.from_pretrained(tmp_path), theirs)
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(SavedModelError, match=r"model-00002-of-.* is missing"):
        zoo.from_pretrained(tmp_path)


def _old_names(theirs):
    """The names and mask buffers of the published gpt2 checkpoint."""
    state = {name.removeprefix("transformer."): tensor for name, tensor in theirs.state_dict().items()}
    state.pop("lm_head.weight")
    mask = torch.ones(1, 1, 24, 24).tril()
    return state | {f"h.{i}.attn.bias": mask for i in range(2)} | {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}


def test_names_of_the_published_checkpoint(reference, tmp_path):
    theirs, folder = reference
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    state = {name: tensor.clone().contiguous() for name, tensor in _old_names(theirs).items()}
    safetensors.torch.save_file(state, tmp_path / "model.safetensors")
    _equal(zoo.from_pretrained(tmp_path), theirs)


def test_pytorch_bin(reference, tmp_path):
    theirs, folder = reference
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    torch.save(_old_names(theirs), tmp_path / "pytorch_model.bin")
    _equal(zoo.from_pretrained(tmp_path), theirs)
    os.truncate(tmp_path / "pytorch_model.bin", 1000)
    with pytest.raises(SavedModelError, match=r"pytorch_model\.bin is truncated or not a PyTorch file"):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tied": False},
        {"bias": False},
        {"hidden": 50},
        {"structure": "btt", "rank": 2},
        {"structure": "low_rank", "rank": 3, "tied": False, "structured": "all"},
    ],
    ids=str,
)
def test_what_we_write_transformers_reads(transformers, fields, tmp_path):
    ours = small(**fields)
    zoo.to_pretrained(ours, tmp_path)
    theirs, report = transformers.GPT2LMHeadModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    _equal(ours, theirs.eval())
    _equal(zoo.from_pretrained(tmp_path), theirs)


def test_dtype(reference):
    _, folder = reference
    assert {p.dtype for p in zoo.from_pretrained(folder, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


def test_generation_equals_transformers(reference):
    theirs, folder = reference
    x = tokens(1, 5)
    expected = theirs.generate(x, max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(zoo.generate(zoo.from_pretrained(folder), x, length=12, temperature=0), expected)


@pytest.mark.parametrize(
    "fields, message",
    [({"qk_norm": True}, "a GPT-2 has no QK-norm"), ({"head_dim": 12}, "heads × head_dim is the width, and here 4 × 12 is not 32")],
)
def test_what_gpt2_cannot_hold(fields, message, tmp_path):
    with pytest.raises(SavedModelError, match=message):
        zoo.to_pretrained(small(**fields), tmp_path)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, r"config\.json: model_type is 'llama', and only 'gpt2' can be read"),
        ({"activation_function": "relu"}, "activation_function is 'relu', and only 'gelu_new' or 'gelu_pytorch_tanh' can be read"),
        ({"layer_norm_epsilon": 1e-6}, "layer_norm_epsilon is 1e-06"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is True"),
        ({"n_head": 5}, r"config\.json: width=32 is not a multiple of heads=5"),
        ({"n_embd": "x"}, r"config\.json: width='x' must be a whole number"),
        ({"vocab_size": 98}, r"token_table\.weight has shape \(97, 32\), and the model needs \(98, 32\)"),
        ({"n_layer": 3}, r"model\.safetensors lacks h\.2\.ln_1\.weight"),
        ({"n_layer": 1}, "has weights that a GPT-2 has not: h.1.attn.c_attn.bias"),
    ],
)
def test_other_architectures_are_refused(reference, changes, message, tmp_path):
    _, folder = reference
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(SavedModelError, match=message) as error:
        zoo.from_pretrained(tmp_path)
    assert "\n" not in str(error.value)


def test_missing_and_damaged_files(reference, tmp_path):
    _, folder = reference
    with pytest.raises(SavedModelError, match=r"config\.json is missing: a Hugging Face model is a folder"):
        zoo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"n_embd": 3')
    with pytest.raises(SavedModelError, match=r"config\.json is truncated or not JSON"):
        zoo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SavedModelError, match="no field 'model_type'"):
        zoo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(SavedModelError, match="lacks vocab_size, n_positions, n_layer, n_embd, n_head"):
        zoo.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(SavedModelError, match=r"model\.safetensors is missing, and so is pytorch_model\.bin"):
        zoo.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(SavedModelError, match=r"model\.safetensors \(5000 bytes\) is truncated"):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize("index", ["[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 3}}', '{"weight_map": {"a": null}}'])
def test_an_index_that_is_none(reference, tmp_path, index):
    (tmp_path / "config.json").write_text((reference[1] / "config.json").read_text())
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(SavedModelError, match=r"index\.json is not the index of a model"):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "junk", [b"", b"junk", b"\x80\x02junk", b"\x00" * 40, b"PK\x03\x04" + b"x" * 40, b"X" * 7, b"\x80\x02J\x00", b"}" * 9]
)
def test_junk_instead_of_a_pickle(reference, tmp_path, junk):
    (tmp_path / "config.json").write_text((reference[1] / "config.json").read_text())
    (tmp_path / "pytorch_model.bin").write_bytes(junk)
    with pytest.raises(SavedModelError, match=r"pytorch_model\.bin"):
        zoo.from_pretrained(tmp_path)


@pytest.mark.parametrize("tensors", [{3: torch.ones(2)}, {"wte.weight": 3}])
def test_a_pickle_that_holds_no_tensors_by_name(reference, tmp_path, tensors):
    (tmp_path / "config.json").write_text((reference[1] / "config.json").read_text())
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(SavedModelError, match=r"pytorch_model\.bin holds .*, not tensors by name"):
        zoo.from_pretrained(tmp_path)
