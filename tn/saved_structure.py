"""Restructured models on disk: `tn_structure.json` beside the weights, read back without pickle in a new process."""

import inspect
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from tn.checks import check_model
from tn.errors import SizeError, StructureError, TnError, unknown
from tn.linear import StructuredLinear
from tn.replaceable import features, is_conv1d, is_linear, replace

FILE = "tn_structure.json"
FORMAT = 1
_WEIGHTS = "model.safetensors"


def save_restructured(model: nn.Module, folder: str | Path) -> None:
    """Write the weights of any model as `model.safetensors` and its structured layers as `tn_structure.json`.

    Models of transformers that `restructure` changed write the same file in their own `save_pretrained`.
    """
    from safetensors.torch import save_model  # late: keeps `import tn` light

    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    save_model(model, str(path / _WEIGHTS))
    write_structure(model, path)


def write_structure(model: nn.Module, folder: str | Path) -> None:
    """Write `tn_structure.json`: path → sizes and settings of every structured layer."""
    layers = {
        path: {"in_features": m.in_features, "out_features": m.out_features, "bias": m.bias is not None, "role": m.tn_role, **m.settings}
        for path, m in model.named_modules()
        if isinstance(m, StructuredLinear) and m.structure != "dense"
    }
    text = json.dumps({"format": FORMAT, "layers": layers}, indent=1, sort_keys=True)
    (Path(folder) / FILE).write_text(text + "\n", encoding="utf-8")


def load_restructured(model: nn.Module, folder: str | Path) -> nn.Module:
    """Give a fresh model of the original architecture the structured layers and weights of a folder; in place, all or nothing.

    Args:
        model: as it was before `restructure`. folder: with `tn_structure.json` and `model.safetensors`, one file or several with an index.

    Returns:
        The model.

    Raises:
        StructureError: a file that is missing or of another format, a layer the model does not have or that has another size.
        SizeError: weights that do not fit.
    """
    check_model(model)
    if not isinstance(folder, str | Path):
        raise StructureError(f"folder is {folder!r}, expected a path")
    path = Path(folder)
    new = _layers(model, _read(path))
    tensors = _tensors(path)
    wanted: dict[str, tuple[int, ...]] = {}
    for name, value in model.state_dict().items():
        if not any(name.startswith(f"{layer}.") for layer in new):
            wanted[name] = tuple(value.shape)
    for layer, twin in new.items():
        wanted |= {f"{layer}.{name}": tuple(value.shape) for name, value in twin.state_dict().items()}
    _check(model, wanted, tensors, path)
    for layer, twin in new.items():
        old = model.get_submodule(layer)
        twin.tn_role = getattr(old, "tn_role", None) or twin.tn_role
        role = twin.tn_role
        replace(model, layer, old, twin)
        twin.tn_role = role
    model.load_state_dict(tensors, strict=False)
    remember(model)
    return model


def remember(model: nn.Module) -> None:
    """Make a transformers model write `tn_structure.json` whenever it is saved."""
    if callable(getattr(type(model), "save_pretrained", None)):
        model.save_pretrained = types.MethodType(save_pretrained, model)  # type: ignore[assignment]


def save_pretrained(model: Any, save_directory: str | Path, *arguments: Any, **options: Any) -> Any:
    """The model's own `save_pretrained`, and `tn_structure.json` beside it, the weights under the names they have in the model."""
    # transformers 5 writes some models under the names of older versions, which do not fit structured layers
    if "save_original_format" in inspect.signature(type(model).save_pretrained).parameters:
        options.setdefault("save_original_format", False)
    done = type(model).save_pretrained(model, save_directory, *arguments, **options)
    write_structure(model, save_directory)
    return done


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    file = folder / FILE
    if not file.is_file():
        raise StructureError(f"{file} does not exist; restructured models are saved by save_pretrained or tn.save_restructured")
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise StructureError(f"{file} is damaged: {error}") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or not isinstance(value.get("layers"), dict):
        raise StructureError(f"{file} is not in format {FORMAT} of tn_structure.json")
    return value["layers"]


def _layers(model: nn.Module, saved: Mapping[str, dict[str, Any]]) -> dict[str, StructuredLinear]:
    linear = {path: m for path, m in model.named_modules() if is_linear(m)}
    found = {}
    for path, entry in saved.items():
        if path not in linear:
            raise StructureError(unknown("layer", path, linear))
        old, settings = linear[path], {name: _tuples(value) for name, value in entry.items()}
        size = (settings.pop("out_features", None), settings.pop("in_features", None))
        role, weight = settings.pop("role", None), next(old.parameters())
        if features(old) != size:
            raise StructureError(f"layer {path!r} maps {features(old)[1]} → {features(old)[0]}, the folder's {size[1]} → {size[0]}")
        try:
            new = StructuredLinear(size[1], size[0], device=weight.device, dtype=weight.dtype, **settings)
        except (TnError, TypeError) as error:
            raise StructureError(f"layer {path!r}: {error}") from error
        new.tn_role, new.replaced = role, type(old) if is_conv1d(old) else None
        found[path] = new
    return found


def _tensors(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file  # late: keeps `import tn` light

    index = folder / f"{_WEIGHTS}.index.json"
    names = [_WEIGHTS]
    if index.is_file():
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    found: dict[str, Tensor] = {}
    for name in names:
        if not (folder / name).is_file():
            raise StructureError(f"{folder / name} does not exist")
        found |= load_file(str(folder / name))
    return found


def _check(model: nn.Module, wanted: Mapping[str, tuple[int, ...]], tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Every tensor the model wants is there with its shape, or is tied to one that is; and nothing else."""
    extra = [name for name in tensors if name not in wanted]
    if extra:
        raise SizeError(f"{folder} has {extra[0]!r}, which the model does not")
    kept = {name: value.data_ptr() for name, value in model.state_dict().items() if name in wanted and value.numel()}
    loaded = {kept[name] for name in tensors if name in kept}
    for name, shape in wanted.items():
        if name not in tensors:
            if kept.get(name) not in loaded:
                raise SizeError(f"{folder} lacks {name!r}")
        elif tuple(tensors[name].shape) != shape:
            raise SizeError(f"{folder} has {name!r} of shape {tuple(tensors[name].shape)}, the model wants {shape}")


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
