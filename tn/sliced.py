"""Programs of sliced plans (tn.slices): a loop over slices of an inner program, forward and backward."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from tn.errors import OperatorError
from tn.plan import Plan
from tn.program import Program, again, autocast, see_through
from tn.slices import inner, summed
from tn.spec import ROWS, Term

Cut = Mapping[str, tuple[int, int]]  # axis → (start, length)


class Sliced(Program):
    """Runs a sliced Plan, in float32 or float64. torch.func and torch.compile see the plain program of the whole, without slices.

    Attributes:
        plan: what it runs. inner: the program of one slice. plain: the whole in one piece.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(dataclasses.replace(plan, slices=()))
        self.plan, self.fast = plan, None
        one = inner(plan)
        self.inner = Program(dataclasses.replace(one, grad=()), own=True)
        self._remaking = {one.needs[: len(one.leaves)]: self.inner.remaking(one.needs[: len(one.leaves)])}

    @property
    def source(self) -> str:
        """The generated Python of one slice."""
        parts = ", ".join(f"{size} of {axis}" for axis, size in self.plan.slices)
        return "\n".join([f"# run on slices of {parts}", self.inner.fast_source, *(source for _, source in self._remaking.values())])

    def __call__(self, *operands: Tensor) -> Tensor:
        if see_through():
            return self.plain(*operands)
        if torch._C._is_any_autocast_enabled():
            operands = tuple(autocast(operands))
        self.plan.network.bind([operand.shape for operand in operands])
        for name, operand in zip(self.names, operands, strict=True):
            if operand.dtype is not operands[0].dtype or operand.dtype not in (torch.float32, torch.float64):
                raise OperatorError(f"operand {name!r} is {operand.dtype}: slices are added up in float32 or float64, all operands alike")
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
            return _Function.apply(self, *operands)
        return self.whole(operands)

    def whole(self, operands: Sequence[Tensor]) -> Tensor:
        """The result, slice by slice."""
        network = self.plan.network
        sizes = network.bind([operand.shape for operand in operands])
        term = network.output
        make = operands[0].new_zeros if summed(term.axes, self.plan) else operands[0].new_empty
        result = make([sizes[axis] for axis in term.axes])
        for cut in self._cuts(sizes):
            _put(result, term, cut, self._part(operands, sizes, cut), summed(term.axes, self.plan))
        return result.reshape(self._shape(operands, sizes))

    def gradients(self, gradient: Tensor, operands: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """One gradient (or None) per name, slice by slice; the intermediates of a slice are made again."""
        terms, given = self.plan.network.spec.operands, dict(zip(self.names, operands, strict=True))
        sizes = self.plan.network.bind([operand.shape for operand in operands])
        need = dict(zip(self.names, needs, strict=True))
        add = {term.name: summed(term.axes, self.plan) for term in terms}
        for name in self.names:
            add[name] |= [term.name for term in terms].count(name) > 1
        made = {
            name: (given[name].new_zeros if add[name] else given[name].new_empty)(given[name].shape) for name in self.names if need[name]
        }
        run = self._run(tuple(need[term.name] for term in terms))
        for cut in self._cuts(sizes):
            parts = run(_get(gradient, self.plan.network.output, sizes, cut), *self._parts(operands, sizes, cut))
            for term, part in zip(terms, parts, strict=True):
                if part is not None:
                    _put(made[term.name].view([sizes[axis] for axis in term.axes]), term, cut, part, add[term.name])
            del parts, part
        return [made.get(name) for name in self.names]

    def _run(self, needs: tuple[bool, ...]) -> Callable[..., tuple[Tensor | None, ...]]:
        if needs not in self._remaking:
            self._remaking[needs] = self.inner.remaking(needs)
        return self._remaking[needs][0]

    def _cuts(self, sizes: Mapping[str, int]) -> Iterator[Cut]:
        """Every slice."""
        axes = [axis for axis, _ in self.plan.slices]
        for starts in itertools.product(*(range(0, sizes[axis], size) for axis, size in self.plan.slices)):
            ends = [min(start + size, sizes[axis]) for start, (axis, size) in zip(starts, self.plan.slices, strict=True)]
            yield {axis: (start, end - start) for axis, start, end in zip(axes, starts, ends, strict=True)}

    def _part(self, operands: Sequence[Tensor], sizes: Mapping[str, int], cut: Cut) -> Tensor:
        assert self.inner.fast is not None
        return self.inner.fast(*self._parts(operands, sizes, cut))[0]

    def _parts(self, operands: Sequence[Tensor], sizes: Mapping[str, int], cut: Cut) -> list[Tensor]:
        given = dict(zip(self.names, operands, strict=True))
        return [_get(given[term.name], term, sizes, cut) for term in self.plan.network.spec.operands]

    def _shape(self, operands: Sequence[Tensor], sizes: Mapping[str, int]) -> list[int]:
        """The stored shape of the result."""
        network = self.plan.network
        shape: list[int] = []
        for dim in network.output.dims:
            if dim == (ROWS,):
                name = next(term.name for term in network.spec.operands if ROWS in term.axes)
                shape += operands[self.names.index(name)].shape[: 1 - len(network.term(name).dims) or None]
            else:
                shape.append(math.prod(sizes[axis] for axis in dim))
        return shape

    def __repr__(self) -> str:
        return f"Sliced({self.plan.network.spec})"

    def __reduce__(self):
        return Sliced, (self.plan,)


class _Function(torch.autograd.Function):
    """A sliced program under autograd: nothing but operands is kept."""

    @staticmethod
    def forward(ctx, program: Sliced, *operands: Tensor) -> Tensor:
        ctx.program = program
        ctx.save_for_backward(*operands)
        return program.whole(operands)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *again(ctx.program.plain, ctx.saved_tensors, needs, [gradient])
        return None, *ctx.program.gradients(gradient, ctx.saved_tensors, needs)


def _get(tensor: Tensor, term: Term, sizes: Mapping[str, int], cut: Cut) -> Tensor:
    """A slice of a tensor, in one piece of memory, with a dimension for each axis."""
    part = tensor.reshape([sizes[axis] for axis in term.axes])
    for place, axis in enumerate(term.axes):
        if axis in cut:
            part = part.narrow(place, *cut[axis])
    return part.contiguous()


def _put(whole: Tensor, term: Term, cut: Cut, part: Tensor, add: bool) -> None:
    """Write a slice into a tensor with a dimension for each axis, or add it."""
    for place, axis in enumerate(term.axes):
        if axis in cut:
            whole = whole.narrow(place, *cut[axis])
    if add:
        whole.add_(part)
    else:
        whole.copy_(part)
