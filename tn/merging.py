"""Merging cores ahead: a network split into products of cores alone, made once, and the rest, run for every batch of inputs."""

import functools
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tn.network import Network, network
from tn.plan import Plan
from tn.planner import plan
from tn.spec import ROWS, Spec, Term

_FREELY = 5  # cores up to which several groups may be merged apart; with more, one run of neighbours
_GAIN = 0.95  # of the time that a merge must be predicted to leave, so that no merge is made for nothing

Groups = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Split:
    """A network in two parts.

    Attributes:
        groups: cores that are merged with each other. merges: the plan of each group; its network takes the group's cores.
        rest: the plan of everything else; merged tensors are its cores, named by `merged_name`.
        seconds: predicted of one batch, forward and gradients, its share of the merges included.
    """

    groups: Groups
    merges: tuple[Plan, ...]
    rest: Plan
    seconds: float

    @functools.cached_property
    def matrix(self) -> bool:
        """Whether the rest is one matrix, merged of all cores, on the rows of the one input: y = x Wᵀ."""
        net = self.rest.network
        if len(net.names) != 2 or net.names[1] not in net.cores:
            return False
        x, weight = map(net.term, net.names)
        return len(weight.dims) == 2 and x.axes == (ROWS, *weight.dims[1]) and net.output.axes == (ROWS, *weight.dims[0])


class Held:
    """Tensors as they were at one moment: their identity, version counter and address. Writes through `.data` cannot be noticed."""

    def __init__(self, tensors: Sequence[Tensor] = ()) -> None:
        self.seen = [(tensor, tensor._version, tensor.data_ptr()) for tensor in tensors]

    def same(self, tensors: Sequence[Tensor | None]) -> bool:
        """Whether these are the tensors, unchanged."""
        return len(tensors) == len(self.seen) and all(
            kept is tensor and version == kept._version and address == kept.data_ptr()
            for (kept, version, address), tensor in zip(self.seen, tensors, strict=True)
        )


def split(net: Network, groups: Groups) -> tuple[tuple[Network, ...], Network]:
    """The networks that merge groups of cores, and the network of the rest. Each group must be of at least two cores.

    A merged tensor has up to three dimensions, by where its axes are: the result, other cores, the inputs alone; batch axes come first.

    >>> net = network("x: ... (i j), a: i k r, c: r j l -> ... (k l)", dict(i=2, j=3, k=4, l=5, r=6), cores=("a", "c"))
    >>> merges, rest = split(net, (("a", "c"),))
    >>> str(merges[0].spec), str(rest.spec)
    ('a: i k r, c: r j l -> (k l) (i j)', 'x: ... (i j), a_c: (k l) (i j) -> ... (k l)')
    """
    owner = {name: group for group in groups for name in group}
    inputs = [axis for name in net.names if name not in net.cores for axis in net.term(name).axes]
    result = net.output.axes
    merges, operands, cores = [], [], []
    for term in net.spec.operands:
        group = owner.get(term.name)
        if group is None:
            operands.append(term)
            cores += [term.name] if term.name in net.cores else []
        elif term.name == group[0]:
            terms = tuple(net.term(name) for name in group)
            mine = dict.fromkeys(axis for part in terms for axis in part.axes)
            outside = {axis for other in net.spec.operands if other.name not in group for axis in other.axes}.union(result)
            kept = sorted((axis for axis in mine if axis in outside), key=lambda axis: _place(axis, result, inputs))
            dims = tuple(tuple(run) for _, run in itertools.groupby(kept, key=lambda axis: _place(axis, result, inputs)[0]))
            merged = Term(merged_name(net, group), dims)
            known = {axis: net.sizes[axis] for axis in mine}
            merges.append(network(Spec(terms, (Term("y0", dims),)), known, cores=group))
            operands.append(merged)
            cores.append(merged.name)
    rest = Spec(tuple(operands), net.spec.outputs)
    axes = {axis for term in operands for axis in term.axes}
    known = {axis: size for axis, size in net.known if axis in axes}
    consts = tuple(name for name in net.consts if name not in owner)
    return tuple(merges), network(rest, known, cores=cores, consts=consts)


def _place(axis: str, result: Sequence[str], inputs: Sequence[str]) -> tuple[int, int]:
    """Where an axis of a merged tensor goes: batch axes, then the result's, then those of other cores, then the inputs'."""
    if axis in result:
        return (0 if axis in inputs else 1), result.index(axis)
    return (3, inputs.index(axis)) if axis in inputs else (2, 0)


def merged_name(net: Network, group: Sequence[str]) -> str:
    """The name of a merged tensor: those of its cores, made unlike any other."""
    name = "_".join(group)
    while name in net.names:
        name += "_"
    return name


@functools.lru_cache(maxsize=4096)
def choose(
    net: Network, grad: tuple[str, ...], sizes: tuple[tuple[str, int], ...], batches: int, dtype: torch.dtype, device: torch.device
) -> Split | None:
    """The split that is predicted to be fastest when its merges are shared by so many batches; None where merging does not pay.

    Args:
        grad: tensors that need a gradient. sizes: (axis, size) pairs of one batch, for dynamic axes.
    """

    def planned(part: Network, needed: Sequence[str]) -> Plan:
        dynamic = {axis: size for axis, size in sizes if axis in part.dynamic}
        return plan(part, grad=needed, sizes=dynamic, dtype=dtype, device=device)

    def adding(part: Plan) -> float:
        """Seconds of adding the gradients of its cores to those of earlier batches."""
        table, item = part.machine, dtype.itemsize
        added = [math.prod(part.network.shape(name)) * item for name in part.network.cores if name in part.grad]
        return sum(3 * size / table.multiply + table.element for size in added)

    whole = planned(net, grad)
    best, limit = None, _GAIN * (whole.seconds + adding(whole))
    for groups in _groupings(net):
        merges, rest = split(net, groups)
        names = [merged_name(net, group) for group, part in zip(groups, merges, strict=True) if set(part.cores) & set(grad)]
        made = tuple(planned(part, [name for name in part.cores if name in grad]) for part in merges)
        after = planned(rest, [name for name in rest.names if name in names or name in grad])
        seconds = after.seconds + adding(after) + sum(part.seconds for part in made) / batches
        if seconds < limit:
            best, limit = Split(groups, made, after, seconds), seconds
    return best


def _groupings(net: Network) -> Iterator[Groups]:
    """Ways to merge cores that follow each other in the spec and hang together."""
    cores = net.cores
    if len(cores) > _FREELY:
        runs: list[Groups] = [(cores[a:b],) for a, b in itertools.combinations(range(len(cores) + 1), 2)]
    else:
        cuts = itertools.chain.from_iterable(itertools.combinations(range(1, len(cores)), count) for count in range(len(cores)))
        runs = [tuple(cores[a:b] for a, b in itertools.pairwise((0, *cut, len(cores)))) for cut in cuts]
    for run in runs:
        groups = tuple(group for group in run if len(group) > 1)
        if groups and all(_joined(net, group) for group in groups):
            yield groups


def _joined(net: Network, group: Sequence[str]) -> bool:
    """Whether each core shares an axis with one before it: a merge must not be an outer product."""
    seen = set(net.term(group[0]).axes)
    for name in group[1:]:
        axes = set(net.term(name).axes)
        if not seen & axes:
            return False
        seen |= axes
    return True
