"""Bit-exact resume of processes that were really killed: at random steps, while saving, before the first checkpoint."""

import dataclasses
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from tests.train import runs
from train import metrics

STEPS = 60

# A process that has imported the heavy packages once and forks: each child is a process of its own, without seconds of imports.
# It does not see pytest's import path, so nothing of ours is among them.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["torch._dynamo", "safetensors.torch", "matplotlib.figure", "rich.progress", "tyro", "cotengra"])


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """Folder of a run that nothing stopped. Dropout makes it depend on the random state, accumulation on the batch counter."""
    folder = tmp_path_factory.mktemp("unbroken")
    train.run(_config(folder), console=runs.quiet())
    return folder


def _config(folder: Path) -> train.RunConfig:
    shape = {"structure": "btt", "dropout": 0.1}
    return runs.config(folder, steps=STEPS, accumulate=2, checkpoint_every=5, eval_every=20, log_every=3, model=shape)


class Child:
    """`python -m train WORDS` in a process of its own, whose output goes to a file."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._output = folder / "output.txt"
        self._process = _FORKS.Process(target=runs.main_into, args=(self._output, words))
        self._process.start()

    def wait_for(self, condition: Callable[[], object]) -> None:
        """Wait until a condition holds, while the process is alive."""
        end = time.monotonic() + 60
        while not condition():
            if not self._process.is_alive():
                pytest.fail(f"ended early: {self._output.read_text()}")
            assert time.monotonic() < end
            time.sleep(0.001)

    def send(self, number: signal.Signals) -> None:
        os.kill(self._process.pid, number)

    def end(self) -> tuple[int, str]:
        """Wait for the end; return exit status and output."""
        self._process.join(60)
        assert self._process.exitcode is not None
        return self._process.exitcode, self._output.read_text()


def _begin(folder: Path) -> Child:
    return Child(folder, *_words(folder))


def _words(folder: Path) -> list[str]:
    runs.write_text(folder / "text.txt")
    (folder / "config.yaml").write_text(train.config.dump(_config(folder)))
    return ["gpt", "--config", str(folder / "config.yaml"), "--out", str(folder / "run")]


def _step(run: Path) -> int:
    """The newest step that metrics.jsonl has."""
    lines = metrics.read(run / "metrics.jsonl", "train")
    return lines[-1]["step"] if lines else 0


def _kill_while_saving(child: Child, run: Path, after: int) -> Path:
    """Stop the process while its temporary checkpoint folder exists, and kill it there; return that folder."""
    folder = run / "checkpoints"

    def saving() -> list[Path]:
        return [path for path in folder.glob(".saving-*") if int(path.name.split("-")[2]) > after] if folder.exists() else []

    while True:
        child.wait_for(saving)
        child.send(signal.SIGSTOP)
        left = saving()
        if left:
            break
        child.send(signal.SIGCONT)
    child.send(signal.SIGKILL)
    assert child.end()[0] == -signal.SIGKILL
    return left[0]


def _same_story(first: Path, second: Path) -> None:
    """Two runs ended bit-equal, and their metrics tell the same steps once, with the same losses."""
    assert runs.same_weights(first, second)
    for kind in ("train", "eval"):
        a, b = (metrics.read(run / "metrics.jsonl", kind) for run in (first, second))
        for key in ("step", "loss", "tokens"):
            assert [line[key] for line in a] == [line[key] for line in b]
    assert (first / "samples.txt").read_text() == (second / "samples.txt").read_text()
    assert not list((second / "checkpoints").glob(".*"))


def test_killed_at_random_steps_and_while_saving(tmp_path, unbroken):
    draw, run = random.Random(0), tmp_path / "run"
    child = _begin(tmp_path)
    reached = draw.randrange(3, 18)
    child.wait_for(lambda: _step(run) >= reached)
    child.send(signal.SIGKILL)
    assert child.end()[0] == -signal.SIGKILL

    child = Child(tmp_path, "resume", str(run))
    reached = draw.randrange(20, 30)
    child.wait_for(lambda: _step(run) >= reached)
    child.send(signal.SIGTERM)
    code, output = child.end()
    assert code == 143, output
    step = train.checkpoint.step_of(train.checkpoint.find(run / "checkpoints").newest())
    assert f"stopped by SIGTERM after step {step}, saved in {run}\ncontinue with: python -m train resume {run}" in output
    assert (run / "curves.png").exists()

    left = _kill_while_saving(Child(tmp_path, "resume", str(run)), run, after=step + draw.randrange(15))

    code, output = Child(tmp_path, "resume", str(run)).end()
    assert code == 0, output
    assert f"ignored checkpoint {left}: its writer was stopped while saving" in output
    _same_story(unbroken / "run", run)


def test_ctrl_c_finishes_the_step_saves_and_says_how_to_go_on(tmp_path, unbroken):
    """As from a shell: `python -m train`, SIGINT, exit status 130."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "train", *_words(tmp_path)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    end = time.monotonic() + 60
    while _step(run) < 6:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.001)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Traceback" not in output
    assert "stopped by SIGINT after step " in output
    train.resume(run, console=runs.quiet())
    _same_story(unbroken / "run", run)


def test_killed_while_the_first_checkpoint_is_saved(tmp_path, unbroken):
    run = tmp_path / "run"
    _kill_while_saving(_begin(tmp_path), run, after=-1)
    console = runs.quiet()
    train.resume(run, console=console)
    assert "no checkpoint yet: starting at step 0" in console.file.getvalue()
    _same_story(unbroken / "run", run)


def test_longer_runs_may_be_asked_for(tmp_path):
    """More steps than the run was made for: named, and continued from its last checkpoint."""
    run = tmp_path / "run"
    train.run(runs.config(tmp_path, schedule="constant"), console=runs.quiet())
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(text.replace("steps: 12", "steps: 20"))
    console = runs.quiet()
    assert train.resume(run, console=console).steps == 20
    assert "WARNING: steps was 12" in console.file.getvalue()


def test_the_config_of_a_run_is_all_it_needs(unbroken):
    saved = train.config.load(unbroken / "run" / "config.yaml", train.recipes.gpt())
    asked = _config(unbroken)
    assert dataclasses.replace(saved, out=asked.out, model=asked.model, fit_vocab=True) == asked
