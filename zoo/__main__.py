"""python -m zoo: make text with a model, look at one, list the names."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import inspect
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import tn
import zoo
from zoo.config import GPTConfig
from zoo.describe import describe
from zoo.errors import ConfigError, GenerateError
from zoo.gpt import GPT
from zoo.pipes import quiet_pipe
from zoo.registry import config as preset

_EXAMPLES = """examples:
  python -m zoo names
  python -m zoo describe gpt2-small --model.structure btt --model.rank 2
  python -m zoo generate runs/demo --prompt "def main(" --length 100 --temperature 0.8
"""


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line, with the nearest name where a name is unknown."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; see {self.prog} --help\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        # argparse's own hook; its message lists the choices without the nearest.
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, tn.errors.unknown("choice", value, action.choices))

    def parse_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:  # type: ignore[override]
        parsed, unknown = self.parse_known_args(args, namespace)
        if unknown:
            parsed.parser.error(_unknown_flag(unknown[0].partition("=")[0], parsed.parser))
        return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, or 2 for a mistake in what was asked."""
    try:
        return quiet_pipe(lambda: _run(_parser().parse_args(arguments)))
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _run(options: argparse.Namespace) -> int:
    try:
        options.run(options)
    except tn.TnError as error:
        print(f"{options.parser.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _parser() -> _Parser:
    parser = _Parser(
        allow_abbrev=False,
        prog="python -m zoo",
        description="Models made of tensor-network layers: make text with one, look at one, list their names.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_describe(commands)
    names = commands.add_parser("names", allow_abbrev=False, help="list the models that can be made by name")
    names.set_defaults(run=_names, parser=names)
    return parser


def _add_generate(commands: Any) -> None:
    parser = commands.add_parser(
        allow_abbrev=False,
        name="generate",
        help="continue a text with a trained model",
        description="Continue a text with the model in a folder: a training run, a folder written by zoo.save, "
        "or a local Hugging Face GPT-2. The text goes to stdout as it is made.",
    )
    parser.add_argument("model", metavar="DIR", help="folder of the model")
    parser.add_argument("--prompt", default="", help="text to continue (default: start a new document)")
    parser.add_argument("--length", type=int, default=100, metavar="N", help="most new tokens (default: 100)")
    parser.add_argument(
        "--temperature",
        type=float,
        default=1.0,
        metavar="T",
        help="below 1 is safer, above 1 wilder, 0 takes the most likely token (default: 1)",
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens")
    parser.add_argument("--top-p", type=float, metavar="P", help="draw from the fewest tokens that reach probability P")
    parser.add_argument("--min-p", type=float, metavar="P", help="draw from tokens at least P times as likely as the most likely one")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="equal seeds give equal texts (default: 0)")
    parser.add_argument("--no-cache", action="store_true", help="compute every token anew (slower, same text)")
    parser.add_argument(
        "--overflow",
        choices=("error", "slide"),
        default="slide",
        help="when the text would outgrow the model's context: refuse, or go on from its last half (default: slide)",
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: cpu)")
    parser.set_defaults(run=_generate, parser=parser)


def _add_describe(commands: Any) -> None:
    parser = commands.add_parser(
        allow_abbrev=False,
        name="describe",
        help="print every layer of a model with parameters, FLOPs and memory",
        description="Print every contraction and pointwise node of a model with its parameters, FLOPs and memory. "
        "Nothing is computed and no memory is taken.",
    )
    parser.add_argument("model", metavar="NAME_OR_DIR", help="a name of `python -m zoo names`, or a folder with a model")
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="sequences (default: 1)")
    parser.add_argument("--sequence", type=int, metavar="N", help="tokens of each (default: the model's context)")
    group = parser.add_argument_group("fields of the model", "to change in a model given by name")
    helps = _field_docs()
    for name, kind in typing.get_type_hints(GPTConfig).items():
        group.add_argument(f"--model.{name}", type=_reader(kind), default=argparse.SUPPRESS, metavar=_metavar(kind), help=helps[name])
    parser.set_defaults(run=_describe, parser=parser)


def _names(options: argparse.Namespace) -> None:
    rows: list[tuple[str, ...]] = [("name", "layers", "width", "heads", "context", "vocab", "parameters")]
    for name in zoo.names():
        config = preset(name)
        parameters = sum(parameter.numel() for parameter in GPT(config, device="meta").parameters())
        sizes = (config.layers, config.width, config.heads, config.context, config.vocab)
        rows.append((name, *(str(size) for size in sizes), f"{parameters:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *cells in rows:
        print(name.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(cells, widths[1:], strict=True)))


def _describe(options: argparse.Namespace) -> None:
    fields = {name.removeprefix("model."): value for name, value in vars(options).items() if name.startswith("model.")}
    if not fields:
        print(describe(options.model, batch=options.batch, sequence=options.sequence))
        return
    if options.model not in zoo.names() and Path(options.model).is_dir():
        raise ConfigError(f"--model.{next(iter(fields))} cannot change a saved model ({options.model})")
    model = zoo.create(options.model, device="meta", **fields)
    print(describe(model, batch=options.batch, sequence=options.sequence))


def _generate(options: argparse.Namespace) -> None:
    model, tokenizer = _open(Path(options.model), _device(options.device))
    pieces = zoo.stream_text(
        model,
        tokenizer,
        options.prompt,
        length=options.length,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        min_p=options.min_p,
        seed=options.seed,
        cache=not options.no_cache,
        overflow=options.overflow,
    )
    print(options.prompt, end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print(flush=True)


def _open(folder: Path, device: torch.device) -> tuple[GPT, zoo.Tokenizer]:
    if not folder.is_dir():
        raise GenerateError(f"there is no folder {folder}: give a training run or a saved model")
    if (folder / "model.json").is_file() or not (folder / "config.json").is_file():
        model = zoo.load(folder, device=device)
        if not (folder / "tokenizer.json").is_file():
            raise GenerateError(f"{folder / 'tokenizer.json'} is missing: save the model with its tokenizer")
        return model, zoo.load_tokenizer(folder)
    return zoo.from_pretrained(folder, device=device), zoo.tokenizer(f"hf:{folder}")


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise GenerateError(f"unknown device {name!r}: use cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise GenerateError(f"device {name!r} cannot be used: use cpu, cuda or cuda:N")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise GenerateError(f"device {name!r} is not there: this PyTorch sees no CUDA device; use cpu")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise GenerateError(f"device {name!r} is not there: this PyTorch sees {torch.cuda.device_count()} CUDA devices")
    return device


def _unknown_flag(flag: str, parser: argparse.ArgumentParser) -> str:
    if not flag.startswith("-"):
        return f"unexpected argument {flag!r}"
    flags = [option for action in parser._actions for option in action.option_strings]
    near = difflib.get_close_matches(flag, flags, n=1)
    return f"unknown flag {flag}" + (f": did you mean {near[0]}?" if near else "")


def _reader(kind: Any) -> Any:
    """The function that reads a flag's text as a value of this type."""
    kinds = [part for part in typing.get_args(kind) or (kind,) if part is not type(None)]
    optional = type(None) in typing.get_args(kind)

    def read(text: str) -> Any:
        if optional and text.lower() == "none":
            return None
        if kinds[0] is bool:
            if text.lower() not in ("true", "false"):
                raise argparse.ArgumentTypeError(f"{text!r} must be True or False")
            return text.lower() == "true"
        return kinds[0](text)

    read.__name__ = {"int": "whole number", "float": "number"}.get(kinds[0].__name__, kinds[0].__name__)
    return read


def _metavar(kind: Any) -> str:
    name = (typing.get_args(kind) or (kind,))[0].__name__
    return {"int": "N", "float": "X", "bool": "True|False", "str": "NAME"}[name]


def _field_docs() -> dict[str, str]:
    """The line under each field of GPTConfig, and its default where it has one to show."""
    lines = [line.strip() for line in inspect.getsource(GPTConfig).splitlines()]
    docs = {}
    for field in dataclasses.fields(GPTConfig):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{field.name}: "))
        docs[field.name] = lines[at + 1].strip('"').replace("%", "%%")
    return docs


if __name__ == "__main__":
    sys.exit(main())
