"""Program: printable Python, generated from a Plan, that runs it with aten calls.

Two forms of the same steps. The *fast* form writes products straight into strided views of their result and has its own backward;
it runs inside an autograd Function. The *plain* form only makes new tensors, so autograd, torch.func and torch.compile see through it;
it runs whenever one of them is at work.
"""

import builtins
import functools
import linecache
import math
import string
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tn.errors import OperatorError, PlanError, SizeError
from tn.layout import Pairing, is_run, pair
from tn.network import Network
from tn.order import Axes
from tn.plan import Plan, plan
from tn.spec import ROWS, Term


class Program:
    """Runs a Plan. Make one with `tn.compile`; call it with one tensor per name of the network, in spec order.

    Attributes:
        plan: what it runs. source: the Python of the fast form, forward and backward, or of the plain form where that is used always.
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = plan.network.names
        self._plain, self.plain_source = _load(plan, "plain", _plain_source(plan))
        self._fast, self._backwards = None, {}
        if _worth_owning(plan):
            self._fast, self.fast_source = _load(plan, "fast", _fast_source(plan))

    @property
    def source(self) -> str:
        """The generated Python."""
        if self._fast is None:
            return self.plain_source
        return f"{self.fast_source}\n{_backward_source(self.plan, self._all_floating())}"

    def _all_floating(self) -> tuple[bool, ...]:
        return tuple(name in self.plan.grad for name in self.names)

    def __call__(self, *operands: Tensor) -> Tensor:
        if self._fast is None or _transforming() or not _fits_fast(operands):
            return self._plain(*operands)
        if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
            return _Owned.apply(self, *operands)
        return self._fast(*operands)[0]

    def backward(self, needs: tuple[bool, ...]) -> Callable[..., tuple[Tensor | None, ...]]:
        """The generated gradient function for the operands that need one."""
        found = self._backwards.get(needs)
        if found is None:
            found, _ = _load(self.plan, "backward", _backward_source(self.plan, needs))
            self._backwards[needs] = found
        return found

    def __repr__(self) -> str:
        return f"Program({self.plan.network.spec})"

    def __reduce__(self):
        return Program, (self.plan,)


class _Owned(torch.autograd.Function):
    """The fast form under autograd. Old style on purpose: a `setup_context` costs about 10 µs a call."""

    @staticmethod
    def forward(ctx, program: Program, *operands: Tensor) -> Tensor:
        result, *saved = program._fast(*operands)
        ctx.program = program
        ctx.save_for_backward(*operands, *saved)
        return result

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        program, needs = ctx.program, ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *program.backward(needs)(gradient, *ctx.saved_tensors)
        operands = ctx.saved_tensors[: len(needs)]  # create_graph: differentiate the plain form, which autograd sees through
        aliases = [operand.view_as(operand) if need else operand for operand, need in zip(operands, needs, strict=True)]
        wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
        found = iter(torch.autograd.grad(program._plain(*aliases), wanted, gradient, create_graph=True))
        return None, *(next(found) if need else None for need in needs)


def _transforming() -> bool:
    """Whether something has to see through the operations: torch.compile, a torch.func transform or forward-mode derivatives."""
    return torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _fits_fast(operands: Sequence[Tensor]) -> bool:
    """The fast form's own gradients hold for real floating tensors of one dtype; low precision on a CPU takes the plain form."""
    first = operands[0]
    if not first.is_floating_point() or (first.device.type == "cpu" and first.dtype not in (torch.float32, torch.float64)):
        return False
    return all(operand.dtype is first.dtype for operand in operands)


def _worth_owning(plan: Plan) -> bool:
    """Chains of plain matrix products gain nothing from a backward of our own; batched ones lose their copies.

    Diagonals, sums of a single operand and elementwise products keep the tape."""
    simple = all(len(set(term.axes)) == len(term.axes) == len(axes) for term, axes in zip(plan.network.spec.operands, plan.leaves, strict=True))
    kinds = {step.pairing.kind for step in (*plan.steps, *plan.backward_steps)}
    return simple and "bmm" in kinds and kinds <= {"mm", "bmm"}


def compile(target: Network | Plan) -> Program:
    """A Program for a network (planned with default settings and gradients of its cores and inputs) or for a plan.

    >>> import torch, tn
    >>> f = tn.compile(tn.network("x: ... i, w: i o -> ... o", dict(i=3, o=2)))
    >>> f(torch.ones(4, 3), torch.ones(3, 2)).shape
    torch.Size([4, 2])
    """
    return Program(target if isinstance(target, Plan) else plan(target, grad=target.names))


def _load(plan: Plan, form: str, source: str) -> tuple[Callable, str]:
    """Run generated source and return its function; the text stays visible to tracebacks and debuggers."""
    filename = f"<tn {form} {plan.network.spec}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space: dict = {"torch": torch, "mismatch": functools.partial(_mismatch, plan.network)}
    exec(builtins.compile(source, filename, "exec"), space)  # our own generated text
    return space["backward" if form == "backward" else "forward"], source


def _mismatch(network: Network, *operands: Tensor) -> None:
    """Raise the error that names what does not fit."""
    for name, operand in zip(network.names, operands, strict=True):
        if not isinstance(operand, Tensor):
            raise OperatorError(f"operand {name!r} is a {type(operand).__name__}, expected a torch.Tensor")
    network.bind([operand.shape for operand in operands])
    raise SizeError(f"shapes {[tuple(operand.shape) for operand in operands]} do not fit {network.spec}")


class _Value:
    """A tensor in generated code: its variable, its axis order, and the axes each dimension of the variable holds."""

    def __init__(self, name: str, order: Axes, dims: tuple[Axes, ...] | None) -> None:
        self.name, self.order, self.dims = name, order, dims


