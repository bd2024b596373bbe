"""A Plan: the contraction order, the memory order of every value, and the kind and cost of each step. Pure data."""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from tn import memory, order, slices, store
from tn.cost import contraction_flops, step_flops, volume
from tn.documents import is_size
from tn.errors import PlanError, SizeError, unknown
from tn.layout import Job, choose, price
from tn.machine import Machine, machine
from tn.network import Network
from tn.order import Axes, Path
from tn.pairing import Pairing, pair
from tn.sharing import alike
from tn.spec import ROWS, Term

FORMAT = 3  # of the JSON
GOALS = ("time", "flops", "peak", "saved")
TILES = (128, 64, 256, 512, 1024, 2048)  # rows worked on at a time that are tried, in the layout that is best for the first
_SHARING = 512  # trees that are looked at for equal steps where a tensor is used twice
_LAID_OUT = (8, 6, 4, 3)  # trees that get layouts: up to five operands, of six, of seven, of more
_SHOWN = 3  # plans not chosen that a plan remembers
_TILED_BEST = 2  # the fastest of those that are tried with several tiles
DEFAULT_ROWS = 1024  # size assumed for a dynamic axis when none is given
Candidate = tuple[float, float, Path, int]  # cost by the goal, seconds, tree, tile (0: all rows at once)


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
        slices: (axis, size of a slice) of the axes that are worked on slice by slice to save memory; see tn.slices.
        itemsize: bytes of an element.
        dtype, device: what it will run in, for which operators are asked (see tn.regions); not in its JSON, and plans are equal without it.
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
    slices: tuple[tuple[str, int], ...] = ()
    itemsize: int = 4
    dtype: torch.dtype = field(default=torch.float32, compare=False, repr=False)
    device: str = field(default="cpu", compare=False, repr=False)

    def __post_init__(self) -> None:
        tile = self.tile
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 2):
            raise PlanError(f"tile is {tile!r}, expected at least 2 rows, or None for all at once")

    @functools.cached_property
    def size(self) -> Mapping[str, int]:
        """axis → size the plan was made for."""
        return dict(self.sizes)

    @functools.cached_property
    def terms(self) -> tuple[Term, ...]:
        """The operands as the steps take them: those of every part of the network, one part after the other."""
        return tuple(term for part in self.network.parts for term in part.spec.operands)

    @functools.cached_property
    def leaves(self) -> tuple[Axes, ...]:
        """Axes of every operand after diagonals are read and axes that nobody else needs are summed."""
        return tuple(axes for part in self.network.parts for axes in leaf_axes(part))

    @functools.cached_property
    def results(self) -> tuple[int, ...]:
        """The SSA value of each output."""
        return _results([len(part.spec.operands) for part in self.network.parts])

    @functools.cached_property
    def same(self) -> Mapping[int, tuple[int, Mapping[str, str]]]:
        """Values that are not computed: value → (the earlier value it equals, that one's axes → its own)."""
        return {
            value: (first, names)
            for value, (first, names) in self.alike.items()
            if self.orders[value] == tuple(names[axis] for axis in self.orders[first])
        }

    @functools.cached_property
    def alike(self) -> dict[int, tuple[int, dict[str, str]]]:
        """The same for values whose memory orders may differ."""
        if len(self.network.names) == len(self.terms):
            return {}
        return alike(self.terms, self.leaves, self.path, self.orders[len(self.leaves) :], self.network.sizes)

    def first(self, value: int) -> int:
        """The value that is computed for this one."""
        return self.same[value][0] if value in self.same else value

    @functools.cached_property
    def plain_leaves(self) -> bool:
        """Whether every operand goes into the steps as it is: no axis of it is repeated, none is summed before."""
        return all(term.axes == axes for term, axes in zip(self.terms, self.leaves, strict=True))

    @functools.cached_property
    def slice_size(self) -> Mapping[str, int]:
        """axis → size in one slice; without slices, all of it."""
        return {**self.size, **dict(self.slices)}

    @functools.cached_property
    def step_size(self) -> Mapping[str, int]:
        """axis → size that a step works on: in one slice, and with tiles, the rows of one."""
        return self.slice_size if self.tile is None else {**self.slice_size, ROWS: self.tile}

    @property
    def slice_count(self) -> int:
        """How many slices there are."""
        return math.prod(-(-self.size[axis] // size) for axis, size in self.slices)

    @functools.cached_property
    def memory(self) -> memory.Memory:
        """Bytes that the program keeps for the gradients, and the most alive at once, forward and backward; see tn.memory."""
        return slices.measure(self) if self.slices else memory.measure(self)

    @property
    def saved_bytes(self) -> int:
        """Bytes of intermediates that the forward pass keeps for the gradients in `grad`."""
        return self.memory.saved

    @property
    def peak_bytes(self) -> int:
        """The most bytes of intermediates and workspace alive at once, forward and backward; operands, result and gradients apart."""
        return self.memory.peak

    @functools.cached_property
    def tree_steps(self) -> tuple[Step, ...]:
        """Every pairwise contraction of the tree, those that equal an earlier one too."""
        first = len(self.leaves)
        return tuple(Step(left, right, first + i, self.pairing(left, right, first + i)) for i, (left, right) in enumerate(self.path))

    @functools.cached_property
    def steps(self) -> tuple[Step, ...]:
        """The pairwise contractions that run, in order; operands may be values that equal an earlier one (`same`)."""
        if not self.same:
            return self.tree_steps
        wanted = {self.first(value) for value in self.results}
        for step in reversed(self.tree_steps):
            if step.out in wanted:
                wanted |= {self.first(step.left), self.first(step.right)}
        return tuple(step for step in self.tree_steps if step.out in wanted)

    @functools.cached_property
    def backward_steps(self) -> tuple[Step, ...]:
        """The contractions of the needed gradients, in the order they run: `out` is the value whose gradient is made."""
        return tuple(self.gradient_steps(self.needs))

    def gradient_steps(self, needs: Sequence[bool]) -> Iterator[Step]:
        """The contractions of the gradients of some values, last step first. A square's gradient is made once and doubled."""
        for step in reversed(self.steps):
            for target, other in ((step.left, step.right), (step.right, step.left)):
                if needs[target] and not (target == step.right and self.squares(target, other)):
                    yield Step(step.out, other, target, self.pairing(step.out, other, target))

    def squares(self, left: int, right: int) -> bool:
        """Whether two values are one, axis by axis."""
        return self.first(left) == self.first(right) and self.orders[left] == self.orders[right]

    def pairing(self, left: int, right: int, out: int) -> Pairing:
        """How SSA values, or their gradients, are contracted into another in the orders of this plan."""
        return pair(self.orders[left], self.orders[right], self.orders[out], self.step_size, self.machine)

    @functools.cached_property
    def needs(self) -> tuple[bool, ...]:
        """Whether each SSA value needs a gradient."""
        return self.needing(self.grad)

    def needing(self, names: Collection[str]) -> tuple[bool, ...]:
        """Whether each SSA value needs a gradient when these tensors do."""
        needs = [term.name in names for term in self.terms]
        for left, right in self.path:
            needs.append(needs[left] or needs[right])
        return tuple(needs)

    @functools.cached_property
    def kept(self) -> tuple[int, ...]:
        """Intermediates: values of steps that a later step takes."""
        taken = {self.first(value) for step in self.steps for value in (step.left, step.right)}
        return tuple(step.out for step in self.steps if step.out in taken)

    @functools.cached_property
    def saved(self) -> tuple[int, ...]:
        """Intermediates that the forward pass keeps because the gradients in `grad` read them (with tiles, for few rows only)."""
        return memory.Work.of(self, self.needs).read

    @property
    def tree(self) -> Any:
        """The order as a `cotengra.ContractionTree`; its `contraction_cost()` counts multiply-adds, half of our FLOPs.

        Raises:
            PlanError: the network has several outputs.
        """
        if len(self.results) > 1:
            raise PlanError(f"a tree has one output, this network has {len(self.results)}; plan one of `network.parts`")
        return order.tree(self.path, self.leaves, self.orders[-1], self.size)

    def times(self, step: Step) -> float:
        """How often a step, or a gradient step, runs: once a tile if it has rows, once a slice."""
        rows = ROWS in self.orders[step.left] or ROWS in self.orders[step.right]
        return self.size[ROWS] / self.tile if rows and self.tile else float(self.slice_count)

    @property
    def flops(self) -> int:
        """Forward FLOPs, 2 × the product of the axis sizes of every step."""
        return self._flops(self.steps)

    @property
    def tree_flops(self) -> int:
        """Forward FLOPs if no step were shared, 2 × those of cotengra's tree."""
        return self._flops(self.tree_steps)

    @property
    def backward_flops(self) -> int:
        """FLOPs of the gradients in `grad`."""
        return self._flops(self.backward_steps)

    def _flops(self, steps: Iterable[Step]) -> int:
        return self.slice_count * sum(step_flops(self.orders[step.left], self.orders[step.right], self.slice_size) for step in steps)

    @property
    def seconds(self) -> float:
        """Predicted seconds, forward and needed gradients."""
        return self.forward_seconds + self.backward_seconds

    @property
    def forward_seconds(self) -> float:
        """Predicted seconds of one forward pass."""
        seconds = sum(self.times(step) * step.pairing.seconds for step in self.steps)
        return seconds + self._streaming[0] + slices.seconds(self, gradients=False)

    @property
    def backward_seconds(self) -> float:
        """Predicted seconds of the gradients in `grad`; with tiles or slices, of making the intermediates again too."""
        seconds = sum(self.times(step) * step.pairing.seconds for step in self.backward_steps)
        if (self.tile or self.slices) and self.grad:
            seconds += sum(self.times(step) * step.pairing.seconds for step in self.steps if step.out in self.kept and self.times(step) > 1)
            seconds += slices.seconds(self, gradients=True)
        return seconds + self._streaming[1]

    @property
    def _streaming(self) -> tuple[float, float]:
        if not self.tile:
            return 0.0, 0.0
        operands = [leaf for leaf in range(len(self.leaves)) if leaf not in self.same]
        read, made = ([self.orders[value] for value in values] for values in (operands, self.results))
        return _streaming(read, made, [self.needs[leaf] for leaf in operands], self.size, self.machine)

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
            "slices": self.slices,
            "itemsize": self.itemsize,
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
        from tn.saved_plan import read  # late: it makes plans

        return read(text, table)

    def __str__(self) -> str:
        from tn.table import table  # late: it reads plans

        return table(self)


def _results(counts: Sequence[int]) -> tuple[int, ...]:
    """The last SSA value of each tree of a forest; a tree of one operand is that operand."""
    found, leaf, step = [], 0, sum(counts)
    for count in counts:
        step += count - 1
        found.append(leaf if count == 1 else step - 1)
        leaf += count
    return tuple(found)


def settled(draft: Plan) -> Plan:
    """The draft, or a plan of the same trees in which alike values lie in memory alike too, so that they are computed once."""
    plans = [draft]
    for later in (False, True):
        orders = list(draft.orders)
        for value, (first, names) in draft.alike.items():
            if later:
                back = {mine: theirs for theirs, mine in names.items()}
                orders[first] = tuple(back[axis] for axis in orders[value])
            else:
                orders[value] = tuple(names[axis] for axis in orders[first])
        if all(orders[value] == draft.orders[value] for value in draft.results):
            plans.append(dataclasses.replace(draft, orders=tuple(orders)))
    return min(plans, key=lambda plan: plan.seconds) if draft.alike else draft


def repeated(network: Network, path: Path) -> frozenset[int]:
    """Steps of a tree that equal an earlier one."""
    if len(network.names) == len(network.spec.operands):
        return frozenset()
    leaves = leaf_axes(network)
    outs = [out for *_, out in order.steps_of(path, leaves, network.output.axes)]
    copies = alike(network.spec.operands, leaves, path, outs, network.sizes)
    return frozenset(value - len(leaves) for value in copies if value >= len(leaves))


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
    memory_limit: int | None = None,
) -> Plan:
    """Plan a network: a pure function of its arguments.

    Args:
        grad: names of the tensors that need a gradient; their contractions are planned and paid for too.
        goal: "time" minimises predicted seconds, "flops" floating-point operations, "saved" the bytes kept for gradients, "peak" the most
            bytes alive at once; each counts the needed gradients.
        rows: size of `...` to plan for. sizes: sizes of other dynamic axes. Both default to 1024; the plan is valid for every size.
        dtype, device: choose the machine table when `table` is None; the dtype also says how many bytes an element has.
        search: "auto", "cotengra" (its trees only) or "left_to_right" (as written).
        seed: of cotengra's search when there are many operands.
        memory_limit: bytes that `Plan.peak_bytes` stays within; where no order does, the best one works slice by slice (tn.slices).

    Returns:
        A Plan; `print(plan)` shows every step, its operator and cost.

    Raises:
        PlanError: an unknown goal or search, or a memory limit that no plan meets. SizeError: sizes for unknown axes. SpecError: an unknown
            tensor in `grad`.
    """
    if goal not in GOALS:
        raise PlanError(unknown("goal", goal, GOALS))
    if memory_limit is not None and (isinstance(memory_limit, bool) or not isinstance(memory_limit, int) or memory_limit < 0):
        raise PlanError(f"memory_limit is {memory_limit!r}, expected a number of bytes ≥ 0, or None")
    if memory_limit is not None and dtype not in (torch.float32, torch.float64):
        raise PlanError(f"memory_limit= holds for float32 and float64, got {dtype}")
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
        "itemsize": dtype.itemsize,
        "limit": memory_limit,
    }
    made = store.recall(asked, _frugal, Plan.from_json)
    return placed(made, dtype, torch.device(device).type)


