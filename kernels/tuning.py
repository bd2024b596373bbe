"""Which blocks a kernel is cut into: a heuristic, or what was measured fastest on this device, kept on disk.

Nothing is tuned behind a caller's back: `tune` measures when it is called (as a calibration does) and `cut` only looks up. The table of a
device is one JSON file; it is replaced as a whole, and one that cannot be read is ignored with one warning.
"""

import contextlib
import contextvars
import functools
import json
import os
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from torch import Tensor

from tn.operators import OperatorError, cache_folder
from tn_kernels.launch import Config

FORMAT = 1
# A streaming multiprocessor of compute capability 8.0 to 9.0 has 64 Ki registers of four bytes; the smallest of them gives one program
# 99 KiB of shared memory, the largest 227 KiB. What does not fit where it is tried is skipped there.
REGISTERS, SHARED = 1 << 16, 227 << 10


@dataclass(frozen=True, slots=True)
class Request:
    """A kernel that was about to run: its problem as a key, and the ways to cut it."""

    kernel: str
    key: str
    space: tuple[Config, ...]


_forced: contextvars.ContextVar[dict[str, Config] | None] = contextvars.ContextVar("tn_kernels.forced", default=None)
_requests: contextvars.ContextVar[list[Request] | None] = contextvars.ContextVar("tn_kernels.requests", default=None)


@contextlib.contextmanager
def using(**cuts: Config) -> Iterator[None]:
    """Cut kernels as told inside the block, and in gradients of what it makes: `using(chain=config(BN=32, …))`."""
    token = _forced.set({**(_forced.get() or {}), **cuts})
    try:
        yield
    finally:
        _forced.reset(token)


def forced(kernel: str) -> bool:
    """Whether `using` tells how this kernel is cut."""
    return kernel in (_forced.get() or {})


def cut(
    kernel: str, tensor: Tensor, problem: Mapping[str, int], default: Callable[[], Config], space: Callable[[], Iterable[Config]]
) -> Config:
    """The Config of a kernel: forced, measured on the tensor's device, or the heuristic.

    Args:
        problem: the sizes that decide which Config is best. They are looked up rounded to powers of two.
        space: the configurations worth trying, pruned by what fits.
    """
    told = _forced.get()
    if told and kernel in told:
        return told[kernel]
    requests = _requests.get()
    if requests is not None:
        requests.append(Request(kernel, case(kernel, problem, tensor.dtype), tuple(space())))
    if not tensor.is_cuda:
        return default()
    return _known(_measured(kernel, tuple(problem.items()), tensor.dtype, tensor.device.index or 0), default(), tensor.device.index or 0)


def _known(measured: Config | None, default: Config, device: int) -> Config:
    """What was measured, unless it was for a kernel whose blocks had other names."""
    if measured is None:
        return default
    if {name for name, _ in measured.blocks} != {name for name, _ in default.blocks}:
        _warn_once(path(device_name(device)), f"blocks {dict(measured.blocks)} are of another version of the kernel")
        return default
    return measured


def case(kernel: str, problem: Mapping[str, int], dtype: torch.dtype) -> str:
    """The key of a problem: sizes rounded up to powers of two.

    >>> case("chain", {"n": 1000, "r": 1}, torch.float16)
    'chain n1024 r1 float16'
    """
    sizes = " ".join(f"{name}{1 << max(size - 1, 0).bit_length()}" for name, size in problem.items())
    return f"{kernel} {sizes} {str(dtype).removeprefix('torch.')}"


def fits(registers: int, shared: int) -> bool:
    """Whether a program is worth trying.

    Args:
        registers: numbers of four bytes held at once; a quarter of the file is left to addresses and operands.
        shared: bytes of shared memory.
    """
    return registers <= REGISTERS * 3 // 4 and shared <= SHARED


