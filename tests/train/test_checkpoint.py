"""Checkpoints: whole or absent, whatever happens to the disk; damaged ones are named and never used."""

import errno
import json
import os
import random

import numpy
import pytest
import safetensors.torch
import torch

import train
import zoo
from tests.train import runs
from train import checkpoint, metrics, optim
from train.__main__ import main


def _model(seed=0, **fields):
    torch.manual_seed(seed)
    model = zoo.GPT(zoo.GPTConfig(vocab=64, **runs.SHAPE | {"structure": "btt", "zero_init": False} | fields))
    return model, optim.adamw(model, train.recipes.gpt())


def _step(model, optimizer):
    tokens = torch.randint(64, (2, 16))
    optimizer.zero_grad()
    model.loss(tokens, tokens).backward()
    optimizer.step()


def test_everything_comes_back_bit_for_bit(tmp_path):
    model, optimizer = _model()
    _step(model, optimizer)
    rng = checkpoint.Rng.now()
    path = checkpoint.save(tmp_path, 7, model, optimizer, {"best": 1 / 3}, rng=rng, keep=2)
    draws = [torch.rand(3), random.random(), numpy.random.rand()]  # noqa: NPY002 the global state is under test
    _step(model, optimizer)

    other, other_optimizer = _model(seed=1)
    state, rng = checkpoint.load(path, other, other_optimizer)
    rng.restore()
    again = [torch.rand(3), random.random(), numpy.random.rand()]  # noqa: NPY002 as above
    assert torch.equal(draws[0], again[0])
    assert draws[1:] == again[1:]
    assert (state["step"], state["best"]) == (7, 1 / 3)
    _step(other, other_optimizer)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert all(torch.equal(optimizer.state[a][key], other_optimizer.state[b][key]) for key in ("step", "exp_avg", "exp_avg_sq"))
        assert optimizer.state[a]["exp_avg"].stride() == other_optimizer.state[b]["exp_avg"].stride() == b.stride()


