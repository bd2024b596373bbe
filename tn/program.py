"""Program: printable Python, generated from a Plan, that runs it with aten calls.

Two forms of the same steps. The *fast* form writes products straight into strided views of their result and has its own backward;
it runs inside an autograd Function. The *plain* form only makes new tensors, so autograd, torch.func and torch.compile see through it;
it runs whenever one of them is at work.
"""

import builtins
import dataclasses
import functools
import hashlib
import keyword
import linecache
import math
import re
import string
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tn import memory, regions, tiles
from tn.errors import OperatorError, PlanError, SizeError
from tn.network import Network
from tn.operators import Offer, transforming, usable
from tn.pairing import pair
from tn.plan import Plan
from tn.planner import plan
from tn.spec import ROWS
from tn.writer import Gradients, Value, Writer, tuple_of

_autocasting, _HALF = torch._C._is_any_autocast_enabled, torch.float16  # looked up once: a call takes a microsecond or two

_BIAS = "b0"
# Variables and functions of generated code.
_OURS = re.compile(
    r"[vsdxbcegy]\d+(_t)?|op_\d+|n_\w+|n|rows|size|start|gradient\d+|torch|mismatch|prod|max|min|range|len|forward(_tiled)?|backward(_tiled)?"
)


class Program:
    """Runs a Plan. Make one with `tn.compile`; call it with one tensor per name of the network, in spec order.

    Args:
        plan: what to run. own: whether to have the fast form; where it is worth having if None.

    Attributes:
        plan: what it runs. outputs: how many results; with several, a call returns a tuple in spec order.
        source: the Python of the fast form, forward and backward, or of the plain form where that is used always.
        plain: the plain form, called with the operands. fast: the fast form, which returns the results and what the gradient needs; None
            where the plain form is as good.
    """

    def __init__(self, plan: Plan, own: bool | None = None) -> None:
        if plan.slices:
            raise PlanError("a plan with slices runs through tn.compile")
        self.plan, self.own = plan, own
        self.names = plan.network.names
        self.outputs = len(plan.results)
        self.apart = set(plan.saved).isdisjoint(map(plan.first, plan.results))  # no gradient reads a result
        self._code = _with_safe_names(plan)
        self.plain, self.plain_source = _load(plan, "plain", _plain_source(self._code))
        self.fast: Callable[..., tuple[Tensor, ...]] | None = None  # results, then what the gradient needs
        self._backwards: dict[tuple[bool, ...], Callable[..., tuple[Tensor | None, ...]]] = {}
        if plan.worth_owning if own is None else own:
            self.fast, self.fast_source = _load(plan, "fast", _fast_source(self._code))

    @property
    def source(self) -> str:
        """The generated Python."""
        if self.fast is None:
            return self.plain_source
        return f"{self.fast_source}\n{_backward_source(self._code, [name in self.plan.grad for name in self.names])}"

    def __call__(self, *operands: Tensor) -> Any:
        try:
            if _autocasting():
                operands = tuple(autocast(operands))
            fast = self.fast
            if fast is None or see_through() or not fits_fast(operands):
                if operands[0].dtype is _HALF and operands[0].device.type == "cpu":  # whose half products are 10 to 30 times slower
                    with torch.autocast("cpu", enabled=False):
                        return _halved(self(*(operand.float() for operand in operands)))
                return self.plain(*operands)
            if torch.is_grad_enabled() and any(operand.requires_grad for operand in operands):
                return _Owned.apply(self, *operands)
            return fast(*operands)[0] if self.outputs == 1 else fast(*operands)[: self.outputs]
        except (AttributeError, IndexError, TypeError):
            self._refuse(operands)
            raise

    def _refuse(self, operands: Sequence[object]) -> None:
        """Raise the error for operands that are too few, too many, or no tensors."""
        if len(operands) != len(self.names):
            raise OperatorError(f"the program takes {len(self.names)} tensors ({', '.join(self.names)}), got {len(operands)}")
        for name, operand in zip(self.names, operands, strict=True):
            if not isinstance(operand, Tensor):
                raise OperatorError(f"operand {name!r} is a {type(operand).__name__}, expected a torch.Tensor")

    def backward(self, needs: tuple[bool, ...]) -> Callable[..., tuple[Tensor | None, ...]]:
        """The generated gradient function for the operands that need one."""
        found = self._backwards.get(needs)
        if found is None:
            found, _ = _load(self.plan, "backward", _backward_source(self._code, needs))
            self._backwards[needs] = found
        return found

    def remaking(self, needs: tuple[bool, ...]) -> tuple[Callable[..., tuple[Tensor | None, ...]], str]:
        """A gradient function that is called with gradients and operands alone and makes the intermediates again, and its source."""
        return _load(self.plan, "backward", _backward_source(self._code, needs, keep=False))

    def opaque_forward(self) -> Callable[..., tuple[Tensor, ...]]:
        """The fast form that returns equally many tensors for every number of rows: all at once, or always tile by tile."""
        assert self.fast is not None
        return self.fast if self.plan.tile is None else self.fast.__globals__["forward_tiled"]

    def result_shapes(self, operands: Sequence[Tensor]) -> list[tuple[int, ...]]:
        """Shapes of the results for operands that fit; sizes may be symbols of a compiler."""
        network = self.plan.network
        lead: tuple[int, ...] = ()
        for name, operand in zip(self.names, operands, strict=True):
            dims = network.term(name).dims
            if dims[:1] == ((ROWS,),):
                lead = tuple(operand.shape[: operand.dim() - len(dims) + 1])
        sizes = network.sizes
        return [(*lead, *(math.prod(sizes[axis] for axis in dim) for dim in term.dims if dim != (ROWS,))) for term in network.spec.outputs]

    def opaque_backward(self, needs: tuple[bool, ...]) -> Callable[..., tuple[Tensor | None, ...]]:
        """Its gradient function for the operands that need one."""
        found = self.backward(needs)
        return found if self.plan.tile is None else found.__globals__["backward_tiled"]

    def __repr__(self) -> str:
        return f"Program({self.plan.network.spec})"

    def __reduce__(self):
        return Program, (self.plan, self.own)


class _Owned(torch.autograd.Function):
    """The fast form under autograd. Old style on purpose: a `setup_context` costs about 10 µs a call."""

    @staticmethod
    def forward(ctx, program: Program, *operands: Tensor) -> Any:
        assert program.fast is not None
        made, count = program.fast(*operands), program.outputs
        ctx.program = program
        ctx.save_for_backward(*operands, *made[count:])
        results = made[:count]
        if program.apart:  # autograd lets nobody change a view that a Function made
            results = tuple([result if result._base is None else result.data for result in results])
        return results[0] if count == 1 else results

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        program, needs = ctx.program, ctx.needs_input_grad[1:]
        if not torch.is_grad_enabled():
            return None, *program.backward(needs)(*gradients, *ctx.saved_tensors)
        return None, *again(program.plain, ctx.saved_tensors[: len(needs)], needs, gradients)


def again(
    plain: Callable[..., Any], operands: Sequence[Tensor], needs: Sequence[bool], gradients: Sequence[Tensor]
) -> Iterator[Tensor | None]:
    """Gradients that can be differentiated themselves (create_graph): those of the plain form, which autograd sees through."""
    aliases = [operand.view_as(operand) if need else operand for operand, need in zip(operands, needs, strict=True)]
    wanted = [alias for alias, need in zip(aliases, needs, strict=True) if need]
    made = plain(*aliases)
    pairs = zip(made if isinstance(made, tuple) else (made,), gradients, strict=True)
    results, given = zip(*((result, gradient) for result, gradient in pairs if result.requires_grad), strict=True)
    found = iter(torch.autograd.grad(results, wanted, given, create_graph=True, allow_unused=True))
    return (next(found) if need else None for need in needs)


def autocast(operands: Sequence[Tensor]) -> Sequence[Tensor]:
    """Operands in the dtype that autocast asks for on their device; float64 and integers stay, as in `nn.Linear`."""
    kind = operands[0].device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return operands
    dtype = torch.get_autocast_dtype(kind)
    return [t.to(dtype) if t.is_floating_point() and t.dtype is not torch.float64 else t for t in operands]


def _halved(results: Any) -> Any:
    return results.half() if isinstance(results, Tensor) else tuple(result.half() for result in results)


def see_through() -> bool:
    """Whether something has to see through the operations: torch.compile, a torch.func transform or forward-mode derivatives."""
    return torch.compiler.is_compiling() or transforming()


def fits_fast(operands: Sequence[Tensor]) -> bool:
    """The fast form's own gradients hold for real floating tensors of one dtype; low precision on a CPU takes the plain form."""
    first = operands[0]
    if not first.is_floating_point() or (first.device.type == "cpu" and first.dtype not in (torch.float32, torch.float64)):
        return False
    return all(operand.dtype is first.dtype for operand in operands)


class OperatorProgram(Program):
    """Runs a Plan with operators in place of some of its steps; as the plan alone wherever they do not run.

    Attributes:
        choices: (part of the plan, the offer that runs it) pairs. woven: the plain form with the operators in it. insists: the caller
            asked for operators, so that what they cannot run is an error. biased: the form in which the last operator adds a bias too, if
            it can.
    """

    def __init__(self, plan: Plan, choices: Sequence[tuple[regions.Part, Offer]], insists: bool) -> None:
        super().__init__(plan)
        self.choices, self.insists = tuple(choices), insists
        self._parts = [part for part, _ in choices]
        self._functions = {f"op_{i}": offer.run for i, (_, offer) in enumerate(choices)}
        self.woven, self.woven_source = _load(plan, "woven", _woven_source(self._code, self._parts), self._functions)

    @functools.cached_property
    def biased(self) -> Callable[..., Any] | None:
        """Called with the operands and a bias. Made when a bias is first given."""
        for place, (part, offer) in enumerate(self.choices):
            also = regions.with_bias(self.plan, part, offer)
            if also is not None:
                source = _woven_source(self._code, self._parts, biased=place)
                return _load(self.plan, "biased", source, {**self._functions, f"op_{place}": also.run})[0]
        return None

    @property
    def source(self) -> str:
        """The generated Python."""
        return self.woven_source if self.choices else super().source

    def fits(self, operands: Sequence[Tensor]) -> bool:
        """Whether these are tensors that the operators were chosen for."""
        dtype, device = self.plan.dtype, self.plan.device
        return all(isinstance(t, Tensor) and t.dtype is dtype and t.device.type == device for t in operands)

    def __call__(self, *operands: Tensor, bias: Tensor | None = None) -> Any:
        """Run it, and add a bias of the last stored dimension of the result."""
        if _autocasting():
            operands = tuple(autocast(operands))
        if self.choices and not see_through():
            if self.fits(operands):
                try:
                    if bias is not None and self.biased is not None:
                        return self.biased(*operands, bias.to(self.plan.dtype))
                    return added(self.woven(*operands), bias)
                except OperatorError as error:
                    self._give_up(error)
            elif self.insists:
                given = ", ".join(f"{name} {getattr(t, 'dtype', type(t).__name__)}" for name, t in zip(self.names, operands, strict=False))
                raise OperatorError(f"backend 'triton' takes tensors of {self.plan.dtype} on {self.plan.device}, got {given}")
        return added(super().__call__(*operands), bias)

    def _give_up(self, error: OperatorError) -> None:
        """From now on torch runs everything, and the plan says why."""
        if self.insists:
            raise error
        for part, offer in self.choices:
            regions.failed(part, offer.operator, f"does not run here: {error}")
        warnings.warn(f"torch runs {self.plan.network.spec} from here on: {error}", stacklevel=3)
        self.choices = ()

    def __reduce__(self):
        return program, (self.plan, "triton" if self.insists else "planned")


def added(result: Any, bias: Tensor | None) -> Any:
    """result + bias, in the result's dtype."""
    return result if bias is None else result + bias.to(result.dtype)


def program(plan: Plan, backend: str) -> "Program | EinsumProgram":
    """The Program of a plan; equal plans for one dtype and device share it.

    Args:
        backend: "planned" takes operators where the plan's table has them measured faster than torch; "triton" takes them for every step;
            "plain" never has a fast form; "einsum" is the readable reference.

    Raises:
        OperatorError: "triton", and some step that no operator runs, with every reason.
    """
    if backend in ("einsum", "plain") or plan.device == "meta":
        return _unbound(plan, backend)
    if usable(plan.device):
        return _bound(plan, backend, plan.dtype, plan.device)
    if backend == "triton":
        regions.insist(plan)  # raises, saying why
    return _unbound(plan, backend)


@functools.lru_cache(maxsize=4096)
def _unbound(plan: Plan, backend: str) -> "Program | EinsumProgram":
    return EinsumProgram(plan) if backend == "einsum" else Program(plan, own=False if backend == "plain" else None)


@functools.lru_cache(maxsize=4096)
def _bound(plan: Plan, backend: str, dtype: torch.dtype, device: str) -> "Program | EinsumProgram":
    """`dtype` and `device` are the plan's, which two equal plans may have different."""
    choices = regions.insist(plan) if backend == "triton" else regions.choose(plan)
    return OperatorProgram(plan, choices, backend == "triton") if choices else _unbound(plan, "planned")


def compile(target: Network | Plan) -> Program:
    """A Program for a network (planned with default settings and gradients of its cores and inputs) or for a plan.

    Operators are taken where the plan's table has them measured faster than torch, for the dtype and device that were planned for.

    >>> import torch, tn
    >>> f = tn.compile(tn.network("x: ... i, w: i o -> ... o", dict(i=3, o=2)))
    >>> f(torch.ones(4, 3), torch.ones(3, 2)).shape
    torch.Size([4, 2])
    """
    if not isinstance(target, Network | Plan):
        raise PlanError(f"tn.compile takes a network, such as tn.network(spec, sizes) gives, or a plan, got {target!r}")
    made = target if isinstance(target, Plan) else plan(target, grad=target.names)
    if made.slices:
        from tn.sliced import Sliced  # late: it builds on programs

        return Sliced(made)
    found = program(made, "planned")
    assert isinstance(found, Program)
    return found


def _load(plan: Plan, form: str, source: str, functions: Mapping[str, Callable] | None = None) -> tuple[Callable, str]:
    """Run generated source and return its function; the text stays visible to tracebacks and debuggers."""
    filename = f"<tn {form} {plan.network.spec} {hashlib.sha256(source.encode()).hexdigest()[:8]}>"
    linecache.cache[filename] = (len(source), None, source.splitlines(keepends=True), filename)
    space: dict = {"torch": torch, "prod": math.prod, "mismatch": functools.partial(_mismatch, plan.network), **(functions or {})}
    exec(builtins.compile(source, filename, "exec"), space)  # our own generated text
    return space["backward" if form == "backward" else "forward"], source


def _mismatch(network: Network, *operands: Tensor) -> None:
    """Raise the error that names what does not fit."""
    for name, operand in zip(network.names, operands, strict=True):
        if not isinstance(operand, Tensor):
            raise OperatorError(f"operand {name!r} is a {type(operand).__name__}, expected a torch.Tensor")
    network.bind([operand.shape for operand in operands])
    raise SizeError(f"shapes {[tuple(operand.shape) for operand in operands]} do not fit {network.spec}")


def _forward_body(writer: Writer, strided: bool, instead: str = "") -> dict[int, Value]:
    """Write all steps and give every value; with more rows than a tile, the call `instead`."""
    plan = writer.plan
    writer.prologue()
    if instead:
        _hand_over(writer, instead)
    values = _leaves(writer, plan.turned)
    work = memory.Work.of(plan, plan.needs)
    for step, (*_, dead) in zip(plan.steps, work.forward(plan.saved if strided else ()), strict=True):
        left, right, order = writer.value(values, step.left), writer.value(values, step.right), plan.orders[step.out]
        p = step.pairing if strided else pair(left.order, right.order, order, plan.step_size, plan.machine, tape=True)
        values[step.out] = writer.product(left, right, order, p, f"v{step.out}", strided)
        writer.delete([values[value].name for value in dead])
    return values


