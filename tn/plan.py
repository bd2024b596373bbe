"""A Plan: the contraction order, the memory order of every value, and the kind and cost of each step. Pure data."""

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from tn import order, store
from tn.cost import contraction_flops, step_flops, volume
from tn.documents import document, is_size
from tn.errors import PlanError, SizeError, unknown
from tn.layout import Job, bound, choose
from tn.machine import Machine, machine
from tn.network import Network
from tn.order import Axes, Path
from tn.pairing import Pairing, pair
from tn.spec import ROWS

FORMAT = 2  # of the JSON
_KEYS = {
    "network": dict,
    "sizes": list,
    "grad": list,
    "goal": str,
    "search": str,
    "path": list,
    "orders": list,
    "tile": (int, type(None)),
    "floor": float,
    "others": list,
    "machine": str,
    "machine_digest": str,
}
GOALS = ("time", "flops")
_TILES = (128, 64, 256, 512, 1024, 2048)  # rows worked on at a time that are tried, in the layout that is best for the first
_LAID_OUT = 8  # trees of the least bound that get layouts
_SHOWN = 3  # plans not chosen that a plan remembers
_TILED = 2  # the fastest of those that are tried with tiles
DEFAULT_ROWS = 1024  # size assumed for a dynamic axis when none is given
SEGMENTS = ((32, 8), (512, 128), (math.inf, 2048))  # a layer's rows: below the first number, it runs the plan for the second


@dataclass(frozen=True, slots=True)
class Step:
    """One pairwise contraction of SSA values `left` and `right` into value `out`, and how it runs."""

    left: int
    right: int
    out: int
    pairing: Pairing


