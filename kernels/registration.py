"""How a kernel becomes a torch operator: schema, shapes for tracing, gradient, and the torch path where kernels do not run.

Each operator brings four functions of the same arguments: `forward` and `backward` launch kernels, `reference` is the same mathematics in
torch operations, `shapes` makes the results without computing them. The registered operator runs `forward` where kernels can run and
`reference` elsewhere. Its gradient runs `backward`; where kernels cannot run, and for second derivatives, it differentiates `reference`.
"""

import contextvars
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, infer_schema

from tn.operators import transforming
from tn_kernels.launch import is_recording, runs_here


class Operator:
    """A registered operator `tn::name`. Call it like `reference`.

    Args:
        forward: launches the kernel; annotated, for the schema. Returns new contiguous tensors, the first of which is differentiable.
        reference: the same result from torch operations, differentiable any number of times.
        shapes: the same result, uninitialised.
        backward: (gradient, inputs, results, needs) → one gradient for each tensor among the inputs, None where `needs` is False; launches
            kernels. None: the gradient is that of `reference`.
    """

    def __init__(
        self,
        name: str,
        *,
        forward: Callable[..., Any],
        reference: Callable[..., Any],
        shapes: Callable[..., Any],
        backward: Callable[..., list[Tensor | None]] | None = None,
    ) -> None:
        self.name, self.forward, self.reference, self.backward = name, forward, reference, backward

        @functools.wraps(forward)
        def run(*arguments: Any) -> Any:
            return forward(*arguments) if runs_here(*_tensors(arguments)) else reference(*arguments)

        self.op = custom_op(f"tn::{name}", run, mutates_args=())
        self.op.register_fake(shapes)
        self.op.register_autograd(self._differentiate, setup_context=_setup)
        if backward is not None:
            # An operator of its own, because torch.compile traces a backward pass with tensors that have no data.
            inputs = infer_schema(run, mutates_args=()).split(") ->")[0].removeprefix("(")
            schema = f"(Tensor gradient, {inputs}, Tensor[] results, bool[] needs) -> Tensor[]"
            self._backward_op = custom_op(f"tn::{name}_backward", self._gradients, mutates_args=(), schema=schema)
            self._backward_op.register_fake(_gradient_shapes)

    def __call__(self, *arguments: Any) -> Any:
        if torch.compiler.is_compiling():  # what follows is no part of a graph
            return self.op(*arguments)
        if is_recording():
            return self._record(*arguments)
        return self.reference(*arguments) if transforming() else self.op(*arguments)

    def _record(self, *arguments: Any) -> Any:
        """Launch what a forward and a whole backward pass would launch."""
        made = self.forward(*arguments)
        results = made if isinstance(made, tuple) else (made,)
        if self.backward is not None:
            self.backward(torch.empty_like(results[0]), list(arguments), list(results), [True] * len(_tensors(arguments)))
        return made

    def _differentiate(self, ctx: Any, gradient: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all arguments. Further results, such as a logarithm of a sum, are constants to whoever uses them."""
        tensors = iter(ctx.saved_tensors)
        inputs = [next(tensors) if held else value for held, value in zip(ctx.held, ctx.arguments, strict=True)]
        results = list(tensors)
        needs = [need for need, held in zip(ctx.needs_input_grad, ctx.held, strict=True) if held]
        if self.backward is None or torch.is_grad_enabled() or not runs_here(gradient, *_tensors(inputs)):
            found = iter(_through(self.reference, gradient, inputs, needs))
        else:
            # On CUDA autograd has threads of its own, which know nothing of a tuning run or of blocks that were told.
            made = ctx.context.copy().run(self._backward_op, gradient, *inputs, results, needs)
            found = iter([tensor if need else None for tensor, need in zip(made, needs, strict=True)])
        return tuple(next(found) if held else None for held in ctx.held)

    def _gradients(self, gradient: Tensor, *rest: Any) -> list[Tensor]:
        """One contiguous tensor for each tensor among the inputs; an empty one where none is needed, since operators return tensors."""
        *inputs, results, needs = rest
        assert self.backward is not None
        made = self.backward(gradient, inputs, results, needs)
        return [gradient.new_empty(0) if tensor is None else tensor for tensor in made]

    def __repr__(self) -> str:
        return f"Operator({self.name})"


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.held = [isinstance(value, Tensor) for value in inputs]
    ctx.arguments = [None if held else value for held, value in zip(ctx.held, inputs, strict=True)]
    # A single result is never needed: gradients are made from the inputs. Several are there because backward wants the others.
    results = output if isinstance(output, tuple) else ()
    ctx.save_for_backward(*_tensors(inputs), *results)
    ctx.context = contextvars.copy_context()


def _gradient_shapes(gradient: Tensor, *rest: Any) -> list[Tensor]:
    *inputs, _, needs = rest
    pairs = zip(_tensors(inputs), needs, strict=True)
    return [tensor.new_empty(tensor.shape) if need else gradient.new_empty(0) for tensor, need in pairs]


def _tensors(values: Sequence[Any]) -> list[Tensor]:
    return [value for value in values if isinstance(value, Tensor)]


def _through(reference: Callable[..., Any], gradient: Tensor, inputs: list[Any], needs: list[bool]) -> list[Tensor | None]:
    """Gradients of the reference, themselves differentiable when gradients are on."""
    twice = torch.is_grad_enabled()
    need = iter(needs)
    with torch.enable_grad():
        again = [_alias(value, twice) if isinstance(value, Tensor) and next(need) else value for value in inputs]
        wanted = [new for new, old in zip(again, inputs, strict=True) if new is not old]
        result = reference(*again)
        found = iter(torch.autograd.grad(result[0] if isinstance(result, tuple) else result, wanted, gradient, create_graph=twice))
    return [next(found) if need else None for need in needs]


def _alias(value: Tensor, twice: bool) -> Tensor:
    """The same numbers as a new variable, so that the gradient stops there; connected to the old one for second derivatives."""
    return value.view_as(value) if twice else value.detach().requires_grad_()
