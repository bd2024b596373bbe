"""Programs that work on a tile of rows at a time: intermediates live in buffers local to the call, small enough for the cache.

The forward form keeps nothing for the gradient; the backward form makes the intermediates of a tile again, and adds the tile's share
to the gradients of tensors that have no rows. Steps between such tensors run once, outside the loop.
"""

from collections.abc import Sequence

from tn.order import Axes
from tn.pairing import pair
from tn.plan import Plan
from tn.spec import ROWS
from tn.writer import Value, Writer, tuple_of


class _Tiled:
    """The state of one generated function with a loop over row tiles."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.writer = plan, Writer(plan)
        self.writer.prologue()
        self.first = plan.network.names[0]
        self.before = self.writer.lines
        self.loop: list[str] = []
        self.writer.add(f"size = min({plan.tile}, rows)")

    def inside(self) -> None:
        """From here on lines go into the loop."""
        self.writer.lines, self.writer.indent, self.writer.rows = self.loop, "        ", "n"
        self.writer.add(f"n = min({self.plan.tile}, rows - start)")

    def outside(self) -> None:
        """From here on lines go behind the loop."""
        loop = [f"    for start in range(0, rows, {self.plan.tile}):", *self.loop]
        self.writer.lines, self.writer.indent, self.writer.rows = [*self.before, *loop], "    ", "rows"

    def prepare(self, line: str) -> None:
        """Add a line before the loop."""
        self.before.append(f"    {line}")

    def rowwise(self, value: int) -> bool:
        return ROWS in self.plan.orders[value]

    def split(self, order: Axes) -> tuple[Axes, ...]:
        """Dimensions of a tensor with rows: the rows, and everything else."""
        return ((ROWS,), tuple(order[1:])) if len(order) > 1 else ((ROWS,),)

    def whole(self, name: str, order: Axes) -> Value:
        """A new tensor for all rows, made before the loop; inside, the tile of it."""
        dims = self.split(order)
        shape = ["rows", *(self.writer.extent(dim) for dim in dims[1:])]
        self.prepare(f"{name} = {self.first}.new_empty({tuple_of(shape)})")
        return self.tile(name, name, order)

    def tile(self, name: str, source: str, order: Axes) -> Value:
        self.writer.add(f"{name}_t = {source}[start : start + n]")
        return Value(f"{name}_t", order, self.split(order))

    def flatten(self, source: str, name: str, order: Axes) -> None:
        """A view of an operand with its leading dimensions as rows."""
        shape = ["rows", *(self.writer.extent(dim) for dim in self.split(order)[1:])]
        self.prepare(f"{name} = {source}.reshape({tuple_of(shape)})")

    def buffer(self, name: str, order: Axes) -> str:
        rest = self.writer.extent([axis for axis in order if axis != ROWS])
        self.prepare(f"{name} = {self.first}.new_empty(size * {rest})")
        return name

    def leaves(self) -> dict[int, Value]:
        """Operands: whole ones as they are, those with rows as flattened views."""
        values = {}
        for i, (term, axes) in enumerate(zip(self.plan.network.spec.operands, self.plan.leaves, strict=True)):
            if self.rowwise(i):
                self.flatten(term.name, f"x{i}", axes)
            else:
                values[i] = self.writer.leaf(term, axes)
        return values

    def forward(self, values: dict[int, Value], wanted: set[int], last: Value | None) -> None:
        """Steps with rows, in the loop; the last one goes into `last`."""
        for step in self.plan.steps:
            if step.out not in wanted or not self.rowwise(step.out):
                continue
            left, right, order = (values[step.left], values[step.right], self.plan.orders[step.out])
            if last is not None and step is self.plan.steps[-1]:
                self.writer.write(left, right, step.pairing, last)
                values[step.out] = last
            else:
                name = self.buffer(f"b{step.out}", order)
                values[step.out] = self.writer.write_buffer(left, right, order, step.pairing, f"v{step.out}", name)

    def hoisted(self, values: dict[int, Value]) -> None:
        """Steps without rows, before the loop."""
        for step in self.plan.steps:
            if not self.rowwise(step.out):
                order = self.plan.orders[step.out]
                values[step.out] = self.writer.product(values[step.left], values[step.right], order, step.pairing, f"v{step.out}", True)


def forward_source(plan: Plan) -> str:
    """operands → result, tile by tile."""
    network, tiled = plan.network, _Tiled(plan)
    values = tiled.leaves()
    tiled.hoisted(values)
    tiled.inside()
    for i, axes in enumerate(plan.leaves):
        if tiled.rowwise(i):
            values[i] = tiled.tile(f"x{i}", f"x{i}", axes)
    result = tiled.whole("y", plan.orders[-1])
    tiled.forward(values, {step.out for step in plan.steps}, result)
    tiled.outside()
    text = tiled.writer.result(Value("y", result.order, result.dims), network.output)
    return "\n".join([f"def forward_tiled({', '.join(network.names)}):", *tiled.writer.lines, f"    return {text},", ""])


def backward_source(plan: Plan, needs: Sequence[bool]) -> str:
    """gradient, operands → one gradient (or None) per name, tile by tile."""
    network, tiled = plan.network, _Tiled(plan)
    writer = tiled.writer
    wanted = {name for name, need in zip(network.names, needs, strict=True) if need}
    need = [term.name in wanted for term in network.spec.operands]
    for left, right in plan.path:
        need.append(need[left] or need[right])
    values = tiled.leaves()
    tiled.hoisted(values)
    tiled.flatten("gradient", "g", plan.orders[-1])
    tiled.inside()
    for i, axes in enumerate(plan.leaves):
        if tiled.rowwise(i):
            values[i] = tiled.tile(f"x{i}", f"x{i}", axes)
    tiled.forward(values, _used(plan, need), None)
    gradients = {len(plan.orders) - 1: tiled.tile("g", "g", plan.orders[-1])}
    for step, target, other in _gradient_steps(plan, need):
        order = plan.orders[target]
        p = pair(plan.orders[step.out], plan.orders[other], order, plan.step_size, plan.machine)
        if not tiled.rowwise(step.out):
            continue
        if not tiled.rowwise(target):
            gradients[target] = made = writer.accumulate(gradients[step.out], values[other], order, p, f"d{target}")
            tiled.prepare(f"d{target} = {tiled.first}.new_zeros({tuple_of([writer.extent(dim) for dim in made.dims])})")
        elif target < len(plan.leaves):
            gradients[target] = tiled.whole(f"d{target}", order)
            writer.write(gradients[step.out], values[other], p, gradients[target])
        else:
            name = tiled.buffer(f"e{target}", order)
            gradients[target] = writer.write_buffer(gradients[step.out], values[other], order, p, f"d{target}", name)
    tiled.outside()
    for value, made in gradients.items():
        if value < len(plan.leaves) and tiled.rowwise(value):
            gradients[value] = Value(f"d{value}", made.order, made.dims)
        elif not tiled.rowwise(value) and made.order != plan.orders[value]:
            gradients[value] = writer.reorder(made, plan.orders[value], copy=True)
    for step, target, other in _gradient_steps(plan, need):
        if not tiled.rowwise(step.out):
            p = pair(plan.orders[step.out], plan.orders[other], plan.orders[target], plan.step_size, plan.machine)
            gradients[target] = writer.product(gradients[step.out], values[other], plan.orders[target], p, f"d{target}", True)
    returned = []
    for name in network.names:
        parts = [writer.result(gradients[i], term) for i, term in enumerate(network.spec.operands) if term.name == name and need[i]]
        returned.append(" + ".join(parts) if parts else "None")
    header = f"def backward_tiled({', '.join(['gradient', *network.names])}):"
    return "\n".join([header, *writer.lines, f"    return {', '.join(returned)},", ""])


def _gradient_steps(plan: Plan, need: Sequence[bool]):
    """(step, value whose gradient is made, the other operand), last step first."""
    for step in reversed(plan.steps):
        for target, other in ((step.left, step.right), (step.right, step.left)):
            if need[target]:
                yield step, target, other


def _used(plan: Plan, need: Sequence[bool]) -> set[int]:
    """Intermediates that the gradients read, and what those are made of."""
    used = {other for _, _, other in _gradient_steps(plan, need)}
    for step in reversed(plan.steps):
        if step.out in used:
            used |= {step.left, step.right}
    return used
