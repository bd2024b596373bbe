"""zoo.save and zoo.load: exact round trips, atomic writes, and one clear line for every damaged file."""

import json
import os

import pytest
import safetensors.torch
import torch

import tn
import zoo
from tests.zoo.models import VARIANTS, small, tokens
from zoo import SavedModelError


def _same(a, b):
    first, second = a.state_dict(), b.state_dict()
    assert list(first) == list(second)
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor, second[name]), name


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_round_trip(fields, tmp_path):
    model = small(**fields)
    assert zoo.save(model, tmp_path / "a" / "b") == tmp_path / "a" / "b"
    state = torch.get_rng_state()
    loaded = zoo.load(tmp_path / "a" / "b")
    assert torch.equal(torch.get_rng_state(), state), "loading must not move the random generator"
    assert loaded.config == model.config
    assert not loaded.training
    _same(model, loaded)
    assert torch.equal(model(tokens(2, 9)), loaded(tokens(2, 9)))
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == ["model.json", "model.safetensors"]


def test_tied_weights_are_stored_once(tmp_path):
    zoo.save(small(), tmp_path)
    names = list(safetensors.torch.load_file(tmp_path / "model.safetensors"))
    assert "token_table.weight" in names
    assert not any(name.startswith("head") for name in names)
    loaded = zoo.load(tmp_path)
    with torch.no_grad():
        loaded.token_table.weight.zero_()
    assert loaded(tokens(1, 4)).abs().max() == 0


def test_dtypes(tmp_path):
    model = small(dtype=torch.bfloat16)
    model.norm.float()
    zoo.save(model, tmp_path)
    _same(model, zoo.load(tmp_path))
    assert {p.dtype for p in zoo.load(tmp_path, dtype=torch.float32).parameters()} == {torch.float32}


def test_roles_survive(tmp_path):
    model = small(structure="btt", rank=2)
    zoo.save(model, tmp_path)
    roles = {name: m.tn_role for name, m in model.named_modules() if isinstance(m, tn.StructuredLinear)}
    loaded = zoo.load(tmp_path)
    assert {name: m.tn_role for name, m in loaded.named_modules() if isinstance(m, tn.StructuredLinear)} == roles


def test_layers_that_differ_from_the_config_come_back_as_they_are(tmp_path):
    """What tn.restructure, or a later default for the factors, would leave behind."""
    model = small(tied=False)
    attention, old = model.blocks[1].attention, model.blocks[1].attention.query
    attention.query = tn.StructuredLinear(32, 32, structure="low_rank", rank=3)
    attention.query.tn_role = old.tn_role
    zoo.save(model, tmp_path)
    loaded = zoo.load(tmp_path)
    _same(model, loaded)
    assert loaded.blocks[1].attention.query.structure == "low_rank"
    assert loaded.blocks[1].attention.query.tn_role == "attention.qkv"
    assert loaded.blocks[0].attention.query.structure == "dense"


@pytest.mark.parametrize("structure", ["btt", "low_rank"])
def test_a_restructured_model_round_trips(structure, tmp_path):
    model = small(tied=False)
    tn.restructure(model, structure=structure, rank=2, layers="all")
    zoo.save(model, tmp_path)
    loaded = zoo.load(tmp_path)
    _same(model, loaded)
    assert torch.equal(model(tokens(2, 9)), loaded(tokens(2, 9)))
    model = small(structure=structure, rank=2)
    before = model(tokens(2, 9))
    tn.densify(model)
    zoo.save(model, tmp_path)
    torch.testing.assert_close(zoo.load(tmp_path)(tokens(2, 9)), before, atol=1e-5, rtol=1e-5)


def test_saving_again_replaces(tmp_path):
    zoo.save(small(seed=1), tmp_path)
    model = small(seed=2, structure="btt")
    zoo.save(model, tmp_path)
    _same(model, zoo.load(tmp_path))


