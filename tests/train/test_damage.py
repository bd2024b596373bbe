"""What goes wrong with a run's own files and numbers: one line that names it, and the last usable state is kept."""

import dataclasses
import json
import shutil

import pytest

import train
import zoo
from tests.train import runs
from train import metrics, plot, report
from train.__main__ import main
from zoo import saved


def _cut(path, size=-20):
    path.write_bytes(path.read_bytes()[:size])


def _edit(path, change):
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.fixture
def finished(tmp_path):
    train.run(runs.config(tmp_path), console=runs.quiet())
    return tmp_path / "run"


def _stopped(tmp_path, monkeypatch, **settings):
    """A run that ended between its second checkpoint, at step 4, and its last."""
    config = runs.config(tmp_path, **settings)
    with monkeypatch.context() as patch:
        patch.setattr(train.loop.Trainer, "_log", _log_until(7))
        with pytest.raises(train.RunError, match="stopped here"):
            train.run(config, console=runs.quiet())
    return tmp_path / "run"


def _log_until(step):
    real = train.loop.Trainer._log

    def log(self, *arguments):
        if self.position.step == step:
            raise train.RunError("stopped here")
        real(self, *arguments)

    return log


@pytest.mark.parametrize("samples", [0, 1])
def test_a_run_that_diverges_on_its_last_update_is_not_a_model(tmp_path, samples):
    config = runs.config(tmp_path, lr=1e30, warmup=0, steps=1, sample_every=samples)
    with pytest.raises(train.NonFiniteError, match=r"after step 1: the held-out loss is nan; .*newest checkpoint is .*step-000000"):
        train.run(config, console=runs.quiet())
    run = tmp_path / "run"
    assert not (run / "model.safetensors").exists() and not (run / "result.json").exists()
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-000000"]


def test_a_sample_of_a_diverged_model_names_the_step(tmp_path, monkeypatch):
    config = runs.config(tmp_path, lr=1e30, warmup=0, steps=4, sample_every=1)
    with pytest.raises(train.NonFiniteError, match="after step 1: no text can be sampled: .*not finite"):
        train.run(config, console=runs.quiet())


def test_a_full_disk_under_the_metrics_keeps_its_own_error(tmp_path):
    with open("/dev/full", "ab") as full:
        log = metrics.Log(tmp_path / "metrics.jsonl")
        log._file.close()
        log._file = full
        with pytest.raises(train.RunError, match=r"No space left.*python -m train resume"):
            log.record("train", {"step": 1})
        log.close()


