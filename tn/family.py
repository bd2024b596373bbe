"""Programs found again: calls of one structure share them, and a size that changes from call to call becomes dynamic.

The first call of a structure is planned for its very sizes. When another call differs in one or two sizes, those axes become dynamic, and
the Program for them runs every size near those it was planned for: a loop over batch sizes plans twice. A call that differs in more is
another network with the same equation, whose best order may be another one: it is planned for its own sizes.
"""

import functools
from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from tn.bridge.opt_einsum import pairs_of
from tn.bridge.paths import along
from tn.contraction import program
from tn.network import network
from tn.order import SEARCHES, Axes
from tn.plan import leaf_axes
from tn.planner import plan
from tn.program import EinsumProgram, Program
from tn.spec import ROWS, Spec

_MEMBERS = 16  # programs of one structure; when there are so many, everything that differs becomes dynamic
_FREE = 2  # axes that may become dynamic together, `...` not counted
_REACH = 16  # a dynamic size may be this many times larger or smaller than the one planned for
_HEADROOM = 4  # sizes that have changed once are planned for this many times larger ones: loops go up more often than down


@dataclass(frozen=True, slots=True)
class Structure:
    """What programs of one family have in common: everything but sizes.

    Attributes:
        spec: operands t0, t1, … and the output. dtype, device: of the operands.
        grads: which operands need a gradient. route: how the order is found, see `tn.bridge.opt_einsum.route`.
        backend: "planned" or "einsum".
    """

    spec: Spec
    dtype: torch.dtype
    device: torch.device
    grads: tuple[bool, ...]
    route: Hashable = "auto"
    backend: str = "planned"


@dataclass(frozen=True, slots=True)
class Member:
    """One program of a family: the sizes it was planned for, and which of them may change."""

    sizes: Mapping[str, int]
    dynamic: frozenset[str]
    program: Program | EinsumProgram

    def runs(self, sizes: Mapping[str, int]) -> bool:
        """Whether the program accepts these sizes."""
        return all(axis in self.dynamic or size == sizes[axis] for axis, size in self.sizes.items())

    def reaches(self, sizes: Mapping[str, int]) -> bool:
        """Whether the dynamic sizes are near those of the plan."""
        return all(self.sizes[axis] <= _REACH * max(sizes[axis], 1) and sizes[axis] <= _REACH * self.sizes[axis] for axis in self.dynamic)


class Family:
    """The programs of one structure, oldest first."""

    def __init__(self, structure: Structure) -> None:
        self.structure = structure
        self.members: tuple[Member, ...] = ()

    def find(self, sizes: Mapping[str, int]) -> Program | EinsumProgram:
        """A program for these sizes, planned now where no member will do."""
        able = [member for member in self.members if member.runs(sizes)]
        for member in able:
            if member.reaches(sizes):
                return member.program
        full = len(self.members) == _MEMBERS
        if full and able:
            return able[-1].program
        made = self._next(sizes, full)
        self.members = (*self.members, made)[-_MEMBERS:]
        return made.program

    def _next(self, sizes: Mapping[str, int], full: bool) -> Member:
        """A member for sizes that none runs well: dynamic where it differs from its nearest relative, if that is nowhere much."""
        rows = frozenset(sizes) & {ROWS}
        changes = [member.dynamic | {axis for axis, size in sizes.items() if size != member.sizes[axis]} for member in self.members]
        dynamic = min(changes, key=len, default=None)
        if dynamic is None or (len(dynamic - rows) > _FREE and not full):
            return self._make(sizes, rows)
        return self._make({axis: size * _HEADROOM if axis in dynamic else size for axis, size in sizes.items()}, dynamic)

    def _make(self, sizes: Mapping[str, int], dynamic: frozenset[str]) -> Member:
        planned = {axis: max(size, 1) if axis in dynamic else size for axis, size in sizes.items()}
        return Member(planned, dynamic, make(self.structure, tuple(planned.items()), dynamic))


@functools.lru_cache(maxsize=1024)
def family(structure: Structure) -> Family:
    """The family of a structure; equal structures share one."""
    return Family(structure)


@functools.lru_cache(maxsize=1024)
def make(structure: Structure, sizes: tuple[tuple[str, int], ...], dynamic: frozenset[str]) -> Program | EinsumProgram:
    """A program for these sizes that lets the dynamic ones change."""
    size = dict(sizes)
    net = network(structure.spec, {axis: extent for axis, extent in sizes if axis not in dynamic})
    free = {axis: size[axis] for axis in dynamic if axis != ROWS}
    grad = [name for name, need in zip(net.names, structure.grads, strict=True) if need]
    rows, dtype, device = size.get(ROWS), structure.dtype, structure.device
    if structure.route in SEARCHES:
        made = plan(net, grad=grad, rows=rows, sizes=free, dtype=dtype, device=device, search=str(structure.route))
    else:
        pairs = pairs_of(structure.route, leaf_axes(net), net.output.axes, size)
        made = along(net, pairs, grad=grad, rows=rows, sizes=free, dtype=dtype, device=device)
    return program(made, structure.backend)


def rearrange(tensor: Tensor, term: Axes, output: Axes) -> Tensor:
    """Diagonals, sums and a permutation of a single operand, which needs no plan: a view unless something is summed."""
    axes = list(term)
    while len(set(axes)) < len(axes):
        axis = next(a for a in axes if axes.count(a) > 1)
        first, second = [i for i, a in enumerate(axes) if a == axis][:2]
        axes = [a for i, a in enumerate(axes) if i not in (first, second)] + [axis]
        tensor = tensor.diagonal(dim1=first, dim2=second)
    summed = [i for i, axis in enumerate(axes) if axis not in output]
    if summed:
        tensor = tensor.sum(summed, dtype=tensor.dtype)
    kept = [axis for axis in axes if axis in output]
    return tensor.permute([kept.index(axis) for axis in output])
