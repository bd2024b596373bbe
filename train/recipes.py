"""Recipes: functions that return a RunConfig. `python -m train NAME` runs one; the docstring's first line is its help."""

from collections.abc import Callable, Mapping
from types import MappingProxyType

import zoo
from tn.errors import unknown
from train.config import RunConfig
from train.errors import ConfigError


def gpt() -> RunConfig:
    """A GPT-2 on text. The default is a small dense one on Python's standard library: minutes on two CPU cores."""
    return RunConfig(recipe="gpt", model=zoo.GPTConfig(layers=4, width=512, heads=8, context=256))


RECIPES: Mapping[str, Callable[[], RunConfig]] = MappingProxyType({"gpt": gpt})


def names() -> tuple[str, ...]:
    """Return the names of all recipes."""
    return tuple(sorted(RECIPES))


def recipe(name: str) -> RunConfig:
    """Return the recipe's config.

    Raises:
        ConfigError: no such recipe; the nearest one is named.
    """
    if not isinstance(name, str) or name not in RECIPES:
        raise ConfigError(unknown("recipe", name, names()))
    return RECIPES[name]()
