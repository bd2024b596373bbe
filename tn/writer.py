"""The words of generated programs: expressions for views, products and results, written line by line."""

import math
import re
from collections.abc import Mapping, Sequence

from tn.errors import SizeError
from tn.order import Axes
from tn.pairing import Pairing, is_run
from tn.plan import Plan, Step
from tn.spec import ROWS, Term


class Value:
    """A tensor in generated code: its variable, its axis order, and the axes each dimension of the variable holds."""

    def __init__(self, name: str, order: Axes, dims: tuple[Axes, ...] | None) -> None:
        self.name, self.order, self.dims = name, order, dims

    def renamed(self, names: Mapping[str, str]) -> "Value":
        """The same tensor with other names for its axes."""
        dims = None if self.dims is None else tuple(tuple(names[axis] for axis in dim) for dim in self.dims)
        return Value(self.name, tuple(names[axis] for axis in self.order), dims)


class Writer:
    """Writes the body of one generated function."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lines: list[str] = []
        self.indent = "    "
        self.rows = "rows"  # the variable that holds the size of `...`; another one inside a loop over row tiles
        self.sizes = plan.size
        self.count = 0

    def add(self, line: str) -> None:
        self.lines.append(f"{self.indent}{line}")

    def delete(self, names: Sequence[str]) -> None:
        """Let go of variables whose memory nothing needs any more."""
        if names:
            self.add(f"del {', '.join(names)}")

    def finish(self, returned: str) -> list[str]:
        """The lines, without the number of rows where neither they nor what is returned ask for it."""
        asked = sum(len(re.findall(rf"\b{self.rows}\b", line)) for line in [*self.lines, returned])
        return [line for line in self.lines if asked > 1 or not line.lstrip().startswith(f"{self.rows} = ")]

    def variable(self, axis: str) -> str:
        """The Python variable that holds the size of a dynamic axis."""
        return self.rows if axis == ROWS else f"n_{axis}"

    def fresh(self) -> str:
        self.count += 1
        return f"s{self.count}"

    def extent(self, axes: Sequence[str]) -> str:
        """The size of merged axes as an expression: literals where known, variables where dynamic."""
        known = math.prod(self.plan.network.sizes.get(axis, 1) for axis in axes)
        dynamic = [self.variable(axis) for axis in axes if axis not in self.plan.network.sizes]
        return " * ".join([*dynamic, *([str(known)] if known != 1 or not dynamic else [])])

    def shape(self, groups: Sequence[Axes]) -> str:
        return ", ".join(self.extent(group) for group in groups)

    def prologue(self) -> None:
        """Check the shapes and name the dynamic sizes. The checks are cheap; `mismatch` then finds the words for what is wrong."""
        network, known, lead = self.plan.network, self.plan.network.sizes, self.lead
        ranks: list[str] = []
        sizes: list[str] = []
        checks: list[str] = []
        pending: list[tuple[str, Axes]] = []
        for term in dict.fromkeys(network.spec.operands):
            name, dims = term.name, [dim for dim in term.dims if dim != (ROWS,)]
            cut = f"[:{-len(dims)}]" if dims else ""
            if all(axis in known for axis in term.axes):
                checks.append(f"{name}.shape != {tuple_of([self.extent(dim) for dim in dims])}")
                continue
            if ROWS not in term.axes:
                ranks.append(f"{name}.dim() != {len(dims)}")
            elif lead is not None and term == lead:
                ranks.append(f"{name}.dim() < {len(dims)}")
            elif lead is not None:
                checks.append(f"{name}.shape{cut} != {_leading(lead)}")
            pending += [(f"{name}.shape[{i - len(dims)}]", dim) for i, dim in enumerate(dims)]
        self._solve(pending, checks, sizes)
        if sizes:
            self._guard(ranks)
            ranks = []
        for line in sizes:
            self.add(line)
        self._guard([*ranks, *checks])
        if lead is not None:
            self.add(f"{self.variable(ROWS)} = prod({_leading(lead)})")

    @property
    def lead(self) -> Term | None:
        """The operand that says what the leading dimensions are."""
        return next((term for term in self.plan.network.spec.operands if ROWS in term.axes), None)

    def _guard(self, checks: list[str]) -> None:
        if checks:
            self.add(f"if {' or '.join(dict.fromkeys(checks))}:")
            self.add(f"    mismatch({', '.join(self.plan.network.names)})")

    def _solve(self, pending: list[tuple[str, Axes]], checks: list[str], sizes: list[str]) -> None:
        """Name dynamic sizes from stored dimensions, those with one unnamed axis first; every other dimension is a check."""
        seen = set(self.plan.network.sizes)
        while pending:
            stuck = []
            for text, dim in pending:
                fresh = [axis for axis in dim if axis not in seen]
                if not fresh:
                    checks.append(f"{text} != {self.extent(dim)}")
                elif len(fresh) > 1:
                    stuck.append((text, dim))
                else:
                    seen.add(fresh[0])
                    rest = [axis for axis in dim if axis != fresh[0]]
                    sizes.append(f"{self.variable(fresh[0])} = {text}" + (f" // max({self.extent(rest)}, 1)" if rest else ""))
                    checks += [f"{text} != {self.extent(dim)}"] if rest else []
            if len(stuck) == len(pending):
                raise SizeError(f"dimension ({' '.join(stuck[0][1])}) does not say how it splits; give sizes for all but one of its axes")
            pending = stuck

    def leaf(self, term: Term, axes: Axes) -> Value:
        """An operand as a buffer with one axis or run of axes a dimension: groups split, diagonals read, unneeded axes summed."""
        simple = len(set(term.axes)) == len(term.axes) == len(axes)
        if simple and ROWS not in term.axes:
            return Value(term.name, term.axes, term.dims)
        if simple and len(term.dims) <= 2:  # one matrix of rows, without a view where it is one already
            flat = self.fresh()
            rest = f", {self.extent(term.dims[1])}" if term.dims[1:] else ","
            self.add(
                f"{flat} = {term.name} if {term.name}.dim() == {len(term.dims)} else {term.name}.reshape((prod({_leading(term)}){rest}))"
            )
            return Value(flat, term.axes, term.dims)
        if simple:
            return Value(term.name, term.axes, None)
        name, order = term.name, list(term.axes)
        split = self.fresh()
        self.add(f"{split} = {name}.reshape({self.shape([(axis,) for axis in order])})")
        while len(set(order)) < len(order):
            axis = next(a for a in order if order.count(a) > 1)
            first, second = [i for i, a in enumerate(order) if a == axis][:2]
            order = [a for i, a in enumerate(order) if i not in (first, second)] + [axis]
            self.add(f"{split} = {split}.diagonal(dim1={first}, dim2={second})")
        summed = [i for i, axis in enumerate(order) if axis not in axes]
        if summed:
            self.add(f"{split} = {split}.sum(({', '.join(map(str, summed))},), dtype={name}.dtype)")
        kept = [axis for axis in order if axis in axes]
        if tuple(kept) != tuple(axes):
            self.add(f"{split} = {split}.permute({', '.join(str(kept.index(axis)) for axis in axes)})")
        return Value(split, tuple(axes), tuple((axis,) for axis in axes))

    def value(self, values: Mapping[int, Value], number: int) -> Value:
        """An SSA value of the plan; one that equals an earlier one is that one, by its own axes."""
        if number not in self.plan.same:
            return values[number]
        first, names = self.plan.same[number]
        return values[first].renamed(names)

    def view(self, value: Value, groups: Sequence[Axes], copy: bool = False) -> str:
        """An expression for the value with one dimension a group, in the given order."""
        groups = [tuple(group) for group in groups]
        if copy or not all(is_run(value.order, group, self.sizes) for group in groups):
            flat = [axis for group in groups for axis in group]
            text = self._reshape(value, [(axis,) for axis in value.order])
            text += _permute([value.order.index(axis) for axis in flat])
            return f"{text}.contiguous().reshape({self.shape(groups)})"
        filled = [group for group in groups if group]
        memory = self._memory(value.order, groups)
        text = self._reshape(value, memory) + _permute([memory.index(group) for group in filled])
        for i, group in enumerate(groups):
            if not group:
                text += f".unsqueeze({i})"
        return text

    def _reshape(self, value: Value, dims: Sequence[Axes]) -> str:
        if value.dims is not None and tuple(map(tuple, dims)) == value.dims:
            return value.name
        return f"{value.name}.reshape({self.shape(dims) if dims else '()'})"

    def product(self, left: Value, right: Value, order: Axes, p: Pairing, name: str, strided: bool) -> Value:
        """Write one step into a new tensor. `strided`: through a view of it, or with a copy; otherwise the order may be a view's."""
        call, groups = self._call(left, right, order, p)
        flat = tuple(axis for group in groups for axis in group)
        if strided and (p.out == "strided" or p.kind == "multiply"):
            memory = self._memory(order, groups)
            self.add(f"{name} = {left.name}.new_empty({tuple_of([self.extent(group) for group in memory])})")
            made = Value(name, order, memory)
            self.add(f"{call}, out={self.view(made, groups)})")
            return made
        self.add(f"{name} = {call})")
        made = Value(name, flat, groups)
        return made if flat == order or p.out == "native" else self.reorder(made, order, strided)

    def write(self, left: Value, right: Value, p: Pairing, target: Value) -> None:
        """Write one step into an existing tensor."""
        call, groups = self._call(left, right, target.order, p)
        if p.out == "copy":
            dims = [(axis,) for group in groups for axis in group]
            self.add(f"{self.view(target, dims)}.copy_({call}).view({self.shape(dims)}))")
        else:
            self.add(f"{call}, out={self.view(target, groups)})")

    def write_buffer(self, left: Value, right: Value, order: Axes, p: Pairing, name: str, buffer: str) -> Value:
        """Write one matrix product into the head of a flat buffer."""
        memory: tuple[Axes, ...] = tuple((axis,) for axis in order)
        if p.out != "copy":
            memory = self._memory(order, self._call(left, right, order, p)[1])
        self.add(f"{name} = {buffer}[: {self.extent(order)}].view({tuple_of([self.extent(group) for group in memory])})")
        target = Value(name, order, memory)
        self.write(left, right, p, target)
        return target

    def add_into(self, left: Value, right: Value, p: Pairing, target: Value) -> None:
        """Add one step to an existing tensor."""
        if p.kind in ("mm", "bmm") and p.batch_on != "operands" and p.out != "copy":
            call, a, b, groups = self._matrices(left, right, p)
            self.add(f"{self.view(target, groups)}.{'addmm_' if call == 'mm' else 'baddbmm_'}({a}, {b})")
        else:
            call, groups = self._call(left, right, target.order, p)
            dims = [(axis,) for group in groups for axis in group]
            self.add(f"{self.view(target, dims)}.add_({call}).reshape({self.shape(dims) or '()'}))")

    def accumulate(self, left: Value, right: Value, order: Axes, p: Pairing, name: str) -> Value:
        """Add one step to a tensor of the step's own shape."""
        if p.kind in ("mm", "bmm") and p.batch_on != "operands":
            call, a, b, groups = self._matrices(left, right, p)
            self.add(f"{name}.{'addmm_' if call == 'mm' else 'baddbmm_'}({a}, {b})")
        else:
            text, groups = self._call(left, right, order, p)
            self.add(f"{name} += {text})")
        return Value(name, tuple(axis for group in groups for axis in group), groups)

    def _call(self, left: Value, right: Value, order: Axes, p: Pairing) -> tuple[str, tuple[Axes, ...]]:
        """(the call that runs a step, without its closing parenthesis, groups of the result's dimensions)."""
        if p.kind == "multiply":
            a, b = (self._spread(value, order) for value in (left, right))
            return f"torch.mul({a}, {b}", tuple((axis,) for axis in order)
        if p.kind == "dot":
            axes = [axis for axis in p.whole if axis in order or axis in p.contracted]
            a, b = (self._spread(value, axes) for value in (left, right))
            summed = tuple_of([str(place) for place, axis in enumerate(axes) if axis in p.contracted])
            return f"torch.sum({a} * {b}, {summed}, dtype={left.name}.dtype", tuple((axis,) for axis in axes if axis in order)
        call, a, b, groups = self._matrices(left, right, p)
        if p.batch_on == "operands":
            return f"torch.sum(torch.{call}({a}, {b}), 0, dtype={left.name}.dtype", groups
        return f"torch.{call}({a}, {b}", groups

    def _spread(self, value: Value, axes: Sequence[str]) -> str:
        """The value with one dimension for each axis, of size one where it lacks the axis. Its axes that are not wanted have size one."""
        stored = [axis for axis in value.order if axis in axes]
        mine = [axis for axis in axes if axis in value.order]
        text = self._reshape(value, [(axis,) for axis in stored]) + _permute([stored.index(axis) for axis in mine])
        return text + "".join(f".unsqueeze({i})" for i, axis in enumerate(axes) if axis not in value.order)

    def _memory(self, order: Axes, groups: Sequence[Axes]) -> tuple[Axes, ...]:
        """The groups that have axes, sorted by their place in memory."""
        return tuple(sorted((g for g in groups if g), key=lambda group: _place(order, group, self.sizes)))

    def _matrices(self, left: Value, right: Value, p: Pairing) -> tuple[str, str, str, tuple[Axes, ...]]:
        """("mm" or "bmm", left matrix, right matrix, groups of the result's dimensions)."""
        first, second, outer, inner = (left, right, p.left, p.right) if not p.swap else (right, left, p.right, p.left)
        copies = (p.copy_left, p.copy_right) if not p.swap else (p.copy_right, p.copy_left)
        batch: tuple[Axes, ...] = (p.batch,)
        if p.kind == "mm":
            batch = ()
            if p.batch:  # batch axes of size one ride along with the rows
                outer = (*p.batch, *outer)
                second = self._without(second, p.batch)
                copies = (copies[0] or not is_run(first.order, outer, self.sizes), copies[1])
        a = self._matrix(first, outer, p.contracted, batch, copies[0])
        b = self._matrix(second, p.contracted, inner, batch, copies[1])
        return (p.kind, a, b, (outer, inner) if p.batch_on == "operands" else (*batch, outer, inner))

    def _matrix(self, value: Value, rows: Axes, columns: Axes, batch: tuple[Axes, ...], copy: bool) -> str:
        """A value as a batch of matrices; one that lacks the batch is broadcast along it."""
        if batch and not set(batch[0]) & set(value.order) and batch[0]:
            return f"{self.view(value, [rows, columns], copy)}.expand({self.shape([*batch, rows, columns])})"
        return self.view(value, [*batch, rows, columns], copy)

    def _without(self, value: Value, axes: Axes) -> Value:
        """The value with axes of size one dropped from its order; its memory is the same."""
        return Value(value.name, tuple(axis for axis in value.order if axis not in axes), None)

    def turn(self, value: Value, order: Axes, name: str) -> Value:
        """A copy of an operand in another memory order."""
        text = self._reshape(value, [(axis,) for axis in value.order]) + _permute([value.order.index(axis) for axis in order])
        self.add(f"{name} = {text}.contiguous()")
        return Value(name, order, tuple((axis,) for axis in order))

    def reorder(self, value: Value, order: Axes, copy: bool = False) -> Value:
        """The value with its axes permuted to an order: a copy in that order, or a view that later steps copy as they need."""
        text = self._reshape(value, [(axis,) for axis in value.order]) + _permute([value.order.index(axis) for axis in order])
        self.add(f"{value.name} = {text}" + (".contiguous()" if copy else ""))
        return Value(value.name, order, tuple((axis,) for axis in order))

    def result(self, value: Value, term: Term) -> str:
        """The value in the stored shape of a term, leading dimensions restored."""
        dims = [dim for dim in term.dims if dim != (ROWS,)]
        text = value.name
        if value.order != term.axes:
            text = self._reshape(value, [(axis,) for axis in value.order]) + _permute([value.order.index(axis) for axis in term.axes])
        elif ROWS not in term.axes and value.dims == term.dims:
            return text
        shape = tuple_of([self.extent(dim) for dim in dims])
        if ROWS not in term.axes:
            return f"{text}.reshape({shape})"
        lead = self.lead
        assert lead is not None
        whole = f"{text}.reshape({_leading(lead)} + {shape})"
        if value.order == term.axes and value.dims == term.dims:
            return f"({text} if {lead.name}.dim() == {len(lead.dims)} else {whole})"
        return whole


