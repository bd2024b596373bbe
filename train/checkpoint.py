"""Checkpoints that are whole or absent: written aside, synced, and renamed into place.

    RUN/checkpoints/step-000100/
        model.safetensors   parameters by name
        state.safetensors   optimiser moments as "exp_avg/NAME", torch's random state as "rng/cpu" and "rng/cuda:N"
        state.json          step, counters, other random states, versions, threads, fingerprints, the run's config
        manifest.json       every file with its size; written last, so that a folder without it is unfinished

A folder counts only when it is named step-N and every file has the size that the manifest says.
"""

import json
import os
import platform
import random
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import tn
from train.errors import CheckpointError

_FORMAT = 1
_SAVING, _BROKEN, _DELETING = ".saving-", "broken-", ".deleting-"


@dataclass(frozen=True)
class Found:
    """What a checkpoints folder holds: complete checkpoints, oldest first, and unusable ones with the reason."""

    complete: tuple[Path, ...]
    broken: tuple[tuple[Path, str], ...]

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint."""
        return self.complete[-1] if self.complete else None


def step_of(path: Path) -> int:
    """Return the step in a checkpoint's name."""
    return int(path.name.removeprefix("step-"))


def find(folder: Path) -> Found:
    """Look through a checkpoints folder; nothing is changed. A folder that does not exist holds nothing."""
    complete, broken = [], []
    entries = sorted(folder.iterdir()) if folder.is_dir() else []
    for path in entries:
        if path.name.startswith(_SAVING):
            broken.append((path, "its writer was stopped while saving"))
        elif path.name.startswith("step-") and path.name[5:].isdigit():
            reason = _problem(path)
            if reason:
                broken.append((path, reason))
            else:
                complete.append(path)
    return Found(tuple(sorted(complete, key=step_of)), tuple(broken))


def _problem(path: Path) -> str | None:
    """Say why a checkpoint is not complete; None when it is."""
    try:
        sizes = json.loads((path / "manifest.json").read_text(encoding="utf-8"))["files"]
    except OSError:
        return "no manifest.json"
    except (ValueError, KeyError, TypeError):
        return "manifest.json is damaged"
    if not isinstance(sizes, dict) or not {"model.safetensors", "state.safetensors", "state.json"} <= sizes.keys():
        return "manifest.json is damaged"
    for name, size in sizes.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
    return None


