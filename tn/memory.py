"""Memory: what a plan's program keeps for its gradients, and the most bytes that are alive at once.

Intermediates, their gradients, copies, and products on their way into another order count; operands, the result and the gradients of
operands do not. `Work` says when a value is made and when it dies, and the generated code (tn.program) follows it: the model is exact for
contiguous operands in the precision of the plan, of which no axis is repeated or summed before the first step. Chains of plain products
run on autograd's tape, which lets go of what it kept earlier: there it is an upper bound.
"""

import functools
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tn.cost import volume
from tn.order import Axes, Path
from tn.pairing import Pairing, same_memory
from tn.spec import ROWS

if TYPE_CHECKING:
    from tn.plan import Plan

Spike = Callable[[int, int, int, bool], int]  # left, right, out, whether the result counts → bytes alive in a step beyond its operands


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes kept between the forward and the backward pass, and the most alive in each of the two; the second includes the kept ones."""

    saved: int
    forward: int
    backward: int

    @property
    def peak(self) -> int:
        """The most bytes alive at once."""
        return max(self.forward, self.backward)


@dataclass(frozen=True)
class Work:
    """The steps of a program and of its gradients, by SSA values.

    Attributes:
        count: number of operands. steps: (left, right, out). gradients: (value whose gradient is known, the other operand, value whose
            gradient is made). results: of the program.
        same: values that are not computed → the one they equal. turned: operands that are copied first. back: those whose
            gradients are copied at the end. copied: whether the gradient of the result is, first.
    """

    count: int
    steps: tuple[tuple[int, int, int], ...]
    gradients: tuple[tuple[int, int, int], ...]
    results: tuple[int, ...]
    same: Mapping[int, int]
    turned: tuple[int, ...] = ()
    back: tuple[int, ...] = ()
    copied: bool = False

    @classmethod
    def of(cls, plan: "Plan", needs: Sequence[bool]) -> "Work":
        """That of a plan, for gradients of some of its values."""
        steps = tuple((step.left, step.right, step.out) for step in plan.steps)
        gradients = tuple((step.left, step.right, step.out) for step in plan.gradient_steps(needs))
        same = {value: first for value, (first, _) in plan.same.items()}
        return cls(
            len(plan.leaves),
            steps,
            gradients,
            tuple(map(plan.first, plan.results)),
            same,
            plan.turned,
            plan.turned_back,
            bool(plan.cotangent),
        )

    @classmethod
    def along(cls, path: Path, needs: Sequence[bool], count: int) -> "Work":
        """That of a tree without equal values."""
        steps = tuple((left, right, out) for out, (left, right) in enumerate(path, start=count))
        turns = ((out, other, target) for left, right, out in steps[::-1] for target, other in ((left, right), (right, left)))
        return cls(count, steps, tuple(turn for turn in turns if needs[turn[2]]), (count + len(path) - 1,), {})

    def first(self, value: int) -> int:
        """The value that is computed for this one."""
        return self.same.get(value, value)

    def made(self, value: int) -> bool:
        """Whether a value is made by the program: a step's result, or a copy of an operand."""
        return value >= self.count or value in self.turned

    @functools.cached_property
    def read(self) -> tuple[int, ...]:
        """The values made that the gradients read, in the order they are made."""
        return tuple(sorted({self.first(other) for _, other, _ in self.gradients if self.made(self.first(other))}))

    @functools.cached_property
    def gradients_of(self) -> Counter[int]:
        """How many gradients are made of each value that is computed, or given for it."""
        return Counter([self.first(target) for *_, target in self.gradients] + list(self.results))

    @property
    def equal(self) -> set[int]:
        """Values that are several results: the gradients given for them are added up."""
        return {value for value in self.results if self.results.count(value) > 1}

    def remade(self, have: Collection[int]) -> set[int]:
        """The values to make again for the gradients by a backward pass that has some."""
        missing = {value for value in self.read if value not in have}
        for left, right, out in reversed(self.steps):
            if out in missing:
                missing.update(v for v in map(self.first, (left, right)) if self.made(v) and v not in have)
        return missing

    def forward(self, keep: Collection[int], only: Collection[int] | None = None) -> Iterator[tuple[int, int, int, list[int]]]:
        """(left, right, out, values that nothing reads any more) of every step, or of those that make the values in `only`."""
        run = [step for step in self.steps if only is None or step[2] in only]
        ends = {self.first(value): place for place, (left, right, _) in enumerate(run) for value in (left, right)}
        for place, (left, right, out) in enumerate(run):
            over = place == len(run) - 1 and only is None  # what dies with the function need not be deleted
            dead = [value for value, end in ends.items() if end == place and self.made(value) and value not in (*keep, *self.results)]
            yield left, right, out, [] if over else dead

    def backward(self, spent: Collection[int]) -> Iterator[tuple[int, int, int, list[int], list[int]]]:
        """(known, other, target, values whose gradient nothing reads any more, values of `spent` likewise) of every gradient step."""
        ends = {self.first(above): place for place, (above, _, _) in enumerate(self.gradients)}
        last = {self.first(other): place for place, (_, other, _) in enumerate(self.gradients)}
        for place, (above, other, target) in enumerate(self.gradients):
            over = [value for value, end in ends.items() if end == place and (self.copied or value not in self.results)]
            yield above, other, target, over, [value for value in spent if last.get(value) == place]


