"""Layouts: the memory order of every intermediate, chosen over the whole tree so that matrix products need no copy (see tn.pairing)."""

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from tn.cost import volume
from tn.forms import fuse
from tn.machine import Machine
from tn.order import Axes, Path, Task, Weights, roles, steps_of
from tn.pairing import Prices, ideal, is_run, turning
from tn.spec import ROWS

_ORDERS = (8, 6)  # orders of an intermediate that are tried, in networks of up to six operands and of more
_ORDERS_INNER = (6, 4)  # the same when both of its operands are intermediates: the search is cubic in it
_FEW = 6  # operands

_NO_FLOORS = (0.0, 0.0, 0.0)

Costs = dict[Axes, tuple[float, Axes, Axes]]  # order of a value → (seconds of its subtree, orders of its operands)


@dataclass(frozen=True, slots=True)
class Job:
    """What trees are laid out for.

    Attributes:
        task: the operands, the result and the sizes of all axes. machine: prices the steps.
        turns: whether operands may be copied into another memory order before the first step, once for all steps and gradients.
        known: what was found out, because trees share subtrees.
    """

    task: Task
    machine: Machine
    turns: bool = False
    known: dict[tuple, Costs] = field(default_factory=dict)

    @classmethod
    def of(cls, inputs: tuple[Axes, ...], output: Axes, sizes: Mapping[str, int], grads: tuple[bool, ...], machine: Machine) -> "Job":
        """A job for all rows at once, whose task compares trees by the seconds of their steps."""
        return cls(Task(inputs, output, sizes, grads, functools.partial(ideal, machine=machine)), machine)

    def turning(self, value: int, order: Axes) -> float:
        """Seconds of copying an operand into another memory order (again for the gradients of a program in tiles), and of turning its
        gradient back."""
        task = self.task
        times = 1 + task.grads[value] + (task.tiles > 1 and any(task.grads))
        return times * turning(task.inputs[value], order, task.sizes, self.machine)

    def tiled(self, tile: int) -> "Job":
        """The same with so many rows at a time."""
        sizes = self.task.sizes
        return Job(replace(self.task, sizes={**sizes, ROWS: tile}, tiles=sizes[ROWS] / tile), self.machine, self.turns)


class Layout(NamedTuple):
    """A tree laid out.

    Attributes:
        seconds: predicted, of the steps and the needed gradients. orders: the memory order of every SSA value.
        excess: of every step, what it adds to the seconds of its subtree in the best order for that beyond its own best layout.
    """

    seconds: float
    orders: tuple[Axes, ...]
    excess: tuple[float, ...] = ()


def choose(path: Path, job: Job) -> Layout:
    """Memory orders of all values of a tree, operands and output fixed, by dynamic programming over the tree."""
    inputs, output = job.task.inputs, job.task.output
    steps = [*steps_of(path, inputs, output)]
    count = len(inputs)
    parent = {operand: number for number, (left, right, _) in enumerate(steps) for operand in (left, right)}
    axes = [*inputs, *(out for _, _, out in steps)]
    extents, weights = roles(path, job.task)
    floors = job.task.turns(extents).T.tolist()
    table = []
    for value, own in enumerate(inputs):
        costs: Costs = {own: (0.0, (), ())}
        if job.turns and value in parent and not (job.task.tiles > 1 and ROWS in own):
            left, right, out = steps[parent[value]]
            sibling, needs = (right, weights[parent[value]][2]) if left == value else (left, weights[parent[value]][1])
            if needs or job.task.tiles > 1:  # it is read again, for the gradient of the other operand or by the next tile
                others = _turned(own, axes[sibling], out, output, job.task.sizes)
                costs |= {other: (job.turning(value, other), (), ()) for other in others}
        table.append(job.known.setdefault((value, *costs), costs))
    for number, (left, right, _) in enumerate(steps):
        value = count + number
        orders = [output] if value not in parent else _orders(value, steps, parent, axes, count, output)
        same = (id(table[left]), id(table[right]), weights[number], *orders)
        if same not in job.known:
            job.known[same] = _best(table[left], table[right], orders, weights[number], floors[number], job)
        table.append(job.known[same])
    if not steps:
        return Layout(0.0, inputs)
    chosen: list[Axes] = [()] * len(axes)
    chosen[-1] = output
    for number in reversed(range(len(steps))):
        left, right, _ = steps[number]
        _, chosen[left], chosen[right] = table[count + number][chosen[count + number]]
    best = [min(costs.values())[0] for costs in table]
    excess = []
    for number, (left, right, _) in enumerate(steps):
        least = sum([weight * floor for weight, floor in zip(weights[number], floors[number], strict=True)])
        excess.append(best[count + number] - best[left] - best[right] - least)
    return Layout(best[-1], tuple(chosen), tuple(excess))


def _turned(own: Axes, sibling: Axes, out: Axes, output: Axes, sizes: Mapping[str, int]) -> Iterable[Axes]:
    """Memory orders of an operand in which the step that takes it finds each group together: batch, then kept and summed axes, each in the
    sequence that the other tensors have, or its own."""
    found: list[Axes] = []
    for hints in ((*sibling, *output, *own), own):
        ranked = [axis for axis in dict.fromkeys(hints) if axis in own]
        batch = tuple([axis for axis in ranked if axis in sibling and axis in out])
        kept = tuple([axis for axis in ranked if axis not in sibling])
        summed = tuple([axis for axis in ranked if axis not in out])
        if all(is_run(own, group, sizes) for group in (batch, kept, summed)) and not (batch and own[-1] in batch):
            break  # as it is
        found += [(*batch, *kept, *summed), (*batch, *summed, *kept)]
    return dict.fromkeys(found)


def price(path: Path, orders: Sequence[Axes], job: Job) -> float:
    """Predicted seconds (see `choose`) of a tree in given memory orders."""
    (_, weights), inputs = roles(path, job.task), job.task.inputs
    total = sum([job.turning(value, order) for value, order in enumerate(orders[: len(inputs)]) if order != inputs[value]])
    for number, (left, right) in enumerate(path):
        lefts, rights = ({orders[value]: (0.0, (), ())} for value in (left, right))
        ((found, _, _),) = _best(lefts, rights, [orders[len(job.task.inputs) + number]], weights[number], _NO_FLOORS, job).values()
        total += found
    return total


def _best(lefts: Costs, rights: Costs, orders: list[Axes], weights: Weights, floors: Sequence[float], job: Job) -> Costs:
    """For each order of a step's result the cheapest orders of both operands. Pairs that could not win even in their best layout are
    left out.

    Args:
        weights, floors: how often each turn runs, and its seconds in its best layout (see `_turns`).
    """
    atoms, (left_code, right_code, code) = fuse((list(lefts), list(rights), orders), job.task.sizes)
    extent = {atom: volume(axes, job.task.sizes) for atom, axes in atoms.items()}
    one = any(job.task.sizes[axis] == 1 for axis in orders[0] if axis in next(iter(lefts)) and axis in next(iter(rights)))
    a, b, c = (next(iter(codes.values())) for codes in (left_code, right_code, code))
    turns = [
        Prices(*turn, extent, job.machine, whole=one) if weight else None for turn, weight in zip(_turns(a, b, c), weights, strict=True)
    ]
    floors = [weight * floor for weight, floor in zip(weights, floors, strict=True)]
    by_left = sorted((cost, order) for order, (cost, *_) in lefts.items())
    by_right = sorted((cost, order) for order, (cost, *_) in rights.items())
    least, found = sum(floors), {}
    for order in orders:
        best: tuple[float, Axes, Axes] = (math.inf, (), ())
        for (left_cost, left), (right_cost, right) in itertools.product(by_left, by_right):
            cost = left_cost + right_cost + least
            if cost >= best[0]:
                continue
            codes = _turns(left_code[left], right_code[right], code[order])
            for weight, turn, parts, floor in zip(weights, turns, codes, floors, strict=True):
                if turn and cost < best[0]:
                    cost += weight * turn.seconds(*parts) - floor
            if cost < best[0]:
                best = (cost, left, right)
        found[order] = best
    return found


def _turns(left: Any, right: Any, out: Any) -> tuple[tuple[Any, Any, Any], ...]:
    """A step, the gradient of its left and that of its right operand, each as (left, right, result)."""
    return (left, right, out), (out, right, left), (left, out, right)


def _orders(value: int, steps: list, parent: Mapping[int, int], axes: list[Axes], count: int, output: Axes) -> list[Axes]:
    """Orders worth trying for an intermediate: permutations of the atoms that its own step and its consumer both keep together."""
    left, right, out = steps[value - count]
    up_left, up_right, up_out = steps[parent[value]]
    sibling = up_right if up_left == value else up_left
    top = output if count + parent[value] not in parent else up_out
    above = [*(axes[sibling] if sibling < count else ()), *top]
    below = [axis for child in (left, right) if child < count for axis in axes[child]]

    def group(axis: str) -> tuple[bool, bool, bool, bool]:
        return (axis in axes[left], axis in axes[right], axis in axes[sibling], axis in up_out)

    limit = (_ORDERS if left < count or right < count else _ORDERS_INNER)[count > _FEW]
    found: dict[Axes, None] = {}
    tried: list[dict[tuple, Axes]] = []
    for hints in ((*above, *below, *out), (*below, *above, *out)):
        atoms: dict[tuple, Axes] = {}
        for axis in dict.fromkeys(hints):
            if axis in out:
                atoms[group(axis)] = (*atoms.get(group(axis), ()), axis)
        if atoms not in tried:  # the second time only where a group has another sequence
            tried.append(atoms)
            keys = tuple(atoms)
            for order in _least_broken(keys)[:limit]:
                found[tuple(axis for place in order for axis in atoms[keys[place]])] = None
    return list(found)


@functools.lru_cache(maxsize=4096)
def _least_broken(keys: tuple[tuple[bool, bool, bool, bool], ...]) -> list[tuple[int, ...]]:
    """Permutations of atoms, those first that split the fewest groups of either step: without a split, neither step copies."""

    def broken(order: tuple[int, ...]) -> int:
        return sum(_changes([keys[place][side : side + 2] for place in order]) for side in (0, 2))

    return sorted(itertools.islice(itertools.permutations(range(len(keys))), 5040), key=broken)[: _ORDERS[0]]


def _changes(labels: Sequence[tuple]) -> int:
    """Runs of equal labels beyond one run a label."""
    return sum(1 for _ in itertools.groupby(labels)) - len(set(labels))
