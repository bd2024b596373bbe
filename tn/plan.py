"""A Plan: the contraction order, the memory order of every value, and the kind and cost of each step. Pure data."""

import dataclasses
import functools
import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

import torch

from tn import memory, order, slices
from tn.cost import contraction_flops, step_flops, volume
from tn.errors import PlanError
from tn.machine import Machine
from tn.network import Network
from tn.order import Axes, Path
from tn.pairing import Pairing, is_run, pair, same_memory, turning
from tn.sharing import alike
from tn.spec import ROWS, Term

FORMAT = 4  # of the JSON


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
        path: pairs of SSA values. orders: memory order of every SSA value (operands, then one a step); an operand in another order than
            its own is copied into it before the first step.
        tile: rows worked on at a time, so that intermediates stay in cache; None to take all rows at once. With tiles, the backward
            pass makes the intermediates again instead of keeping them.
        machine: the table of rates behind the predicted times.
        floor: seconds of the best tree that was looked at, if each step took all rows at once in its own best layout, nothing broadcast.
        others: the best of the plans that were not chosen: predicted seconds, path, tile.
        slices: (axis, size of a slice) of the axes that are worked on slice by slice to save memory; see tn.slices.
        itemsize: bytes of an element.
        cotangent: memory order that the gradient of the result is copied into, once for both gradient steps that read it; empty where they
            read it as it comes.
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
    cotangent: Axes = ()
    dtype: torch.dtype = field(default=torch.float32, compare=False, repr=False)
    device: str = field(default="cpu", compare=False, repr=False)

    def __post_init__(self) -> None:
        tile = self.tile
        if tile is not None and (isinstance(tile, bool) or not isinstance(tile, int) or tile < 2):
            raise PlanError(f"tile is {tile!r}, expected at least 2 rows, or None for all at once")
        if tile is not None and not all(value >= len(self.leaves) and ROWS in self.orders[value] for value in self.results):
            raise PlanError(f"tile is {tile} rows, but a result has no rows or is an operand; such a plan takes all rows at once")
        if tile is not None and (turned := [self.terms[leaf].name for leaf in self.turned if ROWS in self.leaves[leaf]]):
            raise PlanError(f"tile is {tile} rows, but {turned[0]!r} is copied for all rows at once")

        if self.cotangent and (tile is not None or self.slices or len(self.results) > 1):
            raise PlanError("the gradient of the result is copied as a whole: for one output, all rows at once, in no slices")

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
    def parts(self) -> "tuple[Plan, ...]":
        """A plan for each output by itself, of the same tree."""
        if len(self.network.parts) == 1:
            return (self,)
        found, leaf, step = [], 0, len(self.leaves)
        for part in self.network.parts:
            count = len(part.spec.operands)
            values = [*range(leaf, leaf + count), *range(step, step + count - 1)]
            path = tuple((values.index(left), values.index(right)) for left, right in self.path[step - len(self.leaves) :][: count - 1])
            cut = {"sizes": self.sizes, "slices": self.slices}
            mine: dict[str, Any] = {key: tuple(pair for pair in pairs if pair[0] in part.axes) for key, pairs in cut.items()}
            grad, orders = tuple(name for name in self.grad if name in part.names), tuple(self.orders[value] for value in values)
            found.append(dataclasses.replace(self, network=part, grad=grad, path=path, orders=orders, others=(), **mine))
            leaf, step = leaf + count, step + count - 1
        return tuple(found)

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
        """The same for values whose memory orders may differ. Slices share nothing."""
        if self.slices or len(self.network.names) == len(self.terms):
            return {}
        return alike(self.terms, self.leaves, self.path, self.orders[len(self.leaves) :], self.network.sizes)

    @functools.cached_property
    def turned(self) -> tuple[int, ...]:
        """Operands that are copied into another memory order before the first step, once for all steps and gradients."""
        return tuple(
            leaf for leaf, own in enumerate(self.leaves) if not same_memory(self.orders[leaf], own, self.size) and leaf not in self.same
        )

    @property
    def rearranged(self) -> bool:
        """Whether operands, or the gradient of the result, are copied into another memory order first."""
        return bool(self.turned or self.cotangent)

    def turning(self, leaf: int) -> float:
        """Predicted seconds of one such copy."""
        return turning(self.leaves[leaf], self.orders[leaf], self.size, self.machine)

    @property
    def turning_cotangent(self) -> float:
        """Predicted seconds of copying the gradient of the result."""
        return turning(self.orders[-1], self.cotangent, self.size, self.machine) if self.cotangent and self.grad else 0.0

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
        """How many slices run, those of every output counted."""
        return sum(self._slice_counts)

    @functools.cached_property
    def _slice_counts(self) -> list[int]:
        """How many slices each output is made in."""
        return [math.prod(-(-self.size[axis] // size) for axis, size in self.slices if axis in part.axes) for part in self.network.parts]

    @functools.cached_property
    def _slices_of(self) -> list[int]:
        """How often slices make each SSA value: operands once, others as often as there are slices of the output they are for."""
        inner = [[count] * (len(part.spec.operands) - 1) for count, part in zip(self._slice_counts, self.network.parts, strict=True)]
        return [*(1 for _ in self.leaves), *(count for counts in inner for count in counts)]

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

    def viewed(self, step: Step) -> bool:
        """Whether a gradient step makes the gradient of an operand, the only one it gets, in an order of which that is a view. It is not
        copied then, as autograd copies none: where it is added up, it goes into the operand's own order."""
        if step.out >= len(self.leaves) or len(self.network.names) != len(self.terms) or step.pairing.kind == "multiply":
            return False  # an elementwise product lies as its operands do, unless it is written in place
        return self._as_stored(step.out, step.pairing.natural(self.orders[step.out]))

    @functools.cached_property
    def turned_back(self) -> tuple[int, ...]:
        """Operands whose gradients are copied from another memory order into their own at the end."""
        steps = {step.out: step for step in self.backward_steps}
        wrong = [leaf for leaf in self.turned if self.needs[leaf] and not self._as_stored(leaf, self.orders[leaf])]
        return tuple(leaf for leaf in wrong if not self.viewed(steps[leaf]))

    def _as_stored(self, leaf: int, order: Axes) -> bool:
        """Whether a tensor in this memory order is a view of an operand's stored dimensions."""
        term = self.terms[leaf]
        return term.axes == self.leaves[leaf] and all(is_run(order, dim, self.size) for dim in term.dims)

    def squares(self, left: int, right: int) -> bool:
        """Whether two values are one, axis by axis."""
        return self.first(left) == self.first(right) and self.orders[left] == self.orders[right]

    def pairing(self, left: int, right: int, out: int) -> Pairing:
        """How SSA values, or their gradients, are contracted into another in the orders of this plan."""
        known = self.cotangent if self.cotangent and left == self.results[0] else self.orders[left]
        return pair(known, self.orders[right], self.orders[out], self.step_size, self.machine)

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

    @functools.cached_property
    def worth_owning(self) -> bool:
        """Whether its program is worth a backward of its own: chains of plain matrix products gain nothing from one, others lose their
        copies, tiled ones their traffic. Diagonals and sums of a single operand keep autograd's tape."""
        gains = self.tile is not None or self.goal in ("peak", "saved") or self.copies > 0
        return self.plain_leaves and (gains or any(step.pairing.kind != "mm" for step in (*self.steps, *self.backward_steps)))

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
        return self.size[ROWS] / self.tile if rows and self.tile else float(self._slices_of[max(step.left, step.out)])

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
        each = ((self._slices_of[max(step.left, step.out)], self.orders[step.left], self.orders[step.right]) for step in steps)
        return sum(count * step_flops(left, right, self.slice_size) for count, left, right in each)

    @property
    def seconds(self) -> float:
        """Predicted seconds, forward and needed gradients."""
        return self.forward_seconds + self.backward_seconds

    @property
    def forward_seconds(self) -> float:
        """Predicted seconds of one forward pass."""
        seconds = sum(self.times(step) * step.pairing.seconds for step in self.steps) + sum(map(self.turning, self.turned))
        return seconds + self._streaming[0] + slices.seconds(self, gradients=False)

    @property
    def backward_seconds(self) -> float:
        """Predicted seconds of the gradients in `grad`; with tiles or slices, of making the intermediates again too."""
        seconds = sum(self.times(step) * step.pairing.seconds for step in self.backward_steps)
        seconds += sum(self.turning(leaf) for leaf in self.turned if self.needs[leaf])  # the gradients, into the operands' own order
        if (self.tile or self.slices) and self.grad:
            seconds += sum(self.times(step) * step.pairing.seconds for step in self.steps if step.out in self.kept and self.times(step) > 1)
            seconds += sum(map(self.turning, self.turned))
            seconds += slices.seconds(self, gradients=True)
        return seconds + self._streaming[1] + self.turning_cotangent

    @property
    def _streaming(self) -> tuple[float, float]:
        if not self.tile:
            return 0.0, 0.0
        operands = [leaf for leaf in range(len(self.leaves)) if leaf not in self.same]
        read, made = ([self.orders[value] for value in values] for values in (operands, self.results))
        return streaming(read, made, [self.needs[leaf] for leaf in operands], self.size, self.machine)

    @property
    def copies(self) -> int:
        """Tensors copied, forward and needed gradients."""
        return len(self.turned) + bool(self.cotangent) + sum(step.pairing.copies for step in (*self.steps, *self.backward_steps))

    def at(self, sizes: Mapping[str, int]) -> "Plan":
        """The plan as it runs at other sizes of some axes: no more rows than a tile are taken all at once."""
        found = {**self.size, **sizes}
        tile = self.tile if self.tile is not None and found[ROWS] > self.tile else None
        return dataclasses.replace(self, sizes=tuple(found.items()), tile=tile)

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
            "cotangent": self.cotangent,
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


def streaming(
    leaves: Iterable[Axes], outputs: Iterable[Axes], grads: Iterable[bool], size: Mapping[str, int], table: Machine
) -> tuple[float, float]:
    """Seconds, forward and backward, that reading and writing whole tensors takes besides, when steps only see a tile of them."""
    read, new = ([4 * volume(t, size) if ROWS in t else 0 for t in tensors] for tensors in (leaves, outputs))
    made = [number for number, need in zip(read, grads, strict=True) if need]
    forward = sum(map(table.traffic, read)) + sum(table.traffic(number, new=True) for number in new)
    backward = sum(map(table.traffic, (*read, *new))) + sum(table.traffic(number, new=True) for number in made)
    return forward, backward if made else 0.0
