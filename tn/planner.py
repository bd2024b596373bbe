"""The choice of a plan: trees that can be the best, laid out, tile by tile, and compared by what is asked for."""

import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import SupportsIndex

import torch

from tn import order, store
from tn.documents import is_size
from tn.errors import PlanError, SizeError, SpecError, unknown
from tn.layout import Job, choose, price
from tn.machine import Machine, machine
from tn.network import Network
from tn.order import Axes, Path
from tn.plan import Plan, leaf_axes, repeated, settled, streaming
from tn.spec import ROWS

GOALS = ("time", "flops", "peak", "saved")
TILES = (128, 64, 256, 512, 1024, 2048)  # rows worked on at a time that are tried, in the layout that is best for the first
_SHARING = 512  # trees that are looked at for equal steps where a tensor is used twice
_LAID_OUT = (8, 6, 4, 3)  # trees that get layouts: up to five operands, of six, of seven, of more
_TOGETHER = 4  # trees of one of several outputs that are tried with those of the others, besides the ones that were laid out for it alone
_SHOWN = 3  # plans not chosen that a plan remembers
_TILED_BEST = 2  # the fastest of those that are tried with several tiles
DEFAULT_ROWS = 1024  # size assumed for a dynamic axis when none is given

Candidate = tuple[float, float, Path, int]  # cost by the goal, seconds, tree, tile (0: all rows at once)


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
    memory_limit: SupportsIndex | None = None,
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
    _check(network, grad, goal, sizes, dtype, device, search, table, seed)
    limit = None if memory_limit is None else _bytes(memory_limit)
    if limit is not None and dtype not in (torch.float32, torch.float64):
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
        "limit": limit,
    }
    made = store.recall(asked, _frugal, Plan.from_json)
    return placed(made, dtype, torch.device(device).type)


def _check(
    network: object,
    grad: object,
    goal: str,
    sizes: object,
    dtype: object,
    device: torch.device | str,
    search: str,
    table: object,
    seed: object,
) -> None:
    """Raise where an argument of `plan` is of another kind than it takes."""
    if not isinstance(network, Network):
        raise PlanError(f"tn.plan takes a network, such as tn.network(spec, sizes) gives, got {network!r}")
    if not isinstance(dtype, torch.dtype):
        raise PlanError(f"dtype is {dtype!r}, expected a torch.dtype")
    if table is not None and not isinstance(table, Machine):
        raise PlanError(f"table is {table!r}, expected a tn.Machine")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise PlanError(f"seed is {seed!r}, expected an integer")
    try:
        torch.device(device)
    except (RuntimeError, TypeError):
        raise PlanError(f"device is {device!r}, expected a torch.device or the name of one, such as 'cpu' or 'cuda'") from None
    if search not in order.SEARCHES:
        raise PlanError(unknown("search", search, order.SEARCHES))
    if not isinstance(grad, Iterable):
        raise SpecError(f"grad is {grad!r}, expected names of tensors: {', '.join(network.names)}")
    if sizes is not None and not isinstance(sizes, Mapping):
        raise SizeError(f"sizes is {sizes!r}, expected a size for each axis, such as dict(i=3)")
    if goal not in GOALS:
        raise PlanError(unknown("goal", goal, GOALS))


def _bytes(limit: SupportsIndex) -> int:
    """A memory limit of any integral type, such as NumPy's."""
    try:
        found = -1 if isinstance(limit, bool) else operator.index(limit)
    except TypeError:
        found = -1
    if found < 0:
        raise PlanError(f"memory_limit is {limit!r}, expected a whole number of bytes ≥ 0, or None")
    return found


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
    choices: list[list[Path]] = []
    leaves: list[Axes] = []
    inner: list[Axes] = []
    for part in network.parts:
        mine = tuple((axis, extent) for axis, extent in sizes if axis in part.axes)
        alone = _plan(part, mine, tuple(name for name in grad if name in part.names), goal, search, table, seed)
        trees = order.search(_task(part, mine, alone.grad, goal, table), method=search, seed=seed)
        choices.append([alone.path, *(path for _, path, _ in alone.others), *itertools.islice(trees.all(), _TOGETHER)])
        leaves += alone.leaves
        inner += alone.orders[len(alone.leaves) :]
    path = _forest([choice[0] for choice in choices], [len(part.spec.operands) for part in network.parts])
    return min(joined(Plan(network, sizes, grad, goal, search, path, (*leaves, *inner), None, table), choices, _cost), key=_cost)


