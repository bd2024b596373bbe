"""Slices: a plan that works on a part of some axes at a time, so that it stays within a memory limit. tn.sliced runs it.

Slices of an axis of the result write their part of it, slices of a contracted axis are added up. The backward pass makes the
intermediates of a slice again, so that nothing but operands is kept. Several outputs are made one after the other, and share nothing. The
axes are found greedily, as in cotengra's slicing, by the time they add for the memory they save.
"""

import dataclasses
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import TYPE_CHECKING

from tn import memory
from tn.cost import volume
from tn.errors import PlanError
from tn.network import Network
from tn.order import Axes
from tn.spec import Term

if TYPE_CHECKING:
    from tn.plan import Plan

_SEARCHED = 3  # plans that are sliced, the best first, if one of them can be


def inner(plan: "Plan") -> "Plan":
    """The plan of one slice of a plan with one output: one dimension an axis, and a name for every occurrence of a tensor, because they may
    be cut differently.

    Axes whose last slice is a smaller one are dynamic in it.
    """
    spec, size = plan.network.spec, plan.slice_size
    names = [term.name for term in spec.operands]
    for place in range(len(names)):
        while names.count(names[place]) > 1:
            names[place] = f"{names[place]}_{place}"
    operands = tuple(dataclasses.replace(split(term), name=name) for term, name in zip(spec.operands, names, strict=True))
    known = tuple((axis, size[axis]) for axis, full in plan.network.known if full % max(size[axis], 1) == 0)
    grad = tuple(name for name, need in zip(names, plan.needs, strict=False) if need)
    network = Network(dataclasses.replace(spec, operands=operands, outputs=(split(plan.network.output),)), known)
    return dataclasses.replace(plan, network=network, sizes=tuple(size.items()), grad=grad, slices=(), tile=None, others=())


def split(term: Term) -> Term:
    """A term with one dimension an axis."""
    return dataclasses.replace(term, dims=tuple((axis,) for axis in term.axes))


def seconds(plan: "Plan", gradients: bool) -> float:
    """Predicted seconds of cutting operands and joining results, forward or backward."""
    return sum(_moving(part, gradients) for part in plan.parts) if plan.slices else 0.0


def _moving(plan: "Plan", gradients: bool) -> float:
    terms = [*plan.network.spec.operands, plan.network.output]
    made = [term for term in terms if term.name in plan.grad] if gradients else terms[-1:]
    moved = sum(_copied(term.axes, plan) for term in (terms if gradients else terms[:-1]))
    moved += 2 * plan.itemsize * sum(volume(term.axes, plan.slice_size) for term in made)
    return plan.slice_count * ((len(terms) + len(made)) * plan.machine.element + 2 * moved / plan.machine.copy)


def measure(plan: "Plan") -> memory.Memory:
    """Memory of a sliced program: that of one slice, with the copies that cut operands and the cut gradient need."""
    forward, backward = zip(*map(_measure, plan.parts), strict=True)
    return memory.Memory(0, max(forward), max(backward))


def _measure(plan: "Plan") -> tuple[int, int]:
    one = memory.part(inner(plan))
    parts = sum(_copied(term.axes, plan) for term in plan.network.spec.operands)
    return parts + one.forward, parts + _copied(plan.network.output.axes, plan) + one.backward if plan.grad else 0


def _copied(axes: Axes, plan: "Plan") -> int:
    """Bytes of the copy of a tensor's slice; none where the slice is a run in memory."""
    full, cut = [plan.size[axis] for axis in axes], [plan.slice_size[axis] for axis in axes]
    first = next((place for place, size in enumerate(cut) if size != 1), len(cut))
    return 0 if cut[first + 1 :] == full[first + 1 :] else plan.itemsize * volume(axes, plan.slice_size)


def within(limit: int, plans: Sequence["Plan"], score: Callable[["Plan"], tuple[float, float]]) -> list["Plan"]:
    """Plans with a peak of at most `limit` bytes: those given that stay within it, and sliced ones.

    Raises:
        PlanError: there is none, with the smallest limit that there is a plan for.
    """
    fitting = [plan for plan in plans if plan.peak_bytes <= limit]
    if fitting and fitting[0].goal in ("peak", "saved"):
        return fitting
    whole = sorted((plan for plan in plans if plan.tile is None and not plan.rearranged), key=score)
    over = [plan for plan in whole if plan.peak_bytes > limit]
    least = {plan: _with(plan, dict.fromkeys(plan.size, 1)).peak_bytes for plan in over}
    able = [plan for plan in over if least[plan] <= limit]
    found = [*fitting, *(_cut(plan, limit) for plan in able[:_SEARCHED])]
    if not found:
        smallest = min([*least.values(), *(plan.peak_bytes for plan in plans)])
        raise PlanError(f"memory_limit is {limit} bytes, no plan needs less than {smallest} bytes")
    return found


def _cut(plan: "Plan", limit: int) -> "Plan":
    """Cut one axis after another into smaller slices, whichever adds the least time for the memory it saves, until the limit is met."""
    sizes: dict[str, int] = dict(plan.size)
    made = plan
    while made.peak_bytes > limit:
        options = [_with(plan, {**sizes, axis: -(-size // 2)}) for axis, size in sizes.items() if size > 1]
        made = min(options, key=lambda option: _price(made, option))
        sizes = dict(made.slice_size)
    for axis, size in made.slices:  # halves may be smaller than need be
        fits, too_large = size, min(2 * size, plan.size[axis] + 1)
        while too_large - fits > 1:
            middle = (fits + too_large) // 2
            larger = _with(plan, {**dict(made.slice_size), axis: middle})
            made, fits, too_large = (larger, middle, too_large) if larger.peak_bytes <= limit else (made, fits, middle)
    return made


def _price(before: "Plan", after: "Plan") -> tuple[float, float, float]:
    """What a cut costs: time added for every halving of the peak; cuts that do not lower it come last, the lowest peak first."""
    saved = math.log(before.peak_bytes / after.peak_bytes) if after.peak_bytes else math.inf
    if saved <= 0:
        return math.inf, after.peak_bytes, after.seconds
    return math.log(after.seconds / before.seconds) / saved, after.peak_bytes, after.seconds


def _with(plan: "Plan", sizes: Mapping[str, int]) -> "Plan":
    slices = tuple((axis, size) for axis, size in sizes.items() if size < plan.size[axis])
    return dataclasses.replace(plan, slices=slices)


def summed(axes: Collection[str], plan: "Plan") -> bool:
    """Whether slices of a tensor with these axes are added up."""
    return any(axis not in axes for axis, _ in plan.slices)