@functools.lru_cache(maxsize=4096)
def _frugal(
    network: Network,
    sizes: tuple[tuple[str, int], ...],
    grad: tuple[str, ...],
    goal: str,
    search: str,
    table: Machine,
    seed: int,
    itemsize: int,
    limit: int | None,
) -> Plan:
    """The fastest plan, or the one of the fewest FLOPs, unless memory matters."""
    run = _plan if len(network.parts) == 1 else _plan_outputs
    made = run(network, sizes, grad, goal if goal == "flops" else "time", search, table, seed)
    if itemsize != made.itemsize or goal != made.goal:
        made = dataclasses.replace(made, itemsize=itemsize, goal=goal)
    if goal in ("time", "flops") and limit is None:
        return made
    from tn.frugal import frugal  # late: it builds on plans

    return frugal(made, limit)


@functools.lru_cache(maxsize=4096)
def placed(plan: Plan, dtype: torch.dtype, device: str) -> Plan:
    """The plan for a dtype and a kind of device, with the table it has."""
    return plan if (plan.dtype, plan.device) == (dtype, device) else dataclasses.replace(plan, dtype=dtype, device=device)


@functools.lru_cache(maxsize=1024)
def _plan_outputs(
    network: Network, sizes: tuple[tuple[str, int], ...], grad: tuple[str, ...], goal: str, search: str, table: Machine, seed: int
) -> Plan:
    """A tree for each output: the best ones by themselves, then those that share more if that is faster; one tile for all."""
    jobs, choices = [], []
    for part in network.parts:
        mine = tuple((axis, extent) for axis, extent in sizes if axis in part.axes)
        alone = _plan(part, mine, tuple(name for name in grad if name in part.names), goal, search, table, seed)
        jobs.append(_job(part, mine, alone.grad, table))
        choices.append(list(dict.fromkeys([alone.path, *(path for _, path, _ in alone.others)])))
    counts = [len(job.task.inputs) for job in jobs]

    def made(paths: Sequence[Path], tile: int | None) -> Plan:
        orders = [choose(path, job.tiled(tile) if tile else job).orders for path, job in zip(paths, jobs, strict=True)]
        leaves = [axes for chosen, count in zip(orders, counts, strict=True) for axes in chosen[:count]]
        inner = [axes for chosen, count in zip(orders, counts, strict=True) for axes in chosen[count:]]
        return settled(Plan(network, sizes, grad, goal, search, _forest(paths, counts), (*leaves, *inner), tile, table))

    paths = [choice[0] for choice in choices]
    plans = [made(paths, None)]
    for place, choice in enumerate(choices):
        for path in choice[1:]:
            plans.append(made([*paths[:place], path, *paths[place + 1 :]], None))
            if _cost(plans[-1]) <= min(map(_cost, plans)):
                paths[place] = path
    plans += [made(paths, tile) for tile in (_tiles(plans[0]) if goal == "time" else ())]
    return min(plans, key=_cost)