def joined(like: Plan, choices: Sequence[Iterable[Path]], cost: Callable[[Plan], tuple[float, float]]) -> list[Plan]:
    """Plans of several outputs, with trees and tiles of their own.

    Args:
        like: for what. choices: trees of each output by itself; each output in turn takes the one that costs least with the others' trees.
    """
    jobs = [_job(plan.network, plan.sizes, plan.grad, like.machine) for plan in like.parts]
    counts = [len(job.task.inputs) for job in jobs]

    def made(paths: Sequence[Path], tile: int | None) -> Plan:
        orders = [choose(path, job.tiled(tile) if tile else job).orders for path, job in zip(paths, jobs, strict=True)]
        leaves = [axes for chosen, count in zip(orders, counts, strict=True) for axes in chosen[:count]]
        inner = [axes for chosen, count in zip(orders, counts, strict=True) for axes in chosen[count:]]
        return settled(dataclasses.replace(like, path=_forest(paths, counts), orders=(*leaves, *inner), tile=tile))

    several = [list(dict.fromkeys(choice)) for choice in choices]
    paths = [choice[0] for choice in several]
    plans = [made(paths, None)]
    for place, choice in enumerate(several):
        for path in choice[1:]:
            plans.append(made([*paths[:place], path, *paths[place + 1 :]], None))
            if cost(plans[-1]) <= min(map(cost, plans)):
                paths[place] = path
    return plans + [made(paths, tile) for tile in (tiles_of(plans[0]) if like.goal != "flops" else ())]


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
    task = _task(network, sizes, grad, goal, table)
    return best_of(order.search(task, method=search, seed=seed), network, sizes, grad, goal, search, table)


def _task(network: Network, sizes: tuple[tuple[str, int], ...], grad: tuple[str, ...], goal: str, table: Machine) -> order.Task:
    """What trees are searched for by a goal."""
    task = _job(network, sizes, grad, table).task
    return dataclasses.replace(task, weigh=order.flops) if goal == "flops" else task


def along(network: Network, path: Path, sizes: tuple[tuple[str, int], ...], grad: tuple[str, ...], table: Machine) -> Plan:
    """The plan of a tree that somebody else found: layouts and tiles are chosen as ever."""
    task = _job(network, sizes, grad, table).task
    return best_of(order.given(task, [path]), network, sizes, grad, "time", "given", table)


def _job(network: Network, sizes: tuple[tuple[str, int], ...], grad: tuple[str, ...], table: Machine) -> Job:
    needs = tuple(term.name in grad for term in network.spec.operands)
    size = {axis: extent or 2 for axis, extent in sizes}  # nothing to do takes no time in any order: as if there were something
    return Job.of(leaf_axes(network), network.output.axes, size, needs, table)


