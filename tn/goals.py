"""What a plan is chosen for: time, floating-point operations, memory kept for the gradients, or the most memory at once."""

from collections.abc import Callable
from typing import TYPE_CHECKING

from tn import memory
from tn.cost import step_flops
from tn.layout import Job, bound
from tn.order import Path, steps_of
from tn.spec import ROWS

if TYPE_CHECKING:
    from tn.plan import Plan

GOALS = ("time", "flops", "peak", "saved")


def best(goal: str) -> Callable[["Plan"], tuple[float, float]]:
    """What to minimise: the goal, then seconds (for "time", FLOPs)."""
    return {
        "time": lambda plan: (plan.seconds, plan.flops),
        "flops": lambda plan: (plan.flops + plan.backward_flops, plan.seconds),
        "peak": lambda plan: (plan.peak_bytes, plan.seconds),
        "saved": lambda plan: (plan.saved_bytes, plan.seconds),
    }[goal]


def least(goal: str, path: Path, job: Job, itemsize: int, tile: int | None = None) -> tuple[float, ...]:
    """A lower bound of `best` for a tree, whatever its layouts, that ends with seconds for all rows at once.

    Args:
        tile: the fewest rows that can be worked on at a time, where fewer than all can.
    """
    seconds = bound(path, job)
    if goal == "time":
        return (seconds,)
    axes, needs, flops = [*job.inputs], list(job.grads), 0
    for left, right, out in steps_of(path, job.inputs, job.output):
        flops += step_flops(axes[left], axes[right], job.sizes) * (1 + needs[left] + needs[right])
        axes.append(out)
        needs.append(needs[left] or needs[right])
    if goal == "flops":
        return flops, seconds
    tiled = tile is not None and any(ROWS in value for value in axes[len(job.inputs) : -1])
    used = memory.lower_bound(path, axes, needs, {**job.sizes, ROWS: tile} if tiled else job.sizes, itemsize)
    return used.peak if goal == "peak" else 0 if tiled else used.saved, seconds
