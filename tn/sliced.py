"""Programs of sliced plans (tn.slices): a loop over slices of an inner program, forward and backward."""

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

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
        plan: what it runs. parts: what makes each output, one after the other. plain: the whole in one piece.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(dataclasses.replace(plan, slices=()))
        self.plan, self.fast = plan, None
        self.parts = [_Part(part) for part in plan.parts]

    @property
    def source(self) -> str:
        """The generated Python of one slice of each output."""
        return "\n".join(part.source for part in self.parts)

    def __call__(self, *operands: Tensor) -> Any:
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

    def whole(self, operands: Sequence[Tensor]) -> Any:
        """The results, slice by slice."""
        given, sizes = self._given(operands)
        results = tuple(part.whole(given, sizes) for part in self.parts)
        return results[0] if len(results) == 1 else results

    def gradients(self, gradients: Sequence[Tensor], operands: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
        """One gradient (or None) per name, slice by slice; the intermediates of a slice are made again."""
        given, sizes = self._given(operands)
        needed = [name for name, need in zip(self.names, needs, strict=True) if need]
        occurrences = Counter(term.name for term in self.plan.terms)
        add = {name for part in self.parts for name in part.added} | {name for name in needed if occurrences[name] > 1}
        made = {name: (given[name].new_zeros if name in add else given[name].new_empty)(given[name].shape) for name in needed}
        for part, gradient in zip(self.parts, gradients, strict=True):
            part.add_gradients(gradient, given, sizes, made, add)
        return [made.get(name) for name in self.names]

    def _given(self, operands: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, int]]:
        """(operands by name, sizes of all axes)."""
        return dict(zip(self.names, operands, strict=True)), self.plan.network.bind([operand.shape for operand in operands])

    def __repr__(self) -> str:
        return f"Sliced({self.plan.network.spec})"

    def __reduce__(self):
        return Sliced, (self.plan,)


class _Part:
    """Makes one output of a sliced plan, and the gradients from it.

    Attributes:
        added: names of operands whose slices' gradients are added up.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan, self.terms, self.output = plan, plan.network.spec.operands, plan.network.output
        self.added = {term.name for term in self.terms if summed(term.axes, plan)}
        one = inner(plan)
        self.inner = Program(dataclasses.replace(one, grad=()), own=True)
        needs = one.needs[: len(one.leaves)]
        self._remaking = {needs: self.inner.remaking(needs)}

    @property
    def source(self) -> str:
        """The generated Python of one slice."""
        parts = ", ".join(f"{size} of {axis}" for axis, size in self.plan.slices)
        return "\n".join([f"# run on slices of {parts}", self.inner.fast_source, *(source for _, source in self._remaking.values())])

    def whole(self, given: Mapping[str, Tensor], sizes: Mapping[str, int]) -> Tensor:
        """The result, slice by slice."""
        assert self.inner.fast is not None
        first, add = given[self.terms[0].name], summed(self.output.axes, self.plan)
        result = (first.new_zeros if add else first.new_empty)([sizes[axis] for axis in self.output.axes])
        for cut in self._cuts(sizes):
            _put(result, self.output, cut, self.inner.fast(*self._parts(given, sizes, cut))[0], add)
        return result.reshape(self._shape(given, sizes))

    def add_gradients(
        self,
        gradient: Tensor,
        given: Mapping[str, Tensor],
        sizes: Mapping[str, int],
        made: Mapping[str, Tensor],
        add: Collection[str],
    ) -> None:
        """Write gradients into the tensors of the needed names, or add them where others do too."""
        needs = tuple(term.name in made for term in self.terms)
        if not any(needs):
            return
        if needs not in self._remaking:
            self._remaking[needs] = self.inner.remaking(needs)
        run, _ = self._remaking[needs]
        for cut in self._cuts(sizes):
            parts = run(_get(gradient, self.output, sizes, cut), *self._parts(given, sizes, cut))
            for term, part in zip(self.terms, parts, strict=True):
                if part is not None:
                    _put(made[term.name].view([sizes[axis] for axis in term.axes]), term, cut, part, term.name in add)
            del parts, part

    def _cuts(self, sizes: Mapping[str, int]) -> Iterator[Cut]:
        """Every slice."""
        axes = [axis for axis, _ in self.plan.slices]
        for starts in itertools.product(*(range(0, sizes[axis], size) for axis, size in self.plan.slices)):
            ends = [min(start + size, sizes[axis]) for start, (axis, size) in zip(starts, self.plan.slices, strict=True)]
            yield {axis: (start, end - start) for axis, start, end in zip(axes, starts, ends, strict=True)}

    def _parts(self, given: Mapping[str, Tensor], sizes: Mapping[str, int], cut: Cut) -> list[Tensor]:
        return [_get(given[term.name], term, sizes, cut) for term in self.terms]

    def _shape(self, given: Mapping[str, Tensor], sizes: Mapping[str, int]) -> list[int]:
        """The stored shape of the result."""
        shape: list[int] = []
        for dim in self.output.dims:
            if dim == (ROWS,):
                term = next(term for term in self.terms if ROWS in term.axes)
                shape += given[term.name].shape[: 1 - len(term.dims) or None]
            else:
                shape.append(math.prod(sizes[axis] for axis in dim))
        return shape


class _Function(torch.autograd.Function):
    """A sliced program under autograd: nothing but operands is kept."""

    @staticmethod
    def forward(ctx, program: Sliced, *operands: Tensor) -> Any:
        ctx.program = program
        ctx.save_for_backward(*operands)
        return program.whole(operands)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad[1:]
        if torch.is_grad_enabled():
            return None, *again(ctx.program.plain, ctx.saved_tensors, needs, gradients)
        return None, *ctx.program.gradients(gradients, ctx.saved_tensors, needs)


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
