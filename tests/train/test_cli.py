"""The command line: old spellings, help, and one-line errors that name the nearest flag."""

import dataclasses

import pytest

from train import aliases, cli, config, recipes
from train.__main__ import main
from train.errors import ConfigError


def test_every_alias_is_a_setting_and_no_setting_is_hidden():
    names = {key for key, _ in config.settings()}
    assert set(aliases.ALIASES.values()) <= names
    assert not names & set(aliases.ALIASES)
    assert not names & set(aliases.UNSUPPORTED)


@pytest.mark.parametrize(
    "flag, value, key, expected",
    [
        ("struct", "btt", "model.structure", "btt"),
        ("layers", "ffn", "model.structured", "ffn"),
        ("tt_rank", "4", "model.rank", 4),
        ("d_model", "1024", "model.width", 1024),
        ("n_embd", "1024", "model.width", 1024),
        ("n_layer", "12", "model.layers", 12),
        ("n_head", "4", "model.heads", 4),
        ("d_head", "64", "model.head_dim", 64),
        ("block_size", "512", "model.context", 512),
        ("dropout", "0.1", "model.dropout", 0.1),
        ("dataset", "text:x", "data", "text:x"),
        ("batch_size", "12", "batch", 12),
        ("gradient_accumulation_steps", "40", "accumulate", 40),
        ("max_iters", "600_000", "steps", 600_000),
        ("warmup_iters", "20", "warmup", 20),
        ("init_lr", "2e-3", "lr", 2e-3),
        ("learning_rate", "2e-3", "lr", 2e-3),
        ("scheduler", "constant", "schedule", "constant"),
        ("grad_clip", "0.5", "clip", 0.5),
        ("base_d_model", "64", "base_width", 64),
        ("eval_interval", "10", "eval_every", 10),
        ("eval_iters", "7", "eval_batches", 7),
        ("log_interval", "3", "log_every", 3),
        ("out_dir", "x", "out", "x"),
    ],
)
def test_alias(flag, value, key, expected):
    needed = ["--struct=btt"] if flag == "tt_rank" else []
    for words in ([f"--{flag}={value}"], [f"--{flag}", value], [f"--{flag.replace('_', '-')}", value]):
        parsed = dataclasses.asdict(cli.parse("gpt", needed + words))
        for part in key.split("."):
            parsed = parsed[part]
        assert parsed == expected
    assert aliases.ALIASES[flag] == key


def test_the_table_above_has_every_alias():
    (mark,) = (mark for mark in test_alias.pytestmark if mark.name == "parametrize")
    assert {row[0] for row in mark.args[1]} == set(aliases.ALIASES)


@pytest.mark.parametrize("flag", aliases.UNSUPPORTED)
def test_an_old_flag_without_counterpart_says_what_to_do(flag):
    with pytest.raises(ConfigError, match=f"--{flag} is not available here: "):
        cli.parse("gpt", [f"--{flag}=1"])


def test_the_published_command_line_is_understood():
    words = "--struct=btt --layers=all_but_last --d_model=1024 --tt_rank=4 --n_layer=12 --n_head=6 --d_head=64 --max_iters=600_000"
    words += " --batch_size=12 --gradient_accumulation_steps=40 --init_lr=2e-3"
    parsed = cli.parse("gpt", words.split())
    assert (parsed.model.structure, parsed.model.rank, parsed.model.width, parsed.model.head_dim) == ("btt", 4, 1024, 64)
    assert (parsed.steps, parsed.batch, parsed.accumulate, parsed.lr) == (600_000, 12, 40, 2e-3)


def test_switches():
    assert cli.parse("gpt", ["--model.no_tied", "--no-tf32"]) == cli.parse("gpt", ["--model.tied=False", "--tf32=false"])
    assert not cli.parse("gpt", ["--model.no-tied"]).model.tied


@pytest.mark.parametrize(
    "words, message",
    [
        (["gtp"], "unknown recipe or command 'gtp': did you mean 'gpt'? One of: demo, gpt, prepare, recipes, resume"),
        (["gpt", "--stepz", "3"], "unknown flag '--stepz': did you mean '--steps'?"),
        (["gpt", "--model.widht=3"], "unknown flag '--model.widht': did you mean '--model.width'?"),
        (["gpt", "--steps", "x"], "--steps should be int; got 'x'"),
        (["gpt", "--lr", "x"], "--lr should be float; got 'x'"),
        (["gpt", "--steps"], "'--steps'"),
        (["gpt", "extra"], "extra"),
        (["gpt", "--schedule", "cosin"], "'cosin'"),
        (["gpt", "--model.tied=3"], "--model.tied should be True or False; got '3'"),
        (["gpt", "--model.structure", "bbt"], "unknown structure 'bbt': did you mean 'btt'?"),
        (["gpt", "--model.structure", "btt", "--model.structured", "all"], "tied and structured together"),
        (["gpt", "--preset", "gpt2-smal"], "unknown preset 'gpt2-smal': did you mean 'gpt2-small'?"),
        (["gpt", "--config"], "--config needs a value"),
        (["gpt", "--recipe", "other"], "the command decides the recipe"),
        (["gpt", "--device", "tpu"], "device should be auto, cpu, cuda or cuda:N; got 'tpu'"),
        (["gpt", "--data", "stdlibs"], "unknown data source 'stdlibs': did you mean 'stdlib'?"),
        (["gpt", "--tokenizer", "byte"], "unknown tokenizer 'byte': did you mean 'bytes'?"),
        (["gpt", "--tokenizer", "bpe:x"], "bpe:x"),
        (["resume"], "run"),
        (["resume", "x", "--thread", "2"], "unknown run 'x'"),
        (["resume", "x", "--treads", "2"], "unknown flag '--treads': did you mean '--threads'?"),
        (["resume", "nowhere/at/all"], "no run at nowhere/at/all"),
        (["prepare", "stdlibs"], "unknown data source 'stdlibs'"),
    ],
)
def test_a_wrong_command_line_is_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "y").mkdir(parents=True)
    if words[:2] == ["resume", "x"]:
        (tmp_path / "y").mkdir()
        (tmp_path / "y" / "config.yaml").touch()
    assert main(words) in (1, 2)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.startswith("error: ")
    assert shown.err.count("\n") == 1
    assert message in shown.err
    assert not any(path.name.startswith("gpt") for path in (tmp_path / "runs").iterdir())


def test_help_names_every_setting_with_a_sentence(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["gpt", "--help"])
    assert stop.value.code == 0
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for key, _ in config.settings():
        assert f"--{key}" in shown, key
    for field in ("config", "preset"):
        assert f"--{field}" in shown
    assert "Peak learning rate of a parameter whose multiplier is 1" in shown
    assert "python -m train gpt" in shown


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]], ids=str)
def test_help_lists_commands_and_recipes(words, capsys):
    assert main(words) == 0
    shown = capsys.readouterr().out
    for word in (*recipes.names(), "resume RUN", "prepare DATA", "recipes", "demo"):
        assert word in shown


def test_recipes_are_listed(capsys):
    assert main(["recipes"]) == 0
    assert "gpt" in capsys.readouterr().out
