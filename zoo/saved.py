"""Models on disk: a folder with `model.json`, `model.safetensors` and, where given, `tokenizer.json`.

Every file is written beside its final place, flushed to the disk and renamed, so that a reader finds the old file or
the new one and never a part of one. `model.json` says what to build (kind, configuration, and the structure and
factors of every structured layer, so that a model changed by `tn.restructure` comes back as it was and a later default
for the factors cannot break it). `model.safetensors` holds the state dict, contiguous and in the order of the specs.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

import tn
from zoo.config import GPTConfig
from zoo.errors import SavedModelError
from zoo.gpt import GPT

_FORMAT, _VERSION = "tn-zoo", 1
_KINDS: dict[str, tuple[type[GPTConfig], type[GPT]]] = {"gpt": (GPTConfig, GPT)}
_DENSE = {"structure": "dense", "rank": None, "factors": None}


class _Saves(Protocol):
    def save(self, directory: Path) -> object: ...


def save(model: GPT, directory: str | Path, tokenizer: _Saves | None = None) -> Path:
    """Write a model, and its tokenizer where given, into a folder.

    Args:
        model: the model; its parameters may be on any device and of any dtype.
        directory: made if need be. The new files are written whole and flushed in a folder inside it, then renamed over those of an
            earlier save: `model.safetensors` last but one, `model.json` last.
        tokenizer: anything whose `save(directory)` writes `tokenizer.json`.

    Returns:
        the folder.

    Raises:
        SavedModelError: the folder cannot be written. A full disk leaves what was there unchanged. Only a process that ends, or a
            disk that refuses, between the renames leaves files of two saves, which `load` refuses by name.
    """
    directory = Path(directory)
    description = json.dumps(describe_model(model), indent=2) + "\n"
    make_folder(directory)
    aside = directory / f".saving-{os.getpid()}"
    writers: list[tuple[str, Callable[[Path], object]]] = [
        ("model.safetensors", _tensor_writer(model.state_dict(), {"format": "pt", "model": description})),
        ("model.json", lambda file: file.write_text(description, encoding="utf-8")),
    ]
    name = "tokenizer.json"
    try:
        aside.mkdir()
        if tokenizer is not None:
            tokenizer.save(aside)
        for name, write in writers:
            _write_flushed(aside / name, write)
        _move_into(directory, aside)
    except (OSError, safetensors.SafetensorError) as error:
        raise SavedModelError(f"cannot write {directory / name}, which is left as it was: {_one_line(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return directory


def _move_into(directory: Path, aside: Path) -> None:
    """Rename every file of a folder into another, the model's two last."""
    files = sorted(aside.iterdir(), key=lambda path: (path.name == "model.json", path.name == "model.safetensors", path.name))
    for file in files:
        if (directory / file.name).is_dir():  # no rename can replace it: refuse before the first one
            raise SavedModelError(f"cannot write {directory / file.name}: it is a folder")
    for file in files:
        try:
            file.replace(directory / file.name)
        except OSError as error:
            raise SavedModelError(f"cannot write {directory / file.name}: {_one_line(error)}") from error
    _flush(directory)


