"""Numbers and names that torch would answer with a traceback: one line, before any work."""

import dataclasses
import typing

import pytest
import torch

import tn
import train
import zoo
from tests.train import runs
from train import cli, config, errors
from train.__main__ import main

HUGE = "99999999999999999999999"


@pytest.mark.parametrize(
    "words, message",
    [
        (["--seed", HUGE], f"seed must be at most {2**63 - 1}; got {HUGE}"),
        (["--steps", HUGE], f"steps must be at most {2**31 - 1}; got {HUGE}"),
        (["--threads", "100000"], "threads must be between 1 and 1024; got 100000"),
        (["--model.width", HUGE], f"width={HUGE} must be at most {2**31 - 1}"),
        (["--out", ""], "out is empty: name a folder, or leave it out"),
    ],
)
def test_a_number_that_torch_cannot_take(words, message, capsys):
    assert main(["gpt", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


@pytest.mark.parametrize("number", [0, -3])
def test_threads_of_a_resume(tmp_path, capsys, number):
    train.run(runs.config(tmp_path, steps=1), console=runs.quiet())
    assert main(["resume", str(tmp_path / "run"), "--threads", str(number)]) == 2
    assert f"threads must be between 1 and 1024; got {number}" in capsys.readouterr().err


def test_a_model_that_does_not_fit_is_one_line(tmp_path, capsys):
    words = runs.flags(runs.config(tmp_path))
    for width in (2_000_000, 2_000_000_000):  # 16 TB of one matrix; more bytes than can be counted
        assert main(["gpt", *words, "--model.width", str(width)]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: the run does not fit into memory: ") and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_only_errors_of_memory_are_taken_for_one():
    with pytest.raises(RuntimeError, match="^shapes differ$"), errors.memory():
        raise RuntimeError("shapes differ")
    with pytest.raises(train.RunError, match="CUDA out of memory"), errors.memory():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
    with pytest.raises(train.RunError, match="does not fit into memory: MemoryError"), errors.memory():
        raise MemoryError


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 1.5}, "steps should be int; got 1.5"),
        ({"steps": "3"}, "steps should be int; got '3'"),
        ({"steps": True}, "steps should be int; got True"),
        ({"steps": 10**400}, "steps must be at most"),
        ({"lr": 10**400}, "lr should be float; got 1000"),
        ({"lr": None}, "lr should be float; got None"),
        ({"betas": 0.9}, "betas should be a list of 2; got 0.9"),
        ({"out": 3}, "out should be str; got 3"),
        ({"model": None}, "model should be a zoo.GPTConfig; got None"),
    ],
)
def test_values_of_the_wrong_type(change, message):
    with pytest.raises(train.ConfigError, match=message):
        dataclasses.replace(train.recipes.gpt(), **change)


def test_values_become_those_of_their_type():
    made = dataclasses.replace(train.recipes.gpt(), steps=20.0, lr=1, betas=[0.5, 0.6])
    assert [repr(value) for value in (made.steps, made.lr, made.betas)] == ["20", "1.0", "(0.5, 0.6)"]


def test_a_key_given_twice_is_refused(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    for text in ("steps: 3\nlr: 1.0\nsteps: 4\n", "model:\n  width: 32\n  width: 64\n"):
        file.write_text(text)
        assert main(["gpt", "--config", str(file)]) == 2
        assert f"key {text.split()[0] if 'steps' in text else 'width'!r}".replace(":", "") in capsys.readouterr().err.replace(":", "")
    file.write_text("a: &x {steps: 3}\n")
    assert config.read(file) == {"a": {"steps": 3}}


def test_help_lists_what_can_be_named(capsys):
    with pytest.raises(SystemExit):
        cli.parse("gpt", ["--help"])
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    *names, last = sorted(tn.structures.names())
    assert f"family of the linear layers: {', '.join(names)} or {last}" in shown
    assert "gpt2:PATH" in shown
    assert "cut at the context" in shown


def test_prepare_help_names_every_tokenizer(capsys):
    with pytest.raises(SystemExit):
        main(["prepare", "--help"])
    shown = capsys.readouterr().out
    assert all(name in shown for name in zoo.tokenizer_names())


def test_the_types_checked_are_all_there_are():
    assert {kind for _, kind in config.settings() if typing.get_origin(kind) is None} == {str, int, float, bool}