@dataclass(frozen=True)
class Plan:
    """How a network is contracted. Make one with `tn.plan`.

    Attributes:
        network: what is contracted. sizes: (axis, size) pairs the plan was made for, dynamic axes included.
        grad: tensors that need a gradient. goal, search: as asked for.
        path: pairs of SSA values. orders: memory order of every SSA value (operands, then one a step).
        tile: rows worked on at a time, so that intermediates stay in cache; None to take all rows at once. With tiles, the backward
            pass makes the intermediates again instead of keeping them.
        machine: the table of rates behind the predicted times.
        floor: seconds of the best tree that was looked at, if each step took all rows at once in its own best layout, nothing broadcast.
        others: the best of the plans that were not chosen: predicted seconds, path, tile.
    """

    network: Network
    sizes: tuple[tuple[str, int], ...]
    grad: tuple[str, ...]
    goal: str
    search: str
    path: Path
    orders: tuple[Axes, ...]
    tile: int | None
    machine: Machine = field(repr=False)
    floor: float = 0.0
    others: tuple[tuple[float, Path, int | None], ...] = ()

    def __post_init__(self) -> None:
        tile = self.tile
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 2):
            raise PlanError(f"tile is {tile!r}, expected at least 2 rows, or None for all at once")

    @functools.cached_property
    def size(self) -> Mapping[str, int]:
        """axis → size the plan was made for."""
        return dict(self.sizes)

    @functools.cached_property
    def leaves(self) -> tuple[Axes, ...]:
        """Axes of every operand after diagonals are read and axes that nobody else needs are summed."""
        return leaf_axes(self.network)

    @functools.cached_property
    def step_size(self) -> Mapping[str, int]:
        """axis → size that a step works on: with tiles, the rows of one."""
        return self.size if self.tile is None else {**self.size, ROWS: self.tile}

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """The pairwise contractions in order."""
        first = len(self.leaves)
        return tuple(Step(left, right, first + i, self.pairing(left, right, first + i)) for i, (left, right) in enumerate(self.path))

    @functools.cached_property
    def backward_steps(self) -> tuple[Step, ...]:
        """The contractions of the needed gradients, in the order they run: `out` is the value whose gradient is made."""
        found = []
        for step in reversed(self.steps):
            for target, other in ((step.left, step.right), (step.right, step.left)):
                if self.needs[target]:
                    found.append(Step(step.out, other, target, self.pairing(step.out, other, target)))
        return tuple(found)

    def pairing(self, left: int, right: int, out: int) -> Pairing:
        """How SSA values, or their gradients, are contracted into another in the orders of this plan."""
        return pair(self.orders[left], self.orders[right], self.orders[out], self.step_size, self.machine)

    @functools.cached_property
    def needs(self) -> tuple[bool, ...]:
        """Whether each SSA value needs a gradient."""
        needs = [term.name in self.grad for term in self.network.spec.operands]
        for left, right in self.path:
            needs.append(needs[left] or needs[right])
        return tuple(needs)

    @property
    def tree(self) -> Any:
        """The order as a `cotengra.ContractionTree`; its `contraction_cost()` counts multiply-adds, half of our FLOPs."""
        return order.tree(self.path, self.leaves, self.orders[-1], self.size)

    def times(self, step: Step) -> float:
        """How often a step, or a gradient step, runs: once a tile if it has rows."""
        rows = ROWS in self.orders[step.left] or ROWS in self.orders[step.right]
        return self.size[ROWS] / self.tile if rows and self.tile else 1.0

    @property
    def flops(self) -> int:
        """Forward FLOPs, 2 × the product of the axis sizes of every step."""
        return sum(step_flops(self.orders[step.left], self.orders[step.right], self.size) for step in self.steps)

    @property
    def backward_flops(self) -> int:
        """FLOPs of the gradients in `grad`."""
        return sum(step_flops(self.orders[step.left], self.orders[step.right], self.size) for step in self.backward_steps)

    @property
    def seconds(self) -> float:
        """Predicted seconds, forward and needed gradients."""
        return self.forward_seconds + self.backward_seconds

    @property
    def forward_seconds(self) -> float:
        """Predicted seconds of one forward pass."""
        seconds = sum(self.times(step) * step.pairing.seconds for step in self.steps)
        return seconds + self._streaming(self.orders[: len(self.leaves)], self.orders[-1:])

    @property
    def backward_seconds(self) -> float:
        """Predicted seconds of the gradients in `grad`; with tiles, of making the intermediates again too."""
        seconds = sum(self.times(step) * step.pairing.seconds for step in self.backward_steps)
        if not self.tile or not self.grad:
            return seconds
        again = sum(self.times(step) * step.pairing.seconds for step in self.steps[:-1] if self.times(step) > 1)
        made = [self.orders[step.out] for step in self.backward_steps if step.out < len(self.leaves)]
        return seconds + again + self._streaming((*self.orders[: len(self.leaves)], self.orders[-1]), made)

    def _streaming(self, read: Iterable[Axes], made: Iterable[Axes]) -> float:
        """Seconds that reading and writing whole tensors takes besides, when steps only see a tile of them."""
        if not self.tile:
            return 0.0

        def size(order: Axes) -> int:
            return 4 * volume(order, self.size) if ROWS in order else 0

        return sum(self.machine.traffic(size(t)) for t in read) + sum(self.machine.traffic(size(t), new=True) for t in made)

    @property
    def copies(self) -> int:
        """Tensors copied, forward and needed gradients."""
        return sum(step.pairing.copies for step in (*self.steps, *self.backward_steps))

    def flops_at(self, sizes: Mapping[str, int]) -> int:
        """FLOPs of the matrix products of one forward pass at other sizes; elementwise products are not matrix products."""
        total = 0
        for step in self.steps:
            left, right, out = (self.orders[value] for value in (step.left, step.right, step.out))
            total += contraction_flops(left, right, out, sizes)
        return total

    def draw(self, path: str | PathLike[str] | None = None) -> Any:
        """A picture of the contraction tree: each step with its operator, FLOPs, predicted time and copies, each tensor with its axes in
        memory order and a line as wide as it has bytes; steps that run tile by tile are marked.

        Args:
            path: file to write, its format from the ending (".png", ".svg", ".pdf").

        Returns:
            The matplotlib Figure. Raises OperatorError for a path that cannot be drawn to.
        """
        from tn.draw_plan import draw  # late: the picture builds on plans

        return draw(self, path)

    def to_json(self) -> str:
        """Canonical JSON; `Plan.from_json` reads it."""
        value = {
            "format": FORMAT,
            "network": json.loads(self.network.to_json()),
            "sizes": self.sizes,
            "grad": self.grad,
            "goal": self.goal,
            "search": self.search,
            "path": self.path,
            "orders": self.orders,
            "tile": self.tile,
            "floor": self.floor,
            "others": self.others,
            "machine": self.machine.name,
            "machine_digest": self.machine.digest,
        }
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, table: Machine | None = None) -> "Plan":
        """The plan that `to_json` wrote.

        Args:
            table: the machine table it was made with; the built-in CPU table if None.

        Raises:
            PlanError: another format, a table with other numbers, or text that is no plan. SpecError, SizeError: its network is none.
        """
        value = document(text, FORMAT, _KEYS, "plan", PlanError)
        table = table or machine()
        if value["machine_digest"] != table.digest:
            raise PlanError(
                f"plan was made with machine table {value['machine']!r} ({value['machine_digest']}), got {table.name!r} ({table.digest})"
            )
        network = Network.from_json(json.dumps(value["network"]))
        try:
            sizes = tuple((axis, size) for axis, size in value["sizes"])
            path = tuple((left, right) for left, right in value["path"])
            orders = tuple(map(tuple, value["orders"]))
            others = tuple((seconds, tuple((left, right) for left, right in path), tile) for seconds, path, tile in value["others"])
            grad, goal, search = tuple(value["grad"]), value["goal"], value["search"]
            made = cls(network, sizes, grad, goal, search, path, orders, value["tile"], table, value["floor"], others)
            _check(made)
        except (TypeError, ValueError) as error:
            raise PlanError(f"plan JSON does not describe a plan: {error}") from None
        return made

    def __str__(self) -> str:
        return _table(self)


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
    alive = set(range(count))
    for number, (left, right) in enumerate(plan.path):
        if left == right or left not in alive or right not in alive:
            raise PlanError(f"step {number} contracts values {left!r} and {right!r}, of which at least one is not there")
        alive = alive - {left, right} | {count + number}
    expected = [*plan.leaves, *(out for _, _, out in order.steps_of(plan.path, plan.leaves, net.output.axes))]
    if len(alive) != 1 or len(plan.orders) != len(expected):
        raise PlanError(f"{len(plan.path)} steps and {len(plan.orders)} memory orders for {count} operands")
    for number, (given, axes) in enumerate(zip(plan.orders, expected, strict=True)):
        if sorted(map(str, given)) != sorted(axes):
            raise PlanError(f"value {number} has the memory order {given}, its axes are {axes}")


