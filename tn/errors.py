"""What can go wrong, as values a caller can catch: every error is a TnError, and most are ValueErrors too."""

import difflib
from collections.abc import Iterable


class TnError(Exception):
    """Base of every error this library raises on purpose."""


class SpecError(TnError, ValueError):
    """A contraction spec that cannot be read, or that contradicts itself."""


class SizeError(TnError, ValueError):
    """Axis sizes or tensor shapes that do not fit the network."""


class PlanError(TnError, ValueError):
    """A plan that cannot be made, or that does not belong to its network."""


class OperatorError(TnError, ValueError):
    """An operation that does not accept the tensors it was given."""


class KindError(OperatorError, TypeError):
    """An argument of a kind that cannot be used at all, such as an output that is no array."""


class PathError(PlanError, RuntimeError):
    """A contraction path that does not contract its operands; a RuntimeError too, as NumPy has it."""


class StructureError(TnError, ValueError):
    """A structured layer that cannot be built with the given sizes or options."""


class ProjectionError(TnError, ValueError):
    """A weight that cannot be projected onto a structure."""


def unknown(kind: str, value: object, candidates: Iterable[str]) -> str:
    """The message for a name nobody knows: the value, the nearest candidate and all of them.

    >>> unknown("structure", "bbt", ["btt", "dense"])
    "unknown structure 'bbt': did you mean 'btt'? One of: btt, dense"
    """
    names = sorted(candidates)
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return f"unknown {kind} {value!r}: {hint}One of: {', '.join(names)}"
