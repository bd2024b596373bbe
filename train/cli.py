"""Flags of a recipe: read by tyro, on top of a file, with the old spellings and one-line errors."""

import contextlib
import io
import re
from typing import Any

import tyro

import zoo
from tn.errors import unknown
from train import aliases, config, recipes
from train.config import RunConfig
from train.errors import ConfigError
from zoo import registry

_OWN = {"config": "YAML file with settings; flags win over it", "preset": "start from the shape of a zoo model"}


def parse(recipe: str, arguments: list[str]) -> RunConfig:
    """Return the config of `python -m train RECIPE ARGUMENTS`: default, then preset, then file, then flags.

    Raises:
        ConfigError: an unknown flag (the nearest is named), a bad value, a file that cannot be used.
        SystemExit: 0 after --help.
    """
    base = recipes.recipe(recipe)
    own, flags = _split([part for argument in arguments for part in _known(argument)])
    if "preset" in own:
        if own["preset"] not in zoo.names():
            raise ConfigError(unknown("preset", own["preset"], zoo.names()))
        base = config.merge(base, {"model": registry.config(own["preset"]).to_dict(), "fit_vocab": base.fit_vocab})
    if "config" in own:
        values = config.read(own["config"])
        if values.get("recipe", recipe) not in list(recipes.names()):
            raise ConfigError(f"{own['config']}: {unknown('recipe', values['recipe'], recipes.names())}")
        if values.get("recipe", recipe) != recipe:
            other = f"run `python -m train {values['recipe']} --config {own['config']}`"
            raise ConfigError(f"{own['config']} is for recipe {values['recipe']!r}; {other}")
        base = config.merge(base, values)
    if any(flag == "--model.vocab" for flag in flags) and not any(flag.startswith(("--fit_vocab", "--no_fit_vocab")) for flag in flags):
        flags = [*flags, "--no_fit_vocab"]
    parsed = config.check(_tyro(recipe, base, flags))
    if parsed.recipe != recipe:
        raise ConfigError(f"the command decides the recipe, one of {', '.join(recipes.names())}: leave --recipe out")
    return parsed


def _known(argument: str) -> list[str]:
    """Return a flag under its own name, split from a value after "="; values pass as they are.

    Raises:
        ConfigError: a flag that nobody knows.
    """
    if not re.match(r"--?[a-zA-Z]", argument):
        return [argument]
    name, equals, value = argument.partition("=")
    name = aliases.resolve(name.lstrip("-").replace("-", "_"))
    kinds = dict(config.settings())
    switches = {_negated(key) for key, kind in kinds.items() if kind is bool}
    if name not in {*kinds, *switches, *_OWN, "help", "h"}:
        known = [f"--{key}" for key in (*kinds, *_OWN, *aliases.ALIASES)]
        raise ConfigError(unknown("flag", f"--{name}", known))
    if equals and kinds.get(name) is bool:
        if value.lower() not in ("true", "false"):
            raise ConfigError(f"--{name} should be True or False; got {value!r}")
        return [f"--{name if value.lower() == 'true' else _negated(name)}"]
    return [f"--{name}", value] if equals else [f"--{name}" if len(name) > 1 else f"-{name}"]


def _negated(key: str) -> str:
    """Return the flag that turns a switch off: model.tied → model.no_tied."""
    head, dot, last = key.rpartition(".")
    return f"{head}{dot}no_{last}"


def _split(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    """Take --config and --preset, with their values, out of the flags."""
    own: dict[str, str] = {}
    rest: list[str] = []
    queue = iter(arguments)
    for argument in queue:
        name = argument.removeprefix("--")
        if not argument.startswith("--") or name not in _OWN:
            rest.append(argument)
            continue
        own[name] = next(queue, "--")
        if own[name].startswith("--"):
            raise ConfigError(f"--{name} needs a value")
    return own, rest


def _tyro(recipe: str, base: RunConfig, flags: list[str]) -> RunConfig:
    """Let tyro read the flags; its boxed errors become one line."""
    described = "\n".join([recipes.RECIPES[recipe].__doc__ or "", "", *(f"--{name} VALUE: {text}." for name, text in _OWN.items())])
    settings: dict[str, Any] = {"prog": f"python -m train {recipe}", "description": described, "use_underscores": True, "default": base}
    if any(flag in ("--help", "-h") for flag in flags):
        return tyro.cli(RunConfig, args=["--help"], **settings)
    # tyro draws its boxes in characters that depend on the encoding of the standard output.
    caught = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    try:
        with contextlib.redirect_stdout(caught), contextlib.redirect_stderr(caught):
            return tyro.cli(RunConfig, args=flags, **settings)
    except SystemExit:
        caught.seek(0)
        raise ConfigError(_one_line(caught.read())) from None


def _one_line(box: str) -> str:
    """Return the message inside tyro's box, up to its rule."""
    words: list[str] = []
    for line in box.splitlines():
        text = line.strip("│╭╮╰╯ ")
        if text.startswith("──") or not text.strip("─"):
            break
        if line.startswith("│"):
            words.append(text)
    message = " ".join(words) or box.strip()
    message = re.sub(r"^Error parsing (?=[^-])(\S+): ", "", message)
    message = re.sub(r"^Error parsing (--\S+): invalid literal for (\w+)\(\).*: (.*)$", r"\1 should be \2; got \3", message)
    return re.sub(r"^Error parsing (--\S+): could not convert string to (\w+): (.*)$", r"\1 should be \2; got \3", message)
