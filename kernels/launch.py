"""Starting a kernel: where kernels run, with which blocks, and what becomes of a failure.

A launch can also be recorded instead of run, on tensors without data, so that a machine without a GPU can compile exactly what a GPU would.
"""

import contextlib
import contextvars
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from tn.operators import OperatorError

# Triton decides when a kernel is defined whether it will be compiled or interpreted, so this is asked once, here.
INTERPRETED: bool = bool(triton.knobs.runtime.interpret)
# What kernels compute in. The interpreter multiplies the bit patterns of bfloat16, so there those tensors take the torch path.
DTYPES = (torch.float32, torch.float16) if INTERPRETED else (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Config:
    """How a kernel is cut: extents of its blocks by name, warps of a program, stages of its loops' pipelines."""

    blocks: tuple[tuple[str, int], ...]
    warps: int = 4
    stages: int = 2

    def __getitem__(self, name: str) -> int:
        return dict(self.blocks)[name]


def config(warps: int = 4, stages: int = 2, **blocks: int) -> Config:
    """A Config with blocks as keywords.

    >>> config(warps=8, BM=64)["BM"]
    64
    """
    return Config(tuple(blocks.items()), warps, stages)


@dataclass(frozen=True, slots=True)
class Call:
    """A launch that was recorded: the kernel, its grid, its arguments in order and its compile-time constants."""

    kernel: object
    grid: tuple[int, ...]
    arguments: tuple[object, ...]
    constants: dict[str, object]
    config: Config


_recorded: contextvars.ContextVar[list[Call] | None] = contextvars.ContextVar("tn_kernels.recorded", default=None)


@contextlib.contextmanager
def recording() -> Iterator[list[Call]]:
    """Launches inside the block are not run but added to the list, forward and backward, so operands may be on the meta device."""
    calls: list[Call] = []
    token = _recorded.set(calls)
    try:
        yield calls
    finally:
        _recorded.reset(token)


def is_recording() -> bool:
    """Whether launches are recorded instead of run."""
    return _recorded.get() is not None


def runs_here(*tensors: Tensor | None) -> bool:
    """Whether kernels can take these tensors: one of their dtypes, on CUDA or in the interpreter."""
    given = [tensor for tensor in tensors if tensor is not None]
    device = "cpu" if INTERPRETED else "cuda"
    return all(t.dtype in DTYPES and t.device.type == device for t in given if t.is_floating_point())


def launch(kernel: object, grid: tuple[int, ...], *arguments: object, cut: Config, wide_offsets: bool = False, **constants: object) -> None:
    """Run a kernel over a grid.

    Args:
        arguments: in the kernel's order. constants: its compile-time ones, besides the blocks of `cut`.
        wide_offsets: the kernel takes every offset that may be large in 64 bits.

    Raises:
        OperatorError: it does not compile, fit or start, with the message of Triton or the driver; an operand is too large for its offsets.
    """
    constants = {**dict(cut.blocks), **constants}
    if not wide_offsets:
        _check_offsets(kernel, arguments)
    calls = _recorded.get()
    if calls is not None:
        calls.append(Call(kernel, grid, arguments, constants, cut))
        return
    tensor = next(argument for argument in arguments if isinstance(argument, Tensor))
    # Triton launches on the current device, whatever device the tensors are on.
    guard = torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()
    try:
        with guard:
            kernel[grid](*arguments, **constants, num_warps=cut.warps, num_stages=cut.stages)  # type: ignore[index]
    # Triton's driver and a missing compiler raise RuntimeError, a compiler of launchers that fails CalledProcessError.
    except (TritonError, RuntimeError, subprocess.CalledProcessError) as error:
        raise OperatorError(f"{getattr(kernel, '__name__', kernel)} with {constants}: {error}") from error


def _check_offsets(kernel: object, arguments: tuple[object, ...]) -> None:
    for tensor in arguments:
        if isinstance(tensor, Tensor) and tensor.untyped_storage().nbytes() >= 1 << 31:  # the span of a view is at most that
            span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
            if span >= 1 << 31:
                name = getattr(kernel, "__name__", kernel)
                raise OperatorError(
                    f"{name}: an operand of shape {tuple(tensor.shape)} spans {span + 1:,} elements, its offsets have 32 bits"
                )


def precision(tensor: Tensor) -> str:
    """How fp32 products are taken: exactly, unless torch.set_float32_matmul_precision allows less."""
    return "ieee" if tensor.dtype is not torch.float32 or torch.get_float32_matmul_precision() == "highest" else "tf32"


def ceil_div(value: int, by: int) -> int:
    """value / by, rounded up."""
    return -(-value // by)


def block(extent: int, least: int = 16, most: int = 128) -> int:
    """The power of two that covers an extent, within limits: tl.dot takes no extent below 16.

    >>> block(3), block(48), block(4096)
    (16, 64, 128)
    """
    return min(max(1 << max(extent - 1, 0).bit_length(), least), most)
