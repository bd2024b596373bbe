"""The registry of families and what an entry has to say."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from tn.errors import StructureError, unknown

Factors = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Built:
    """A family at given sizes: the spec of y = W x and the sizes of its axes.

    Attributes:
        spec: with one input `x`. sizes: of every axis but `...`. cores: in the order they are applied.
        rank: the rank used, None where the family has none. factors: (of d_in, of d_out), slowest first; () where it has none.
        d_in, d_out: sizes after padding; never smaller than asked for.
    """

    spec: str
    sizes: Mapping[str, int]
    cores: tuple[str, ...]
    rank: int | None
    factors: Factors | tuple[()]
    d_in: int
    d_out: int


@dataclass(frozen=True, slots=True)
class Structure:
    """A family of linear maps.

    Attributes:
        name: as users write it. summary: one line for tables.
        build: (d_in, d_out, rank or None, factors or None) → Built; raises StructureError for options it does not take.
    """

    name: str
    summary: str
    build: Callable[[int, int, int | None, Factors | None], Built]


_registry: dict[str, Structure] = {}


def register(structure: Structure) -> None:
    """Add a family. Raises StructureError if the name is taken."""
    if structure.name in _registry:
        raise StructureError(f"structure {structure.name!r} is registered already")
    _registry[structure.name] = structure


def get(name: str) -> Structure:
    """The entry of a family. Raises StructureError naming the nearest one."""
    if name not in _registry:
        raise StructureError(unknown("structure", name, _registry))
    return _registry[name]


def names() -> tuple[str, ...]:
    """Names of all families, sorted."""
    return tuple(sorted(_registry))


def checked_rank(structure: str, rank: int | None, default: int, full: int) -> int:
    """The rank to use. Raises StructureError unless it is a positive integer, at most `full`, which already gives every matrix."""
    if rank is None:
        return default
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise StructureError(f"{structure} needs an integer rank ≥ 1, got {rank!r}")
    if rank > full:
        raise StructureError(f"{structure} rank {rank} is more than {full}, which already gives every matrix of this size")
    return rank
