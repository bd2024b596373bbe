"""Replace the dense layers of a model by structured ones in one call, and back."""

import fnmatch
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from tn import structures
from tn.errors import StructureError, unknown
from tn.linear import StructuredLinear

# torch modules that use the `weight` of their linear children without calling them
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

_GROUPS: dict[str, Callable[[str | None], bool]] = {
    "all": lambda role: True,
    "all_but_last": lambda role: role != "head",
    "ffn": lambda role: role is not None and role.startswith("mlp."),
    "attn": lambda role: role is not None and role.startswith("attention."),
    "head": lambda role: role == "head",
}


@dataclass(frozen=True, slots=True)
class Change:
    """One replaced layer: its path, its repr before and after, parameters before and after."""

    path: str
    before: str
    after: str
    parameters_before: int
    parameters_after: int


@dataclass(frozen=True, slots=True)
class Report:
    """What `restructure` or `densify` did. `str(report)` is a table."""

    changes: tuple[Change, ...]

    def __str__(self) -> str:
        lines = [f"{'layer':<40}{'parameters':>12} → {'':<12}  now"]
        lines += [f"{c.path:<40}{c.parameters_before:>12,} → {c.parameters_after:<12,}  {c.after}" for c in self.changes]
        before, after = sum(c.parameters_before for c in self.changes), sum(c.parameters_after for c in self.changes)
        lines.append(f"{len(self.changes)} layers{'':<31}{before:>12,} → {after:<12,}")
        return "\n".join(lines)


def restructure(
    model: nn.Module,
    *,
    structure: str,
    layers: str | Callable[[str, nn.Module], bool] = "all_but_last",
    rank: int | None = None,
    init: str = "scratch",
) -> Report:
    """Replace linear layers in place by structured ones of the same sizes. All or nothing.

    Args:
        model: any module; `nn.Linear` and `tn.StructuredLinear` layers can be replaced.
        structure, rank: as in `tn.StructuredLinear`.
        layers: "all", "all_but_last", "ffn", "attn" or "head" (the last two and "ffn" go by the `tn_role` of a layer; the last layer
            without roles is the last linear one), a glob over layer paths such as "blocks.*.mlp.*", or a predicate (path, module) → bool.
        init: "scratch" draws new cores.

    Returns:
        A Report of what changed.

    Raises:
        StructureError: an unknown structure or group, no matching layer, a matching layer with shared parameters.
    """
    structures.get(structure)
    if init != "scratch":
        raise StructureError(
            f"init={init!r} is not available yet, only 'scratch': projecting trained weights onto a structure is still to come"
        )
    chosen = _select(model, layers)
    built = {}
    for path, layer in chosen.items():
        weight = next(layer.parameters())
        zero = bool(getattr(layer, "zero_init", False))
        new = StructuredLinear(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            structure=structure,
            rank=rank,
            zero_init=zero,
            device=weight.device,
            dtype=weight.dtype,
        )
        built[path] = _frozen_as(layer, new)
    return _swap(model, chosen, built)


def densify(model: nn.Module) -> Report:
    """Replace every structured layer inside a model in place by the dense one with the same matrix and bias. All or nothing.

    Raises:
        StructureError: the model itself is such a layer, or a layer cannot be replaced alone (see `restructure`).
    """
    if isinstance(model, StructuredLinear):
        raise StructureError("a layer cannot replace itself: give densify the model that holds it, or take layer.to_dense()")
    chosen: dict[str, nn.Module] = {p: m for p, m in model.named_modules() if isinstance(m, StructuredLinear) and m.structure != "dense"}
    _check_owned(model, chosen)
    built = {}
    for path, layer in chosen.items():
        core = next(layer.parameters())
        new = StructuredLinear(layer.in_features, layer.out_features, bias=layer.bias is not None, device=core.device, dtype=core.dtype)
        with torch.no_grad():
            new.weight.copy_(layer.to_dense())
            if layer.bias is not None:
                new.bias.copy_(layer.bias)
        built[path] = _frozen_as(layer, new)
    return _swap(model, chosen, built)


def _frozen_as(old: nn.Module, new: StructuredLinear) -> StructuredLinear:
    """The new layer with its cores frozen if the old weights are, and its bias frozen if the old bias is."""
    weights = [parameter for name, parameter in old.named_parameters(recurse=False) if name != "bias"]
    for name, parameter in new.named_parameters():
        was = [old.bias] if name == "bias" else weights
        parameter.requires_grad_(any(p.requires_grad for p in was))
    return new


def _select(model: nn.Module, layers: str | Callable[[str, nn.Module], bool]) -> dict[str, nn.Module]:
    linear: dict[str, nn.Module] = {path: m for path, m in model.named_modules() if path and isinstance(m, nn.Linear | StructuredLinear)}
    roles = {path: getattr(m, "tn_role", None) for path, m in linear.items()}
    if linear and not any(roles.values()):
        roles[list(linear)[-1]] = "head"  # without roles the last linear layer is the head
    if callable(layers):
        chosen = {path: m for path, m in linear.items() if layers(path, m)}
    elif layers in _GROUPS:
        chosen = {path: m for path, m in linear.items() if _GROUPS[layers](roles[path])}
    elif any(mark in layers for mark in "*?[.") or layers in linear:
        chosen = {path: m for path, m in linear.items() if fnmatch.fnmatchcase(path, layers)}
    else:
        raise StructureError(unknown("layers", layers, _GROUPS))
    if not chosen:
        raise StructureError(f"layers={layers!r} matches none of the {len(linear)} linear layers: {', '.join(list(linear)[:8])}")
    _check_owned(model, chosen)
    return chosen


def _check_owned(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raise StructureError for a layer that cannot be replaced alone: shared, tied, or read by its parent behind its back."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + (parameter is not None)
    for path, layer in chosen.items():
        if len(paths[id(layer)]) > 1:
            raise StructureError(
                f"layer {path!r} is used under several names ({', '.join(paths[id(layer)])}); give each place its own layer"
            )
        if any(owners[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)):
            raise StructureError(f"layer {path!r} shares a parameter with another one (a tied head?); untie it before restructuring")
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, _READS_WEIGHTS):
            raise StructureError(f"layer {path!r} belongs to a {type(parent).__name__}, which reads its weight directly; leave it out")


def _swap(model: nn.Module, old: dict[str, nn.Module], new: dict[str, StructuredLinear]) -> Report:
    changes = []
    for path, layer in new.items():
        parent, _, name = path.rpartition(".")
        layer.tn_role = getattr(old[path], "tn_role", None)
        layer.train(old[path].training)
        setattr(model.get_submodule(parent), name, layer)
        counts = [sum(p.numel() for p in m.parameters()) for m in (old[path], layer)]
        changes.append(Change(path, repr(old[path]), repr(layer), *counts))
    return Report(tuple(changes))
