"""Learning rates that follow from the Network: structure-aware maximal-update parametrisation (arXiv:2406.06248)."""

import math

from torch import nn

from tn.contraction import Contraction
from tn.errors import SizeError, StructureError
from tn.linear import Embedding

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)
_TABLES = (nn.Embedding, Embedding)


def multipliers(layer: Contraction) -> dict[str, float]:
    """core → (d_in / d_in,c) / n_cores: what each core's rate is relative to a dense matrix of the same input size.

    Cores applied in spec order; d_in is the product of the input axes that the layer contracts.
    """
    network = layer.network
    kept = set(network.output.axes)
    d_in = math.prod(
        network.sizes[axis] for name in network.inputs for axis in network.term(name).axes if axis not in kept and axis in network.sizes
    )
    fans = network.fans()
    return {fan.core: d_in / max(fan.d_in, 1) / len(fans) for fan in fans}


def param_groups(model: nn.Module, *, lr: float, weight_decay: float = 0.0, base: int | nn.Module | None = None) -> list[dict]:
    """Parameter groups for any Adam-like optimiser, each with its own rate.

    Args:
        model: any module. A core of a Contraction gets `multipliers` times the width ratio, another matrix the width ratio,
            everything else 1.
        lr: the rate of a vector, and of a dense matrix at the base width.
        weight_decay: of matrices and cores; never of parameters of fewer than two dimensions, norms or embeddings.
        base: the width at which `lr` was found: None makes every width ratio 1, an integer is compared with the model's own
            `width` attribute, a model with the same parameter paths is compared layer by layer.

    Returns:
        Dicts of "params", "names", "lr", "multiplier", "weight_decay"; parameters with equal settings share a group, in model order.

    Raises:
        SizeError: an integer base for a model without `width`. StructureError: a base model without one of the layers.
    """
    if not (isinstance(lr, int | float) and lr >= 0 and math.isfinite(lr)):
        raise SizeError(f"lr is {lr!r}, expected a finite number ≥ 0")
    groups: dict[tuple[float, float], dict] = {}
    for name, parameter, multiplier, decays in _settings(model, _Ratio(model, base)):
        decay = weight_decay if decays and parameter.dim() >= 2 else 0.0
        group = groups.setdefault(
            (multiplier, decay), {"params": [], "names": [], "lr": lr * multiplier, "multiplier": multiplier, "weight_decay": decay}
        )
        group["params"].append(parameter)
        group["names"].append(name)
    return list(groups.values())


def _settings(model: nn.Module, ratio: "_Ratio"):
    """(name, parameter, multiplier, decays) once a parameter, in model order; a tied parameter belongs to its first owner."""
    seen: set[int] = set()
    for path, module in model.named_modules():
        rates = multipliers(module) if isinstance(module, Contraction) else {}
        for local, parameter in module.named_parameters(recurse=False):
            if id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{path}.{local}" if path else local
            if local in rates:
                yield name, parameter, rates[local] * ratio.of_layer(path, module), True
            elif isinstance(module, (*_NORMS, *_TABLES)) or parameter.dim() < 2:
                yield name, parameter, 1.0, False
            else:
                yield name, parameter, ratio.of_matrix(name, parameter), True


class _Ratio:
    """base width / width of a layer."""

    def __init__(self, model: nn.Module, base: int | nn.Module | None) -> None:
        self.modules = dict(base.named_modules()) if isinstance(base, nn.Module) else {}
        self.parameters = dict(base.named_parameters()) if isinstance(base, nn.Module) else {}
        self.given = isinstance(base, nn.Module)
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
        return _input_size(other, path) / _input_size(layer, path)

    def of_matrix(self, name: str, parameter) -> float:
        if not self.given:
            return self.constant
        if name not in self.parameters:
            raise StructureError(f"the base model has no parameter {name!r}")
        return self.parameters[name].shape[1] / parameter.shape[1]


def _input_size(layer: nn.Module, path: str) -> int:
    features = getattr(layer, "in_features", None)
    if isinstance(features, int):
        return features
    if isinstance(layer, Contraction):
        network = layer.network
        return math.prod(network.sizes.get(axis, 1) for name in network.inputs for axis in network.term(name).axes)
    raise StructureError(f"layer {path!r} of the base model is a {type(layer).__name__}, expected a linear layer")
