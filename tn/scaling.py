"""Learning rates that follow from the Network: structure-aware maximal-update parametrisation (arXiv:2406.06248)."""

import fnmatch
import math
from collections.abc import Iterable, Iterator

from torch import nn

from tn.checks import check_model
from tn.contraction import Contraction
from tn.errors import SizeError, StructureError, unknown
from tn.linear import Embedding
from tn.network import Network

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_TABLES = (nn.Embedding, Embedding)
RULES = ("adam", "sgd")
_INPUT_NAMES = ("*input_layer*", "*to_patch_embedding*")  # of the paper's models


def multipliers(layer: Contraction, rule: str = "adam") -> dict[str, float]:
    """core → what its rate is relative to a dense matrix of the same sizes, the cores applied in spec order.

    For Adam (d_in / d_in,c) / n_cores: each core's update is as large as the dense one's, shared among the cores. For SGD, whose rate of a
    dense matrix goes as d_out / d_in (arXiv:2410.02117), (d_out,c / d_in,c) / (d_out / d_in) / n_cores. d_in and d_out are the products of
    the axes that the layer contracts and makes.
    """
    network: Network = getattr(layer, "reference", layer.network)
    if len(network.parts) > 1:  # each core as in the map of the first output it takes part in
        found: dict[str, float] = {}
        for part in reversed(network.parts):
            found |= _multipliers(part, rule)
        return {name: found[name] for name in network.cores}
    return _multipliers(network, rule)


def _multipliers(network: Network, rule: str) -> dict[str, float]:
    ins = [axis for name in network.inputs for axis in network.term(name).axes if axis in network.sizes]
    outs = [axis for axis in network.output.axes if axis in network.sizes]
    d_in = math.prod(network.sizes[axis] for axis in ins if axis not in outs)
    d_out = math.prod(network.sizes[axis] for axis in outs if axis not in ins)
    fans = network.fans()
    if rule == "adam":
        return {fan.core: d_in / max(fan.d_in, 1) / len(fans) for fan in fans}
    return {fan.core: (fan.d_out / max(fan.d_in, 1)) * (d_in / max(d_out, 1)) / len(fans) for fan in fans}