def test_a_full_disk_at_the_final_model_says_how_to_go_on(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(saved, "_write_flushed", full)
    with pytest.raises(train.RunError, match=r"final model.*No space left.*python -m train resume"):
        train.run(runs.config(tmp_path, steps=1), console=runs.quiet())
    monkeypatch.undo()
    train.resume(tmp_path / "run", console=runs.quiet())
    assert zoo.load(tmp_path / "run")


def test_metrics_that_have_become_shorter_are_named_and_mended(tmp_path, monkeypatch):
    run = _stopped(tmp_path, monkeypatch)
    _cut(run / "metrics.jsonl", 700)
    console = runs.quiet()
    train.resume(run, console=console)
    assert "metrics.jsonl has " in console.file.getvalue() and "what was cut off stays lost" in console.file.getvalue()
    assert (run / "curves.png").exists() and zoo.load(run)
    assert metrics.read(run / "metrics.jsonl", "train")[-1]["step"] == 12


@pytest.mark.parametrize(
    "line, message",
    [
        (b"{oops\n", "line 2 of .*metrics.jsonl is damaged: Expecting"),
        (b"\xff\xfe\n", "line 2 of .*metrics.jsonl is damaged: "),
        (b"[]\n", "line 2 of .*metrics.jsonl is damaged: it is no record of kind train or eval"),
        (b'{"kind": "eval", "step": "x"}\n', "line 2 of .*metrics.jsonl is damaged: step is 'x', not a number"),
    ],
)
def test_a_damaged_line_of_metrics_is_named_before_any_work(tmp_path, monkeypatch, line, message):
    run = _stopped(tmp_path, monkeypatch)
    first, rest = (run / "metrics.jsonl").read_bytes().split(b"\n", 1)
    (run / "metrics.jsonl").write_bytes(first + b"\n" + line + rest)
    with pytest.raises(train.RunError, match=message):
        train.resume(run, console=runs.quiet())


def test_curves_that_cannot_be_drawn_stop_no_model(tmp_path, monkeypatch):
    def damaged(*_):
        raise train.RunError("line 3 is damaged")

    monkeypatch.setattr(plot, "plot_runs", damaged)
    console = runs.quiet()
    train.run(runs.config(tmp_path), console=console)
    assert zoo.load(tmp_path / "run") and "WARNING: cannot write" in console.file.getvalue()


def test_a_run_without_its_metrics_says_so_after_its_model(finished):
    for name in ("metrics.jsonl", "result.json", "model.safetensors"):
        (finished / name).unlink()
    with pytest.raises(train.RunError, match=r"no result\.json: .*metrics\.jsonl has lost the lines"):
        train.resume(finished, console=runs.quiet())
    assert zoo.load(finished)


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: _cut(path)], ids=["deleted", "truncated"])
def test_a_finished_run_gets_its_model_back(tmp_path, finished, damage):
    shutil.copytree(finished, tmp_path / "before")
    damage(finished / "model.safetensors")
    console = runs.quiet()
    train.resume(finished, console=console)
    assert "model.safetensors" in console.file.getvalue() and "written again from" in console.file.getvalue()
    assert runs.same_weights(finished, tmp_path / "before")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: _cut(path), "result.json is damaged: "),
        (lambda path: path.write_text("[]"), "result.json is damaged: missing or unknown best_loss"),
        (lambda path: _edit(path, lambda values: values.update(extra=1)), "result.json is damaged: missing or unknown extra"),
        (lambda path: _edit(path, lambda values: values.update(loss=None)), "result.json is damaged: loss is None, not a number"),
    ],
)
def test_a_damaged_result_is_named_and_made_again(finished, damage, message):
    good = report.load(finished)
    damage(finished / "result.json")
    console = runs.quiet()
    again = train.resume(finished, console=console)
    assert message in console.file.getvalue()
    assert dataclasses.replace(again, peak_memory_bytes=0) == dataclasses.replace(good, peak_memory_bytes=0)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state: state.pop("position"), "state.json has no usable 'position'"),
        (lambda state: state["position"].pop("best_loss"), "the position in state.json is not usable: 'best_loss'"),
        (lambda state: state["position"].update(more=1), "the position in state.json is not usable: .*more"),
        (lambda state: state["fingerprints"].clear(), "state.json has no usable 'fingerprints'"),
        (lambda state: state.pop("software"), "state.json has no usable 'software'"),
        (lambda state: state["rng"].pop("numpy"), "it lacks a random state"),
    ],
)
def test_a_damaged_state_is_named(tmp_path, monkeypatch, change, message):
    run = _stopped(tmp_path, monkeypatch)
    newest = run / "checkpoints" / "step-000004"
    _edit(newest / "state.json", change)
    size = (newest / "state.json").stat().st_size
    _edit(newest / "manifest.json", lambda manifest: manifest["files"].update({"state.json": size}))
    with pytest.raises(train.CheckpointError, match=f"step-000004 is damaged: {message}"):
        train.resume(run, console=runs.quiet())


@pytest.mark.parametrize("recipe, shown", [("[1]", "unknown recipe [1]"), ("foo", "unknown recipe 'foo'"), ("{a: 1}", "unknown recipe")])
def test_a_config_of_no_recipe_is_one_line(tmp_path, finished, capsys, recipe, shown):
    text = (finished / "config.yaml").read_text().replace("recipe: gpt", f"recipe: {recipe}")
    (finished / "config.yaml").write_text(text)
    for words in (["resume", str(finished)], ["gpt", "--config", str(finished / "config.yaml")]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert shown in error and error.count("\n") == 1 and "train foo" not in error