def save(
    folder: Path, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], *, rng: "Rng", keep: int
) -> Path:
    """Write the checkpoint of `step`, make it visible in one rename, then delete all but the newest `keep`.

    Args:
        folder: RUN/checkpoints.
        state: JSON data to keep beside the tensors; numbers come back exactly.
        rng: random states to keep (`Rng.now()`).

    Raises:
        CheckpointError: the disk is full or refuses; earlier checkpoints are untouched, nothing half-written is left.
    """
    final = folder / f"step-{step:06d}"
    temporary = folder / f"{_SAVING}{final.name}-{os.getpid()}"
    try:
        temporary.mkdir(parents=True)
        _write(temporary, model, optimizer, {**state, "step": step}, rng)
        if final.exists():
            os.rename(final, _unused(folder / f"{_BROKEN}{final.name}"))
        os.rename(temporary, final)
        _sync(folder)
    except (OSError, safetensors.SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        previous = find(folder).newest()
        kept = f"the previous checkpoint, {previous}, is still valid" if previous else "no earlier checkpoint exists"
        raise CheckpointError(f"could not save step {step} in {folder}: {error}; {kept}") from error
    _retain(folder, keep)
    return final


def _write(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: Mapping[str, Any], rng: "Rng") -> None:
    safetensors.torch.save_file(_parameters(model), folder / "model.safetensors")
    moments = {f"{key}/{name}": value for name, parts in _moments(model, optimizer).items() for key, value in parts.items()}
    safetensors.torch.save_file(moments | {f"rng/{name}": value for name, value in rng.torch.items()}, folder / "state.safetensors")
    record = {"format": _FORMAT, **state, "rng": {"python": rng.python, "numpy": rng.numpy}, "software": software()}
    (folder / "state.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    for name in sizes:
        _sync(folder / name)
    (folder / "manifest.json").write_text(json.dumps({"format": _FORMAT, "files": sizes}), encoding="utf-8")
    _sync(folder / "manifest.json")
    _sync(folder)


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return every parameter once (tied ones share a name), contiguous."""
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters()}


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Tensor]]:
    """Return the optimiser's tensors by parameter name; empty before the first step."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        names[parameter]: {key: value.contiguous() for key, value in parts.items() if isinstance(value, Tensor)}
        for parameter, parts in optimizer.state.items()
    }


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[dict[str, Any], "Rng"]:
    """Fill model and optimiser in place from a complete checkpoint; return its JSON state and random states.

    Raises:
        CheckpointError: a file is damaged, or belongs to another model; the message names it.
    """
    state = read_state(path)
    try:
        weights = safetensors.torch.load_file(path / "model.safetensors")
        tensors = safetensors.torch.load_file(path / "state.safetensors")
    except (OSError, safetensors.SafetensorError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from error
    parameters = dict(model.named_parameters())
    if weights.keys() != parameters.keys():
        different = sorted(weights.keys() ^ parameters.keys())
        raise CheckpointError(f"checkpoint {path} belongs to another model: {different[0]} and {len(different) - 1} more names differ")
    with torch.no_grad():
        for name, parameter in parameters.items():
            if weights[name].shape != parameter.shape:
                shapes = f"shape {tuple(weights[name].shape)}, the model wants {tuple(parameter.shape)}"
                raise CheckpointError(f"checkpoint {path}: {name} has {shapes}")
            parameter.copy_(weights[name])
    random_states = {}
    for key, tensor in tensors.items():
        kind, _, name = key.partition("/")
        if kind != "rng" and name not in parameters:
            raise CheckpointError(f"checkpoint {path}: state.safetensors has {key!r}, which belongs to no parameter")
        if kind == "rng":
            random_states[name] = tensor
        else:
            optimizer.state[parameters[name]][kind] = _like(parameters[name], tensor)
    if "cpu" not in random_states or {"python", "numpy"} - state.get("rng", {}).keys():
        raise CheckpointError(f"checkpoint {path} is damaged: it lacks a random state")
    return state, Rng(python=state["rng"]["python"], numpy=state["rng"]["numpy"], torch=random_states)


def _like(parameter: nn.Parameter, tensor: Tensor) -> Tensor:
    """Return a moment on its parameter's device and in its memory order; counters stay as they are, on the CPU unless fused."""
    if tensor.shape != parameter.shape or tensor.dim() == 0:
        return tensor.to(parameter.device)
    return torch.empty_like(parameter, requires_grad=False).copy_(tensor)


def read_state(path: Path) -> dict[str, Any]:
    """Return a checkpoint's JSON state.

    Raises:
        CheckpointError: missing, damaged, or written by a newer version.
    """
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"cannot read checkpoint {path}: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"cannot read checkpoint {path}: state.json holds a {type(state).__name__}")
    if state.get("format") != _FORMAT:
        raise CheckpointError(f"checkpoint {path} has format {state.get('format')}; this version reads format {_FORMAT}")
    return state


@dataclass(frozen=True)
class Rng:
    """The random states of a moment: Python's, numpy's global one, torch's for the CPU and every CUDA device."""

    python: list
    numpy: list
    torch: dict[str, Tensor]

    @classmethod
    def now(cls) -> "Rng":
        """Return the present states."""
        version, words, gauss = random.getstate()
        kind, keys, *rest = numpy.random.get_state(legacy=True)  # noqa: NPY002 the global state is what is being saved
        states = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
        return cls(python=[version, list(words), gauss], numpy=[kind, numpy.asarray(keys).tolist(), *rest], torch=states)

    def restore(self) -> None:
        """Make these the present states."""
        version, words, gauss = self.python
        random.setstate((version, tuple(words), gauss))
        kind, keys, *rest = self.numpy
        numpy.random.set_state((kind, numpy.array(keys, dtype=numpy.uint32), *rest))  # noqa: NPY002 as above
        torch.set_rng_state(self.torch["cpu"])
        for name, state in self.torch.items():
            if name != "cpu" and torch.cuda.is_available() and int(name[5:]) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, name)


def software() -> dict[str, str]:
    """Return what numbers depend on besides the config: versions and the CPU's instruction set."""
    return {
        "python": platform.python_version(),
        "tn": tn.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
    }


def _retain(folder: Path, keep: int) -> None:
    """Delete all complete checkpoints but the newest `keep`, and what earlier writers left unfinished."""
    old = list(find(folder).complete[:-keep])
    for path in old:
        doomed = _unused(folder / f"{_DELETING}{path.name}")
        os.rename(path, doomed)
    for path in folder.iterdir():
        if path.name.startswith((_DELETING, _SAVING)):
            shutil.rmtree(path, ignore_errors=True)


def _unused(path: Path) -> Path:
    """Return the path, or the first of path-1, path-2 … that does not exist."""
    candidate, count = path, 0
    while candidate.exists():
        count += 1
        candidate = path.with_name(f"{path.name}-{count}")
    return candidate


def _sync(path: Path) -> None:
    """Wait until a file or a folder's list of names is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