def leaf_axes(network: Network) -> tuple[Axes, ...]:
    """Axes each operand brings to the pairwise steps: repeated ones once, ones that nobody else needs summed away."""
    terms = network.spec.operands
    kept = []
    for i, term in enumerate(terms):
        needed = set(network.output.axes).union(*(other.axes for j, other in enumerate(terms) if j != i))
        kept.append(tuple(axis for axis in dict.fromkeys(term.axes) if axis in needed))
    return tuple(kept)


def plan(
    network: Network,
    *,
    grad: Iterable[str] = (),
    goal: str = "time",
    rows: int | None = None,
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    search: str = "auto",
    table: Machine | None = None,
    seed: int = 0,
) -> Plan:
    """Plan a network: a pure function of its arguments.

    Args:
        grad: names of the tensors that need a gradient; their contractions are planned and paid for too.
        goal: "time" minimises predicted seconds, "flops" floating-point operations.
        rows: size of `...` to plan for. sizes: sizes of other dynamic axes. Both default to 1024; the plan is valid for every size.
        dtype, device: choose the machine table when `table` is None.
        search: "auto", "cotengra" (its trees only) or "left_to_right" (as written).
        seed: of cotengra's search when there are many operands.

    Returns:
        A Plan; `print(plan)` shows every step, its operator and cost.

    Raises:
        PlanError: an unknown goal or search. SizeError: sizes for unknown axes. SpecError: an unknown tensor in `grad`.
    """
    if goal not in GOALS:
        raise PlanError(unknown("goal", goal, GOALS))
    wanted = {grad} if isinstance(grad, str) else set(grad)
    for name in wanted:
        network.term(name)
    given = {**({ROWS: rows} if rows is not None else {}), **(sizes or {})}
    for axis, extent in given.items():
        if axis not in network.axes:
            raise SizeError(unknown("axis", axis, network.axes))
        if not is_size(extent):
            raise SizeError(f"axis {axis!r} has size {extent!r}, expected an integer ≥ 0")
        if network.sizes.get(axis, extent) != extent:
            raise SizeError(f"axis {axis!r} has size {network.sizes[axis]} in the network, sizes says {extent}")
    # A dynamic axis is never planned as size one: layouts may ignore axes of size one, and this axis can grow.
    size = {axis: network.sizes.get(axis, max(2, given.get(axis, DEFAULT_ROWS))) for axis in network.axes}
    asked = {
        "network": network,
        "sizes": tuple(size.items()),
        "grad": tuple(name for name in network.names if name in wanted),
        "goal": goal,
        "search": search,
        "table": table or machine(device, dtype),
        "seed": seed,
    }
    return store.recall(asked, _plan, Plan.from_json)