class _Heap:
    """What is alive, by name, and the most that ever was."""

    def __init__(self) -> None:
        self.live: dict[object, int] = {}
        self.now = self.peak = 0

    def run(self, size: int) -> None:
        """So many bytes more, for a moment."""
        self.peak = max(self.peak, self.now + size)

    def add(self, name: object, size: int) -> None:
        self.live[name] = size
        self.now += size
        self.run(0)

    def drop(self, *names: object) -> None:
        for name in names:
            self.now -= self.live.pop(name, 0)

    def replace(self, name: object, size: int) -> None:
        """What is made while that of the same name is still there."""
        self.run(size)
        self.drop(name)
        self.add(name, size)


def whole(
    work: Work, sizes: Sequence[int], spikes: tuple[Spike, Spike], again: bool = False, parts: Collection[int] = (), tape: bool = False
) -> Memory:
    """Memory of a program that takes all rows at once.

    Args:
        sizes: of every SSA value, in bytes. spikes: of a step that makes a tensor, and of one that adds to it.
        again: nothing is kept, what the gradients read is made again, and the result and the gradients count.
        parts: operands whose gradients count because they are added up.
        tape: several gradients of one value are tensors of their own before they are added.
    """
    heap, keep = _Heap(), () if again else work.read
    for value in work.turned:
        heap.add(value, sizes[value])
    for left, right, out, dead in work.forward(keep):
        counted = again or out not in work.results
        heap.run(spikes[0](left, right, out, counted))
        heap.add(out, sizes[out] * counted)
        heap.drop(*dead)
    forward, heap.peak = heap.peak, 0
    heap.drop(*[value for value in heap.live if value not in keep])
    saved = heap.now
    heap.run(0)
    fresh = work.remade(keep)
    for value in fresh.intersection(work.turned):
        heap.add(value, sizes[value])
    for left, right, out, dead in work.forward(work.read, fresh):
        heap.run(spikes[0](left, right, out, True))
        heap.add(out, sizes[out])
        heap.drop(*dead)
    if work.copied and work.gradients:
        heap.add(("gradient", work.results[0]), sizes[work.results[0]])
    ours = {*work.equal} if work.gradients else set()
    for value in ours:
        heap.add(("gradient", value), sizes[value])
        heap.run(sizes[value] * tape)
    for above, other, target, over, dead in work.backward(fresh):
        first = work.first(target)
        if tape and work.gradients_of[first] > 1:
            heap.run(spikes[0](above, other, target, True))
            heap.run(2 * sizes[first])  # that one, and the sum
            heap.replace(("gradient", first), sizes[first])
        else:
            counted = again or first >= work.count or target in (*parts, *work.back)
            heap.run(spikes[first in ours](above, other, target, counted))
            if first not in ours:
                heap.add(("gradient", first), sizes[first] * counted)
            ours.add(first)
        heap.drop(*dead, *(("gradient", value) for value in over))
    heap.run(max((sizes[value] for value in parts), default=0) * (len(parts) > 2))
    return Memory(saved, forward, heap.peak)