def _forest(paths: Sequence[Path], counts: Sequence[int]) -> Path:
    """The pairs of several trees, over the operands of all of them."""
    pairs: list[tuple[int, int]] = []
    leaf, leaves = 0, sum(counts)
    for path, count in zip(paths, counts, strict=True):
        step = leaves + len(pairs)
        pairs += [tuple(leaf + value if value < count else step + value - count for value in pair) for pair in path]  # type: ignore[misc]
        leaf += count
    return tuple(pairs)


@functools.lru_cache(maxsize=4096)
def _plan(
    network: Network, sizes: tuple[tuple[str, int], ...], grad: tuple[str, ...], goal: str, search: str, table: Machine, seed: int
) -> Plan:
    job = _job(network, sizes, grad, table)
    task = dataclasses.replace(job.task, weigh=order.flops) if goal == "flops" else job.task
    return best_of(order.search(task, method=search, seed=seed), network, sizes, grad, goal, search, table)


def along(network: Network, path: Path, sizes: tuple[tuple[str, int], ...], grad: tuple[str, ...], table: Machine) -> Plan:
    """The plan of a tree that somebody else found: layouts and tiles are chosen as ever."""
    task = _job(network, sizes, grad, table).task
    return best_of(order.given(task, [path]), network, sizes, grad, "time", "given", table)


