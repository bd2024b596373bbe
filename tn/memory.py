"""Memory: what a plan's program keeps for its gradients, and the most bytes that are alive at once.

Intermediates, their gradients, copies, and products on their way into another order count; operands, the result and the gradients of
operands do not. `steps` and `gradients` say when a value is made and when it dies, and the generated code (tn.program) follows them: the
model is exact for contiguous operands in the precision of the plan, of which no axis is repeated or summed before the first step. Chains of
plain products run on autograd's tape, which lets go of what it kept earlier: there it is an upper bound.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from tn.cost import volume
from tn.order import Axes, Path
from tn.pairing import Pairing, is_run
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


def kept(path: Path, needs: Sequence[bool], count: int) -> tuple[int, ...]:
    """The values, operands aside, that the needed gradients read, in the order they are made.

    Args:
        needs: whether each SSA value needs a gradient. count: number of operands.
    """
    read = {other for pair in path for target, other in (pair, pair[::-1]) if needs[target] and other >= count}
    return tuple(sorted(read))


def steps(path: Path, count: int, keep: Collection[int], only: Collection[int] | None = None) -> Iterator[tuple[int, int, int, list[int]]]:
    """(left, right, out, values that nothing reads any more) of every step, or of those that make the values in `only`."""
    for out, (left, right) in enumerate(path, start=count):
        if only is None or out in only:
            last = out == count + len(path) - 1  # what dies with the function need not be deleted
            yield left, right, out, [] if last else [value for value in (left, right) if value >= count and value not in keep]


def gradients(path: Path, needs: Sequence[bool], count: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
    """(a value whose gradient is known, the (value whose gradient it gives, the other operand) pairs), last step first.

    After each of them the gradient of the first is dead, and so are values made again that the step multiplied.
    """
    for out in range(count + len(path) - 1, count - 1, -1):
        left, right = path[out - count]
        if needs[out]:
            yield out, [(target, other) for target, other in ((left, right), (right, left)) if needs[target]]


def remade(path: Path, read: Collection[int], have: Collection[int], count: int) -> set[int]:
    """The values to make again for a backward pass that reads some and has others."""
    missing = {value for value in read if value not in have}
    for out in range(count + len(path) - 1, count - 1, -1):
        if out in missing:
            missing.update(value for value in path[out - count] if value >= count and value not in have)
    return missing


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


def tree(
    path: Path, needs: Sequence[bool], sizes: Sequence[int], count: int, spike: Spike, again: bool = False, parts: Collection[int] = ()
) -> Memory:
    """Memory of a program that takes all rows at once.

    Args:
        needs, sizes: of every SSA value, in bytes. spike: of a step.
        again: nothing is kept, what the gradients read is made again, and the result and the gradients count.
        parts: operands whose gradients count because they are added up.
    """
    heap, last, read = _Heap(), count + len(path) - 1, kept(path, needs, count)
    keep = () if again else read
    for left, right, out, dead in steps(path, count, keep):
        counted = again or out != last
        heap.run(spike(left, right, out, counted))
        heap.add(out, sizes[out] * counted)
        heap.drop(*dead)
    forward, heap.peak = heap.peak, 0
    heap.drop(*[value for value in heap.live if value not in keep])
    saved = heap.now
    heap.run(0)
    fresh = remade(path, read, keep, count)
    for left, right, out, dead in steps(path, count, read, fresh):
        heap.run(spike(left, right, out, True))
        heap.add(out, sizes[out])
        heap.drop(*dead)
    for out, targets in gradients(path, needs, count):
        for target, other in targets:
            counted = again or target >= count or target in parts
            heap.run(spike(out, other, target, counted))
            heap.add(("gradient", target), sizes[target] * counted)
        heap.drop(("gradient", out), *(fresh.intersection(path[out - count])))
    heap.run(max((sizes[value] for value in parts), default=0) * (len(parts) > 2))
    return Memory(saved, forward, heap.peak)


def lower_bound(path: Path, axes: Sequence[Axes], needs: Sequence[bool], size: Mapping[str, int], itemsize: int) -> Memory:
    """Memory of a tree if no step copies: no layout has less.

    Args:
        axes: of every SSA value.
    """
    sizes = [itemsize * volume(value, size) for value in axes]
    return tree(path, needs, sizes, len(axes) - len(path), lambda left, right, out, counted: sizes[out] * counted)


def measure(plan: "Plan") -> Memory:
    """Memory of a plan's program."""
    if plan.tile is not None:
        return _tiled(plan)
    return tree(plan.path, plan.needs, _sizes(plan), len(plan.leaves), _spikes(plan), parts=_parts(plan))


def part(plan: "Plan") -> Memory:
    """Memory of one slice: nothing is kept, and its result and gradients are on their way into the whole ones."""
    return tree(plan.path, plan.needs, _sizes(plan), len(plan.leaves), _spikes(plan), again=True)


def _sizes(plan: "Plan") -> list[int]:
    return [plan.itemsize * volume(order, plan.step_size) for order in plan.orders]


def _spikes(plan: "Plan") -> Spike:
    def spike(left: int, right: int, out: int, counted: bool) -> int:
        return plan.itemsize * _new(plan.pairing(left, right, out), *_orders(plan, left, right, out), plan.step_size, counted)

    return spike


def _orders(plan: "Plan", left: int, right: int, out: int) -> tuple[Axes, Axes, Axes]:
    return plan.orders[left], plan.orders[right], plan.orders[out]


