"""The registry of families, what an entry has to say, and how an entry is built at given sizes."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tn.checks import positive
from tn.errors import StructureError, unknown
from tn.network import Network, network
from tn.spec import ROWS

Factors = tuple[tuple[int, ...], tuple[int, ...]]
Rank = int | tuple[int, ...]
ACTIVE = 2  # experts that a row of a gated family uses, where nothing is said
ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth")  # names of the cores of a chain


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What a user may say about a structure; None leaves it to the family. A family takes some of them.

    Attributes:
        rank: of every rank axis, or one for each. factors: (of d_in, of d_out), slowest first, or "compat", the split of the paper's code.
        cores: how many. blocks: how many, or (of the output, of the input). theta: the exponents of an einsum2.
        active: experts that each row uses, of a gated family.
    """

    rank: Rank | None = None
    factors: Factors | str | None = None
    cores: int | None = None
    blocks: int | tuple[int, int] | None = None
    theta: str | tuple[float, ...] | None = None
    active: int | None = None

    @property
    def given(self) -> dict[str, object]:
        """The options that are not None."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if getattr(self, f.name) is not None}


@dataclass(frozen=True, slots=True)
class Built:
    """A family at given sizes: the network of y = W x.

    Attributes:
        structure: its name. network: with one input `x`; cores in the order they are applied.
        rank: sizes of the rank axes: an integer for one, a tuple for several, None without any.
        factors: (of d_in, of d_out), slowest first; None where neither is split. d_in, d_out: after padding, never smaller than asked for.
        active: experts a row uses; None where nothing is gated.
    """

    structure: str
    network: Network
    rank: Rank | None
    factors: Factors | None
    d_in: int
    d_out: int
    active: int | None = None

    @property
    def reference(self) -> Network:
        """The network; of a gated structure, that of one expert: what starts, rates and costs go by."""
        axis = get(self.structure).gated
        return network(self.network.spec, {**self.network.sizes, axis: 1}, cores=self.network.cores) if axis else self.network

    @property
    def parameters(self) -> int:
        """Elements of all cores, and of the gate."""
        return sum(math.prod(self.network.shape(core)) for core in self.network.cores) + self._gate

    @property
    def macs(self) -> int:
        """Multiply-adds a row, the cores applied in spec order; of a gated structure, those of the gate and the experts it chooses."""
        return (self.active or 1) * macs(self.reference) + self._gate

    @property
    def _gate(self) -> int:
        axis = get(self.structure).gated
        return self.network.sizes[axis] * self.d_in if axis else 0


# (what the layer was built as, its cores by name) → cores by name of the same matrix in another family
Conversion = Callable[[Built, Mapping[str, Tensor]], dict[str, Tensor]]
# (what to project on, padded matrix (out, in), whitening matrix (in, in) or None) → cores with one dimension an axis
Start = Callable[[Built, Tensor, Tensor | None], dict[str, Tensor]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Structure:
    """A family of linear maps: all there is to know about it.

    Attributes:
        name: as users write it. summary: one line for tables.
        spec: number of input axes → spec; `x` is the input, every other operand a core, in the order they are applied.
        factors: (d_in, d_out, options) → the default factors. rank: (factors, options) → the default rank, cut to the full one.
        full: factors → for each rank axis, the rank from which nothing is gained. takes: names of the options it knows.
        varies: the option that a budget is met with. clamped: whether its cores are RMS-clamped unless the layer says otherwise.
        gated: the rank axis of which each row uses only some values, chosen by a gate; None: the map is linear.
        contains: another family → how its layers become layers of this one, exactly.
        note: what to print beside a layer of this family.
        start: where a projection without closed form starts; None: `projection_svd.split`.
    """

    name: str
    summary: str
    spec: Callable[[int], str]
    factors: Callable[[int, int, Options], Factors]
    rank: Callable[[Factors, Options], Rank] | None = None
    full: Callable[[Factors], Rank] | None = None
    takes: tuple[str, ...] = ("rank", "factors")
    varies: str = "rank"
    clamped: bool = False
    gated: str | None = None
    contains: Mapping[str, Conversion] = dataclasses.field(default_factory=dict)
    note: Callable[[Built], str] | None = None
    start: Start | None = None

    def build(self, d_in: int, d_out: int, options: Options | None = None) -> Built:
        """The family at these sizes. Raises StructureError for an option it does not take or that cannot be."""
        options = options or Options()
        self._check_taken(options)
        factors = options.factors
        if factors is None or factors == "compat":
            factors = self._checked_factors(self.factors(d_in, d_out, options), d_in, d_out)
        else:
            factors = self._checked_factors(factors, d_in, d_out)
            for name in ("blocks", "theta", *(["cores"] if options.cores != len(factors[0]) else [])):
                if name in options.given:
                    raise StructureError(f"{self.name} takes factors={factors} or {name}={options.given[name]!r}, not both")
        draft = network(self.spec(len(factors[0])))
        ins, outs, ranks = axes_of(draft)
        sizes: dict[str, int] = {}
        for side, axes, split in (("d_in", ins, factors[0]), ("d_out", outs, factors[1])):
            if len(axes) != len(split):
                raise StructureError(f"{self.name} takes {len(axes)} positive factors of {side}, slowest first, got {split}")
            for axis, size in zip(axes, split, strict=True):
                if sizes.setdefault(axis, size) != size:
                    raise StructureError(f"{self.name} shares axis {axis!r} between input and output: factors {factors} disagree about it")
        sizes.update(self._checked_ranks(ranks, factors, options))
        found: Rank | None = tuple(sizes[axis] for axis in ranks) or None
        if len(ranks) == 1:
            found = sizes[ranks[0]]
        whole = len(factors[0]) == len(factors[1]) == 1
        net = network(draft.spec, sizes, cores=[name for name in draft.names if name != "x"])
        active = self._checked_active(sizes, options)
        return Built(self.name, net, found, None if whole else factors, math.prod(factors[0]), math.prod(factors[1]), active)

    def full_ranks(self, factors: Factors) -> tuple[int, ...]:
        """For each rank axis, the rank from which nothing is gained."""
        draft = network(self.spec(len(factors[0])))
        return _each(self.full(factors), axes_of(draft)[2]) if self.full else _full_ranks(draft, factors)

    def _check_taken(self, options: Options) -> None:
        for name, value in options.given.items():
            if name not in self.takes:
                what = f"only {', '.join(self.takes)}" if self.takes else "no options"
                raise StructureError(f"{self.name} takes {what}, got {name}={value!r}")
        if isinstance(options.factors, str) and options.factors != "compat":
            raise StructureError(unknown("factors", options.factors, ["compat"]))

    def _checked_factors(self, factors: object, d_in: int, d_out: int) -> Factors:
        example = "two tuples of positive integers such as ((24, 32), (64, 48)): of d_in and of d_out, slowest first"
        if not isinstance(factors, tuple | list) or len(factors) != 2 or not all(isinstance(split, tuple | list) for split in factors):
            raise StructureError(f"{self.name} factors are {factors!r}, expected {example}")
        for what, size, split in (("d_in", d_in, factors[0]), ("d_out", d_out, factors[1])):
            if not split or not all(positive(factor) for factor in split):
                raise StructureError(f"{self.name} takes positive factors of {what}, slowest first, got {tuple(split)}; expected {example}")
            if math.prod(split) < size:
                raise StructureError(f"{self.name} factors {tuple(split)} of {what} make {math.prod(split)}, less than {size}")
        return tuple(factors[0]), tuple(factors[1])

    def _checked_active(self, sizes: Mapping[str, int], options: Options) -> int | None:
        if self.gated is None:
            return None
        count = sizes[self.gated]
        active = min(ACTIVE, count) if options.active is None else options.active
        if not positive(active) or active > count:
            raise StructureError(f"active is {active!r}, expected an integer from 1 to the {count} experts")
        return active

    def _checked_ranks(self, axes: tuple[str, ...], factors: Factors, options: Options) -> dict[str, int]:
        if not axes:
            return {}
        assert self.rank is not None, f"{self.name} has rank axes and no default rank"
        full = self.full_ranks(factors)
        if options.rank is None:
            default = _each(self.rank(factors, options), axes)
            return {axis: max(1, min(rank, most)) for axis, rank, most in zip(axes, default, full, strict=True)}
        rank = tuple(options.rank) if isinstance(options.rank, list) else options.rank
        if isinstance(rank, tuple) and len(rank) != len(axes):
            raise StructureError(f"{self.name} with {len(factors[0])} cores takes {len(axes)} ranks, got {rank}")
        for value, most in zip(_each(rank, axes), full, strict=True):
            if not positive(value):
                raise StructureError(f"{self.name} needs an integer rank ≥ 1, got {rank!r}")
            if value > most and not (isinstance(rank, int) and len(axes) > 1):
                raise StructureError(f"{self.name} rank {value} is more than {most}, which already gives every matrix of this size")
        return {axis: min(value, most) for axis, value, most in zip(axes, _each(rank, axes), full, strict=True)}


_registry: dict[str, Structure] = {}


def register(structure: Structure) -> None:
    """Add a family. Raises StructureError if the name is taken."""
    if structure.name in _registry:
        raise StructureError(f"structure {structure.name!r} is registered already")
    _registry[structure.name] = structure


def get(name: str) -> Structure:
    """The entry of a family. Raises StructureError naming the nearest one."""
    if not isinstance(name, str) or name not in _registry:
        raise StructureError(unknown("structure", name, _registry))
    return _registry[name]


def names() -> tuple[str, ...]:
    """Names of all families, sorted."""
    return tuple(sorted(_registry))


def axes_of(net: Network) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Axes of the input, of the output, and the rest (the ranks), each in order of appearance."""
    ins = tuple(axis for axis in net.term("x").axes if axis != ROWS)
    outs = tuple(axis for axis in net.output.axes if axis != ROWS)
    return ins, outs, tuple(axis for axis in net.axes if axis not in (*ins, *outs, ROWS))


