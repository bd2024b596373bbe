"""A run keeps the plans and the machine table it began with."""

import dataclasses
import io
import shutil
from importlib import import_module

from rich.console import Console

import tn
import train
from tests.train import runs
from tn import machine
from train import launch


def test_a_resume_keeps_plans_and_table(tmp_path, monkeypatch):
    config = runs.config(tmp_path, model={"structure": "btt"})
    run = tmp_path / "run"
    train.run(config, console=runs.quiet())
    shutil.copytree(run, tmp_path / "whole")
    plans = {path.name: path.read_text() for path in (run / "plans").iterdir()}
    assert sum(name.startswith("plan-") for name in plans) >= 2 and sum(name.startswith("table-") for name in plans) == 1
    for name in ("result.json", "model.safetensors"):
        (run / name).unlink()
    newest = max((run / "checkpoints").iterdir(), key=lambda path: path.name)
    for path in newest.iterdir():
        path.unlink()
    newest.rmdir()  # resume from the one before

    built_in = machine.machine()
    other = dataclasses.replace(built_in, call=built_in.call * 50, element=built_in.element * 50)
    for module in (machine, launch, import_module("tn.planner")):
        monkeypatch.setattr(module, "machine", lambda *_: other)
    out = io.StringIO()
    train.resume(run, console=Console(file=out, width=300))
    said = f"machine table {built_in.name} was {built_in.digest} when the run began and is {other.digest} now: the run keeps its own"
    assert said in out.getvalue()
    assert runs.same_weights(run, tmp_path / "whole")
    assert {name: (run / "plans" / name).read_text() for name in plans} == plans
    assert tn.store._open == []
