"""Questions about cost, answered without running anything."""

from torch import nn

from tn.plan import Plan
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
