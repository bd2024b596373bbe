"""Questions about cost, answered without running anything."""

from torch import nn

from tn.contraction import Contraction
from tn.plan import Plan
from tn.segments import cells
from tn.tracing import trace


def flops(target: nn.Module | Plan, *inputs: object) -> int:
    """FLOPs of one forward pass, 2 a multiply-add; planned for training or inference as `model.training` says.

    Args:
        target: a Plan, for its own sizes; or a module, with the inputs to call it with (only their shapes matter).

    Returns:
        For a module, the FLOPs of all matrix products built from tn.
    """
    if isinstance(target, Plan):
        return target.flops
    return trace(target, *inputs).flops


def explain(target: nn.Module | Plan) -> str:
    """Why it runs as it does: the plans of a layer, or of every one in a module, for each range of sizes, in training and evaluation.

    Each plan's table has, for every step, the operator, FLOPs, bytes, copies, predicted time and memory order, and the plans that were
    not chosen. Layers with the same network share a section.

    >>> import tn
    >>> print(tn.explain(tn.StructuredLinear(64, 64, structure="btt")).splitlines()[0])
    StructuredLinear(64, 64, bias=True, structure='btt', rank=1, factors=((8, 8), (8, 8)))
    """
    if isinstance(target, Plan):
        return str(target)
    layers: dict[object, list[tuple[str, Contraction]]] = {}
    for name, module in target.named_modules():
        if isinstance(module, Contraction):
            layers.setdefault(module.network, []).append((name, module))
    lines: list[str] = []
    for alike in layers.values():
        names, layer = [name for name, _ in alike if name], alike[0][1]
        lines += [*([", ".join(names)] if names else []), repr(layer)]
        ranges = cells(layer.network)
        for what, grad in (("training", layer.network.names), ("evaluation", ())):
            for cell in range(len(ranges)):
                lines += [f"{what}, {ranges.words(cell)}:", str(layer.plan(grad=grad, sizes=ranges.sizes(cell)))]
    return "\n".join(lines) if lines else "no contractions"
