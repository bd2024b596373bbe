"""python -m train demo: two runs in processes of their own, a table of what they measured, and continuing after an interrupt."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from train import demo, report
from train.__main__ import main
from train.demo import Demo
from train.report import Result

TINY = ["--steps", "4", "--width", "32", "--layers", "1", "--heads", "2", "--context", "16", "--batch", "2", "--threads", "1"]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(20):
        (folder / f"{number:02}.txt").write_text("".join(f"line {i} of text {number}: the quick brown fox\n" for i in range(40)))
    return ["--data", f"text:{folder}", "--tokenizer", "bytes"]


def _demo(words, folder, **options):
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "train", "demo", *words],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        **options,
    )


@pytest.fixture(scope="module")
def finished(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    process = _demo([*TINY, *corpus, "--out", str(folder / "out")], folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    return folder, output


def test_demo_shows_what_it_measured(finished):
    folder, output = finished
    results = {name: report.load(folder / "out" / name) for name in ("btt", "dense")}
    for result in results.values():
        assert f"{result.tokens_per_second:,.0f}" in output
        assert f"{result.bits_per_byte:.3f}" in output
    assert results["btt"].parameters < results["dense"].parameters
    for words in ("peak memory", "FLOPs per token", "plan of x: ...", "What the BTT model writes", "demo.png"):
        assert words in output
    assert (folder / "out" / "demo.png").read_bytes()[:4] == b"\x89PNG"


def test_both_models_see_the_same_batches(finished):
    folder, _ = finished
    configs = [(folder / "out" / name / "config.yaml").read_text().splitlines() for name in ("btt", "dense")]
    differing = {line.split(":")[0].strip() for one, other in zip(*configs, strict=True) if one != other for line in (one, other)}
    assert differing == {"structure", "rank"}


def test_a_finished_demo_is_shown_again_without_training(finished):
    folder, _ = finished
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").rglob("model.safetensors")}
    process = _demo(["--out", str(folder / "out")], folder)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert output.count("is finished already") == 2
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_other_settings_in_the_same_folder_are_refused(finished, capsys):
    folder, _ = finished
    assert main(["demo", "--out", str(folder / "out"), "--steps", "9"]) == 1
    assert "holds a demo with steps 4, not 9" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)], ids=lambda number: number.name)
def test_interrupted_demo_continues(corpus, tmp_path, number):
    words = [*TINY[2:], *corpus, "--steps", "100000", "--out", str(tmp_path / "out")]
    process = _demo(words, tmp_path)
    metrics = tmp_path / "out" / "btt" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not (metrics.exists() and '"train"' in metrics.read_text()):
        time.sleep(0.05)
    process.send_signal(number)
    output, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + number, output
    assert f"To continue where it stopped: python -m train demo --out {tmp_path / 'out'}" in output
    assert json.loads((tmp_path / "out" / "demo.json").read_text())["steps"] == 100000
    assert list((tmp_path / "out" / "btt" / "checkpoints").glob("step-*"))


@pytest.mark.parametrize(
    "words, status, message",
    [
        (["--stps", "3"], 2, "did you mean '--steps'"),
        (["--steps", "many"], 2, "invalid int value: 'many'"),
        (["--steps", "0"], 2, "--steps must be at least 1"),
        (["--heads", "7"], 1, "heads=7"),
        (["--rank", "0"], 2, "--rank must be at least 1"),
    ],
)
def test_wrong_usage_is_one_line_before_any_work(words, status, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["demo", *words]) == status
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_foreign_folder_is_refused(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["demo", "--out", str(tmp_path)]) == 1
    assert "is not empty and holds no demo" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_table(tmp_path):
    def result(**values):
        numbers = dict.fromkeys((field for field in Result.__dataclass_fields__ if field != "run"), 1.0)
        return Result(run=tmp_path, **{**numbers, **values})

    view = demo.table(
        Demo(), {"btt": result(tokens_per_second=3000.0, step_seconds=0.25), "dense": result(tokens_per_second=1000.0, step_seconds=1.0)}
    )
    ratios = dict(zip(view.columns[0]._cells, view.columns[3]._cells, strict=True))
    assert ratios["tokens per second"] == "3.00"
    assert ratios["time per step (ms)"] == "0.25"


def test_every_demo_has_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("time.strftime", lambda _: "20260101-000000")  # two demos within one second
    folders = [demo._claim(demo.Demo(), None) for _ in range(3)]
    assert [path.name for path in folders] == ["demo-20260101-000000", "demo-20260101-000000-2", "demo-20260101-000000-3"]
    assert all((path / demo.SETTINGS).exists() for path in folders)
