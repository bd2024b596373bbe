"""The models a bench compares: the one asked for, its dense twin, and the shape both share."""

import argparse
import dataclasses
from dataclasses import dataclass
from typing import NoReturn

import yaml

import tn
import zoo
from zoo.registry import config as preset

# The demo's shape: large enough that contractions, not Python, take the time; small enough for two minutes on two cores.
DEFAULT = zoo.GPTConfig(vocab=4096, context=256, layers=4, width=512, heads=8, structure="btt", rank=1)

EPILOG = "A field of the model is changed by: " + ", ".join(f"--model.{field.name}" for field in dataclasses.fields(zoo.GPTConfig))


@dataclass(frozen=True, kw_only=True)
class Case:
    """What a bench measures: a configuration and the size of its input."""

    config: zoo.GPTConfig
    batch: int
    sequence: int

    @property
    def tokens(self) -> int:
        """Tokens of one forward pass."""
        return self.batch * self.sequence

    @property
    def label(self) -> str:
        """The structure and its rank, as tables name the model."""
        config = self.config
        return config.structure + (f" rank {config.rank}" if config.rank is not None else "")

    @property
    def settings(self) -> dict[str, object]:
        """Everything that decides the numbers, for a Row."""
        return {**self.config.to_dict(), "batch": self.batch, "sequence": self.sequence}

    def dense(self) -> "Case":
        """The same shape with dense layers."""
        return dataclasses.replace(self, config=self.config.override(structure="dense", rank=None))


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line."""

    def error(self, message: str) -> NoReturn:
        """Refuse the command line.

        Raises:
            zoo.ConfigError: always, with argparse's message.
        """
        raise zoo.ConfigError(f"{self.prog}: {message}")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a case; `--model.FIELD VALUE` flags are read by `case` from what the parser leaves over."""
    start = "start from a model of the zoo, with BTT layers of rank 1 (default: the demo's shape)"
    parser.add_argument("--name", metavar="NAME", help=f"{start}: {', '.join(zoo.names())}")
    parser.add_argument("--batch", type=int, default=4, help="sequences (default 4)")
    parser.add_argument("--sequence", type=int, help="tokens of each (default: the model's context)")


def case(options: argparse.Namespace, rest: list[str]) -> Case:
    """The case of the parsed flags and the `--model.FIELD VALUE` pairs left over.

    Raises:
        zoo.ConfigError: an unknown flag or field (the nearest is named), or a value that is not valid.
    """
    config = DEFAULT if options.name is None else preset(options.name, structure="btt", rank=1)
    fields = dict(_pairs(rest))
    if "structure" in fields and "rank" not in fields:
        fields["rank"] = None  # the rank of another structure means something else
    config = config.override(fields) if fields else config
    sequence = config.context if options.sequence is None else options.sequence
    if not 1 <= sequence <= config.context:
        raise zoo.ConfigError(f"--sequence {sequence} must be between 1 and the model's context of {config.context}")
    if options.batch < 1:
        raise zoo.ConfigError(f"--batch {options.batch} must be at least 1")
    return Case(config=config, batch=options.batch, sequence=sequence)


def _pairs(rest: list[str]) -> list[tuple[str, object]]:
    known = [f"--model.{field.name}" for field in dataclasses.fields(zoo.GPTConfig)]
    words = [part for word in rest for part in (word.split("=", 1) if word.startswith("--") else [word])]
    pairs = []
    for flag, value in zip(words[::2], [*words[1::2], None], strict=False):
        if flag not in known:
            raise zoo.ConfigError(tn.errors.unknown("flag", flag, known))
        if value is None:
            raise zoo.ConfigError(f"{flag} needs a value")
        pairs.append((flag.removeprefix("--model."), yaml.safe_load(value)))
    return pairs
