"""RunConfig: what it refuses, YAML and back, and who wins among default, file and flag."""

import dataclasses

import pytest
import yaml

import zoo
from train import cli, config, recipes
from train.errors import ConfigError


def test_a_saved_config_reads_back_equal(tmp_path):
    run = dataclasses.replace(recipes.gpt(), model=zoo.GPTConfig(structure="btt", rank=3, width=64, heads=4), betas=(0.8, 0.99), lr=1e-5)
    (tmp_path / "run.yaml").write_text(config.dump(run))
    assert config.load(tmp_path / "run.yaml", recipes.gpt()) == run


def test_a_saved_config_says_everything_but_the_folder():
    assert set(yaml.safe_load(config.dump(recipes.gpt()))) == {field.name for field in dataclasses.fields(config.RunConfig)} - {"out"}


def test_flag_wins_over_file_wins_over_preset_wins_over_default(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("steps: 20\nlr: 1e-3\nmodel:\n  layers: 3\n  heads: 4\n")
    parsed = cli.parse("gpt", ["--preset", "gpt2-medium", "--steps", "30", "--config", str(file), "--model.heads", "2"])
    assert (parsed.batch, parsed.model.width) == (recipes.gpt().batch, 1024)
    assert (parsed.lr, parsed.model.layers) == (1e-3, 3)
    assert (parsed.steps, parsed.model.heads) == (30, 2)


def test_a_file_and_a_flag_may_each_be_half_of_a_change(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model.width: 100\n")
    with pytest.raises(ConfigError, match="width=100 is not a multiple of heads=8"):
        cli.parse("gpt", ["--config", str(file)])
    assert cli.parse("gpt", ["--config", str(file), "--model.heads", "10"]).model.width == 100


def test_giving_the_vocabulary_keeps_it(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("model:\n  vocab: 640\n")
    assert cli.parse("gpt", []).fit_vocab
    assert not cli.parse("gpt", ["--model.vocab", "640"]).fit_vocab
    assert not cli.parse("gpt", ["--config", str(file)]).fit_vocab
    assert cli.parse("gpt", ["--preset", "gpt-tiny"]).fit_vocab
    assert cli.parse("gpt", ["--model.vocab", "640", "--fit_vocab"]).fit_vocab


@pytest.mark.parametrize(
    "text, message",
    [
        ("stepz: 3", r"unknown config key 'stepz': did you mean 'steps'\? One of: accumulate, .*, warmup, weight_decay"),
        ("model:\n  widht: 3", r"unknown config key 'model.widht': did you mean 'model.width'\?"),
        ("model: gpt2", "model should hold `key: value` lines; got 'gpt2'"),
        ("steps: many", "steps should be int; got 'many'"),
        ("steps: 1.5", "steps should be int; got 1.5"),
        ("steps: true", "steps should be int; got True"),
        ("steps: .inf", "steps should be int; got inf"),
        ("lr: fast", "lr should be float; got 'fast'"),
        ("tf32: 1", "tf32 should be bool; got 1"),
        ("betas: 0.9", "betas should be a list of 2; got 0.9"),
        ("mode: paked", r"unknown value of mode 'paked': did you mean 'packed'\? One of: packed, padded"),
        ("model:\n  structure: bbt", r"unknown structure 'bbt': did you mean 'btt'\? One of: "),
        ("steps: 0", "steps must be at least 1; got 0"),
        ("lr: -1", "lr must be a positive number; got -1.0"),
        ("lr: .nan", "lr must be a positive number; got nan"),
        ("clip: .nan", "clip must be at least 0; got nan"),
        ("lr_floor: 2", "lr_floor is a fraction of lr"),
        ("warmup: 1000", r"warmup \(1000 steps\) is longer than the run \(300 steps\)"),
        ("- 1", "should hold `key: value` lines; got list"),
        ("a: [", "is not YAML"),
    ],
)
def test_a_bad_file_is_refused_in_one_line(tmp_path, text, message):
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        config.load(tmp_path / "run.yaml", recipes.gpt())
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named():
    with pytest.raises(ConfigError, match=r"cannot read config nowhere\.yaml"):
        config.load("nowhere.yaml", recipes.gpt())


def test_every_setting_can_be_set_by_file():
    for key, _ in config.settings():
        head, _, rest = key.partition(".")
        value = getattr(recipes.gpt(), head)
        value = getattr(value, rest) if rest else value
        value = list(value) if isinstance(value, tuple) else value
        merged = config.check(config.merge(recipes.gpt(), {key: value, "fit_vocab": True}))
        assert merged == recipes.gpt(), key