def lower_bound(path: Path, axes: Sequence[Axes], needs: Sequence[bool], size: Mapping[str, int], itemsize: int) -> Memory:
    """Memory of a tree if no step copies: no layout has less.

    Args:
        axes: of every SSA value.
    """
    sizes = [itemsize * volume(value, size) for value in axes]
    made = lambda left, right, out, counted: sizes[out] * counted
    return whole(Work.along(path, needs, len(axes) - len(path)), sizes, (made, made))


def measure(plan: "Plan") -> Memory:
    """Memory of a plan's program."""
    if plan.tile is not None:
        return _tiled(plan)
    return whole(Work.of(plan, plan.needs), _sizes(plan), _spikes(plan), parts=_parts(plan), tape=not plan.worth_owning)


def part(plan: "Plan") -> Memory:
    """Memory of one slice: nothing is kept, and its result and gradients are on their way into the whole ones."""
    return whole(Work.of(plan, plan.needs), _sizes(plan), _spikes(plan), again=True)


def _sizes(plan: "Plan") -> list[int]:
    return [plan.itemsize * volume(order, plan.step_size) for order in plan.orders]


def _spikes(plan: "Plan") -> tuple[Spike, Spike]:
    viewed = {step.out for step in plan.backward_steps if plan.viewed(step)}

    def make(left: int, right: int, out: int, counted: bool) -> int:
        orders = _orders(plan, left, right, out)
        return plan.itemsize * _new(plan.pairing(left, right, out), *orders, plan.step_size, counted, out in viewed)

    def add(left: int, right: int, out: int, counted: bool) -> int:
        return plan.itemsize * _added(plan.pairing(left, right, out), *_orders(plan, left, right, out), plan.step_size)

    return make, add


def _orders(plan: "Plan", left: int, right: int, out: int) -> tuple[Axes, Axes, Axes]:
    return plan.orders[left], plan.orders[right], plan.orders[out]


def _inner(p: Pairing, left: Axes, right: Axes, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Elements of the operands' copies, and of a product that is summed afterwards."""
    if p.kind == "multiply":
        return 0, 0
    if p.kind == "dot":
        return 0, volume((*p.batch, *p.left, *p.right, *p.contracted), sizes)
    copies = p.copy_left * volume(left, sizes) + p.copy_right * volume(right, sizes)
    return copies, volume((*p.batch, *p.left, *p.right), sizes) if p.batch_on == "operands" else 0


def _made(copies: int, inner: int, result: int) -> int:
    """Most elements alive while a product makes its own result."""
    return max(copies + inner, inner + result) if inner else copies + result


def _new(p: Pairing, left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int], counted: bool, viewed: bool) -> int:
    """Most elements alive while a step writes a new tensor (Writer.product), `viewed` where it is a view of the product."""
    (copies, inner), whole = _inner(p, left, right, sizes), volume(out, sizes)
    result = whole * counted
    if viewed:
        return _made(copies, inner, result)
    if p.kind == "multiply" or p.out == "strided":  # the result is there before its operands are copied
        return result + copies + inner
    if p.out == "copy":
        return max(_made(copies, inner, whole), whole + result)
    return _made(copies, inner, result)


def _into(p: Pairing, left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int]) -> int:
    """Most elements alive while a step writes into a tensor that is there (Writer.write)."""
    copies, inner = _inner(p, left, right, sizes)
    return _made(copies, inner, volume(out, sizes)) if p.out == "copy" else copies + inner


def _added(p: Pairing, left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int]) -> int:
    """Most elements alive while a step is added to a tensor that is there (Writer.add_into)."""
    if p.out == "copy":
        return _made(*_inner(p, left, right, sizes), volume(out, sizes))
    return _onto(p, left, right, out, sizes)


def _onto(p: Pairing, left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int]) -> int:
    """Most elements alive while a step is added to a tensor of its own shape (Writer.accumulate)."""
    copies, inner = _inner(p, left, right, sizes)
    if p.kind in ("mm", "bmm") and p.batch_on != "operands":
        return copies
    return _made(copies, inner, volume(out, sizes))