def test_only_the_newest_are_kept(tmp_path):
    model, optimizer = _model()
    for step in (0, 5, 1_000_000, 10):
        checkpoint.save(tmp_path, step, model, optimizer, {}, rng=checkpoint.Rng.now(), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000010", "step-1000000"]
    assert checkpoint.find(tmp_path).newest().name == "step-1000000"


@pytest.mark.parametrize("damage", ["truncate", "delete", "no manifest", "bad manifest", "temporary"])
def test_a_damaged_checkpoint_is_ignored_and_named(tmp_path, damage):
    model, optimizer = _model()
    good, bad = (checkpoint.save(tmp_path, step, model, optimizer, {}, rng=checkpoint.Rng.now(), keep=5) for step in (1, 2))
    if damage == "truncate":
        os.truncate(bad / "state.safetensors", 100)
    elif damage == "delete":
        (bad / "model.safetensors").unlink()
    elif damage == "no manifest":
        (bad / "manifest.json").unlink()
    elif damage == "bad manifest":
        (bad / "manifest.json").write_text("{")
    else:
        bad = bad.rename(tmp_path / f".saving-{bad.name}-1")
    found = checkpoint.find(tmp_path)
    assert found.complete == (good,)
    ((path, reason),) = found.broken
    assert path == bad
    expected = {"truncate": "has 100 bytes instead of", "delete": "model.safetensors is missing", "no manifest": "no manifest.json"}
    assert expected.get(damage, "manifest.json is damaged" if damage == "bad manifest" else "stopped while saving") in reason


def test_a_broken_checkpoint_is_moved_aside_not_overwritten(tmp_path):
    model, optimizer = _model()
    broken = checkpoint.save(tmp_path, 2, model, optimizer, {}, rng=checkpoint.Rng.now(), keep=5)
    os.truncate(broken / "model.safetensors", 10)
    checkpoint.save(tmp_path, 2, model, optimizer, {}, rng=checkpoint.Rng.now(), keep=5)
    assert checkpoint.find(tmp_path).newest() == broken
    assert (tmp_path / "broken-step-000002" / "model.safetensors").stat().st_size == 10


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    model, optimizer = _model()
    path = checkpoint.save(tmp_path, 2, model, optimizer, {}, rng=checkpoint.Rng.now(), keep=5)
    with pytest.raises(train.CheckpointError, match="belongs to another model"):
        checkpoint.load(path, *_model(structure="dense"))
    with pytest.raises(train.CheckpointError, match=r"has shape \(64, 32\), the model wants \(64, 64\)"):
        checkpoint.load(path, *_model(width=64))


def _full_disk(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("where", ["weights", "sync", "rename"])
def test_a_full_disk_leaves_the_previous_checkpoint_valid(tmp_path, monkeypatch, where):
    unbroken = runs.config(tmp_path, out=str(tmp_path / "unbroken"))
    train.run(unbroken, console=runs.quiet())
    save, calls = checkpoint.save, []

    def save_until_full(*arguments, **settings):
        calls.append(None)
        if len(calls) == 3:
            target, name = {
                "weights": (safetensors.torch, "save_file"),
                "sync": (os, "fsync"),
                "rename": (os, "rename"),
            }[where]
            monkeypatch.setattr(target, name, _full_disk)
        return save(*arguments, **settings)

    monkeypatch.setattr(checkpoint, "save", save_until_full)
    with pytest.raises(train.CheckpointError) as caught:
        train.run(runs.config(tmp_path), console=runs.quiet())
    run = tmp_path / "run"
    message = str(caught.value)
    assert "could not save step 8" in message
    assert "No space left on device" in message
    assert f"{run / 'checkpoints' / 'step-000004'}, is still valid" in message
    assert f"python -m train resume {run}" in message
    monkeypatch.undo()
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-000000", "step-000004"]
    train.resume(run, console=runs.quiet())
    assert runs.same_weights(run, tmp_path / "unbroken")


def test_metrics_on_a_full_disk_stop_the_run_by_name(tmp_path, monkeypatch):
    class Full:
        def write(self, _):
            _full_disk()

    log = metrics.Log(tmp_path / "metrics.jsonl")
    monkeypatch.setattr(log, "_file", Full())
    with pytest.raises(train.RunError, match=r"cannot write .*metrics\.jsonl: .*No space left"):
        log.record("train", {"step": 1})


def test_nan_and_infinity_are_null_in_metrics(tmp_path):
    log = metrics.Log(tmp_path / "metrics.jsonl")
    log.record("train", {"a": float("nan"), "b": float("inf"), "c": 1.5})
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"kind": "train", "a": None, "b": None, "c": 1.5}


def _stopped(tmp_path):
    """A run that a full disk ended after step 8."""
    run = tmp_path / "run"
    train.run(runs.config(tmp_path, keep=9), console=runs.quiet())
    for path in (run / "checkpoints").iterdir():
        if path.name > "step-000004":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    for name in ("result.json", "model.safetensors", "model.json"):
        (run / name).unlink()
    return run


def test_no_usable_checkpoint_is_an_error_that_changes_nothing(tmp_path):
    run = _stopped(tmp_path)
    for path in (run / "checkpoints").iterdir():
        os.truncate(path / "model.safetensors", 10)
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    with pytest.raises(
        train.CheckpointError, match=r"no usable checkpoint in .*step-000000: model.safetensors has 10 bytes.*nothing was changed"
    ):
        train.resume(run, console=runs.quiet())
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_another_corpus_is_refused(tmp_path):
    run = _stopped(tmp_path)
    runs.write_text(tmp_path / "text.txt", seed=1)
    with pytest.raises(
        train.RunError, match=r"the corpus of 'text:.*' is not the one .* was trained on \(hash [0-9a-f]{12}, the checkpoint has"
    ):
        train.resume(run, console=runs.quiet())


@pytest.mark.parametrize(
    "line, changed, message",
    [
        ("batch: 2", "batch: 3", "now says batch: 3, the checkpoint was made with 2"),
        ("  structure: dense", "  structure: btt", "now says model.structure: btt, the checkpoint was made with dense"),
    ],
)
def test_an_edited_config_that_is_another_run_is_refused(tmp_path, line, changed, message):
    run = _stopped(tmp_path)
    text = (run / "config.yaml").read_text()
    assert line in text
    (run / "config.yaml").write_text(text.replace(line, changed))
    with pytest.raises(train.RunError, match=message):
        train.resume(run, console=runs.quiet())


def test_harmless_differences_are_named_loudly(tmp_path):
    run = _stopped(tmp_path)
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("lr: 0.002", "lr: 0.001"))
    state = run / "checkpoints" / "step-000004" / "state.json"
    values = json.loads(state.read_text())
    values["software"]["torch"] = "1.0.0"
    text = json.dumps(values)
    manifest = state.with_name("manifest.json")
    sizes = json.loads(manifest.read_text())
    sizes["files"]["state.json"] = len(text)
    state.write_text(text)
    manifest.write_text(json.dumps(sizes))
    console = runs.quiet()
    train.resume(run, threads=2, console=console)
    shown = console.file.getvalue()
    assert "WARNING: lr was 0.002 when the checkpoint was made and is 0.001 now" in shown
    assert (
        f"WARNING: torch was 1.0.0 when the checkpoint was made and is {torch.__version__} now: the result will not be bit-equal" in shown
    )
    assert "WARNING: CPU threads was 1 when the checkpoint was made and is 2 now" in shown


def test_a_finished_run_has_nothing_to_resume(tmp_path, capsys):
    result = train.run(runs.config(tmp_path), console=runs.quiet())
    assert train.resume(tmp_path / "run", console=runs.quiet()) == result
    assert main(["resume", str(tmp_path / "run")]) == 0
    assert "is finished: all 12 steps are done" in capsys.readouterr().out


def test_two_processes_cannot_train_one_run(tmp_path):
    run = _stopped(tmp_path)
    held = train.launch.folder.lock(run)
    with pytest.raises(train.RunError, match="another process is training"):
        train.resume(run, console=runs.quiet())
    held.close()
    train.resume(run, console=runs.quiet())
