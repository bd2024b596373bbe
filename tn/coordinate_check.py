"""Do features change alike at every width? A few optimiser steps at several widths, the change of every layer's output, and its slope."""

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tn.checks import positive
from tn.contraction import Contraction
from tn.errors import SizeError, StructureError, unknown
from tn.scaling import param_groups

_ROWS = 64


@dataclass(frozen=True)
class CoordinateCheck:
    """What `coordinate_check` measured. `str(check)` is a table, `check.draw(path)` a picture.

    Attributes:
        widths: ascending. changes: layer → root mean square change of its output at each width, the mean over seeds.
    """

    widths: tuple[int, ...]
    changes: dict[str, tuple[float, ...]]

    def slope(self, layer: str) -> float:
        """Of log change against log width, least squares: 0 is a change that does not depend on the width.

        Raises:
            StructureError: a layer that was not measured.
        """
        if layer not in self.changes:
            raise StructureError(unknown("layer", layer, self.changes))
        x, y = [math.log(w) for w in self.widths], [math.log(max(c, 1e-300)) for c in self.changes[layer]]
        return statistics.linear_regression(x, y).slope

    def spread(self, layer: str) -> float:
        """The largest change over the smallest."""
        return max(self.changes[layer]) / max(min(self.changes[layer]), 1e-300)

    def __str__(self) -> str:
        lines = [f"{'change of the output of':<32}{''.join(f'{w:>11}' for w in self.widths)}{'slope':>9}{'spread':>8}"]
        for layer, changes in self.changes.items():
            cells = "".join(f"{change:>11.3g}" for change in changes)
            lines.append(f"{layer:<32}{cells}{self.slope(layer):>9.2f}{self.spread(layer):>8.2f}")
        return "\n".join(lines)

    def draw(self, path: str | Path) -> None:
        """Write the changes against the width, both logarithmic, as a picture (PNG, SVG or PDF by the name's ending)."""
        from matplotlib.figure import Figure  # late: keeps `import tn` light

        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.add_subplot()
        for layer, changes in self.changes.items():
            axes.plot(self.widths, changes, marker="o", label=f"{layer} ({self.slope(layer):+.2f})")
        axes.set(xscale="log", yscale="log", xlabel="width", ylabel="change of the output, root mean square")
        axes.set_xticks(self.widths, [str(width) for width in self.widths])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small", title="layer (slope)")
        figure.savefig(path, dpi=150)


def coordinate_check(
    model_fn: Callable[[int], nn.Module],
    widths: Iterable[int],
    *,
    loss: Callable[[nn.Module], Tensor] | None = None,
    steps: int = 5,
    seeds: int = 5,
    lr: float = 1e-3,
    groups: Callable[[nn.Module], Sequence[dict[str, Any]]] | None = None,
) -> CoordinateCheck:
    """Train a model for a few Adam steps at several widths and measure how far every linear layer's output moves (arXiv:2203.03466).

    Args:
        model_fn: width → a new model, drawn with torch's generator.
        widths: at least two; the smallest is the base width of the rates.
        loss: model → scalar, on the same data each time; None: cross-entropy of random labels on 64 normal rows of the size that the
            first linear layer takes.
        steps: of Adam. seeds: how many starts are averaged. lr: of `tn.param_groups` at the smallest width.
        groups: model → parameter groups, instead of `tn.param_groups(model, lr=lr, base=model_fn(smallest))`.

    Returns:
        A CoordinateCheck. Torch's random state is left as it was.

    Raises:
        SizeError: fewer than two widths, steps or seeds below one. StructureError: a model without linear layers.

    >>> check = coordinate_check(lambda w: nn.Sequential(nn.Linear(8, w), nn.ReLU(), nn.Linear(w, 4)), (16, 64), seeds=1)
    >>> list(check.changes)
    ['0', '2']
    """
    for what, function in (("model_fn", model_fn), ("loss", loss), ("groups", groups)):
        if not callable(function) and not (function is None and what != "model_fn"):
            raise StructureError(f"{what} is {function!r}, expected a function")
    given = list(widths) if isinstance(widths, Iterable) else [widths]
    if len(set(given)) < 2 or not all(map(positive, (*given, steps, seeds))):
        raise SizeError(f"needs two or more widths and at least one step and seed, all integers, got {widths=}, {steps=}, {seeds=}")
    sizes = tuple(sorted(set(given)))
    changes: dict[str, list[float]] = {}
    with torch.random.fork_rng(devices=[]):
        base = _model(model_fn, sizes[0])
        for width in sizes:
            found: dict[str, list[float]] = {}
            for seed in range(seeds):
                torch.manual_seed(seed)
                model = _model(model_fn, width)
                wanted = groups(model) if groups else param_groups(model, lr=lr, base=base)
                for layer, change in _trained(model, wanted, loss or _labels(model, seed), steps, lr).items():
                    found.setdefault(layer, []).append(change)
            for layer, values in found.items():
                changes.setdefault(layer, []).append(statistics.mean(values))
    return CoordinateCheck(sizes, {layer: tuple(values) for layer, values in changes.items()})


def _model(model_fn: Callable[[int], nn.Module], width: int) -> nn.Module:
    model = model_fn(width)
    if not isinstance(model, nn.Module):
        raise StructureError(f"model_fn({width}) is a {type(model).__name__}, expected a torch.nn.Module")
    _layers(model)
    return model


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    found: dict[str, nn.Module] = {path: m for path, m in model.named_modules() if isinstance(m, nn.Linear | Contraction)}
    if not found:
        raise StructureError(f"the {type(model).__name__} has no linear layer to watch")
    return found


def _labels(model: nn.Module, seed: int) -> Callable[[nn.Module], Tensor]:
    """Cross-entropy of random labels on normal rows."""
    first = next(iter(_layers(model).values()))
    features = getattr(first, "in_features", None)
    if not isinstance(features, int):
        raise StructureError(f"the first layer is a {type(first).__name__} without in_features; give loss=")
    generator = torch.Generator().manual_seed(seed)
    parameter = next(model.parameters())
    x = torch.randn(_ROWS, features, generator=generator).to(parameter)
    draw = torch.rand(_ROWS, generator=generator).to(parameter.device)

    def loss(model: nn.Module) -> Tensor:
        y = model(x)
        return nn.functional.cross_entropy(y, (draw * y.shape[-1]).long())

    return loss


def _trained(
    model: nn.Module, groups: Sequence[dict[str, Any]], loss: Callable[[nn.Module], Tensor], steps: int, lr: float
) -> dict[str, float]:
    """Layer → root mean square difference of its output before and after the steps."""
    before = _outputs(model, loss)
    if not groups:
        raise StructureError("groups gave no parameter groups")
    optimizer = torch.optim.Adam(groups, lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model).backward()
        optimizer.step()
    after = _outputs(model, loss)
    return {layer: float((after[layer] - value).square().mean().sqrt()) for layer, value in before.items()}


def _outputs(model: nn.Module, loss: Callable[[nn.Module], Tensor]) -> dict[str, Tensor]:
    """Output of every linear layer while the loss is taken."""
    found: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_hook(lambda _module, _inputs, output, path=path: found.__setitem__(path, output.detach().clone()))
        for path, layer in _layers(model).items()
    ]
    try:
        with torch.no_grad():
            found_loss = loss(model)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(found_loss, Tensor) or found_loss.numel() != 1:
        got = f"shape {tuple(found_loss.shape)}" if isinstance(found_loss, Tensor) else f"a {type(found_loss).__name__}"
        raise StructureError(f"loss gave {got}, expected one number as a tensor")
    return found