def _tiled(plan: "Plan") -> Memory:
    """Memory of a program that takes a tile of rows at a time (tn.tiles): what has no rows, made before the loop, and buffers."""
    work, (make, add), sizes = Work.of(plan, plan.needs), _spikes(plan), _sizes(plan)
    rowwise, parts = [ROWS in order for order in plan.orders], _parts(plan)

    def loop(kind: Callable[..., int], left: int, right: int, out: int) -> int:
        return plan.itemsize * kind(plan.pairing(left, right, out), *_orders(plan, left, right, out), plan.step_size)

    def forward(heap: _Heap, made: Collection[int], given: Collection[int]) -> list[int]:
        """Everything without rows and the buffers of the values in `made`; what each step of the loop takes besides."""
        for value in work.turned:
            heap.add(value, sizes[value])
        for left, right, out in work.steps:
            if not rowwise[out]:
                heap.run(make(left, right, out, True))
                heap.add(out, sizes[out])
        inside = [step for step in work.steps if rowwise[step[2]] and step[2] in made]
        for *_, out in inside:
            heap.add(out, sizes[out] * (out not in given))
        return [loop(_into, *step) for step in inside]

    first, second = _Heap(), _Heap()
    first.run(max(forward(first, range(len(plan.orders)), work.results), default=0))
    if not work.gradients:
        return Memory(0, first.peak, 0)
    spikes = forward(second, work.remade(()), ())
    gradients, ours = _WholeGradients(work, second, sizes, rowwise, parts), {*work.equal}
    moved = []
    for value in ours:  # a tile's is made while that of the tile before is there
        second.add(("gradient", value), sizes[value])
        spikes.append(sizes[value])
    for above, other, target in (turn for turn in work.gradients if rowwise[turn[0]]):
        order, value = plan.orders[target], work.first(target)
        if not rowwise[target]:
            moves = not same_memory(plan.pairing(above, other, target).natural(order), order, plan.size)
            second.add(("gradient", target), sizes[target] * (gradients.counted(value) or moves))
            spikes.append(loop(_onto, above, other, target))
            moved.append((target, moves))
        elif value in ours:
            spikes.append(add(above, other, target, True))
        else:
            ours.add(value)
            size = plan.itemsize * volume(order, plan.size if value < work.count else plan.step_size)
            second.add(("gradient", value), size * (value >= work.count or target in parts))
            spikes.append(loop(_into, above, other, target))
    second.run(max(spikes, default=0))
    for target, moves in moved:  # what was added up, copied into its own order
        if moves:
            second.replace(("gradient", target), sizes[target] * gradients.counted(work.first(target)))
        gradients.give(target)
    for above, other, target in (turn for turn in work.gradients if not rowwise[turn[0]]):
        value = work.first(target)
        if value in gradients.ours:
            second.run(add(above, other, target, True))
        else:
            counted = gradients.lasting(value)
            second.run(make(above, other, target, counted))
            second.add(("gradient", target), sizes[target] * counted)
            gradients.ours.add(value)
    return Memory(0, first.peak, second.peak)


class _WholeGradients:
    """Gradients of values without rows behind a loop over tiles: several of one value are joined in one tensor."""

    def __init__(self, work: Work, heap: _Heap, sizes: Sequence[int], rowwise: Sequence[bool], parts: Collection[int]) -> None:
        self.work, self.heap, self.sizes, self.parts = work, heap, sizes, parts
        inside = Counter(work.first(target) for above, _, target in work.gradients if rowwise[above] and not rowwise[target])
        behind = {work.first(target) for above, _, target in work.gradients if not rowwise[above]}
        self.joined = {value for value, times in inside.items() if times > 1 or value in behind}
        self.known: set[int] = set()
        self.ours: set[int] = set()  # that steps add to

    def lasting(self, value: int) -> bool:
        """Whether the whole gradient of a value is not one that is returned."""
        return value >= self.work.count or value in (*self.parts, *self.work.back)

    def counted(self, value: int) -> bool:
        """The same of what a loop adds up for it."""
        return self.lasting(value) or value in self.joined

    def give(self, target: int) -> None:
        """Take one of the gradients of a value; two are joined in a new tensor, to which others are added."""
        value = self.work.first(target)
        if value in self.known and value not in self.ours:
            self.heap.replace(("gradient", value), self.sizes[value] * self.lasting(value))
            self.ours.add(value)
        self.known.add(value)


def _parts(plan: "Plan") -> list[int]:
    """Operands that are one tensor of several: their gradients are added up."""
    names = [term.name if value not in plan.same else "" for value, term in enumerate(plan.terms)]
    return [value for value, name in enumerate(names) if name and plan.needs[value] and names.count(name) > 1]
