"""Checks of arguments that several functions take, with the error a user then reads."""

from typing import Any

from torch import nn

from tn.errors import StructureError


def check_model(model: object) -> None:
    """Raise StructureError unless this is a module."""
    if not isinstance(model, nn.Module):
        raise StructureError(f"model is a {type(model).__name__}, expected a torch.nn.Module")


def check_flags(**flags: object) -> None:
    """Raise StructureError unless these are True or False."""
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise StructureError(f"{name} is {value!r}, expected True or False")


def positive(value: Any) -> bool:
    """Whether a value is an integer ≥ 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1
