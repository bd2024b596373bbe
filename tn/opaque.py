"""Programs as operators of torch, for torch.compile: it sees neither products written into views nor loops over tiles."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from tn.program import Program

_programs: dict[str, Program] = {}


def register(program: Program) -> str:
    """The key by which compiled code calls a program; equal plans have equal keys in every process."""
    key = hashlib.sha256(program.plan.to_json().encode()).hexdigest()[:32]
    _programs.setdefault(key, program)
    return key


def _contiguous(tensors: Sequence[Tensor | None]) -> list[Tensor]:
    return [tensor.contiguous() for tensor in tensors if tensor is not None]


@torch.library.custom_op("tn::contraction", mutates_args=())
def contraction(operands: Sequence[Tensor], key: str) -> list[Tensor]:
    """The results of a registered program, then what its gradient needs besides the operands."""
    return _contiguous(_programs[key].opaque_forward()(*operands))


@contraction.register_fake
def _(operands: Sequence[Tensor], key: str) -> list[Tensor]:
    program = _programs[key]
    if program.plan.tile is not None:  # a loop over symbolic rows would be unrolled
        return [operands[0].new_empty(shape) for shape in program.result_shapes(operands)]
    return _contiguous(program.opaque_forward()(*operands))


@torch.library.custom_op("tn::contraction_backward", mutates_args=())
def contraction_backward(gradients: Sequence[Tensor], tensors: Sequence[Tensor], needs: Sequence[bool], key: str) -> list[Tensor]:
    """Gradients of the operands that need one; `tensors` are the operands and what the forward pass kept."""
    return _contiguous(_programs[key].opaque_backward(tuple(needs))(*gradients, *tensors))


@contraction_backward.register_fake
def _(gradients: Sequence[Tensor], tensors: Sequence[Tensor], needs: Sequence[bool], key: str) -> list[Tensor]:
    wanted = [operand for operand, need in zip(tensors, needs, strict=False) if need]
    return [torch.empty_like(operand, memory_format=torch.contiguous_format) for operand in wanted]


def _setup(ctx, inputs: tuple[Sequence[Tensor], str], output: list[Tensor]) -> None:
    operands, ctx.key = inputs
    ctx.outputs = _programs[ctx.key].outputs
    ctx.needs = [operand.requires_grad for operand in operands]
    ctx.save_for_backward(*operands, *output[ctx.outputs :])


def _backward(ctx, gradients: list[Tensor]) -> tuple[list[Tensor | None], None]:
    found = iter(contraction_backward(gradients[: ctx.outputs], ctx.saved_tensors, ctx.needs, ctx.key))
    return [next(found) if need else None for need in ctx.needs], None


contraction.register_autograd(_backward, setup_context=_setup)