class Gradients:
    """The gradients of a plan's values while they are written; what several steps contribute to one value is summed."""

    def __init__(self, writer: Writer) -> None:
        self.writer, self.plan = writer, writer.plan
        self.values: dict[int, Value] = {}  # of the values that are computed
        self._ours: set[int] = set()  # that may be written to

    def give(self, value: int, made: Value, ours: bool = False) -> None:
        """Take the gradient of a value, or one of several."""
        first = self.plan.first(value)
        if value in self.plan.same:
            made = made.renamed({mine: theirs for theirs, mine in self.plan.same[value][1].items()})
        if first in self.values:
            dims = tuple((axis,) for axis in made.order)
            before, now = (self.writer.view(part, dims) for part in (self.values[first], made))
            if ours:
                self.writer.add(f"{now}.add_({before})")
            elif first in self._ours:
                self.writer.add(f"{before}.add_({now})")
                return
            else:
                total = made.name if made.name.startswith("d") else f"d{first}"  # another d{first} may still be to come
                self.writer.add(f"{total} = {before} + {now}")
                made, ours = Value(total, made.order, dims), True
        self.values[first] = made
        self._ours |= {first} if ours else set()

    def of(self, value: int) -> Value:
        """The gradient of a value, by its own axes."""
        return self.writer.value(self.values, value)

    def open(self, value: int) -> bool:
        """Whether a step can add to the gradient of a value: there is one, and it is ours."""
        return self.plan.first(value) in self._ours

    def add(self, step: Step, other: Value) -> None:
        """Write a gradient step; that of a square is twice that of one factor."""
        above, twice = self.of(step.left), self.plan.squares(step.right, step.out)
        if self.open(step.out):
            for _ in range(1 + twice):
                self.writer.add_into(above, other, step.pairing, self.of(step.out))
            return
        made = self.writer.product(above, other, self.plan.orders[step.out], step.pairing, f"d{step.out}", not self.plan.viewed(step))
        if twice:
            self.writer.add(f"{made.name}.mul_(2)")
        self.give(step.out, made, ours=True)

    def returned(self, needs: Sequence[bool]) -> str:
        """One gradient, or None, per name of the network."""
        found = []
        for name in self.plan.network.names:
            mine = [i for i, term in enumerate(self.plan.terms) if term.name == name and needs[i] and i not in self.plan.same]
            found.append(" + ".join(self.writer.result(self.values[i], self.plan.terms[i]) for i in mine) or "None")
        return ", ".join(found)


def _leading(term: Term) -> str:
    """The leading dimensions of an operand with rows."""
    return f"{term.name}.shape" + (f"[:{1 - len(term.dims)}]" if len(term.dims) > 1 else "")


def _place(order: Axes, group: Axes, sizes: Mapping[str, int]) -> int:
    wide = [axis for axis in group if sizes[axis] != 1]
    return order.index((wide or list(group))[0])


def tuple_of(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _permute(permutation: Sequence[int]) -> str:
    if list(permutation) == sorted(permutation):
        return ""
    if list(permutation) in ([1, 0], [0, 2, 1]):
        return ".mT"
    return f".permute({', '.join(map(str, permutation))})"