def _full_ranks(net: Network, factors: Factors) -> tuple[int, ...]:
    """For a chain of cores: the smaller of what only the cores before the cut and what only those after it hold of both sides."""
    ins, outs, ranks = axes_of(net)
    sizes = dict(zip((*ins, *outs), (*factors[0], *factors[1]), strict=True))
    cores = [set(term.axes) for term in net.spec.operands if term.name != "x"]
    found = []
    for rank in ranks:
        cut = next(i for i, core in enumerate(cores) if rank in core) + 1
        before, after = set().union(*cores[:cut]), set().union(*cores[cut:])
        sides = [math.prod(sizes[axis] for axis in side if axis in sizes) for side in (before - after, after - before)]
        found.append(min(sides))
    return tuple(found)


def macs(net: Network) -> int:
    """Multiply-adds a row of a network with known sizes, the cores applied to the inputs in spec order."""
    current = {axis for name in net.inputs for axis in net.term(name).axes} - {ROWS}
    total = 0
    for position, name in enumerate(net.cores):
        together = current | set(net.term(name).axes)
        total += math.prod(net.sizes[axis] for axis in together)
        later = {axis for other in net.cores[position + 1 :] for axis in net.term(other).axes} | set(net.output.axes)
        current = together & later
    return total


def checked_count(structure: str, what: str, value: object, most: int, least: int = 1) -> int:
    """A number of cores or blocks. Raises StructureError unless it is an integer from `least` to `most`."""
    if not isinstance(value, int) or not positive(value) or not least <= value <= most:
        raise StructureError(f"{structure} {what} is {value!r}, expected an integer from {least} to {most}")
    return value


def _each(rank: Rank, axes: tuple[str, ...]) -> tuple[int, ...]:
    return rank if isinstance(rank, tuple) else (rank,) * len(axes)
