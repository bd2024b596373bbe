"""Tiny runs for the tests of training: one layer of width 32 on a small generated text, a second or two each."""

import contextlib
import dataclasses
import io
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from safetensors.numpy import load_file

import train
import zoo
from train.__main__ import main

SHAPE = {"context": 16, "layers": 1, "width": 32, "heads": 2}
SETTINGS = {
    "tokenizer": "bytes",
    "steps": 12,
    "lr": 2e-3,
    "batch": 2,
    "eval_every": 6,
    "eval_batches": 2,
    "log_every": 1,
    "checkpoint_every": 4,
    "sample_length": 4,
    "threads": 1,
    "progress": False,
}


def write_text(path: Path, *, seed: int = 0, lines: int = 400) -> Path:
    """Write some text that a byte model can learn."""
    draw = random.Random(seed)
    words = ("the", "cat", "sat", "on", "a", "mat", "and", "then", "it", "ran", "far", "away", "from", "a", "very", "happy", "dog")
    path.write_text("\n".join(" ".join(draw.choices(words, k=12)) for _ in range(lines)))
    return path


def config(folder: Path, *, model: dict[str, Any] | None = None, **settings: Any) -> train.RunConfig:
    """Return a tiny run's config whose text, cache and run folder are all in `folder`."""
    text = folder / "text.txt"
    if not text.exists():
        write_text(text)
    places = {"data": f"text:{text}", "cache_dir": str(folder / "cache"), "out": str(folder / "run")}
    return train.RunConfig(model=zoo.GPTConfig(**SHAPE | (model or {})), **SETTINGS | places | settings)


def flags(config: train.RunConfig) -> list[str]:
    """Return the command line of a tiny config, after the recipe's name."""
    shape, words = dataclasses.asdict(config.model), []
    for name in SHAPE:
        words += [f"--model.{name}", str(shape[name])]
    for name in (*SETTINGS, "data", "cache_dir", "out"):
        value = getattr(config, name)
        words += [f"--no_{name}"] if value is False else [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def main_into(output: Path, words: Sequence[str]) -> NoReturn:
    """Run `python -m train WORDS` in this process, with its output in a file, and end the process as a shell would see it."""
    with open(output, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        sys.exit(main(list(words)))


def quiet() -> Console:
    """Return a console that keeps what is printed: `console.file.getvalue()`."""
    return Console(file=io.StringIO(), width=160)


def same_weights(first: Path, second: Path) -> bool:
    """Whether two runs ended with bit-equal models."""
    a, b = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    return a.keys() == b.keys() and all(a[name].tobytes() == b[name].tobytes() for name in a)
