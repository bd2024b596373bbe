"""Plans chosen by memory: the goals "saved" and "peak", and plans within a limit."""

import dataclasses

from tn import memory, slices
from tn.cost import step_flops, volume
from tn.errors import PlanError
from tn.layout import Job, choose
from tn.order import Path, every, steps_of, to_path
from tn.plan import Plan, settled
from tn.planner import TILES, joined, tiles_of
from tn.spec import ROWS

_EVERY = 5  # operands up to which every tree is looked at: 105
_DYNAMIC = 10  # operands up to which the tree that keeps least is found
_LAID_OUT = 8  # trees that get layouts, by each measure
_SHOWN = 3  # plans not chosen that a plan remembers


def frugal(base: Plan, limit: int | None) -> Plan:
    """The best plan by the goal of another one for the same job, with a peak of at most `limit` bytes.

    Args:
        base: what is best for "time" or "flops"; for few operands its order is one candidate of all, beyond them the one to start from.

    Raises:
        PlanError: no plan stays within the limit, or an operand is reduced before the first step, which no plan says the memory of.
    """
    if limit is not None and not base.plain_leaves:
        name = next(term.name for term, axes in zip(base.terms, base.leaves, strict=True) if term.axes != axes)
        raise PlanError(
            f"memory_limit= needs operands that go into the steps as they are: {name!r} has an axis that is repeated or summed alone"
        )
    if base.goal in ("time", "flops") and (limit is None or base.peak_bytes <= limit):
        return base
    plans = [base] if base.tile is None else [base, dataclasses.replace(base, tile=None)]
    plans += _of_outputs(base) if len(base.results) > 1 else _of_trees(base)
    straight = [plan for plan in plans if not plan.rearranged]
    straight += [dataclasses.replace(plan, tile=tile) for plan in straight if plan.tile is None for tile in tiles_of(plan)]
    plans = [*straight, *(plan for plan in plans if plan.rearranged)]
    able = plans if limit is None else slices.within(limit, plans, score)
    chosen = min(able, key=score)
    others = sorted({(plan.seconds, plan.path, plan.tile or 0) for plan in able if plan is not chosen})[:_SHOWN]
    return dataclasses.replace(chosen, floor=base.floor, others=tuple((seconds, path, tile or None) for seconds, path, tile in others))


def _of_trees(base: Plan) -> list[Plan]:
    """Plans of the trees that can keep least, or have least alive at once."""
    paths = [path for path in _trees(base) if path != base.path]
    ranked = [sorted((_least(base, path, measure), path) for path in paths)[:_LAID_OUT] for measure in ("saved", "peak")]
    size = {axis: extent or 2 for axis, extent in base.sizes}  # as in tn.planner
    job = Job.of(base.leaves, base.network.output.axes, size, base.needs[: len(base.leaves)], base.machine)
    found = []
    straight = [base.path] if base.rearranged else []  # the same order without copies of operands
    for path in dict.fromkeys(straight + [path for _, path in ranked[0] + ranked[1]]):
        orders = choose(path, job).orders
        found.append(settled(dataclasses.replace(base, path=path, orders=orders, tile=None, others=(), cotangent=())))
    return found


def _of_outputs(base: Plan) -> list[Plan]:
    """Plans of several outputs, of trees that are frugal for one of them by itself."""
    choices = []
    for part in base.parts:
        found = [frugal(dataclasses.replace(part, goal=goal), None) for goal in ("saved", "peak")]
        choices.append([part.path, *(plan.path for plan in found), *(path for plan in found for _, path, _ in plan.others)])
    return joined(base, choices, score)


def score(plan: Plan) -> tuple[float, float]:
    """What its goal minimises, then seconds."""
    found = {"time": plan.seconds, "flops": plan.flops + plan.backward_flops}.get(plan.goal)
    if found is None:
        found = plan.saved_bytes if plan.goal == "saved" else plan.peak_bytes
    return found, plan.seconds


def _least(base: Plan, path: Path, measure: str) -> tuple[int, int]:
    """(Bytes that a tree keeps, or has alive at once, if no step copies; its FLOPs)."""
    axes, needs, flops = [*base.leaves], [*base.needs[: len(base.leaves)]], 0
    for left, right, out in steps_of(path, base.leaves, base.network.output.axes):
        flops += step_flops(axes[left], axes[right], base.size) * (1 + needs[left] + needs[right])
        axes.append(out)
        needs.append(needs[left] or needs[right])
    rows = base.size.get(ROWS, 0)
    tiled = (
        base.machine.tiles and ROWS in axes[-1] and rows >= 2 * min(TILES) and any(ROWS in value for value in axes[len(base.leaves) : -1])
    )
    used = memory.lower_bound(path, axes, needs, {**base.size, ROWS: min(TILES)} if tiled else base.size, base.itemsize)
    return used.peak if measure == "peak" else 0 if tiled else used.saved, flops


def _trees(base: Plan) -> list[Path]:
    """Orders to look at: every one of few operands, else the given one; only that where another search than "auto" was asked for."""
    count = len(base.leaves)
    if base.search != "auto" or count > _EVERY:
        return [base.path, *([_least_saved(base)] if base.search == "auto" and count <= _DYNAMIC else [])]
    return list(every(count))


def _least_saved(base: Plan) -> Path:
    """The tree that keeps the fewest bytes, then with the fewest FLOPs, by dynamic programming over subsets of the operands."""
    count, output = len(base.leaves), set(base.network.output.axes)
    every_operand, needs = (1 << count) - 1, base.needs
    inside = [set().union(*(base.leaves[i] for i in range(count) if subset >> i & 1)) for subset in range(every_operand + 1)]
    axes = [inside[subset] & (output | inside[every_operand ^ subset]) for subset in range(every_operand + 1)]
    needed = [any(needs[i] for i in range(count) if subset >> i & 1) for subset in range(every_operand + 1)]
    size = [volume(kept, base.size) if subset & (subset - 1) else 0 for subset, kept in enumerate(axes)]  # operands are kept anyway
    best: dict[int, tuple[int, int, object]] = {1 << i: (0, 0, i) for i in range(count)}
    for subset in range(1, every_operand + 1):
        rest = other = subset & (subset - 1)
        options = []
        while other:
            part = subset ^ other
            saved = best[part][0] + best[other][0] + size[part] * needed[other] + size[other] * needed[part]
            flops = best[part][1] + best[other][1] + step_flops(axes[part], axes[other], base.size) * (1 + needed[part] + needed[other])
            options.append((saved, flops, part))
            other = (other - 1) & rest
        if options:
            saved, flops, part = min(options)
            best[subset] = saved, flops, (best[part][2], best[subset ^ part][2])
    return to_path(best[every_operand][2], count)
