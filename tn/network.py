"""The checked, immutable hypergraph of a spec: tensors with roles, axes, known sizes. No data."""

import functools
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from types import MappingProxyType
from typing import Any

from tn.documents import document, is_size
from tn.errors import SizeError, SpecError, unknown
from tn.spec import ROWS, Spec, Term, parse

FORMAT = 1  # of the JSON


@dataclass(frozen=True, slots=True)
class Fan:
    """The contracted and kept sizes of one core when the cores are applied to the input in spec order."""

    core: str
    d_in: int
    d_out: int


@dataclass(frozen=True)
class Network:
    """A contraction without data. Make one with `tn.network`.

    Attributes:
        spec: the parsed spec, operands in order.
        known: (axis, size) pairs in order of first appearance; every other axis is dynamic.
        cores: names of the trainable tensors. consts: names of fixed ones. All other operands are inputs.
    """

    spec: Spec
    known: tuple[tuple[str, int], ...] = ()
    cores: tuple[str, ...] = ()
    consts: tuple[str, ...] = ()

    @functools.cached_property
    def sizes(self) -> Mapping[str, int]:
        """Known axis sizes, read-only."""
        return MappingProxyType(dict(self.known))

    @functools.cached_property
    def names(self) -> tuple[str, ...]:
        """Tensor names in order of first appearance, each once: the order in which a Program takes its operands."""
        return tuple(dict.fromkeys(term.name for term in self.spec.operands))

    @functools.cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of the activations, in operand order."""
        return tuple(name for name in self.names if name not in self.cores and name not in self.consts)

    @functools.cached_property
    def axes(self) -> tuple[str, ...]:
        """Every axis in order of first appearance."""
        return tuple(dict.fromkeys(axis for term in self.spec.operands for axis in term.axes))

    @property
    def dynamic(self) -> tuple[str, ...]:
        """Axes whose size is known only at the call."""
        return tuple(axis for axis in self.axes if axis not in self.sizes)

    @property
    def output(self) -> Term:
        """The only output; networks with several raise SpecError here."""
        if len(self.spec.outputs) != 1:
            raise SpecError(f"network has {len(self.spec.outputs)} outputs; this operation needs exactly one")
        return self.spec.outputs[0]

    @functools.cached_property
    def parts(self) -> tuple["Network", ...]:
        """One network for each output.

        With several outputs, an operand takes part in one if each of its axes is in that output or on another operand that takes part.

        >>> net = network("x: ... i, a: i r, u: r o, v: r p -> y: ... o, z: ... p")
        >>> [", ".join(part.names) for part in net.parts]
        ['x, a, u', 'x, a, v']
        """
        if len(self.spec.outputs) == 1:
            return (self,)
        return tuple(self._part(term) for term in self.spec.outputs)

    def _part(self, output: Term) -> "Network":
        terms = list(self.spec.operands)
        rest: list[Term] = []
        while rest != terms:
            count = Counter(axis for term in (*terms, output) for axis in set(term.axes))
            rest, terms = terms, [term for term in terms if all(count[axis] > 1 for axis in term.axes)]
        axes = {axis for term in terms for axis in term.axes}
        missing = [axis for axis in output.axes if axis not in axes]
        if missing or not terms:
            which = f"no operand with axis {missing[0]!r}" if missing else "no operand"
            raise SpecError(
                f"output {output.name!r}: {which} takes part; each of its axes has to be in the output or on another such operand"
            )
        names = {term.name for term in terms}
        known = tuple((axis, size) for axis, size in self.known if axis in axes)
        roles = [tuple(name for name in role if name in names) for role in (self.cores, self.consts)]
        return Network(Spec(tuple(terms), (output,)), known, *roles)

    def term(self, name: str) -> Term:
        """The first occurrence of a tensor."""
        for term in self.spec.operands:
            if term.name == name:
                return term
        raise SpecError(unknown("tensor", name, self.names))

    def shape(self, name: str) -> tuple[int, ...]:
        """Stored shape of a tensor whose axes all have known sizes, such as a core."""
        dims = self.term(name).dims
        missing = [axis for dim in dims for axis in dim if axis not in self.sizes]
        if missing:
            raise SizeError(f"tensor {name!r} has no fixed shape: axis {missing[0]!r} has no known size")
        return tuple(math.prod(self.sizes[axis] for axis in dim) for dim in dims)

    def bind(self, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
        """Sizes of every axis for operands of the given shapes.

        Args:
            shapes: one per name in `names`.

        Returns:
            axis → size, `...` as the product of the leading dimensions.

        Raises:
            SizeError: naming the tensor, the axis, the expected and the given size.
        """
        if len(shapes) != len(self.names):
            raise SizeError(f"network takes {len(self.names)} tensors ({', '.join(self.names)}), got {len(shapes)}")
        sizes, lead = dict(self.known), None
        given = dict(zip(self.names, map(tuple, shapes), strict=True))
        pending: list[tuple[str, tuple[str, ...], int]] = []
        for term in self.spec.operands:
            shape, dims = given[term.name], term.dims
            if dims and dims[0] == (ROWS,):
                cut = len(shape) - (len(dims) - 1)
                if cut < 0:
                    raise SizeError(f"tensor {term.name!r} has shape {shape}, expected at least {len(dims) - 1} dimensions: {term.pattern}")
                head, shape, dims = shape[:cut], shape[cut:], dims[1:]
                if lead is not None and head != lead:
                    raise SizeError(f"leading dimensions '...' are {lead} on one tensor and {head} on {term.name!r}")
                lead = head
                sizes[ROWS] = math.prod(head)
            if len(shape) != len(dims):
                raise SizeError(
                    f"tensor {term.name!r} has shape {given[term.name]}, expected {len(term.dims)} dimensions: {term.pattern or 'a scalar'}"
                )
            pending += [(term.name, dim, size) for dim, size in zip(dims, shape, strict=True)]
        _solve(sizes, pending)
        return sizes

    def fans(self) -> tuple[Fan, ...]:
        """Contracted and kept size of each core, the cores applied to the inputs in spec order.

        An axis that a later core or the output still needs is a batch axis of the core and counts as neither. These are the
        (d_in,c, d_out,c) of structure-aware maximal-update scaling (Qiu et al. 2024, arXiv:2406.06248).

        >>> from tn import network
        >>> sizes = dict(i=4, j=8, r=2, k=16, l=32)
        >>> [(f.d_in, f.d_out) for f in network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", sizes, cores=("a", "c")).fans()]
        [(8, 32), (8, 32)]
        """
        if len(self.spec.outputs) > 1:
            by_core = {fan.core: fan for part in reversed(self.parts) for fan in part.fans()}
            return tuple(by_core[name] for name in self.cores)
        current = {axis for name in self.inputs for axis in self.term(name).axes}
        fans = []
        for position, name in enumerate(self.cores):
            axes = dict.fromkeys(self.term(name).axes)
            later = {axis for other in self.cores[position + 1 :] for axis in self.term(other).axes}
            later |= set(self.output.axes)
            contracted = [axis for axis in axes if axis in current and axis not in later]
            kept = [axis for axis in axes if axis not in current]
            fans.append(Fan(name, math.prod(self.sizes[a] for a in contracted), math.prod(self.sizes[a] for a in kept)))
            current = (current | set(axes)) - set(contracted)
        return tuple(fans)

    def __reduce__(self):
        return Network, (self.spec, self.known, self.cores, self.consts)

    def to_json(self) -> str:
        """Canonical JSON: equal networks give equal text."""
        value = {"format": FORMAT, "spec": str(self.spec), "sizes": list(map(list, self.known)), "cores": self.cores, "consts": self.consts}
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Network":
        """The network that `to_json` wrote. Raises SpecError for another format or text that is no network, SizeError for sizes."""
        value = document(text, FORMAT, {"spec": str, "sizes": list, "cores": list, "consts": list}, "network", SpecError)
        pairs = value["sizes"]
        if not all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) for pair in pairs):
            raise SpecError(f"network JSON has sizes: {pairs!r}, expected a list of [axis, size]")
        for key in ("cores", "consts"):
            if not all(isinstance(name, str) for name in value[key]):
                raise SpecError(f"network JSON has {key}: {value[key]!r}, expected a list of names")
        return network(value["spec"], dict(pairs), cores=value["cores"], consts=value["consts"])

    def to_quimb(self, tensors: Mapping[str, Any] | Sequence[Any], tags: Mapping[str, Iterable[str]] | None = None) -> Any:
        """The network with its tensors as a `quimb.tensor.TensorNetwork`; `tn.from_quimb` reads it back.

        Args:
            tensors: data by name, or in the order of `names`; torch or numpy. tags: further tags by tensor name, such as a module's path.

        Returns:
            A quimb network: one tensor for each occurrence in the spec, tagged with its name, its role ("role:core", …) and `tags`; one
            dimension for each axis ("(i j)" is split, `...` is one index), a view of the data. `.contract(output_inds=net.output.axes)`.

        Raises:
            SpecError: missing or unknown tensors. SizeError: shapes that do not fit.

        >>> import torch, tn
        >>> net = tn.network("x: b r, u: i r, v: o r -> b i o", dict(r=2, i=3, o=4), cores=("u", "v"))
        >>> net.to_quimb([torch.ones(5, 2), torch.ones(3, 2), torch.ones(4, 2)]).contract(output_inds=net.output.axes).shape
        (5, 3, 4)
        """
        from tn.bridge.quimb import to_quimb  # late: the adapter builds on networks

        return to_quimb(self, tensors, tags)

    def draw(self, path: str | PathLike[str] | None = None, *, sizes: Mapping[str, int] | None = None) -> Any:
        """A picture of the network: tensors as discs, axes as lines with their sizes, the result's axes as open ends.

        Args:
            path: file to write, its format from the ending (".png", ".svg", ".pdf"). sizes: of dynamic axes, to be shown too.

        Returns:
            The matplotlib Figure. A hyperaxis is a small dot with a line to each of its tensors.

        Raises:
            SizeError: sizes of unknown axes, or other than the network's. OperatorError: a path that cannot be drawn to.
        """
        from tn.draw import draw  # late: the picture builds on networks

        return draw(self, path, sizes)

    def __str__(self) -> str:
        rows = [str(self.spec)]
        for name in self.names:
            role = "core" if name in self.cores else "const" if name in self.consts else "input"
            rows.append(f"  {role:<6}{self.term(name)}")
        rows.append("  sizes " + ", ".join(f"{axis}={size}" for axis, size in self.known))
        if self.dynamic:
            rows.append("  dynamic " + ", ".join(self.dynamic))
        return "\n".join(rows)


def _solve(sizes: dict[str, int], pending: list[tuple[str, tuple[str, ...], int]]) -> None:
    """Fill in sizes from stored dimensions, the ones with a single unknown axis first."""
    while pending:
        stuck = []
        for name, dim, size in pending:
            unknown_axes = [axis for axis in dict.fromkeys(dim) if axis not in sizes]
            product = math.prod(sizes[axis] for axis in dim if axis in sizes)
            if not unknown_axes and product != size:
                raise SizeError(_mismatch(name, dim, size, sizes))
            if len(unknown_axes) == 1:
                if product == 0 or size % product or dim.count(unknown_axes[0]) > 1:
                    raise SizeError(_mismatch(name, dim, size, sizes))
                sizes[unknown_axes[0]] = size // product
            elif len(unknown_axes) > 1:
                stuck.append((name, dim, size))
        if len(stuck) == len(pending):
            name, dim, size = stuck[0]
            raise SizeError(
                f"tensor {name!r}: dimension ({' '.join(dim)}) of size {size} does not say how it splits; "
                "give sizes for all but one of its axes"
            )
        pending = stuck


def _mismatch(name: str, dim: tuple[str, ...], size: int, sizes: Mapping[str, int]) -> str:
    if not dim:
        return f"tensor {name!r}: a dimension written '1' has size {size}"
    expected = " × ".join(f"{axis}={sizes.get(axis, '?')}" for axis in dim)
    what = f"axis {dim[0]!r}" if len(dim) == 1 else f"dimension ({' '.join(dim)})"
    return f"tensor {name!r}: {what} has size {size}, expected {expected}"


def network(spec: str | Spec, sizes: Mapping[str, int] | None = None, *, cores: Iterable[str] = (), consts: Iterable[str] = ()) -> Network:
    """Check a spec and give its tensors roles and its axes sizes.

    Args:
        spec: text or a parsed Spec.
        sizes: axis → size (≥ 0) for the axes known now; the others are dynamic.
        cores: names of trainable tensors, in the order they are applied. consts: names of fixed tensors.

    Returns:
        An immutable Network.

    Raises:
        SpecError: an unknown tensor name. SizeError: an unknown axis, a size that is no natural number, or a core without sizes.

    >>> network("x: ... i, w: i o -> ... o", dict(i=3, o=5), cores=("w",)).shape("w")
    (3, 5)
    """
    parsed = spec if isinstance(spec, Spec) else parse(spec)
    for role, names in (("cores", cores), ("consts", consts)):
        if not isinstance(names, Iterable):
            raise SpecError(f"{role} is {names!r}, expected names of tensors")
    if not isinstance(sizes, Mapping | Iterable | None):
        raise SizeError(f"sizes is {sizes!r}, expected a size for each known axis, such as dict(i=3)")
    draft = Network(parsed, (), tuple(cores), tuple(consts))
    for name in (*draft.cores, *draft.consts):
        draft.term(name)
    for role, names in (("cores", draft.cores), ("consts", draft.consts)):
        if len(set(names)) < len(names):
            raise SpecError(f"{role} names a tensor twice: {', '.join(names)}")
    both = set(draft.cores) & set(draft.consts)
    if both:
        raise SpecError(f"tensor {sorted(both)[0]!r} is named both as a core and as a const")
    given = dict(sizes or {})
    for axis, size in given.items():
        if axis not in draft.axes:
            raise SizeError(unknown("axis", axis, draft.axes))
        if axis == ROWS:
            raise SizeError("'...' takes its size from the call; give sizes for named axes only")
        if not is_size(size):
            raise SizeError(f"axis {axis!r} has size {size!r}, expected an integer ≥ 0")
    checked = Network(parsed, tuple((axis, given[axis]) for axis in draft.axes if axis in given), draft.cores, draft.consts)
    for name in checked.cores:
        checked.shape(name)
    used = {name for part in checked.parts for name in part.names}
    for name in checked.names:
        if name not in used:
            raise SpecError(f"tensor {name!r} takes part in no output: an axis of it is neither in that output nor on another operand")
    return checked
