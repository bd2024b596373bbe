"""Plans of zoo models are what they were; a change shows as a difference of text."""

import dataclasses
import difflib

import pytest

import tn
from tests.golden import __main__ as command
from tests.golden import cases


def difference(before: str, after: str, name: str) -> str:
    return "".join(difflib.unified_diff(before.splitlines(True), after.splitlines(True), f"{name} (golden)", f"{name} (now)", n=3))


def test_plans_of_zoo_models_are_the_golden_ones():
    texts = dict(cases.texts())
    kept = {path for path in cases.FOLDER.iterdir() if path.suffix == ".txt"}
    stale = sorted(path.name for path in kept - texts.keys())
    changes = [
        difference(path.read_text(encoding="utf-8") if path in kept else "", text, path.name)
        for path, text in texts.items()
        if path not in kept or path.read_text(encoding="utf-8") != text
    ]
    if changes or stale:
        pytest.fail(
            "plans changed; if that is meant, run `python -m tests.golden` and commit the files"
            + (f"\nno longer made: {', '.join(stale)}" if stale else "")
            + "\n"
            + "\n".join(changes),
            pytrace=False,
        )


def test_a_changed_plan_shows():
    net = next(iter(cases.layers("gpt-tiny", "btt")))
    plan = tn.plan(net, rows=2048)
    other = dataclasses.replace(plan, tile=None if plan.tile else 64)
    assert cases.render(plan) != cases.render(other)
    shown = difference(cases.render(plan), cases.render(other), "gpt-tiny-btt.txt")
    assert "rows at a time" in shown and shown.count("\n-") >= 1


def test_one_command_rewrites_the_files(tmp_path, monkeypatch, capsys):
    golden = {path.name: path.read_text(encoding="utf-8") for path in cases.FOLDER.glob("*.txt")}
    monkeypatch.setattr(cases, "FOLDER", tmp_path)
    command.rewrite()
    command.rewrite()
    assert {path.name: path.read_text(encoding="utf-8") for path in tmp_path.iterdir()} == golden
    said = capsys.readouterr().out
    assert said.count("rewrote") == said.count("same") == len(golden)