def tune(run: Callable[..., object], operands: Sequence[Tensor], samples: int = 7) -> dict[str, Config]:
    """Time every way to cut every kernel that `run(*operands)` launches, keep the fastest and store it for this device.

    Args:
        run: called with copies of the operands. samples: timings of each; the median counts.

    Returns:
        The fastest Config by key.

    Raises:
        OperatorError: no CUDA device, or no way to cut some kernel runs.
    """
    _check_device(operands)
    copies = [operand.detach().clone(memory_format=torch.preserve_format).requires_grad_(operand.requires_grad) for operand in operands]
    requests: list[Request] = []
    token = _requests.set(requests)
    try:
        run(*copies)
    finally:
        _requests.reset(token)
    device, best = operands[0].device.index or 0, {}
    for request in {request.key: request for request in requests}.values():
        times, last = {}, "no configuration fits"
        for config in request.space:
            with using(**{request.kernel: config}):
                try:
                    times[config] = _seconds(lambda: run(*copies), samples)
                except OperatorError as error:
                    last = str(error)
        if not times:
            raise OperatorError(f"no way to cut {request.key} runs: {last}")
        best[request.key] = min(times, key=lambda config: times[config])
    _write(device, best)
    return best


def _check_device(operands: Sequence[Tensor]) -> None:
    if not operands or not operands[0].is_cuda:
        raise OperatorError("tuning measures on a CUDA device; the operands are " + (str(operands[0].device) if operands else "none"))


def _seconds(run: Callable[[], object], samples: int) -> float:
    run()
    found = []
    for _ in range(samples):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        run()
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(found)


@functools.lru_cache(maxsize=4096)
def _measured(kernel: str, problem: tuple[tuple[str, int], ...], dtype: torch.dtype, device: int) -> Config | None:
    """Looked up once for each size: the key alone takes microseconds to make."""
    return _table(device).get(case(kernel, dict(problem), dtype))


@functools.cache
def _table(device: int) -> dict[str, Config]:
    return read(path(device_name(device)))


def device_name(device: int) -> str:
    """What the table of a device is filed under."""
    return torch.cuda.get_device_name(device)


def path(device: str) -> Path:
    """Where the table of a device lies: what is fastest depends on the device and on the compiler."""
    words = "".join(letter if letter.isalnum() else "-" for letter in device)
    return cache_folder() / "kernels" / f"{words}-triton-{triton.__version__}.json"


def read(file: Path) -> dict[str, Config]:
    """The table in a file; empty, with one warning, when it cannot be understood."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise ValueError(f"format {value['format']!r}, this version reads {FORMAT}")
        return {key: _config(**row) for key, row in value["rows"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        _warn_once(file, f"{type(error).__name__}: {error}")
        return {}


def _config(blocks: dict[str, int], warps: int, stages: int) -> Config:
    numbers = (*blocks.values(), warps, stages)
    if not all(type(number) is int and number >= 1 for number in numbers):
        raise ValueError(f"blocks, warps and stages are integers of at least 1, got {numbers}")
    if any(number & (number - 1) for number in (*blocks.values(), warps)):
        raise ValueError(f"blocks and warps are powers of two, got {numbers[:-1]}")
    return Config(tuple(blocks.items()), warps, stages)


@functools.cache
def _warn_once(file: Path, what: str) -> None:
    warnings.warn(f"tuned blocks in {file} are ignored ({what}); delete the file or tune again", stacklevel=2)


def _write(device: int, best: Mapping[str, Config]) -> None:
    file = path(device_name(device))
    store(file, {**read(file), **best})
    _table.cache_clear()
    _measured.cache_clear()


def store(file: Path, table: Mapping[str, Config]) -> None:
    """Write a table so that another process sees the old one or the new one, never a part."""
    rows = {key: {"blocks": dict(config.blocks), "warps": config.warps, "stages": config.stages} for key, config in sorted(table.items())}
    file.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=file.parent, prefix=file.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as out:
            json.dump({"format": FORMAT, "rows": rows}, out, indent=1)
        os.replace(name, file)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise
