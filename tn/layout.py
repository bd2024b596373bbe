"""Layouts: the memory order of every intermediate, chosen over the whole tree so that matrix products need no copy (see tn.pairing)."""

import functools
import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from tn.machine import Machine
from tn.order import Axes, Path, steps_of
from tn.pairing import ideal, pair
from tn.spec import ROWS

_ORDERS = 8  # orders of an intermediate that are tried
_ORDERS_INNER = 6  # the same when both of its operands are intermediates: the search is cubic in it

Costs = dict[Axes, tuple[float, Axes, Axes]]  # order of a value → (seconds of its subtree, orders of its operands)


@dataclass(frozen=True, slots=True)
class Job:
    """What a tree is laid out for.

    Attributes:
        inputs, output: axes of the operands and the result. grads: which operands need a gradient.
        sizes: of every axis; with tiles, the rows are those of a tile. tiles: how often a step with rows runs.
        machine: prices the steps.
    """

    inputs: tuple[Axes, ...]
    output: Axes
    sizes: Mapping[str, int]
    grads: tuple[bool, ...]
    machine: Machine
    tiles: float = 1.0

    def weights(self, left: Axes, right: Axes, out: Axes, left_needs: bool, right_needs: bool) -> tuple[float, float, float]:
        """How often a step, the gradient of its left and that of its right operand run. A tile makes its intermediates again."""
        often = self.tiles if ROWS in left or ROWS in right else 1.0
        again = any(self.grads) and self.tiles > 1 and often > 1 and set(out) != set(self.output)
        return often * (1 + again), often * left_needs, often * right_needs


def choose(path: Path, job: Job) -> tuple[float, tuple[Axes, ...]]:
    """Memory orders of all values of a tree, operands and output fixed, by dynamic programming over the tree.

    Returns:
        (predicted seconds of the steps and the needed gradients, the order of every SSA value).
    """
    inputs, output = job.inputs, job.output
    steps = [*steps_of(path, inputs, output)]
    count = len(inputs)
    parent = {operand: number for number, (left, right, _) in enumerate(steps) for operand in (left, right)}
    needs = list(job.grads)
    table: list[Costs] = [{t: (0.0, (), ())} for t in inputs]
    axes = [*inputs, *(out for _, _, out in steps)]
    for number, (left, right, out) in enumerate(steps):
        value = count + number
        orders = [output] if value not in parent else _orders(value, steps, parent, axes, count, output)
        needs.append(needs[left] or needs[right])
        weights = job.weights(axes[left], axes[right], out, needs[left], needs[right])
        table.append({order: _best(table[left], table[right], order, weights, job) for order in orders})
    chosen: list[Axes] = [()] * len(axes)
    chosen[-1] = next(iter(table[-1]))
    for number in reversed(range(len(steps))):
        left, right, _ = steps[number]
        _, chosen[left], chosen[right] = table[count + number][chosen[count + number]]
    if not steps:
        chosen = [*table[0]]
    return next(iter(table[-1].values()))[0], tuple(chosen)


def bound(path: Path, job: Job, repeated: Collection[int] = ()) -> float:
    """Cost (see `choose`) of a tree whose every step runs in its own best layout, without the steps that are repeated."""
    axes, needs, total = [*job.inputs], list(job.grads), 0.0
    for number, (left, right, out) in enumerate(steps_of(path, job.inputs, job.output)):
        weights = job.weights(axes[left], axes[right], out, needs[left], needs[right])
        total += 0.0 if number in repeated else _ideal(axes[left], axes[right], out, weights, job)
        axes.append(out)
        needs.append(needs[left] or needs[right])
    return total


def _best(lefts: Costs, rights: Costs, order: Axes, weights: tuple[float, float, float], job: Job) -> tuple[float, Axes, Axes]:
    """The cheapest orders of both operands for one order of the result. Pairs that could not win even in their best layout are left out."""
    found: tuple[float, Axes, Axes] = (math.inf, (), ())
    first_left, first_right = next(iter(lefts)), next(iter(rights))
    floors = [weight * ideal(*t, job.sizes, job.machine) for weight, t in zip(weights, _turns(first_left, first_right, order), strict=True)]
    for left, (left_cost, *_) in sorted(lefts.items(), key=_cost):
        for right, (right_cost, *_) in sorted(rights.items(), key=_cost):
            seconds = left_cost + right_cost + sum(floors)
            if seconds >= found[0]:
                break
            for weight, turn, floor in zip(weights, _turns(left, right, order), floors, strict=True):
                if weight and seconds < found[0]:
                    seconds += weight * pair(*turn, job.sizes, job.machine).seconds - floor
            if seconds < found[0]:
                found = (seconds, left, right)
    return found


def _turns(left: Axes, right: Axes, out: Axes) -> tuple[tuple[Axes, Axes, Axes], ...]:
    """A step, the gradient of its left and that of its right operand, each as (left, right, result)."""
    return (left, right, out), (out, right, left), (left, out, right)


def _cost(entry: tuple[Axes, tuple[float, Axes, Axes]]) -> float:
    return entry[1][0]


def _ideal(left: Axes, right: Axes, out: Axes, weights: tuple[float, float, float], job: Job) -> float:
    """Seconds of a step and its gradients if no layout were in the way."""
    turns = _turns(left, right, out)
    return sum(weight * ideal(*turn, job.sizes, job.machine) for weight, turn in zip(weights, turns, strict=True) if weight)


def _orders(value: int, steps: list, parent: Mapping[int, int], axes: list[Axes], count: int, output: Axes) -> list[Axes]:
    """Orders worth trying for an intermediate: permutations of the atoms that its own step and its consumer both keep together."""
    left, right, out = steps[value - count]
    up_left, up_right, up_out = steps[parent[value]]
    sibling = up_right if up_left == value else up_left
    top = output if count + parent[value] not in parent else up_out
    hints = [*(axes[sibling] if sibling < count else ()), *top]
    hints += [axis for child in (left, right) if child < count for axis in axes[child]]
    ranked = [axis for axis in dict.fromkeys((*hints, *out)) if axis in out]

    def group(axis: str) -> tuple[bool, bool, bool, bool]:
        return (axis in axes[left], axis in axes[right], axis in axes[sibling], axis in up_out)

    atoms: dict[tuple, Axes] = {}
    for axis in ranked:
        atoms[group(axis)] = (*atoms.get(group(axis), ()), axis)
    keys = sorted(atoms, key=lambda key: ranked.index(atoms[key][0]))

    limit = _ORDERS if left < count or right < count else _ORDERS_INNER
    return [tuple(axis for place in order for axis in atoms[keys[place]]) for order in _least_broken(tuple(keys))[:limit]]


@functools.lru_cache(maxsize=4096)
def _least_broken(keys: tuple[tuple[bool, bool, bool, bool], ...]) -> list[tuple[int, ...]]:
    """Permutations of atoms, those first that split the fewest groups of either step: without a split, neither step copies."""

    def broken(order: tuple[int, ...]) -> int:
        return sum(_changes([keys[place][side : side + 2] for place in order]) for side in (0, 2))

    return sorted(itertools.islice(itertools.permutations(range(len(keys))), 5040), key=broken)[:_ORDERS]


def _changes(labels: Sequence[tuple]) -> int:
    """Runs of equal labels beyond one run a label."""
    return sum(1 for _ in itertools.groupby(labels)) - len(set(labels))
