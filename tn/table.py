"""A plan as the table that `print(plan)` shows."""

from tn import order, regions
from tn.cost import volume
from tn.order import Axes, Path
from tn.plan import Plan, Step


def table(plan: Plan) -> str:
    """Steps with operator, FLOPs, bytes, copies, time and memory order; totals; what was not chosen."""
    names = [term.name for term in plan.terms] + [f"v{i}" for i in range(len(plan.leaves), len(plan.orders))]
    names = [names[plan.first(value)] for value in range(len(names))]
    dynamic = ", ".join(f"{axis}={plan.size[axis]}" for axis in plan.network.dynamic)
    lines = [
        f"plan of {plan.network.spec}",
        f"  for {dynamic or 'fixed sizes'}, goal {plan.goal}, table {plan.machine.name}, gradients of {', '.join(plan.grad) or 'nothing'}",
    ]
    lines.append(f"  {'step':<28}{'operator':<18}{'MFLOP':>10}{'MB':>9}{'copies':>8}{'µs':>10}  memory order of the result")
    for leaf in plan.turned:
        lines.append(_copy(plan, names[leaf], plan.orders[leaf], plan.turning(leaf)))
    for step in plan.steps:
        title = f"{names[step.out]} = {names[step.left]} · {names[step.right]}"
        lines.append(_row(plan, title, step))
    if plan.turning_cotangent:
        result = plan.results[0]
        lines.append(_copy(plan, f"d{names[result]}", plan.cotangent, plan.turning_cotangent))
    for step in plan.backward_steps:
        title = f"d{names[step.out]} = d{names[step.left]} · {names[step.right]}"
        lines.append(_row(plan, title, step))
    if plan.tile is not None:
        lines.append(f"  with more than {plan.tile} rows: {plan.tile} rows at a time, intermediates made again for the gradients")
    if plan.slices:
        parts = ", ".join(f"{size} of {axis}" for axis, size in plan.slices)
        lines.append(f"  in {plan.slice_count} slices of {parts}; nothing kept, intermediates made again for the gradients")
    for output, value in zip(plan.network.spec.outputs, plan.results, strict=True):
        if len(plan.results) > 1:
            lines.append(f"  {output.name} is {names[value]}")
    shared = f" ({plan.tree_flops / 1e6:.2f} without sharing)" if plan.tree_flops > plan.flops else ""
    work = f"forward {plan.flops / 1e6:.2f} MFLOP{shared}, gradients {plan.backward_flops / 1e6:.2f} MFLOP"
    lines.append(f"  {work}, {plan.copies} copies, predicted {plan.seconds * 1e6:.0f} µs")
    lines.append(f"  {plan.saved_bytes / 1e6:.2f} MB kept for the gradients, at most {plan.peak_bytes / 1e6:.2f} MB at once")
    for seconds, path, tile in plan.others:
        rows = "all rows at once" if tile is None else f"{tile} rows at a time"
        more = 100 * (seconds / plan.seconds - 1) if plan.seconds else 0.0
        lines.append(f"  not chosen: {_words(plan, path, names)}, {rows}: predicted {seconds * 1e6:.0f} µs ({more:+.0f} %)")
    if plan.floor:
        of = "the best of all orders" if plan.search == "auto" and len(plan.leaves) <= order.EXACT else "the best order found"
        gap = f"gap {100 * (plan.seconds / plan.floor - 1):.0f} %"
        lines.append(f"  with every step in a layout of its own, all rows at once: {plan.floor * 1e6:.0f} µs for {of}, {gap}")
    lines += regions.describe(plan)
    return "\n".join(lines)


def _words(plan: Plan, path: Path, names: list[str]) -> str:
    """A path as nested products of tensor names, one for each output."""
    values = names[: len(plan.leaves)]
    for left, right in path:
        values.append(f"({values[left]} · {values[right]})")
    return ", ".join(values[value][1:-1] if value >= len(plan.leaves) else values[value] for value in plan.results)


def _copy(plan: Plan, name: str, order: Axes, seconds: float) -> str:
    size = 2e-6 * plan.itemsize * volume(order, plan.size)
    return f"  {f'copy of {name}':<28}{'copy':<18}{'':>10}{size:>9.2f}{1:>8}{seconds * 1e6:>10.0f}  {' '.join(order)}"


def _row(plan: Plan, title: str, step: Step) -> str:
    p, times = step.pairing, plan.times(step)
    operator = p.kind + (" into a view" if p.out == "strided" else "")
    work = f"{times * p.flops / 1e6:>10.2f}{times * p.bytes / 1e6:>9.2f}{p.copies:>8}{times * p.seconds * 1e6:>10.0f}"
    return f"  {title:<28}{operator:<18}{work}  {' '.join(plan.orders[step.out])}"