def _with_safe_names(plan: Plan) -> Plan:
    """The plan with tensors renamed that would hide a variable of the generated code or are Python keywords."""
    network = plan.network
    if not any(map(_reserved, network.names)):
        return plan
    taken = set(network.names)
    safe: dict[str, str] = {}
    for name in network.names:
        new = f"its_{name}" if _reserved(name) else name
        while new != name and new in taken:
            new += "_"
        safe[name] = new
        taken.add(new)
    operands = tuple(dataclasses.replace(term, name=safe[term.name]) for term in network.spec.operands)
    roles = [tuple(safe[name] for name in names) for names in (network.cores, network.consts)]
    renamed = Network(dataclasses.replace(network.spec, operands=operands), network.known, *roles)
    return dataclasses.replace(plan, network=renamed, grad=tuple(safe[name] for name in plan.grad))


def _reserved(name: str) -> bool:
    return keyword.iskeyword(name) or _OURS.fullmatch(name) is not None


def _leaves(writer: Writer, turned: Collection[int]) -> dict[int, Value]:
    """The operands, some of them copied into the memory order that the plan has for them."""
    plan = writer.plan
    values = {i: writer.leaf(term, plan.leaves[i]) for i, term in enumerate(plan.terms) if i not in plan.same}
    return values | {i: writer.turn(values[i], plan.orders[i], f"c{i}") for i in turned}


def _returned(writer: Writer, values: dict[int, Value]) -> list[str]:
    """The results, each a new tensor: without a step one may be a view of an operand, and two may be equal."""
    plan, found, seen = writer.plan, [], set(range(len(writer.plan.leaves)))
    for value, term in zip(plan.results, plan.network.spec.outputs, strict=True):
        text = writer.result(writer.value(values, value), term)
        found.append(f"{text}.clone()" if plan.first(value) in seen else text)
        seen.add(plan.first(value))
    return found


def _plain_source(plan: Plan) -> str:
    writer = Writer(plan)
    text = ", ".join(_returned(writer, _forward_body(writer, strided=False)))
    return "\n".join([f"def forward({', '.join(plan.network.names)}):", *writer.finish(text), f"    return {text}", ""])


def _woven_source(plan: Plan, parts: Sequence[regions.Part], biased: int | None = None) -> str:
    """The plain form in which operators run some parts; the last argument is a bias that the operator of this part takes too."""
    writer = Writer(plan)
    writer.prologue()
    values, inside = _leaves(writer, plan.turned), {value for part in parts for value in part.values}
    ends = {part.values[-1]: (f"op_{i}", part) for i, part in enumerate(parts)}
    for step in plan.steps:
        order, name = plan.orders[step.out], f"v{step.out}"
        if step.out in ends:
            operator, part = ends[step.out]
            operands = [writer.view(writer.value(values, value), dims) for value, dims in part.operands]
            if operator == f"op_{biased}":
                last = plan.network.output.dims[-1]
                operands.append(writer.view(Value(_BIAS, last, (last,)), tuple((axis,) for axis in last)))
            writer.add(f"{name} = {operator}({', '.join(operands)})")
            made = Value(name, tuple(axis for dim in part.result for axis in dim), part.result)
            values[step.out] = made if made.order == order else writer.reorder(made, order)
        elif step.out not in inside:
            left, right = writer.value(values, step.left), writer.value(values, step.right)
            p = pair(left.order, right.order, order, plan.step_size, plan.machine, tape=True)
            values[step.out] = writer.product(left, right, order, p, name, False)
    text = ", ".join(_returned(writer, values))
    names = plan.network.names if biased is None else (*plan.network.names, _BIAS)
    return "\n".join([f"def forward({', '.join(names)}):", *writer.finish(text), f"    return {text}", ""])


def _fast_source(plan: Plan) -> str:
    writer = Writer(plan)
    values = _forward_body(writer, strided=True, instead=f"forward_tiled({', '.join(plan.network.names)})")
    returned = ", ".join([*_returned(writer, values), *(values[value].name for value in plan.saved)])
    whole = "\n".join([f"def forward({', '.join(plan.network.names)}):", *writer.lines, f"    return {returned},", ""])
    return whole if plan.tile is None else f"{tiles.forward_source(plan)}\n{whole}"


