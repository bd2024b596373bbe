"""Compiling a recorded launch for a device that is not here, and reading what it would take from it.

Triton compiles without a GPU, and its assembler's own reader says how many registers a thread of the result uses, whether some of
them spill to memory (a stack), and how much shared memory a program claims.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.errors import TritonError

from tn.operators import OperatorError
from tn_kernels.launch import INTERPRETED, Call

_TYPES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
_SHARED = {80: 163 << 10, 90: 227 << 10}  # bytes of shared memory one program may claim


@dataclass(frozen=True, slots=True)
class Resources:
    """What one program of a compiled kernel uses.

    Attributes:
        kernel: its name. registers: of a thread, at most 255. stack: bytes a thread keeps in memory, among them what spilled.
        shared: bytes of shared memory. warps: of a program. programs: how many fit one multiprocessor at once, by registers and
            shared memory.
        instructions: tensor-core instructions it issues, "wgmma", "mma" or "none".
    """

    kernel: str
    registers: int
    stack: int
    shared: int
    warps: int
    programs: int
    instructions: str


def compile_call(call: Call, capability: int = 90) -> Resources:
    """Compile a launch exactly as a GPU of this compute capability (80 or 90) would.

    Raises:
        OperatorError: Triton was imported with its interpreter switched on, or the kernel does not compile.
    """
    if INTERPRETED:
        raise OperatorError("kernels cannot be compiled in a process whose Triton interprets them; unset TRITON_INTERPRET")
    kernel = call.kernel
    signature, constants, attributes = {}, {}, {}
    values = dict(zip(kernel.arg_names, call.arguments, strict=False)) | call.constants  # type: ignore[attr-defined]
    for place, name in enumerate(kernel.arg_names):  # type: ignore[attr-defined]
        kind, aligned = _specialised(values[name], name in call.constants)
        signature[name] = kind
        if kind == "constexpr":
            constants[(place,)] = values[name]
        elif aligned:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": call.config.warps, "num_stages": call.config.stages}
    try:
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    except TritonError as error:
        raise OperatorError(f"{kernel.__name__} does not compile for compute capability {capability}: {error}") from error  # type: ignore[attr-defined]
    registers, stack = _usage(made.asm["cubin"])
    shared, warps = made.metadata.shared, made.metadata.num_warps
    if shared > _SHARED[capability]:
        raise OperatorError(f"{made.metadata.name} needs {shared} bytes of shared memory, the device has {_SHARED[capability]}")
    # Registers are given out to warps in units of 256.
    by_registers = (1 << 16) // (warps * (-(-registers * 32 // 256) * 256))
    programs = min(by_registers, (_SHARED[capability] + 1024) // (shared + 1024), 64 // warps)
    text = made.asm["ptx"]
    instructions = "wgmma" if "wgmma.mma_async" in text else "mma" if re.search(r"\bmma\.sync", text) else "none"
    return Resources(made.metadata.name.strip("_"), registers, stack, shared, warps, programs, instructions)


def _specialised(value: object, constant: bool) -> tuple[str, bool]:
    """(type in a signature, whether it is a multiple of 16), as Triton's launcher decides it."""
    if constant or value is None or (isinstance(value, int) and value == 1):
        return "constexpr", False
    if isinstance(value, Tensor):
        return "*" + _TYPES[value.dtype], True  # allocations are aligned
    if isinstance(value, int):
        return ("i32" if -(1 << 31) <= value < 1 << 31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", False
    raise OperatorError(f"cannot compile a kernel for an argument of type {type(value).__name__}")


def _usage(binary: bytes) -> tuple[int, int]:
    """(registers of a thread, bytes of its stack)."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(binary)
        tool = triton.knobs.nvidia.cuobjdump.path
        done = subprocess.run([tool, "-res-usage", str(file)], capture_output=True, text=True, check=False)
    found = re.search(r"REG:(\d+) STACK:(\d+)", done.stdout)
    if found is None:
        raise OperatorError(f"{tool} did not say what the kernel uses: {done.stderr.strip() or done.stdout.strip()}")
    return int(found[1]), int(found[2])