@functools.lru_cache(maxsize=4096)
def _plan(
    network: Network, sizes: tuple[tuple[str, int], ...], grad: tuple[str, ...], goal: str, search: str, table: Machine, seed: int
) -> Plan:
    size, leaves, output = dict(sizes), leaf_axes(network), network.output.axes
    needs = [term.name in grad for term in network.spec.operands]
    paths = order.search(leaves, output, size, method=search, seed=seed)
    job = Job(leaves, output, size, tuple(needs), table)
    plans: list[tuple[float, Plan]] = []

    def add(path: Path, orders: tuple[Axes, ...], tile: int | None) -> None:
        made = Plan(network, sizes, grad, goal, search, path, orders, tile, table)
        plans.append((made.seconds, made))

    ranked = sorted((bound(path, job), path) for path in paths)
    for least, path in ranked[:_LAID_OUT]:
        if goal == "time" and plans and least >= min(plans, key=_seconds)[0]:
            break
        add(path, choose(path, job)[1], None)
    best = _flops if goal == "flops" else _seconds
    for _, made in sorted(plans, key=best)[: 1 if goal == "flops" else _TILED]:
        orders: tuple[Axes, ...] = ()
        for tile in _tiles(made):
            tiled = dataclasses.replace(job, sizes={**size, ROWS: tile}, tiles=size[ROWS] / tile)
            orders = orders or choose(made.path, tiled)[1]
            add(made.path, orders, tile)
    _, chosen = min(plans, key=best)
    others = sorted({(seconds, made.path, made.tile or 0) for seconds, made in plans if made is not chosen})[:_SHOWN]
    shown = tuple((seconds, path, tile or None) for seconds, path, tile in others)
    return dataclasses.replace(chosen, floor=ranked[0][0], others=shown)


def _seconds(entry: tuple[float, Plan]) -> tuple[float, int]:
    return entry[0], entry[1].flops


def _flops(entry: tuple[float, Plan]) -> tuple[int, float]:
    return entry[1].flops + entry[1].backward_flops, entry[0]


def _tiles(plan: Plan) -> list[int]:
    """Tiles of rows to try: those that leave several of them, where that makes a difference: an intermediate has rows."""
    inner = any(ROWS in plan.orders[step.out] for step in plan.steps[:-1])
    if not plan.machine.tiles or not inner or ROWS not in plan.orders[-1]:
        return []
    return [tile for tile in _TILES if 2 * tile <= plan.size[ROWS]]


def _table(plan: Plan) -> str:
    names = [term.name for term in plan.network.spec.operands] + [f"v{i}" for i in range(len(plan.leaves), len(plan.orders))]
    dynamic = ", ".join(f"{axis}={plan.size[axis]}" for axis in plan.network.dynamic)
    lines = [
        f"plan of {plan.network.spec}",
        f"  for {dynamic or 'fixed sizes'}, goal {plan.goal}, table {plan.machine.name}, gradients of {', '.join(plan.grad) or 'nothing'}",
    ]
    lines.append(f"  {'step':<28}{'operator':<18}{'MFLOP':>10}{'MB':>9}{'copies':>8}{'µs':>10}  memory order of the result")
    for step in plan.steps:
        title = f"{names[step.out]} = {names[step.left]} · {names[step.right]}"
        lines.append(_row(plan, title, step))
    for step in plan.backward_steps:
        title = f"d{names[step.out]} = d{names[step.left]} · {names[step.right]}"
        lines.append(_row(plan, title, step))
    if plan.tile is not None:
        lines.append(f"  with more than {plan.tile} rows: {plan.tile} rows at a time, intermediates made again for the gradients")
    work = f"forward {plan.flops / 1e6:.2f} MFLOP, gradients {plan.backward_flops / 1e6:.2f} MFLOP"
    lines.append(f"  {work}, {plan.copies} copies, predicted {plan.seconds * 1e6:.0f} µs")
    for seconds, path, tile in plan.others:
        rows = "all rows at once" if tile is None else f"{tile} rows at a time"
        more = 100 * (seconds / plan.seconds - 1) if plan.seconds else 0.0
        lines.append(f"  not chosen: {_words(path, names)}, {rows}: predicted {seconds * 1e6:.0f} µs ({more:+.0f} %)")
    if plan.floor:
        lines.append(f"  with every step in a layout of its own, all rows at once: {plan.floor * 1e6:.0f} µs for the best order")
    return "\n".join(lines)


def _words(path: Path, names: list[str]) -> str:
    """A path as nested products of tensor names."""
    values = names[: len(path) + 1]
    for left, right in path:
        values.append(f"({values[left]} · {values[right]})")
    return values[-1][1:-1] if path else values[-1]


def _row(plan: Plan, title: str, step: Step) -> str:
    p, times = step.pairing, plan.times(step)
    operator = p.kind + (" into a view" if p.out == "strided" else "")
    work = f"{times * p.flops / 1e6:>10.2f}{times * p.bytes / 1e6:>9.2f}{p.copies:>8}{times * p.seconds * 1e6:>10.0f}"
    return f"  {title:<28}{operator:<18}{work}  {' '.join(plan.orders[step.out])}"