def load(directory: str | Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> GPT:
    """The model that `save` wrote, in evaluation mode.

    Args:
        directory: folder with `model.json` and `model.safetensors`.
        device: where to put it (default: the CPU).
        dtype: of its parameters (default: as saved).

    Raises:
        SavedModelError: a file is missing, truncated, of another kind or of another save; the message names it.
    """
    directory = Path(directory)
    model = build(directory, device="meta")
    description = (directory / "model.json").read_text(encoding="utf-8")
    path = directory / "model.safetensors"
    tensors, metadata = read_tensors(path, device="cpu" if device is None else device)
    if metadata.get("model", description) != description:
        raise SavedModelError(f"{path} and model.json beside it are of different saves; save the model again")
    fill(model, tensors, path)
    return model.to(dtype=dtype).eval() if dtype is not None else model.eval()


def build(directory: str | Path, device: torch.device | str | None = None) -> GPT:
    """A model of the shape that `model.json` describes, with random parameters ("meta": without memory).

    Raises:
        SavedModelError: `model.json` is missing, damaged or not ours; the message names it.
    """
    path = Path(directory) / "model.json"
    data = _read_description(path)
    config_class, model_class = _KINDS[data["kind"]]
    try:
        model = model_class(config_class.from_dict(data["config"]), device=device)
    except tn.TnError as error:
        raise SavedModelError(f"{path}: {error}") from error
    _set_structures(model, data["layers"], path)
    return model


def describe_model(model: GPT) -> dict[str, Any]:
    """What `model.json` holds: plain values from which `build` makes a model of the same shape."""
    kinds = {model_class: kind for kind, (_, model_class) in _KINDS.items()}
    if type(model) not in kinds:
        raise SavedModelError(f"cannot save a {type(model).__name__}; zoo.save takes: {', '.join(_KINDS)}")
    layers = {name: _structure_of(layer) for name, layer in _structured_layers(model) if _structure_of(layer) != _DENSE}
    return {
        "format": _FORMAT,
        "version": _VERSION,
        "kind": kinds[type(model)],
        "config": model.config.to_dict(),
        "layers": layers,
    }


def fill(model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Give a model on the meta device memory, and the values of `tensors`, where and of the dtype they are.

    Raises:
        SavedModelError: names or shapes differ; the message names `path` and the first differences.
    """
    wanted = dict(model.state_dict())
    _check_names(wanted, tensors, path)
    for name, tensor in tensors.items():
        if tensor.shape != wanted[name].shape:
            raise SavedModelError(f"{path}: {name} has shape {tuple(tensor.shape)}, and the model needs {tuple(wanted[name].shape)}")
    device = next((tensor.device for tensor in tensors.values()), torch.device("cpu"))
    model.to_empty(device=device)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(tensors[name].dtype)
    model.load_state_dict(dict(tensors))


def read_tensors(path: Path, device: torch.device | str = "cpu") -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises:
        SavedModelError: the file is missing, truncated or not in the safetensors format.
    """
    if not path.is_file():
        raise SavedModelError(f"{path} is missing{_files_beside(path)}")
    try:
        with safetensors.safe_open(str(path), framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118 (safe_open is not a mapping)
    except (safetensors.SafetensorError, OSError) as error:
        raise SavedModelError(f"{path} ({path.stat().st_size} bytes) is truncated or not a safetensors file: {_one_line(error)}") from error


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file atomically; tensors are stored contiguously, in canonical axis order."""
    _write(path, _tensor_writer(tensors, metadata))


def _tensor_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Callable[[Path], object]:
    flat = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    return lambda file: safetensors.torch.save_file(flat, str(file), metadata=dict(metadata))


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically, as UTF-8."""
    _write(path, lambda part: part.write_text(text, encoding="utf-8"))


def make_folder(directory: Path) -> None:
    """Make a folder, and its parents, unless it is there.

    Raises:
        SavedModelError: a file is in the way, or the folder cannot be made.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SavedModelError(f"cannot make the folder {directory}: {_one_line(error)}") from error


def _write(path: Path, write: Callable[[Path], object]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        _write_flushed(part, write)
        part.replace(path)
        _flush(path.parent)
    except (OSError, safetensors.SafetensorError) as error:
        raise SavedModelError(f"cannot write {path}, which is left as it was: {_one_line(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink()


def _write_flushed(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file and wait until it is on the disk."""
    path.touch()
    mode = path.stat().st_mode  # what the user's umask gives; safetensors would let only the owner read
    write(path)
    path.chmod(mode)
    _flush(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _read_description(path: Path) -> dict[str, Any]:
    if not path.is_file():
        folder = path.parent
        if (folder / "config.json").is_file():
            raise SavedModelError(f"{path} is missing; {folder} looks like a Hugging Face model: use zoo.from_pretrained")
        raise SavedModelError(f"{path} is missing{_files_beside(path)}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SavedModelError(f"{path} is truncated or not JSON: {_one_line(error)}") from error
    if not isinstance(data, dict) or data.get("format") != _FORMAT:
        raise SavedModelError(f"{path} does not describe a zoo model (no field format={_FORMAT!r})")
    if data.get("version") != _VERSION:
        raise SavedModelError(f"{path} has format version {data.get('version')!r}; this version reads {_VERSION}")
    if data.get("kind") not in _KINDS:
        raise SavedModelError(f"{path}: {tn.errors.unknown('kind of model', data.get('kind'), tuple(_KINDS))}")
    for field in ("config", "layers"):
        if not isinstance(data.get(field), dict):
            raise SavedModelError(f"{path} has no field {field!r}")
    return data


def _structured_layers(model: nn.Module) -> list[tuple[str, tn.StructuredLinear]]:
    return [(name, module) for name, module in model.named_modules() if isinstance(module, tn.StructuredLinear)]


def _structure_of(layer: tn.StructuredLinear) -> dict[str, Any]:
    if layer.structure == "dense":
        return _DENSE
    known = {"structure": layer.structure, "rank": _plain(layer.rank), "factors": _plain(layer.factors) or None}
    further = {name: value for name, value in layer.settings.items() if name not in (*known, "zero_init")}
    return {**known, **further}


def _set_structures(model: GPT, layers: Mapping[str, Any], path: Path) -> None:
    """Replace every linear layer whose structure, rank or factors differ from those listed in `path`."""
    found = dict(_structured_layers(model))
    for name in layers:
        if name not in found:
            raise SavedModelError(f"{path}: {tn.errors.unknown('layer', name, tuple(found))}")
    for name, old in found.items():
        want = layers.get(name, _DENSE)
        if want == _structure_of(old):
            continue
        settings = {option: _tuples(value) for option, value in want.items()}
        try:
            new = tn.StructuredLinear(
                old.in_features,
                old.out_features,
                bias=old.bias is not None,
                structure=settings.pop("structure"),
                **settings,
                zero_init=old.zero_init,
                device=next(old.parameters()).device,
            )
        except (tn.TnError, KeyError, TypeError) as error:
            raise SavedModelError(f"{path}: layer {name}: {_one_line(error)}") from error
        new.tn_role = old.tn_role
        model.set_submodule(name, new)


def _check_names(wanted: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted]
    if missing or extra:
        parts = [f"{word} {_first(names)}" for word, names in (("lacks", missing), ("has unknown", extra)) if names]
        raise SavedModelError(f"{path} does not fit the model: it {' and '.join(parts)}")


def _first(names: list[str], count: int = 3) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _files_beside(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f": there is no folder {folder}"
    names = sorted(file.name for file in folder.iterdir() if not file.name.startswith("."))
    return f"; {folder} holds: {_first(names, 6) if names else 'nothing'}"


def _plain(value: Any) -> Any:
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list | tuple) else value


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