def _job(network: Network, sizes: tuple[tuple[str, int], ...], grad: tuple[str, ...], table: Machine) -> Job:
    needs = tuple(term.name in grad for term in network.spec.operands)
    return Job.of(leaf_axes(network), network.output.axes, dict(sizes), needs, table)


def best_of(
    trees: order.Trees, network: Network, sizes: tuple[tuple[str, int], ...], grad: tuple[str, ...], goal: str, search: str, table: Machine
) -> Plan:
    """Lay out the most promising trees, all rows at once and in tiles of rows, until a bound shows that no other can be better or enough
    were tried."""
    job, size = _job(network, sizes, grad, table), dict(sizes)
    leaves, output = job.task.inputs, job.task.output
    most = _LAID_OUT[min(max(len(leaves) - 5, 0), len(_LAID_OUT) - 1)]
    found: dict[Candidate, tuple[Axes, ...]] = {(*entry, 0): orders for entry, orders in _lay_out(trees, job, goal, most)}
    plain = all(term.axes == axes for term, axes in zip(network.spec.operands, leaves, strict=True))
    tiles = [tile for tile in TILES if 2 * tile <= size.get(ROWS, 0)] if table.tiles and ROWS in output and plain else []
    if tiles:
        streaming = sum(_streaming(leaves, [output], job.task.grads, size, table))
        first = job.tiled(tiles[0])
        again = trees.of(dataclasses.replace(first.task, weigh=trees.task.weigh), [min(found)[2]])
        made = [(*entry, orders) for entry, orders in _lay_out(again, first, goal, (most + 1) // 2)]
        with_rows = [entry for entry in made if any(ROWS in t for t in entry[3][len(leaves) : -1])]
        for cost, _, path, orders in sorted(with_rows)[:_TILED_BEST]:
            for tile in tiles:
                seconds = price(path, orders, job.tiled(tile)) + streaming
                found[cost if goal == "flops" else seconds, seconds, path, tile] = orders
    best, *_ = sorted(found)
    others = sorted((seconds, path, tile) for _, seconds, path, tile in found if (path, tile) != best[2:])[:_SHOWN]
    shown = tuple((seconds, path, tile or None) for seconds, path, tile in others)
    floor = trees.least if goal == "time" else 0.0
    chosen = Plan(network, sizes, grad, goal, search, best[2], found[best], best[3] or None, table, floor, shown)
    return chosen if len(network.names) == len(leaves) else _with_equal_steps(chosen, trees, job)


def _with_equal_steps(plan: Plan, trees: order.Trees, job: Job) -> Plan:
    """The plan, or a better one of a network that uses a tensor twice: some of its steps are equal and run once (see tn.sharing)."""
    among = itertools.islice(trees.all(), _SHARING)
    ranked = sorted((order.bound(path, trees.task, repeated(plan.network, path)), path) for path in among)
    paths = dict.fromkeys([plan.path, *(path for _, path in ranked[: _LAID_OUT[0]])])
    plans = [settled(plan)]
    for path in paths:
        whole = dataclasses.replace(plan, path=path, orders=choose(path, job).orders, tile=None)
        plans.append(settled(whole))
        tiles = _tiles(whole)
        orders = choose(path, job.tiled(tiles[0])).orders if tiles else ()
        plans += [settled(dataclasses.replace(whole, orders=orders, tile=tile)) for tile in tiles]
    floor = min(plan.floor, ranked[0][0]) if plan.goal == "time" else 0.0
    return dataclasses.replace(min(plans, key=_cost), floor=floor)


def _lay_out(trees: order.Trees, job: Job, goal: str, most: int) -> Iterator[tuple[tuple[float, float, Path], tuple[Axes, ...]]]:
    """((cost by the goal, seconds, tree), orders) of trees that can be the best, at most so many."""
    best = math.inf
    for path in itertools.islice(trees, most):
        least = order.bound(path, trees.task)
        if least < best * (1 + 1e-9):
            seconds, orders, excess = choose(path, job)
            trees.learn(path, excess)
            cost = least if goal == "flops" else seconds
            best = min(best, cost)
            yield (cost, seconds, path), orders


def _cost(plan: Plan) -> tuple[float, float]:
    """What the goal minimises, then the other of seconds and FLOPs."""
    flops = plan.flops + plan.backward_flops
    return (flops, plan.seconds) if plan.goal == "flops" else (plan.seconds, flops)


def _tiles(plan: Plan) -> list[int]:
    """Tiles of rows to try: those that leave several of them, where that makes a difference: an intermediate has rows."""
    inner = any(ROWS in plan.orders[value] for value in plan.kept)
    outside = not all(ROWS in plan.orders[value] and value >= len(plan.leaves) for value in plan.results)
    if not plan.machine.tiles or not inner or outside or not plan.plain_leaves:
        return []
    return [tile for tile in TILES if 2 * tile <= plan.size[ROWS]]


def _streaming(
    leaves: Iterable[Axes], outputs: Iterable[Axes], grads: Iterable[bool], size: Mapping[str, int], table: Machine
) -> tuple[float, float]:
    """Seconds, forward and backward, that reading and writing whole tensors takes besides, when steps only see a tile of them."""
    read, new = ([4 * volume(t, size) if ROWS in t else 0 for t in tensors] for tensors in (leaves, outputs))
    made = [number for number, need in zip(read, grads, strict=True) if need]
    forward = sum(map(table.traffic, read)) + sum(table.traffic(number, new=True) for number in new)
    backward = sum(map(table.traffic, (*read, *new))) + sum(table.traffic(number, new=True) for number in made)
    return forward, backward if made else 0.0
