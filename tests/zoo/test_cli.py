"""python -m zoo: what a new user types, right and wrong."""

import os
import subprocess
import sys

import pytest
import tokenizers

import zoo
from tests.zoo.models import small
from zoo.__main__ import main


@pytest.fixture
def folder(tmp_path):
    zoo.save(small(vocab=320, context=32), tmp_path, zoo.tokenizer("bytes"))
    return tmp_path


def test_generate_continues_the_prompt(folder, capsys):
    assert main(["generate", str(folder), "--prompt", "abc", "--length", "10", "--temperature", "0"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("abc")
    assert main(["generate", str(folder), "--prompt", "abc", "--length", "10", "--temperature", "0", "--no-cache"]) == 0
    assert capsys.readouterr().out == first


def test_generate_is_decided_by_the_seed(folder, capsys):
    def text(*flags):
        assert main(["generate", str(folder), "--prompt", "abc", "--length", "60", "--top-p", "0.9", *flags]) == 0
        return capsys.readouterr().out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")


def test_describe_a_name_with_fields(capsys):
    assert (
        main(["describe", "gpt2-small", "--sequence", "64", "--model.structure", "btt", "--model.rank", "2", "--model.tied", "False"]) == 0
    )
    assert "blocks.0-11.attention.query" in capsys.readouterr().out


def test_describe_a_folder(folder, capsys):
    assert main(["describe", str(folder)]) == 0
    assert "1 × 32 tokens" in capsys.readouterr().out


def test_names(capsys):
    assert main(["names"]) == 0
    out = capsys.readouterr().out
    for name in zoo.names():
        assert name in out
    assert "124,439,808" in out


@pytest.mark.parametrize("command", [[], ["generate"], ["describe"], ["names"]], ids=str)
def test_help(command, capsys):
    with pytest.raises(SystemExit) as stopped:
        main([*command, "--help"])
    assert stopped.value.code == 0
    assert "usage: python -m zoo" in capsys.readouterr().out


def test_every_flag_has_help(capsys):
    with pytest.raises(SystemExit):
        main(["describe", "--help"])
    out = capsys.readouterr().out
    for name in zoo.GPTConfig().to_dict():
        assert f"--model.{name}" in out
    assert "inside the MLP (default: 4 × width)" in " ".join(out.split())


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["generat", "x"], "did you mean 'generate'"),
        ([], "the following arguments are required: COMMAND"),
        (["generate", "DIR", "--lenght", "4"], "unknown flag --lenght: did you mean --length?"),
        (["generate", "DIR", "--length", "x"], "argument --length: invalid int value: 'x'"),
        (["generate", "DIR", "more"], "unexpected argument 'more'"),
        (["generate", "nowhere"], "there is no folder nowhere"),
        (["generate", "DIR", "--device", "gpu"], "unknown device 'gpu'"),
        (["generate", "DIR", "--temperature", "-1"], "temperature=-1.0 must be 0"),
        (["generate", "DIR", "--length", "50", "--overflow", "error"], "do not fit the model's context of 32"),
        (["describe", "gpt2-smal"], "did you mean 'gpt2-small'"),
        (["describe", "gpt2-small", "--model.heds", "3"], "unknown flag --model.heds: did you mean --model.heads?"),
        (["describe", "gpt2-small", "--model.heads", "x"], "argument --model.heads: invalid whole number value: 'x'"),
        (["describe", "gpt2-small", "--model.tied", "maybe"], "'maybe' must be True or False"),
        (["describe", "gpt2-small", "--model.structure", "bbt"], "did you mean 'btt'"),
        (["describe", "DIR", "--model.heads", "2"], "--model.heads cannot change a saved model"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_are_one_line_and_exit_2(arguments, message, folder, capsys):
    arguments = [str(folder) if word == "DIR" else word for word in arguments]
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    captured = capsys.readouterr()
    assert code == 2
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_damaged_weights(folder, capsys):
    os.truncate(folder / "model.safetensors", 5000)
    assert main(["generate", str(folder)]) == 2
    assert "model.safetensors (5000 bytes) is truncated" in capsys.readouterr().err


def test_a_hugging_face_folder(tmp_path, capsys):
    zoo.to_pretrained(small(vocab=320, context=32), tmp_path)
    assert main(["describe", str(tmp_path)]) == 0
    assert "1 × 32 tokens" in capsys.readouterr().out
    assert main(["generate", str(tmp_path), "--prompt", "abc"]) == 2
    assert "has no tokenizer.json, and transformers cannot make one: no vocab.json" in capsys.readouterr().err
    _hf_tokenizer(tmp_path)
    assert main(["generate", str(tmp_path), "--prompt", "abc", "--length", "5"]) == 0
    assert capsys.readouterr().out.startswith("abc")


def _hf_tokenizer(folder):
    alphabet = {chr(0x100 + i): i for i in range(10)} | {letter: 10 + i for i, letter in enumerate("abcdef")} | {"<|endoftext|>": 16}
    runner = tokenizers.Tokenizer(tokenizers.models.BPE(alphabet, []))
    runner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    runner.decoder = tokenizers.decoders.ByteLevel()
    runner.add_special_tokens(["<|endoftext|>"])
    runner.save(str(folder / "tokenizer.json"))


def test_missing_tokenizer(folder, capsys):
    (folder / "tokenizer.json").unlink()
    assert main(["generate", str(folder)]) == 2
    assert "tokenizer.json is missing" in capsys.readouterr().err


def test_into_a_closed_pipe(folder, monkeypatch, capfd):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        monkeypatch.setattr(sys, "stdout", stdout)
        assert main(["generate", str(folder), "--prompt", "abc", "--length", "3"]) == 141
    assert capfd.readouterr().err == ""


def test_as_a_module_with_a_light_import():
    heavy = ("transformers", "tokenizers", "tiktoken", "datasets", "matplotlib", "triton", "cotengra")
    code = f"""if True:
        import runpy, sys, zoo
        print([name for name in {heavy} if name in sys.modules])
        sys.argv = ["zoo", "--help"]
        runpy.run_module("zoo", run_name="__main__")
    """
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.startswith("[]\nusage: python -m zoo")


@pytest.mark.parametrize(
    "words, message",
    [
        (["--device", "mps"], "device 'mps' cannot be used: use cpu, cuda or cuda:N"),
        (["--device", "meta"], "device 'meta' cannot be used: use cpu, cuda or cuda:N"),
        (["--device", "cuda:99"], "device 'cuda:99' is not there"),
        (["--seed", "99999999999999999999999"], "seed=99999999999999999999999 must be between 0 and"),
        (["--seed", "-1"], "seed=-1 must be between 0 and"),
    ],
)
def test_a_device_or_seed_that_cannot_be_used(folder, capsys, words, message):
    assert main(["generate", str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_tiny_temperature(folder, capsys):
    assert main(["generate", str(folder), "--prompt", "abc", "--length", "3", "--temperature", "1e-300"]) == 0
    assert capsys.readouterr().out.startswith("abc")