class _Writer:
    """Writes the body of one generated function."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.lines: list[str] = []
        self.sizes = plan.size
        self.count = 0

    def add(self, line: str) -> None:
        self.lines.append(f"    {line}")

    def fresh(self) -> str:
        self.count += 1
        return f"s{self.count}"

    def extent(self, axes: Sequence[str]) -> str:
        """The size of merged axes as an expression: literals where known, variables where dynamic."""
        known = math.prod(self.plan.network.sizes.get(axis, 1) for axis in axes)
        dynamic = [variable(axis) for axis in axes if axis not in self.plan.network.sizes]
        return " * ".join([*dynamic, *([str(known)] if known != 1 or not dynamic else [])])

    def shape(self, groups: Sequence[Axes]) -> str:
        return ", ".join(self.extent(group) for group in groups)

    def prologue(self) -> None:
        """Check the shapes and name the dynamic sizes. The checks are cheap; `mismatch` then finds the words for what is wrong."""
        network, known = self.plan.network, self.plan.network.sizes
        lead = next((term.name for term in network.spec.operands if ROWS in term.axes), None)
        ranks: list[str] = []
        sizes: list[str] = []
        checks: list[str] = []
        seen: set[str] = set()
        for term in dict.fromkeys(network.spec.operands):
            name, dims = term.name, [dim for dim in term.dims if dim != (ROWS,)]
            cut = f"[:{-len(dims)}]" if dims else ""
            if all(axis in known for axis in term.axes):
                checks.append(f"{name}.shape != {_tuple([self.extent(dim) for dim in dims])}")
                continue
            if ROWS not in term.axes:
                ranks.append(f"{name}.dim() != {len(dims)}")
            elif name == lead and not sizes:
                ranks.append(f"{name}.dim() < {len(dims)}")
                sizes += [f"lead = {name}.shape{cut}", f"{variable(ROWS)} = lead.numel()"]
            else:
                checks.append(f"{name}.shape{cut} != lead")
            for i, dim in enumerate(dims):
                self._dimension(f"{name}.shape[{i - len(dims)}]", dim, seen, checks, sizes)
        self._guard(ranks)
        for line in sizes:
            self.add(line)
        self._guard(checks)

    def _guard(self, checks: list[str]) -> None:
        if checks:
            self.add(f"if {' or '.join(checks)}:")
            self.add(f"    mismatch({', '.join(self.plan.network.names)})")

    def _dimension(self, text: str, dim: Axes, seen: set[str], checks: list[str], sizes: list[str]) -> None:
        known = self.plan.network.sizes
        fresh = [axis for axis in dict.fromkeys(dim) if axis not in known and axis not in seen]
        if not fresh:
            checks.append(f"{text} != {self.extent(dim)}")
            return
        rest = [axis for axis in dim if axis != fresh[0]]
        if len(fresh) > 1 or len(rest) + 1 < len(dim):
            raise SizeError(f"dimension ({' '.join(dim)}) does not say how it splits; give sizes for all but one of its axes")
        seen.add(fresh[0])
        sizes.append(f"{variable(fresh[0])} = {text}" + (f" // ({self.extent(rest)})" if rest else ""))
        if rest:
            checks.append(f"{text} != {self.extent(dim)}")

    def leaf(self, term: Term, axes: Axes) -> _Value:
        """An operand as a buffer with one axis or run of axes a dimension: groups split, diagonals read, unneeded axes summed."""
        simple = len(set(term.axes)) == len(term.axes) == len(axes)
        if simple:
            dims = tuple(dim for dim in term.dims) if ROWS not in term.axes else None
            return _Value(term.name, term.axes, dims)
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
            self.add(f"{split} = {split}.sum(({', '.join(map(str, summed))},))")
        kept = [axis for axis in order if axis in axes]
        if tuple(kept) != tuple(axes):
            self.add(f"{split} = {split}.permute({', '.join(str(kept.index(axis)) for axis in axes)})")
        return _Value(split, tuple(axes), tuple((axis,) for axis in axes))

    def view(self, value: _Value, groups: Sequence[Axes], copy: bool = False) -> str:
        """An expression for the value with one dimension a group, in the given order."""
        groups = [tuple(group) for group in groups]
        if copy or not all(is_run(value.order, group, self.sizes) for group in groups):
            flat = [axis for group in groups for axis in group]
            text = self._reshape(value, [(axis,) for axis in value.order])
            text += _permute([value.order.index(axis) for axis in flat])
            return f"{text}.reshape({self.shape(groups)})"
        filled = [group for group in groups if group]
        memory = sorted(filled, key=lambda group: _place(value.order, group, self.sizes))
        text = self._reshape(value, memory) + _permute([memory.index(group) for group in filled])
        for i, group in enumerate(groups):
            if not group:
                text += f".unsqueeze({i})"
        return text

    def _reshape(self, value: _Value, dims: Sequence[Axes]) -> str:
        if value.dims is not None and tuple(map(tuple, dims)) == value.dims:
            return value.name
        return f"{value.name}.reshape({self.shape(dims) if dims else '()'})"

    def product(self, left: _Value, right: _Value, order: Axes, p: Pairing, name: str, strided: bool) -> _Value:
        """Write one step; `strided` allows writing through a view of the result."""
        if p.kind == "multiply":
            return self._multiply(left, right, order, name)
        if p.kind == "dot":
            return self._dot(left, right, order, p, name)
        flat = p.kind == "mm"
        rows, columns, summed = p.left, p.right, p.contracted
        first, second = (left, right) if not p.swap else (right, left)
        outer, inner = (rows, columns) if not p.swap else (columns, rows)
        copies = (p.copy_left, p.copy_right) if not p.swap else (p.copy_right, p.copy_left)
        batch = [] if flat else [p.batch]
        if flat and p.batch:  # batch axes of size one ride along with the rows
            outer, first_groups, second_groups = (*p.batch, *outer), [(*p.batch, *outer), summed], [summed, inner]
            second = self._without(second, p.batch)
            if not all(is_run(first.order, group, self.sizes) for group in first_groups):
                copies = (True, copies[1])
        else:
            first_groups, second_groups = [*batch, outer, summed], [*batch, summed, inner]
        a = self.view(first, first_groups, copies[0])
        b = self.view(second, second_groups, copies[1])
        call = "torch.mm" if flat else "torch.bmm"
        groups = (*batch, outer, inner)
        if p.out == "strided" and strided:
            memory = sorted((g for g in groups if g), key=lambda group: _place(order, group, self.sizes))
            self.add(f"{name} = {left.name}.new_empty({_tuple([self.extent(group) for group in memory])})")
            target = self.view(_Value(name, order, tuple(memory)), groups)
            self.add(f"{call}({a}, {b}, out={target})")
            return _Value(name, order, tuple(memory))
        self.add(f"{name} = {call}({a}, {b})")
        made = _Value(name, tuple(axis for group in groups for axis in group), tuple(groups))
        return made if p.out == "native" else self._reorder(made, order)

    def _without(self, value: _Value, axes: Axes) -> _Value:
        """The value with axes of size one dropped from its order; its memory is the same."""
        return _Value(value.name, tuple(axis for axis in value.order if axis not in axes), None)

    def _reorder(self, value: _Value, order: Axes) -> _Value:
        """The value with its axes permuted to an order; dimensions keep runs together where they can."""
        dims = [axis for axis in order]
        text = self._reshape(value, [(axis,) for axis in value.order]) + _permute([value.order.index(axis) for axis in dims])
        self.add(f"{value.name} = {text}")
        return _Value(value.name, order, tuple((axis,) for axis in order))

    def _multiply(self, left: _Value, right: _Value, order: Axes, name: str) -> _Value:
        def spread(value: _Value) -> str:
            kept = [axis for axis in order if axis in value.order]
            text = self._reshape(value, [(axis,) for axis in value.order]) + _permute([value.order.index(axis) for axis in kept])
            missing = [i for i, axis in enumerate(order) if axis not in value.order]
            return text + "".join(f".unsqueeze({i})" for i in missing)

        self.add(f"{name} = {spread(left)} * {spread(right)}")
        return _Value(name, order, tuple((axis,) for axis in order))

    def _dot(self, left: _Value, right: _Value, order: Axes, p: Pairing, name: str) -> _Value:
        kept = tuple(axis for axis in order)
        batch = (*p.batch, *p.left, *p.right)  # every kept axis beyond the batch has size one

        def spread(value: _Value) -> str:
            mine = [axis for axis in batch if axis in value.order]
            text = self.view(value, [*((axis,) for axis in mine), p.contracted])
            for i, axis in enumerate(batch):
                if axis not in value.order:
                    text += f".unsqueeze({i})"
            return text

        self.add(f"{name} = ({spread(left)} * {spread(right)}).sum(-1)")
        made = _Value(name, batch, tuple((axis,) for axis in batch))
        return made if batch == kept else self._reorder(made, kept)

    def result(self, value: _Value, term: Term) -> str:
        """The value in the stored shape of a term, leading dimensions restored."""
        dims = [dim for dim in term.dims if dim != (ROWS,)]
        text = value.name
        if value.order != term.axes:
            text = self._reshape(value, [(axis,) for axis in value.order]) + _permute([value.order.index(axis) for axis in term.axes])
        elif ROWS not in term.axes and value.dims == term.dims:
            return text
        shape = _tuple([self.extent(dim) for dim in dims])
        return f"{text}.reshape({'lead + ' if ROWS in term.axes else ''}{shape})"


def variable(axis: str) -> str:
    """The Python variable that holds the size of a dynamic axis."""
    return "rows" if axis == ROWS else f"n_{axis}"


def _place(order: Axes, group: Axes, sizes: Mapping[str, int]) -> int:
    wide = [axis for axis in group if sizes[axis] != 1]
    return order.index((wide or list(group))[0])


def _tuple(items: Sequence[str]) -> str:
    return f"({', '.join(items)}{',' if len(items) == 1 else ''})"


def _permute(permutation: Sequence[int]) -> str:
    if list(permutation) == sorted(permutation):
        return ""
    if list(permutation) in ([1, 0], [0, 2, 1]):
        return ".mT"
    return f".permute({', '.join(map(str, permutation))})"


def _forward_body(writer: _Writer, strided: bool) -> tuple[list[_Value], _Value]:
    plan = writer.plan
    writer.prologue()
    values = [writer.leaf(term, axes) for term, axes in zip(plan.network.spec.operands, plan.leaves, strict=True)]
    for step in plan.steps:
        values.append(writer.product(values[step.left], values[step.right], plan.orders[step.out], step.pairing, f"v{step.out}", strided))
    return values, values[-1]


def _plain_source(plan: Plan) -> str:
    writer = _Writer(plan)
    _, result = _forward_body(writer, strided=False)
    text = writer.result(result, plan.network.output)
    if text in plan.network.names:
        text = f"{text}.clone()"  # a program returns a new tensor, also when there is nothing to do
    return "\n".join([f"def forward({', '.join(plan.network.names)}):", *writer.lines, f"    return {text}", ""])


def _fast_source(plan: Plan) -> str:
    writer = _Writer(plan)
    values, result = _forward_body(writer, strided=True)
    saved = [value.name for value in values[len(plan.leaves) : -1]]
    returned = ", ".join([writer.result(result, plan.network.output), *saved])
    return "\n".join([f"def forward({', '.join(plan.network.names)}):", *writer.lines, f"    return {returned},", ""])


def _backward_source(plan: Plan, needs: Sequence[bool]) -> str:
    """gradient, operands, saved intermediates → one gradient (or None) per name."""
    network, writer = plan.network, _Writer(plan)
    wanted = {name for name, need in zip(network.names, needs, strict=True) if need}
    forward = _Writer(plan)
    values, result = _forward_body(forward, strided=True)
    saved = [value.name for value in values[len(plan.leaves) : -1]]
    writer.prologue()
    need = [term.name in wanted for term in network.spec.operands]
    for left, right in plan.path:
        need.append(need[left] or need[right])
    gradients: dict[int, _Value] = {len(values) - 1: _Value("gradient", result.order, None)}
    for step in reversed(plan.steps):
        above = gradients[step.out]
        for target, other in ((step.left, step.right), (step.right, step.left)):
            if need[target]:
                p = pair(plan.orders[step.out], plan.orders[other], plan.orders[target], plan.size, plan.machine)
                gradients[target] = writer.product(above, values[other], plan.orders[target], p, f"d{target}", True)
    returned = []
    for name in network.names:
        parts = [writer.result(gradients[i], term) for i, term in enumerate(network.spec.operands) if term.name == name and need[i]]
        returned.append(" + ".join(parts) if parts else "None")
    header = f"def backward({', '.join(['gradient', *network.names, *saved])}):"
    return "\n".join([header, *writer.lines, f"    return {', '.join(returned)},", ""])


def einsum_steps(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """(equation, left, right) of every step in torch.einsum letters, at most 52 a step."""
    for step in plan.steps:
        axes = dict.fromkeys((*plan.orders[step.left], *plan.orders[step.right]))
        if len(axes) > len(string.ascii_letters):
            raise PlanError(f"a step has {len(axes)} axes, torch.einsum has {len(string.ascii_letters)} letters")
        letters = dict(zip(axes, string.ascii_letters, strict=False))
        left, right, out = ("".join(letters[axis] for axis in plan.orders[value]) for value in (step.left, step.right, step.out))
        yield f"{left},{right}->{out}", step.left, step.right


class EinsumProgram:
    """The readable reference: the same order, every step one `torch.einsum` on unflattened axes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = plan.network.names
        writer = _Writer(plan)
        writer.prologue()
        values = [writer.leaf(term, axes) for term, axes in zip(plan.network.spec.operands, plan.leaves, strict=True)]
        for i, value in enumerate(values):
            axes = [(axis,) for axis in value.order]
            if value.dims != tuple(axes):
                writer.add(f"v{i} = {value.name}.reshape({_tuple([writer.extent(axis) for axis in axes])})")
                values[i] = _Value(f"v{i}", value.order, tuple(axes))
        for step, (equation, left, right) in zip(plan.steps, einsum_steps(plan), strict=True):
            writer.add(f'v{step.out} = torch.einsum("{equation}", {values[left].name}, {values[right].name})')
            values.append(_Value(f"v{step.out}", plan.orders[step.out], tuple((axis,) for axis in plan.orders[step.out])))
        text = writer.result(values[-1], plan.network.output)
        text = f"{text}.clone()" if text in self.names else text
        source = "\n".join([f"def forward({', '.join(self.names)}):", *writer.lines, f"    return {text}", ""])
        self._run, self.source = _load(plan, "einsum", source)

    def __call__(self, *operands: Tensor) -> Tensor:
        return self._run(*operands)

    def __reduce__(self):
        return EinsumProgram, (self.plan,)