def param_groups(
    model: nn.Module,
    *,
    lr: float,
    weight_decay: float = 0.0,
    base: int | nn.Module | None = None,
    rule: str = "adam",
    independent_decay: bool = False,
    input_lr_mult: float = 1.0,
    input_layers: Iterable[str] | None = None,
) -> list[dict]:
    """Parameter groups for an optimiser, each with its own rate.

    Args:
        model: any module. A core of a Contraction gets `multipliers` times the width ratio, another matrix the width ratio,
            everything else 1.
        lr: the rate of a vector, and of a dense matrix at the base width.
        weight_decay: of matrices and cores; never of parameters of fewer than two dimensions, norms or embeddings.
        base: the width at which `lr` was found: None makes every width ratio 1, an integer is compared with the model's own
            `width` attribute, a model with the same parameter paths is compared layer by layer.
        rule: "adam" for Adam and its kin, whose rates go as 1 / d_in; "sgd", whose rates go as d_out / d_in, and for vectors and tables as
            their width; it compares shapes, so `base` is None or a model.
        independent_decay: divide the decay by the multiplier, because AdamW multiplies it by the rate: all weights then decay alike.
        input_lr_mult: a further factor on the parameters of the input layers. input_layers: globs of their paths; None: those named as in
            the paper's models (input_layer, to_patch_embedding), or else the first linear layer.

    Returns:
        Dicts of "params", "names", "lr", "multiplier", "weight_decay"; parameters with equal settings share a group, in model order.

    Raises:
        SizeError: an integer base for a model without `width`, a rate that is no number. StructureError: a base model without one of the
        layers, an unknown rule, input layers that are not there.
    """
    check_model(model)
    for what, value in (("lr", lr), ("input_lr_mult", input_lr_mult), ("weight_decay", weight_decay)):
        if isinstance(value, bool) or not (isinstance(value, int | float) and value >= 0 and math.isfinite(value)):
            raise SizeError(f"{what} is {value!r}, expected a finite number ≥ 0")
    if rule not in RULES:
        raise StructureError(unknown("rule", rule, RULES))
    if isinstance(base, bool) or not isinstance(base, int | nn.Module | None):
        raise SizeError(f"base is {base!r}, expected a width, a model or None")
    if isinstance(input_layers, str) or not isinstance(input_layers, Iterable | None):
        raise StructureError(f"input_layers is {input_layers!r}, expected globs over paths such as ['embed.*']")
    if rule == "sgd" and isinstance(base, int):
        raise StructureError(f"rule='sgd' compares the shapes of layers: give a base model instead of base={base}")
    first = _input_paths(model, input_layers) if input_lr_mult != 1 else set()
    groups: dict[tuple[float, float], dict] = {}
    for path, name, parameter, rate, decays in _settings(model, _Ratio(model, base, rule), rule):
        multiplier = rate * (input_lr_mult if path in first else 1)
        decay = weight_decay if decays and parameter.dim() >= 2 else 0.0
        if independent_decay and multiplier:
            decay /= multiplier
        group = groups.setdefault(
            (multiplier, decay), {"params": [], "names": [], "lr": lr * multiplier, "multiplier": multiplier, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _input_paths(model: nn.Module, layers: Iterable[str] | None) -> set[str]:
    """Paths of the modules whose own parameters belong to the input layers."""
    owners = [path for path, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None]
    if layers is not None:
        globs = list(layers)
        found = {path for path in owners if any(fnmatch.fnmatchcase(path, glob) for glob in globs)}
        if not found:
            raise StructureError(f"input_layers {globs} match none of the model's layers: {', '.join(owners[:8])}")
        return found
    found = {path for path in owners if any(fnmatch.fnmatchcase(path, glob) for glob in _INPUT_NAMES)}
    linear = (path for path, module in model.named_modules() if isinstance(module, nn.Linear | Contraction))
    return found or set(list(linear)[:1])


def _settings(model: nn.Module, ratio: "_Ratio", rule: str) -> Iterator[tuple[str, str, nn.Parameter, float, bool]]:
    """(path, name, parameter, multiplier, decays) once a parameter, in model order; a tied parameter belongs to its first owner."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        rates = multipliers(module, rule) if isinstance(module, Contraction) else {}
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{path}.{local}" if path else local
            if local in rates:
                yield path, name, parameter, rates[local] * ratio.of_layer(path, module), True
            elif isinstance(module, (*_NORMS, *_TABLES)) or parameter.dim() < 2:
                yield path, name, parameter, ratio.of_vector(name, parameter), False
            elif isinstance(module, Contraction):  # a dense twin; or the gate of experts, whose rate stays (arXiv:2410.02117)
                gate = local == "gate"
                yield path, name, parameter, 1.0 if gate else ratio.of_layer(path, module), not gate
            else:
                yield path, name, parameter, ratio.of_matrix(name, parameter), True


class _Ratio:
    """How a rate changes from the base to the model's width."""

    def __init__(self, model: nn.Module, base: int | nn.Module | None, rule: str) -> None:
        self.modules = dict(base.named_modules()) if isinstance(base, nn.Module) else {}
        self.parameters = dict(base.named_parameters()) if isinstance(base, nn.Module) else {}
        self.given, self.rule = isinstance(base, nn.Module), rule
        self.constant = 1.0
        if isinstance(base, int):
            width = getattr(model, "width", None)
            if not isinstance(width, int) or width < 1 or base < 1:
                raise SizeError(
                    f"base={base} is compared with model.width, which is {width!r}; give a base model of the same shape instead"
                )
            self.constant = base / width

    def of_layer(self, path: str, layer: Contraction) -> float:
        if not self.given:
            return self.constant
        other = self.modules.get(path)
        if other is None:
            raise StructureError(f"the base model has no layer {path!r}")
        return self._of(_sizes(other, path), _sizes(layer, path))

    def of_matrix(self, name: str, parameter: nn.Parameter) -> float:
        if not self.given:
            return self.constant
        other = self._twin(name)
        return self._of((other.shape[0], other.shape[1]), (parameter.shape[0], parameter.shape[1]))

    def of_vector(self, name: str, parameter: nn.Parameter) -> float:
        """1 under Adam; under SGD as its width: of a table the last dimension."""
        if not self.given or self.rule == "adam" or not parameter.dim() or name.endswith("gains"):
            return 1.0
        return parameter.shape[-1] / self._twin(name).shape[-1]

    def _twin(self, name: str) -> nn.Parameter:
        if name not in self.parameters:
            raise StructureError(f"the base model has no parameter {name!r}")
        return self.parameters[name]

    def _of(self, base: tuple[int, int], now: tuple[int, int]) -> float:
        """(out, in) of the base layer and of this one."""
        ratio = base[1] / now[1]
        return ratio if self.rule == "adam" else ratio * now[0] / base[0]


def _sizes(layer: nn.Module, path: str) -> tuple[int, int]:
    """(out, in) of a linear layer or contraction."""
    found = getattr(layer, "out_features", None), getattr(layer, "in_features", None)
    if isinstance(found[0], int) and isinstance(found[1], int):
        return found[0], found[1]
    if isinstance(layer, Contraction):
        network = layer.network
        ins = (axis for name in network.inputs for axis in network.term(name).axes)
        outs = (axis for term in network.spec.outputs for axis in term.axes)
        return math.prod(network.sizes.get(axis, 1) for axis in outs), math.prod(network.sizes.get(axis, 1) for axis in ins)
    raise StructureError(f"layer {path!r} of the base model is a {type(layer).__name__}, expected a linear layer")
