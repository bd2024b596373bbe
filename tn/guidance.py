"""Self-guided training: a dense twin beside every structured layer, faded out (Wei et al. 2024, arXiv:2406.16450)."""

import math

from torch import nn

from tn.checks import check_model
from tn.errors import StructureError
from tn.linear import StructuredLinear
from tn.structures import get


class Guide:
    """Fades the dense twins of a model out. Make one with `tn.guide`.

    Attributes:
        steps: over which. done: calls of `step` so far.
    """

    def __init__(self, layers: dict[str, StructuredLinear], steps: int) -> None:
        self.layers, self.steps, self.done = layers, steps, 0

    @property
    def ratio(self) -> float:
        """The dense twins' part of every output: half a cosine from 1 to 0."""
        return 0.5 * (1 + math.cos(math.pi * min(self.done / self.steps, 1)))

    def step(self) -> float:
        """Call after every optimiser step; the last one removes the twins. Returns the new ratio."""
        self.done += 1
        if self.done >= self.steps:
            self.finish()
            return 0.0
        for layer in self.layers.values():
            layer.guidance.fill_(self.ratio)
        return self.ratio

    def finish(self) -> None:
        """Remove the twins: every layer is what its cores make."""
        self.done = self.steps
        for layer in self.layers.values():
            layer.set_shadow(False)


def guide(model: nn.Module, steps: int) -> Guide:
    """Give every structured layer a dense twin, first equal to its matrix: y = ratio · (shadow x) + (1 − ratio) · (W x) + b.

    The model computes what it did before. Call it before the optimiser is made, so that the twins (`shadow`, trained like dense matrices)
    are in its groups, and `Guide.step()` after each of its steps. Costs a dense layer's time and memory while it lasts.

    Args:
        model: with StructuredLinear layers. steps: until the twins are gone, ≥ 1.

    Raises:
        StructureError: no structured layer, one that has a twin already, or a number of steps below 1.

    >>> model = nn.Sequential(StructuredLinear(8, 6, structure="btt"))
    >>> fading = guide(model, steps=4)
    >>> [round(fading.step(), 2) for _ in range(4)]
    [0.85, 0.5, 0.15, 0.0]
    """
    check_model(model)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise StructureError(f"steps is {steps!r}, expected an integer ≥ 1")
    layers = {
        path: layer
        for path, layer in model.named_modules()
        if isinstance(layer, StructuredLinear) and layer.structure != "dense" and not get(layer.structure).gated
    }
    if not layers:
        raise StructureError(f"the {type(model).__name__} has no structured layer to guide")
    for path, layer in layers.items():
        if layer.shadow is not None:
            raise StructureError(f"layer {path!r} is guided already")
    for layer in layers.values():
        layer.set_shadow(True)
    return Guide(layers, steps)