def _backward_source(plan: Plan, needs: Sequence[bool], keep: bool = True) -> str:
    """gradients of the results, operands, saved intermediates → one gradient (or None) per name. What was not kept is made again."""
    network, writer = plan.network, Writer(plan)
    need = plan.needing({name for name, need in zip(network.names, needs, strict=True) if need})
    saved, made = plan.saved if keep else (), _forward_body(Writer(plan), strided=True)
    writer.prologue()
    given = [f"gradient{i}" for i in range(len(plan.results))]
    _hand_over(writer, f"backward_tiled({', '.join([*given, *network.names])})")
    work = memory.Work.of(plan, need)
    again = work.remade(saved)
    values = {**_leaves(writer, again.intersection(plan.turned)), **{value: made[value] for value in saved}}
    for left, right, out, dead in work.forward((*work.read, *saved), again):
        first, second = (writer.value(values, value) for value in (left, right))
        values[out] = writer.product(first, second, plan.orders[out], plan.pairing(left, right, out), f"v{out}", True)
        writer.delete([values[value].name for value in dead])
    gradients = Gradients(writer)
    for name, value, term in zip(given, plan.results, network.spec.outputs, strict=True):
        known = Value(name, term.axes, None if ROWS in term.axes else term.dims)
        gradients.give(value, writer.turn(known, plan.cotangent, "g0") if plan.cotangent else known)
    for step, (*_, over, dead) in zip(plan.gradient_steps(need), work.backward(again), strict=True):
        gradients.add(step, writer.value(values, step.right))
        writer.delete([*(gradients.values[value].name for value in over), *(values[value].name for value in dead)])
    names = [*given, *network.names, *(f"{made[value].name}=None" for value in saved)]
    whole = "\n".join([f"def backward({', '.join(names)}):", *writer.lines, f"    return {gradients.returned(need)},", ""])
    return whole if plan.tile is None else f"{tiles.backward_source(plan, need)}\n{whole}"


def _hand_over(writer: Writer, call: str) -> None:
    """Leave to the tiled form when there are more rows than a tile."""
    if writer.plan.tile is not None:
        writer.add(f"if rows > {writer.plan.tile}:")
        writer.add(f"    return {call}")


def einsum_steps(plan: Plan) -> Iterator[tuple[str, int, int]]:
    """(equation, left, right) of every step in torch.einsum letters, at most 52 a step."""
    orders = (*plan.leaves, *plan.orders[len(plan.leaves) :])  # no operand is copied into another one
    for step in plan.tree_steps:
        axes = dict.fromkeys((*orders[step.left], *orders[step.right]))
        if len(axes) > len(string.ascii_letters):
            raise PlanError(f"a step has {len(axes)} axes, torch.einsum has {len(string.ascii_letters)} letters")
        letters = dict(zip(axes, string.ascii_letters, strict=False))
        left, right, out = ("".join(letters[axis] for axis in orders[value]) for value in (step.left, step.right, step.out))
        yield f"{left},{right}->{out}", step.left, step.right


class EinsumProgram:
    """The readable reference: the same order, every step one `torch.einsum` on unflattened axes."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = plan.network.names
        writer = Writer(_with_safe_names(plan))
        writer.prologue()
        values = [writer.leaf(term, axes) for term, axes in zip(writer.plan.terms, plan.leaves, strict=True)]
        for i, value in enumerate(values):
            axes = [(axis,) for axis in value.order]
            if value.dims != tuple(axes):
                writer.add(f"v{i} = {value.name}.reshape({tuple_of([writer.extent(axis) for axis in axes])})")
                values[i] = Value(f"v{i}", value.order, tuple(axes))
        for step, (equation, left, right) in zip(plan.tree_steps, einsum_steps(plan), strict=True):
            writer.add(f'v{step.out} = torch.einsum("{equation}", {values[left].name}, {values[right].name})')
            values.append(Value(f"v{step.out}", plan.orders[step.out], tuple((axis,) for axis in plan.orders[step.out])))
        made = dict(enumerate(values))
        text, names = ", ".join(_returned(writer, made)), writer.plan.network.names
        source = "\n".join([f"def forward({', '.join(names)}):", *writer.lines, f"    return {text}", ""])
        self._run, self.source = _load(plan, "einsum", source)

    def __call__(self, *operands: Tensor) -> Any:
        return self._run(*operands)

    def __reduce__(self):
        return EinsumProgram, (self.plan,)
