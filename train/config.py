"""RunConfig: everything a run depends on, as one frozen, typed value that checks itself, and its YAML form.

Settings come from three places, later ones win: the recipe's defaults, a file, flags. They are merged first
and checked once, so that a file and a flag may each be half of a change.
"""

import dataclasses
import math
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml

import zoo
from tn.errors import unknown
from train.errors import ConfigError

T = TypeVar("T")

_LARGEST = 2**31 - 1
"""Of a count: what torch and numpy can index on every platform."""
_MOST_THREADS = 1024


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One training run. Equal configs on equal software, thread count and corpus give equal weights."""

    recipe: str = "gpt"
    """Recipe that this config came from; written by the recipe."""
    model: zoo.GPTConfig
    """The model's shape; model.context is also the length of the training windows."""
    fit_vocab: bool = True
    """Set model.vocab to the tokenizer's size rounded up to a multiple of 64. Giving model.vocab turns this off."""

    data: str = "stdlib"
    """Training text: stdlib, text:PATH (file or folder), hf:NAME_OR_PATH or bin:DIR (nanoGPT)."""
    tokenizer: str = "bpe:4096"
    """Tokenizer: bytes, bpe:N (trained on the data), gpt2, gpt2:PATH (local files) or hf:PATH."""
    mode: Literal["packed", "padded"] = "packed"
    """packed: windows of one long token stream. padded: one document per row, cut at the context, padding masked
    out of the loss."""
    cache_dir: str | None = None
    """Where prepared tokens are kept; None is the data code's default folder."""

    steps: int = 300
    """Optimiser steps."""
    batch: int = 4
    """Sequences per micro-batch."""
    accumulate: int = 1
    """Micro-batches per step; each token counts equally, whichever micro-batch it is in."""

    lr: float = 1e-3
    """Peak learning rate of a parameter whose multiplier is 1; the start table prints every group's own rate."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Shape of the learning rate after warm-up."""
    warmup: int | None = None
    """Steps of linear warm-up; None is a tenth of the steps, at most 2000."""
    lr_floor: float = 0.1
    """Learning rate at the end of the cosine, as a fraction of the peak."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (never of embeddings, norms and biases); it scales with each group's rate."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's averaging constants of the gradient and of its square."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    clip: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    base_width: int | None = None
    """Width at which lr was tuned: rates of wider models follow from it (muP). None: lr is for this width."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute precision; bfloat16 is autocast over float32 weights."""
    tf32: bool = True
    """Let CUDA matrix products round to TF32 while training; evaluation stays in float32."""
    device: str = "auto"
    """auto (CUDA when there is one), cpu, cuda or cuda:N."""
    threads: int | None = None
    """CPU threads; None is torch's default. The number is saved: bit-exact resume needs the same one."""
    seed: int = 0
    """Seed of initial weights, data order, dropout and samples."""

    eval_every: int = 100
    """Steps between evaluations on held-out text; there is always one at the start and one at the end."""
    eval_batches: int | None = 20
    """Batches per evaluation, spread over the held-out text and the same every time; None is all of it."""
    log_every: int = 10
    """Steps between lines of metrics.jsonl; losses, rates and times in a line are means over these steps."""
    checkpoint_every: int = 100
    """Steps between checkpoints; there is always one at the start and one at the end."""
    keep: int = 2
    """Checkpoints to keep, the newest ones."""
    sample_every: int = 100
    """Steps between text samples in samples.txt; 0 turns them off."""
    sample_length: int = 100
    """Tokens in a sample."""
    sample_prompt: str | None = None
    """Text that samples continue; None is the beginning of the held-out text."""

    out: str | None = None
    """Folder of the run, which must not hold a run; None is runs/RECIPE-TIME."""
    progress: bool = True
    """Show the live progress bar (a plain line now and then where the output is not a terminal)."""

    def __post_init__(self) -> None:
        _check_types(self)
        for name in ("steps", "batch", "accumulate", "eval_every", "log_every", "checkpoint_every", "keep"):
            _between(self, name, 1, _LARGEST)
        for name in ("sample_every", "sample_length"):
            _between(self, name, 0, _LARGEST)
        for name in ("clip", "weight_decay", "lr_floor"):
            _between(self, name, 0)
        _between(self, "seed", 0, 2**63 - 1)
        for name, least, largest in (("warmup", 0, _LARGEST), ("eval_batches", 1, _LARGEST), ("base_width", 1, _LARGEST)):
            if getattr(self, name) is not None:
                _between(self, name, least, largest)
        if self.threads is not None:
            check_threads(self.threads)
        for name in ("out", "cache_dir"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is empty: name a folder, or leave it out")
        for name in ("lr", "eps"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} must be a positive number; got {getattr(self, name)}")
        for name in ("mode", "schedule", "dtype"):
            choices = typing.get_args(typing.get_type_hints(RunConfig)[name])
            if getattr(self, name) not in choices:
                raise ConfigError(unknown(name, getattr(self, name), choices))
        if self.lr_floor > 1:
            raise ConfigError(f"lr_floor is a fraction of lr, between 0 and 1; got {self.lr_floor}")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"betas are two numbers in [0, 1); got {self.betas}")
        if self.warmup is not None and self.warmup > self.steps:
            raise ConfigError(f"warmup ({self.warmup} steps) is longer than the run ({self.steps} steps)")

    @property
    def warmup_steps(self) -> int:
        """Steps of warm-up after the default is filled in."""
        return min(2000, self.steps // 10) if self.warmup is None else self.warmup

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimiser step when no position is padding."""
        return self.batch * self.accumulate * self.model.context


def check_threads(number: int) -> int:
    """Return a number of CPU threads that torch can be asked for.

    Raises:
        ConfigError: less than one, or more than any machine has.
    """
    if not 1 <= number <= _MOST_THREADS:
        raise ConfigError(f"threads must be between 1 and {_MOST_THREADS}; got {number}")
    return number


def _check_types(config: RunConfig) -> None:
    """Make every value exactly of its field's type (a list becomes a tuple, 1 a float), or refuse it."""
    if not isinstance(config.model, zoo.GPTConfig):
        raise ConfigError(f"model should be a zoo.GPTConfig; got {config.model!r}")
    for name, kind in typing.get_type_hints(RunConfig).items():
        if name != "model" and typing.get_origin(kind) is not Literal:  # those have their own message
            object.__setattr__(config, name, _coerce(name, getattr(config, name), kind))


def _between(config: RunConfig, name: str, least: int, largest: int | None = None) -> None:
    value = getattr(config, name)
    if not least <= value < float("inf"):
        raise ConfigError(f"{name} must be at least {least}; got {value}")
    if largest is not None and value > largest:
        raise ConfigError(f"{name} must be at most {largest}; got {value}")


def settings(cls: Any = RunConfig) -> Iterator[tuple[str, Any]]:
    """Yield every settable key with its type, nested ones dotted: ("model.width", int)."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from ((f"{field.name}.{name}", inner) for name, inner in settings(kind))
        else:
            yield field.name, kind


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain nested data (dicts, lists, numbers, text), ready for YAML or JSON."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(config).items()}


def dump(config: RunConfig) -> str:
    """Return the config as YAML. `load` reads it back; `out` is left out, so that a saved config starts a new run."""
    values = to_dict(config)
    del values["out"]
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def load(path: str | Path, base: RunConfig) -> RunConfig:
    """Return `base` with the settings of a YAML file on top, checked.

    Raises:
        ConfigError: the file cannot be read, has an unknown key (the nearest one is named) or a bad value.
    """
    return check(merge(base, read(path)))


class _Loader(yaml.SafeLoader):
    """YAML in which a key stands once: a setting given twice must not silently be the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Return a mapping, or refuse it."""
        seen = set()
        for key, _ in node.value:
            if key.value in seen and isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else id(key))
        return super().construct_mapping(node, deep)


def read(path: str | Path) -> dict[str, Any]:
    """Return a YAML file's settings as nested data, unchecked except for being a mapping.

    Raises:
        ConfigError: no such file, not YAML, or not a mapping.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader)  # a SafeLoader
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{path} should hold `key: value` lines; got {type(values).__name__}")
    return values