def test_tokenizer_goes_along(tmp_path):
    tokenizer = zoo.tokenizer("bytes")
    zoo.save(small(vocab=300), tmp_path, tokenizer)
    assert (tmp_path / "tokenizer.json").is_file()
    assert zoo.load_tokenizer(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_save_that_fails_leaves_the_old_model(tmp_path, monkeypatch):
    model = small()
    zoo.save(model, tmp_path)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    with pytest.raises(SavedModelError, match=r"cannot write .*model\.safetensors, which is left as it was.*No space left"):
        zoo.save(small(seed=5), tmp_path)
    monkeypatch.undo()
    _same(model, zoo.load(tmp_path))

    def broken(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(SavedModelError, match="Input/output error"):
        zoo.save(small(seed=5), tmp_path)
    monkeypatch.undo()
    _same(model, zoo.load(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.json", "model.safetensors"]


def test_a_file_in_the_way_of_the_folder(tmp_path):
    (tmp_path / "a").write_text("")
    with pytest.raises(SavedModelError, match="cannot make the folder"):
        zoo.save(small(), tmp_path / "a")


def _edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def _truncate(size):
    return lambda folder: os.truncate(folder / "model.safetensors", size)


def _reshape(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["norm.weight"] = torch.zeros(7)
    safetensors.torch.save_file(tensors, path)


def _rename(folder):
    path = folder / "model.safetensors"
    tensors = safetensors.torch.load_file(path)
    tensors["mystery"] = tensors.pop("norm.weight")
    safetensors.torch.save_file(tensors, path)


@pytest.mark.parametrize(
    "damage, message",
    [
        (_truncate(1000), r"model\.safetensors \(1000 bytes\) is truncated or not a safetensors file"),
        (_truncate(3), r"model\.safetensors \(3 bytes\) is truncated"),
        (_truncate(0), r"model\.safetensors \(0 bytes\) is truncated"),
        (lambda f: (f / "model.safetensors").write_bytes(b"PK\x03\x04" + b"x" * 500), r"model\.safetensors .* not a safetensors file"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors is missing; .* holds: model\.json"),
        (lambda f: (f / "model.json").unlink(), r"model\.json is missing; .* holds: model\.safetensors"),
        (lambda f: (f / "model.json").rename(f / "config.json"), r"model\.json is missing.*zoo\.from_pretrained"),
        (lambda f: os.truncate(f / "model.json", 50), r"model\.json is truncated or not JSON"),
        (lambda f: (f / "model.json").write_text("[1]"), r"model\.json does not describe a zoo model"),
        (lambda f: (f / "model.json").write_text("{}"), r"model\.json does not describe a zoo model"),
        (lambda f: _edit(f / "model.json", version=9), r"model\.json has format version 9; this version reads 1"),
        (lambda f: _edit(f / "model.json", kind="gtp"), r"model\.json: unknown kind of model 'gtp': did you mean 'gpt'"),
        (lambda f: _edit(f / "model.json", config={"hedas": 4}), r"model\.json: unknown model field 'hedas': did you mean 'heads'"),
        (lambda f: _edit(f / "model.json", config=3), r"model\.json has no field 'config'"),
        (lambda f: _edit(f / "model.json", layers={"norn": {}}), r"model\.json: unknown layer 'norn'"),
        (lambda f: _edit(f / "model.json", layers={"blocks.0.mlp.fc_in": {}}), r"model\.json: layer blocks\.0\.mlp\.fc_in"),
        (_reshape, r"model\.safetensors: norm\.weight has shape \(7,\), and the model needs \(32,\)"),
        (_rename, r"does not fit the model: it lacks norm\.weight and has unknown mystery"),
    ],
)
def test_damaged(damage, message, tmp_path):
    zoo.save(small(), tmp_path)
    damage(tmp_path)
    with pytest.raises(SavedModelError, match=message) as error:
        zoo.load(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path) in str(error.value)


def test_files_of_two_saves(tmp_path):
    zoo.save(small(), tmp_path / "a")
    zoo.save(small(dropout=0.1), tmp_path / "b")
    (tmp_path / "a" / "model.json").replace(tmp_path / "b" / "model.json")
    with pytest.raises(SavedModelError, match="are of different saves"):
        zoo.load(tmp_path / "b")


def test_no_folder(tmp_path):
    with pytest.raises(SavedModelError, match=r"model\.json is missing: there is no folder"):
        zoo.load(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["tokenizer.json", "model.safetensors", "model.json"])
def test_whichever_file_cannot_be_written_the_old_save_still_loads(tmp_path, monkeypatch, file):
    """Another shape each time: the old weights must still have the description that belongs to them."""
    model, coder = small(vocab=300), zoo.tokenizer("bytes")
    zoo.save(model, tmp_path, coder)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    real = os.open

    def full(path, *rest, **named):
        if file in str(path):
            raise OSError(28, "No space left on device")
        return real(path, *rest, **named)

    monkeypatch.setattr(os, "open", full)
    with pytest.raises(SavedModelError, match=rf"{file}, which is left as it was: .*No space left"):
        zoo.save(small(vocab=300, width=64), tmp_path, coder)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    _same(model, zoo.load(tmp_path))


def test_a_folder_in_the_way_is_found_before_the_first_rename(tmp_path):
    zoo.save(small(), tmp_path)
    (tmp_path / "model.json").unlink()
    (tmp_path / "model.json").mkdir()
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(SavedModelError, match=r"model\.json: it is a folder"):
        zoo.save(small(seed=5), tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == before