def _inner(p: Pairing, left: Axes, right: Axes, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Elements of the operands' copies, and of a product that is summed afterwards."""
    if p.kind == "multiply":
        return 0, 0
    if p.kind == "dot":
        copies = sum(volume(order, sizes) for order in (left, right) if not is_run(order, p.contracted, sizes))
        return copies, volume((*p.batch, *p.left, *p.right, *p.contracted), sizes)
    copies = p.copy_left * volume(left, sizes) + p.copy_right * volume(right, sizes)
    return copies, volume((*p.batch, *p.left, *p.right), sizes) if p.batch_on == "operands" else 0


def _made(copies: int, inner: int, result: int) -> int:
    """Most elements alive while a product makes its own result."""
    return max(copies + inner, inner + result) if inner else copies + result


def _new(p: Pairing, left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int], counted: bool) -> int:
    """Most elements alive while a step writes a new tensor (Writer.product)."""
    (copies, inner), whole = _inner(p, left, right, sizes), volume(out, sizes)
    result = whole * counted
    if p.kind == "multiply" or p.out == "strided":  # the result is there before its operands are copied
        return result + copies + inner
    if p.out == "copy" or (p.kind == "dot" and not _alike(_natural(p, out), out, sizes)):
        return max(_made(copies, inner, whole), whole + result)
    return _made(copies, inner, result)


def _into(p: Pairing, left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int]) -> int:
    """Most elements alive while a step writes into a tensor that is there (Writer.write)."""
    copies, inner = _inner(p, left, right, sizes)
    return _made(copies, inner, volume(out, sizes)) if p.out == "copy" else copies + inner


def _onto(p: Pairing, left: Axes, right: Axes, out: Axes, sizes: Mapping[str, int]) -> int:
    """Most elements alive while a step is added to a tensor that is there (Writer.accumulate)."""
    copies, inner = _inner(p, left, right, sizes)
    if p.kind in ("mm", "bmm") and p.batch_on != "operands":
        return copies
    return _made(copies, inner, volume(out, sizes))


def _tiled(plan: "Plan") -> Memory:
    """Memory of a program that takes a tile of rows at a time (tn.tiles): what has no rows, made before the loop, and buffers."""
    count, last, spike, sizes = len(plan.leaves), len(plan.orders) - 1, _spikes(plan), _sizes(plan)
    rowwise, parts = [ROWS in order for order in plan.orders], _parts(plan)

    def loop(kind: Callable[..., int], left: int, right: int, out: int) -> int:
        return plan.itemsize * kind(plan.pairing(left, right, out), *_orders(plan, left, right, out), plan.step_size)

    def forward(heap: _Heap, made: Collection[int]) -> list[int]:
        """Everything without rows and the buffers of the values in `made`; what each step of the loop takes besides."""
        for out, (left, right) in enumerate(plan.path, start=count):
            if not rowwise[out]:
                heap.run(spike(left, right, out, True))
                heap.add(out, sizes[out])
        inside = [out for out in made if rowwise[out]]
        for out in inside:
            heap.add(out, sizes[out] * (out != last))
        return [loop(_into, *plan.path[out - count], out) for out in inside]

    first, second = _Heap(), _Heap()
    first.run(max(forward(first, range(count, last + 1)), default=0))
    if not any(plan.needs):
        return Memory(0, first.peak, 0)
    spikes = forward(second, sorted(remade(plan.path, kept(plan.path, plan.needs, count), (), count)))
    after = []
    for out, targets in gradients(plan.path, plan.needs, count):
        for target, other in targets:
            order, counted = plan.orders[target], target >= count or target in parts
            if not rowwise[out]:
                after.append((out, other, target, counted))
                continue
            moves = False
            if not rowwise[target]:
                natural = _natural(plan.pairing(out, other, target), order)
                moves = not _alike(natural, order, plan.size)
            whole = plan.itemsize * volume(order, plan.size if target < count else plan.step_size)
            second.add(("gradient", target), whole * (counted or moves))
            spikes.append(loop(_into if rowwise[target] else _onto, out, other, target))
            if moves:
                after.append((out, out, target, counted))
    second.run(max(spikes, default=0))
    for out, other, target, counted in sorted(after, key=lambda entry: entry[0] != entry[1]):  # first come the copies of what was added up
        second.run(sizes[target] * counted if out == other else spike(out, other, target, counted))
        second.drop(("gradient", target))
        second.add(("gradient", target), sizes[target] * counted)
    return Memory(0, first.peak, second.peak)


def _parts(plan: "Plan") -> list[int]:
    """Operands that are one tensor of several: their gradients are added up."""
    names = [term.name for term in plan.network.spec.operands]
    return [value for value, name in enumerate(names) if plan.needs[value] and names.count(name) > 1]


def _natural(p: Pairing, out: Axes) -> Axes:
    """The axes of a product in its own order."""
    if p.kind == "multiply":
        return out
    if p.kind == "dot":
        return (*p.batch, *p.left, *p.right)
    outer, inner = (p.right, p.left) if p.swap else (p.left, p.right)
    return (*outer, *inner) if p.batch_on == "operands" else (*p.batch, *outer, *inner)


def _alike(first: Axes, second: Axes, sizes: Mapping[str, int]) -> bool:
    """Whether two orders are the same in memory."""
    return [axis for axis in first if sizes[axis] != 1] == [axis for axis in second if sizes[axis] != 1]