def merge(base: T, values: Mapping[str, Any], prefix: str = "") -> T:
    """Return `base` with `values` on top, typed but *not yet checked* (see `check`).

    Keys are nested ({"model": {"width": 64}}) or dotted ({"model.width": 64}). Giving model.vocab turns fit_vocab off.

    Raises:
        ConfigError: an unknown key, with the nearest one, or a value of the wrong type.
    """
    hints = typing.get_type_hints(type(base))
    changes: dict[str, Any] = {}
    for key, value in _nested(values).items():
        if key not in hints:
            known = [prefix + name for name, _ in settings(type(base))]
            raise ConfigError(unknown("config key", f"{prefix}{key}", known))
        if not dataclasses.is_dataclass(hints[key]):
            changes[key] = _coerce(f"{prefix}{key}", value, hints[key])
        elif not isinstance(value, Mapping):
            raise ConfigError(f"{prefix}{key} should hold `key: value` lines; got {value!r}")
        else:
            changes[key] = merge(getattr(base, key), value, f"{prefix}{key}.")
            if key == "model" and "vocab" in value and "fit_vocab" not in values:
                changes["fit_vocab"] = False
    return _unchecked(base, changes)


def check(config: RunConfig) -> RunConfig:
    """Return an equal config whose every part has checked itself.

    Raises:
        ConfigError: a value out of range, or values that contradict each other.
    """
    try:
        return dataclasses.replace(config, model=dataclasses.replace(config.model))
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f"model: {error}") from error


def _nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Turn dotted keys into nested ones."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        head, dot, rest = str(key).partition(".")
        if dot:
            value = {rest: value}
        if isinstance(value, Mapping) and isinstance(out.get(head), dict):
            out[head] |= value
        else:
            out[head] = dict(value) if isinstance(value, Mapping) else value
    return out


def _unchecked(base: T, changes: Mapping[str, Any]) -> T:
    """Copy a frozen dataclass with changes, without running its checks: a file may be half of a change."""
    copy = object.__new__(type(base))
    for field in dataclasses.fields(base):
        object.__setattr__(copy, field.name, changes.get(field.name, getattr(base, field.name)))
    return copy


def _coerce(key: str, value: Any, kind: Any) -> Any:
    """Return `value` as `kind`; YAML 1.1 reads 1e-3 as text, so text that spells a number is one."""
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        (kind,) = (part for part in parts if part is not type(None))
        return _coerce(key, value, kind)
    if origin is Literal:
        if value not in parts:
            raise ConfigError(unknown(f"value of {key}", value, [str(part) for part in parts]))
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(parts):
            raise ConfigError(f"{key} should be a list of {len(parts)}; got {value!r}")
        return tuple(_coerce(key, part, inner) for part, inner in zip(value, parts, strict=True))
    return _scalar(key, value, kind)


def _scalar(key: str, value: Any, kind: type) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind is float and (number or isinstance(value, str)):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    elif kind is int and number and (isinstance(value, int) or (math.isfinite(value) and value == int(value))):
        return int(value)
    elif kind in (bool, str) and isinstance(value, kind):
        return value
    raise ConfigError(f"{key} should be {kind.__name__}; got {value!r}")
