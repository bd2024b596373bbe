"""Layouts: the memory order of every intermediate, chosen over the whole tree so that matrix products need no copy (see tn.pairing)."""

import itertools
import math
from collections.abc import Mapping, Sequence

from tn.machine import Machine
from tn.order import Axes, Path, steps_of
from tn.pairing import ideal, pair

_ORDERS = 12  # orders of an intermediate that are tried
_ORDERS_INNER = 6  # the same when both of its operands are intermediates: the search is cubic in it
# A forward step weighs more than a gradient of the same cost: it runs again where its result is not kept, and alone in evaluation.
_FORWARD = 1.5

Costs = dict[Axes, tuple[float, Axes, Axes]]  # order of a value → (seconds of its subtree, orders of its operands)


def choose(
    path: Path, inputs: Sequence[Axes], output: Axes, sizes: Mapping[str, int], grads: Sequence[bool], machine: Machine
) -> tuple[float, tuple[Axes, ...]]:
    """Memory orders of all values of a tree, operands and output fixed, by dynamic programming over the tree.

    Returns:
        (cost: predicted seconds of the needed gradients and 1.5 times those of the forward steps, the order of every SSA value).
    """
    steps = [*steps_of(path, inputs, output)]
    count = len(inputs)
    parent = {operand: number for number, (left, right, _) in enumerate(steps) for operand in (left, right)}
    needs = list(grads)
    table: list[Costs] = [{tuple(t): (0.0, (), ())} for t in inputs]
    axes = [*map(tuple, inputs), *(out for _, _, out in steps)]
    for number, (left, right, _out) in enumerate(steps):
        value = count + number
        orders = [tuple(output)] if value not in parent else _orders(value, steps, parent, axes, count, output)
        needs.append(needs[left] or needs[right])
        table.append({order: _best(table[left], table[right], order, needs[left], needs[right], sizes, machine) for order in orders})
    chosen: list[Axes] = [()] * len(axes)
    chosen[-1] = next(iter(table[-1]))
    for number in reversed(range(len(steps))):
        left, right, _ = steps[number]
        _, chosen[left], chosen[right] = table[count + number][chosen[count + number]]
    if not steps:
        chosen = [*table[0]]
    return next(iter(table[-1].values()))[0], tuple(chosen)


def bound(path: Path, inputs: Sequence[Axes], output: Axes, sizes: Mapping[str, int], grads: Sequence[bool], machine: Machine) -> float:
    """Cost (see `choose`) of a tree in which no step copies: no layout of it is cheaper."""
    axes, needs, total = [*map(tuple, inputs)], list(grads), 0.0
    for left, right, out in steps_of(path, inputs, output):
        total += _ideal(axes[left], axes[right], out, needs[left], needs[right], sizes, machine)
        axes.append(out)
        needs.append(needs[left] or needs[right])
    return total


def _best(
    lefts: Costs, rights: Costs, order: Axes, left_needs: bool, right_needs: bool, sizes: Mapping[str, int], machine: Machine
) -> tuple[float, Axes, Axes]:
    """The cheapest orders of both operands for one order of the result. Pairs that could not win even without a copy are left out."""
    found: tuple[float, Axes, Axes] = (math.inf, (), ())
    floor = 0.0
    for left, (left_cost, *_) in sorted(lefts.items(), key=_cost):
        for right, (right_cost, *_) in sorted(rights.items(), key=_cost):
            floor = floor or _ideal(left, right, order, left_needs, right_needs, sizes, machine)
            if left_cost + right_cost + floor >= found[0]:
                break
            seconds = left_cost + right_cost + _FORWARD * pair(left, right, order, sizes, machine).seconds
            if left_needs:
                seconds += pair(order, right, left, sizes, machine).seconds
            if right_needs:
                seconds += pair(left, order, right, sizes, machine).seconds
            if seconds < found[0]:
                found = (seconds, left, right)
    return found


def _cost(entry: tuple[Axes, tuple[float, Axes, Axes]]) -> float:
    return entry[1][0]


def _ideal(left: Axes, right: Axes, out: Axes, left_needs: bool, right_needs: bool, sizes: Mapping[str, int], machine: Machine) -> float:
    """Seconds of a step and its gradients if no layout were in the way."""
    needed = ((left, right, out, _FORWARD), (out, right, left, left_needs), (left, out, right, right_needs))
    return (1 - 1e-9) * sum(weight * ideal(a, b, c, sizes, machine) for a, b, c, weight in needed if weight)


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

    def broken(order: Sequence[tuple]) -> int:
        """How many groups of either step are split in this order: 0 is copy-free on both sides."""
        return sum(_changes([key[side : side + 2] for key in order]) for side in (0, 2))

    limit = _ORDERS if left < count or right < count else _ORDERS_INNER
    tried = itertools.islice(itertools.permutations(keys), 5040)
    best = sorted(tried, key=broken)[:limit]
    return [tuple(axis for key in order for axis in atoms[key]) for order in best]


def _changes(labels: Sequence[tuple]) -> int:
    """Runs of equal labels beyond one run a label."""
    return sum(1 for _ in itertools.groupby(labels)) - len(set(labels))