def best_of(
    trees: order.Trees, network: Network, sizes: tuple[tuple[str, int], ...], grad: tuple[str, ...], goal: str, search: str, table: Machine
) -> Plan:
    """Lay out the most promising trees, all rows at once and in tiles of rows, until a bound shows that no other can be better or enough
    were tried."""
    job, size = _job(network, sizes, grad, table), dict(sizes)
    leaves, output = job.task.inputs, job.task.output
    plain = all(term.axes == axes for term, axes in zip(network.spec.operands, leaves, strict=True))
    job = dataclasses.replace(job, turns=plain and len(network.names) == len(leaves))
    most = _LAID_OUT[min(max(len(leaves) - 5, 0), len(_LAID_OUT) - 1)]
    found: dict[Candidate, tuple[Axes, ...]] = {(*entry, 0): orders for entry, orders in _lay_out(trees, job, goal, most)}
    tiles = [tile for tile in TILES if 2 * tile <= size.get(ROWS, 0)] if table.tiles and ROWS in output and plain else []
    if tiles:
        moved = sum(streaming(leaves, [output], job.task.grads, size, table))
        first = job.tiled(tiles[0])
        again = trees.of(dataclasses.replace(first.task, weigh=trees.task.weigh), [min(found)[2]])
        made = [(*entry, orders) for entry, orders in _lay_out(again, first, goal, (most + 1) // 2)]
        with_rows = [entry for entry in made if any(ROWS in t for t in entry[3][len(leaves) : -1])]
        for cost, _, path, orders in sorted(with_rows)[:_TILED_BEST]:
            for tile in tiles:
                seconds = price(path, orders, job.tiled(tile)) + moved
                found[cost if goal == "flops" else seconds, seconds, path, tile] = orders
    best, *_ = sorted(found)
    others = sorted((seconds, path, tile) for _, seconds, path, tile in found if (path, tile) != best[2:])[:_SHOWN]
    shown = tuple((seconds, path, tile or None) for seconds, path, tile in others)
    floor = trees.least if goal == "time" else 0.0
    chosen = Plan(network, sizes, grad, goal, search, best[2], found[best], best[3] or None, table, floor, shown)
    return _with_cotangent(chosen) if len(network.names) == len(leaves) else _with_equal_steps(chosen, trees, job)


def _with_cotangent(plan: Plan) -> Plan:
    """The plan, or a faster one that copies the gradient of its result once, for both gradient steps that read it."""
    steps = [step for step in plan.backward_steps if step.left == plan.results[0]]
    if plan.tile is not None or not plan.plain_leaves or len(steps) < 2 or not any(step.pairing.copies for step in steps):
        return plan
    left, right, out = (plan.orders[value] for value in (*plan.path[-1], plan.results[0]))
    plans = [plan]
    for hints in ((*left, *right), out):
        batch = tuple(axis for axis in dict.fromkeys(hints) if axis in left and axis in right and axis in out)
        rows, columns = (
            tuple(axis for axis in dict.fromkeys(hints) if axis in one and axis in out and axis not in batch) for one in (left, right)
        )
        plans += [
            dataclasses.replace(plan, cotangent=(*batch, *order))
            for order in ((*rows, *columns), (*columns, *rows))
            if (*batch, *order) != out
        ]
    return min(plans, key=_cost)


def _with_equal_steps(plan: Plan, trees: order.Trees, job: Job) -> Plan:
    """The plan, or a better one of a network that uses a tensor twice: some of its steps are equal and run once (see tn.sharing)."""
    among = itertools.islice(trees.all(), _SHARING)
    ranked = sorted((order.bound(path, trees.task, repeated(plan.network, path)), path) for path in among)
    paths = dict.fromkeys([plan.path, *(path for _, path in ranked[: _LAID_OUT[0]])])
    plans = [settled(plan)]
    for path in paths:
        whole = dataclasses.replace(plan, path=path, orders=choose(path, job).orders, tile=None)
        plans.append(settled(whole))
        tiles = tiles_of(whole)
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


def tiles_of(plan: Plan) -> list[int]:
    """Tiles of rows to try: those that leave several of them, where that makes a difference: an intermediate has rows."""
    inner = any(ROWS in plan.orders[value] for value in plan.kept)
    outside = not all(ROWS in plan.orders[value] and value >= len(plan.leaves) for value in plan.results)
    if not plan.machine.tiles or not inner or outside or not plan.plain_leaves:
        return []
    return [tile for tile in TILES if 2 * tile <= plan.size[ROWS]]
