"""Plans from their JSON: nothing in it is believed before it is checked."""

import json

from tn import order
from tn.documents import document, is_size
from tn.errors import PlanError, unknown
from tn.machine import Machine, machine
from tn.network import Network
from tn.order import Axes
from tn.plan import FORMAT, Plan
from tn.planner import GOALS

_KEYS = {
    "network": dict,
    "sizes": list,
    "grad": list,
    "goal": str,
    "search": str,
    "path": list,
    "orders": list,
    "tile": (int, type(None)),
    "cotangent": list,
    "floor": float,
    "others": list,
    "slices": list,
    "itemsize": int,
    "machine": str,
    "machine_digest": str,
}


def read(text: str, table: Machine | None) -> Plan:
    """See `Plan.from_json`."""
    value = document(text, FORMAT, _KEYS, "plan", PlanError)
    table = table or machine()
    if value["machine_digest"] != table.digest:
        raise PlanError(
            f"plan was made with machine table {value['machine']!r} ({value['machine_digest']}), got {table.name!r} ({table.digest})"
        )
    network = Network.from_json(json.dumps(value["network"]))
    try:
        sizes, sliced = (tuple((axis, size) for axis, size in value[key]) for key in ("sizes", "slices"))
        path = tuple((left, right) for left, right in value["path"])
        orders = tuple(map(tuple, value["orders"]))
        others = tuple((seconds, tuple((left, right) for left, right in path), tile) for seconds, path, tile in value["others"])
        cotangent = tuple(value["cotangent"])
        grad, goal, search, floor = tuple(value["grad"]), value["goal"], value["search"], value["floor"]
        made = Plan(
            network, sizes, grad, goal, search, path, orders, value["tile"], table, floor, others, sliced, value["itemsize"], cotangent
        )
        _check(made)
    except (TypeError, ValueError, IndexError) as error:
        raise PlanError(f"plan JSON does not describe a plan: {error}") from None
    return made


def _check(plan: Plan) -> None:
    """Raise PlanError where the parts of a plan that was read do not belong together."""
    net, count = plan.network, len(plan.leaves)
    if set(plan.size) != set(net.axes) or any(not is_size(size) for size in plan.size.values()):
        raise PlanError(f"sizes are {dict(plan.sizes)}, expected an integer ≥ 0 for each of {', '.join(net.axes)}")
    if any(net.sizes[axis] != plan.size[axis] for axis in net.sizes):
        raise PlanError(f"sizes are {dict(plan.sizes)}, the network has {dict(net.sizes)}")
    if unknown_names := [name for name in plan.grad if name not in net.names]:
        raise PlanError(unknown("tensor", unknown_names[0], net.names))
    if plan.goal not in GOALS:
        raise PlanError(unknown("goal", plan.goal, GOALS))
    if any(axis not in net.axes or not is_size(size) or size < 1 for axis, size in plan.slices):
        raise PlanError(f"slices are {dict(plan.slices)}, expected an integer ≥ 1 for axes of {', '.join(net.axes)}")
    for seconds, path, _ in plan.others:
        values = [value for number, pair in enumerate(path) for value in pair if not (is_size(value) and value < count + number)]
        if isinstance(seconds, bool) or not isinstance(seconds, int | float) or values or len(path) != len(plan.path):
            raise PlanError(f"others has {[seconds, path]}, expected seconds and {len(plan.path)} pairs of values")
    if plan.itemsize < 1:
        raise PlanError(f"itemsize is {plan.itemsize}, expected at least 1 byte")
    expected: list[Axes] = [*plan.leaves]
    leaf, step = 0, count
    for part in net.parts:  # each has a tree of its own: its operands, then its steps
        own = len(part.spec.operands)
        mine = [*range(leaf, leaf + own), *range(step, step + own - 1)]
        pairs, alive = plan.path[step - count : step - count + own - 1], set(mine[:own])
        for number, (left, right) in enumerate(pairs):
            if left == right or not {left, right} <= alive:
                raise PlanError(f"step {step - count + number} contracts values {left!r} and {right!r}, of which at least one is not there")
            alive = alive - {left, right} | {mine[own + number]}
        if len(alive) != 1:
            raise PlanError(f"{len(plan.path)} steps leave {len(alive)} tensors of {own} operands, expected one")
        local = tuple((mine.index(left), mine.index(right)) for left, right in pairs)
        expected += [out for *_, out in order.steps_of(local, plan.leaves[leaf : leaf + own], part.output.axes)]
        leaf, step = leaf + own, step + own - 1
    if len(plan.path) != step - count or len(plan.orders) != len(expected):
        raise PlanError(f"{len(plan.path)} steps and {len(plan.orders)} memory orders for {count} operands")
    for number, (given, axes) in enumerate(zip(plan.orders, expected, strict=True)):
        if sorted(map(str, given)) != sorted(axes):
            raise PlanError(f"value {number} has the memory order {given}, its axes are {axes}")
    if plan.cotangent and sorted(map(str, plan.cotangent)) != sorted(expected[-1]):
        raise PlanError(f"cotangent is {plan.cotangent}, the result has the axes {expected[-1]}")
