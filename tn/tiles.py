"""Programs that work on a tile of rows at a time: intermediates live in buffers local to the call, small enough for the cache.

The forward form keeps nothing for the gradient; the backward form makes the intermediates of a tile again, and adds the tile's share
to the gradients of tensors that have no rows. Steps between such tensors run once, outside the loop.
"""

from collections.abc import Collection, Mapping, Sequence

from tn.order import Axes
from tn.plan import Plan, Step
from tn.spec import ROWS
from tn.writer import Gradients, Value, Writer, tuple_of


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
        for i, term in enumerate(self.plan.terms):
            if i in self.plan.same:
                continue
            if self.rowwise(i):
                self.flatten(term.name, f"x{i}", self.plan.leaves[i])
            else:
                values[i] = self.writer.leaf(term, self.plan.leaves[i])
        return values | {i: self.writer.turn(values[i], self.plan.orders[i], f"c{i}") for i in self.plan.turned}

    def tile_leaves(self, values: dict[int, Value]) -> None:
        """The tiles of operands with rows, in the loop."""
        for i, axes in enumerate(self.plan.leaves):
            if self.rowwise(i) and i not in self.plan.same:
                values[i] = self.tile(f"x{i}", f"x{i}", axes)

    def forward(self, values: dict[int, Value], wanted: Collection[int], results: Mapping[int, Value]) -> None:
        """Steps with rows, in the loop; results go into tensors that are there."""
        for step in self.plan.steps:
            if step.out not in wanted or not self.rowwise(step.out):
                continue
            left, right = (self.writer.value(values, value) for value in (step.left, step.right))
            if step.out in results:
                self.writer.write(left, right, step.pairing, results[step.out])
                values[step.out] = results[step.out]
            else:
                order = self.plan.orders[step.out]
                name = self.buffer(f"b{step.out}", order)
                values[step.out] = self.writer.write_buffer(left, right, order, step.pairing, f"v{step.out}", name)

    def hoisted(self, values: dict[int, Value]) -> None:
        """Steps without rows, before the loop."""
        for step in self.plan.steps:
            if not self.rowwise(step.out):
                left, right = (self.writer.value(values, value) for value in (step.left, step.right))
                values[step.out] = self.writer.product(left, right, self.plan.orders[step.out], step.pairing, f"v{step.out}", True)


def forward_source(plan: Plan) -> str:
    """operands → results, tile by tile."""
    network, tiled = plan.network, _Tiled(plan)
    values = tiled.leaves()
    tiled.hoisted(values)
    tiled.inside()
    tiled.tile_leaves(values)
    results = {value: tiled.whole(f"y{value}", plan.orders[value]) for value in dict.fromkeys(map(plan.first, plan.results))}
    tiled.forward(values, {step.out for step in plan.steps}, results)
    tiled.outside()
    returned = []
    for i, (value, term) in enumerate(zip(plan.results, network.spec.outputs, strict=True)):
        made = Value(f"y{plan.first(value)}", plan.orders[value], tiled.split(plan.orders[value]))
        again = plan.first(value) in map(plan.first, plan.results[:i])
        returned.append(tiled.writer.result(made, term) + (".clone()" if again else ""))
    # values that later steps take besides, as `forward` returns them when there is one tile
    returned += [f"y{value}" for value in plan.saved if value in results]
    return "\n".join([f"def forward_tiled({', '.join(network.names)}):", *tiled.writer.lines, f"    return {', '.join(returned)},", ""])


def backward_source(plan: Plan, need: Sequence[bool]) -> str:
    """gradients of the results, operands → one gradient (or None) per name, tile by tile."""
    network, tiled = plan.network, _Tiled(plan)
    writer = tiled.writer
    values = tiled.leaves()
    tiled.hoisted(values)
    given = [f"gradient{i}" for i in range(len(plan.results))]
    for i, value in enumerate(plan.results):
        tiled.flatten(given[i], f"g{i}", plan.orders[value])
    tiled.inside()
    tiled.tile_leaves(values)
    tiled.forward(values, _used(plan, need), {})
    gradients = _TileGradients(tiled)
    for i, value in enumerate(plan.results):
        gradients.give(value, tiled.tile(f"g{i}", f"g{i}", plan.orders[value]))
    steps = [*plan.gradient_steps(need)]
    for step in steps:
        if tiled.rowwise(step.left):
            gradients.add(step, writer.value(values, step.right))
    tiled.outside()
    total = gradients.total()
    for step in steps:
        if not tiled.rowwise(step.left):
            total.add(step, writer.value(values, step.right))
    header = f"def backward_tiled({', '.join([*given, *network.names])}):"
    return "\n".join([header, *writer.lines, f"    return {total.returned(need)},", ""])


class _TileGradients(Gradients):
    """Gradients inside the loop: those of values with rows are a tile's, the others sums over the tiles so far."""

    def __init__(self, tiled: _Tiled) -> None:
        super().__init__(tiled.writer)
        self.tiled = tiled
        self._sums: dict[int, Value] = {}

    def add(self, step: Step, other: Value) -> None:
        """Write a gradient step of a value with rows."""
        tiled, target = self.tiled, step.out
        above, order = self.of(step.left), self.plan.orders[target]
        if not tiled.rowwise(target):
            self._sums[target] = made = self.writer.accumulate(above, other, order, step.pairing, f"d{target}")
            tiled.prepare(f"d{target} = {tiled.first}.new_zeros({tuple_of([self.writer.extent(dim) for dim in made.dims or ()])})")
        elif self.open(target):
            super().add(step, other)
        else:
            if target < len(self.plan.leaves):
                made = tiled.whole(f"d{target}", order)
                self.writer.write(above, other, step.pairing, made)
            else:
                name = tiled.buffer(f"e{target}", order)
                made = self.writer.write_buffer(above, other, order, step.pairing, f"d{target}", name)
            if self.plan.squares(step.right, target):
                self.writer.add(f"{made.name}.mul_(2)")
            self.give(target, made, ours=True)

    def total(self) -> Gradients:
        """The gradients behind the loop: whole tensors."""
        found = Gradients(self.writer)
        for value, made in self.values.items():
            if value < len(self.plan.leaves):
                found.give(value, Value(made.name.removesuffix("_t"), made.order, self.tiled.split(made.order)))
        for value, made in self._sums.items():
            order = self.plan.orders[value]
            found.give(value, made if made.order == order else self.writer.reorder(made, order, copy=True))
        return found


def _used(plan: Plan, need: Sequence[bool]) -> set[int]:
    """Intermediates that the gradients read, and what those are made of."""
    used = {plan.first(step.right) for step in plan.gradient_steps(need)}
    for step in reversed(plan.steps):
        if step.out in used:
            used |= {plan.first(step.left), plan.first(step.right)}
    return used
