"""Contraction: the nn.Module that owns the cores of a network and the Programs that run it."""

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tn import opaque, tracing
from tn.errors import OperatorError, SpecError, unknown
from tn.network import Network, network
from tn.operators import usable
from tn.plan import Plan
from tn.planner import DEFAULT_ROWS, plan
from tn.program import EinsumProgram, OperatorProgram, Program, added, autocast, fits_fast, program
from tn.segments import ROW_RANGES, cells
from tn.spec import ROWS

BACKENDS = ("planned", "einsum", "triton")

_TINY = 48 * 48  # elements of a matrix below which autograd over plain calls is faster than a Python function with a backward of its own
_FEW, _SOME, _MANY = (below for below, _ in ROW_RANGES[:3])
_forced: contextvars.ContextVar[str | None] = contextvars.ContextVar("tn.backend", default=None)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run every Contraction that this thread calls inside the block with one backend.

    Args:
        name: "planned"; "einsum", the readable reference; or "triton", kernels for every step, measured or not.

    >>> import torch, tn
    >>> layer = tn.StructuredLinear(6, 4, structure="btt")
    >>> with tn.backend("einsum"):
    ...     layer(torch.ones(2, 6)).shape
    torch.Size([2, 4])
    """
    _check_backend(name)
    token = _forced.set(name)
    try:
        yield
    finally:
        _forced.reset(token)


def current_backend() -> str | None:
    """The backend of the block this thread is in, if it is in one."""
    return _forced.get()


def _check_backend(name: str) -> None:
    if name not in BACKENDS:
        raise OperatorError(unknown("backend", name, BACKENDS))


def _is_tensor(value: object) -> bool:
    return isinstance(value, Tensor)


class _Compiled:
    """What torch.compile sees of a program: plain calls, chosen operators, or one operator where the fast form is worth having."""

    def __init__(self, plan: Plan, backend: str) -> None:
        self.refusal = ""
        try:
            run = program(plan, backend)
        except OperatorError as error:  # of backend="triton", whose device and dtype may change before the first call
            run, self.refusal = program(plan, "planned"), str(error)
        assert isinstance(run, Program)
        self.plain, self.source = run.plain, run.plain_source + (run.fast_source if run.fast else "")
        self.key = opaque.register(run) if run.fast and run.apart else ""  # an operator may not return a tensor twice
        self.outputs = run.outputs
        self.woven = run if isinstance(run, OperatorProgram) else None
        if self.woven is not None:
            self.source += self.woven.woven_source

    def __call__(self, operands: list[Tensor]) -> Any:
        if self.refusal:
            raise OperatorError(self.refusal)
        if self.woven is not None and self.woven.fits(operands) and not torch._C._are_functorch_transforms_active():
            return self.woven.woven(*operands)
        if not self.key or not fits_fast(operands) or torch._C._are_functorch_transforms_active():
            return self.plain(*operands)
        made = opaque.contraction(operands, self.key)
        return made[0] if self.outputs == 1 else tuple(made[: self.outputs])


class Contraction(nn.Module):
    """A layer given by a contraction: y = einsum(inputs, cores) + bias, the cores trainable. Several outputs are planned together.

    Args:
        spec: such as "x: ... i, a: i r, c: r o -> ... o"; see `tn.network`.
        sizes: axis → size; every axis of a core must have one.
        cores: names of the trainable tensors in the order they are applied. The other operands are inputs of `forward`, in spec order.
        bias: add a vector to the last stored dimension of the output.
        zero_init: start with the last core of every output at zero, so that the layer first gives zero.
        device, dtype: of the parameters.
        backend: "planned": torch, and kernels where the machine table has them measured faster. "einsum": the readable reference. "triton":
            kernels for every step; a call that they cannot run raises OperatorError with every reason.

    Parameters are named by their core and have the shape the spec stores them in; `bias` comes last. Each core starts normal with
    the standard deviation sqrt(min(d_in, d_out)) / d_in of its `Network.fans()` (arXiv:2406.06248).

    Raises:
        SpecError, SizeError: see `tn.network`. OperatorError: an unknown backend, or a bias without a fixed last dimension.

    >>> import torch
    >>> layer = Contraction("x: ... i, a: i r, c: r o -> ... o", sizes=dict(i=6, r=2, o=4), cores=("a", "c"), bias=True)
    >>> layer(torch.ones(5, 6)).shape
    torch.Size([5, 4])
    """

    _merged: Any = None  # inside tn.frozen: runs the layer as one product
    _hoisted: Any = None  # inside tn.accumulate: runs the layer with merged cores

    def __init__(
        self,
        spec: str,
        *,
        sizes: Mapping[str, int],
        cores: Iterable[str] = (),
        bias: bool = False,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "planned",
    ) -> None:
        super().__init__()
        _check_backend(backend)
        self.network: Network = network(spec, sizes, cores=cores)
        self.zero_init, self.backend = zero_init, backend
        for name in self.network.cores:
            if hasattr(self, name) or name == "bias" or name.startswith("_"):
                raise SpecError(f"core name {name!r} is taken by an attribute of the layer; choose another word")
            self.register_parameter(name, nn.Parameter(torch.empty(self.network.shape(name), device=device, dtype=dtype)))
        if bias:
            self.register_parameter("bias", nn.Parameter(torch.empty(self._bias_size(), device=device, dtype=dtype)))
        else:
            self.register_parameter("bias", None)
        self._prepare()
        self.reset_parameters()

    def _bias_size(self) -> int:
        if len(self.network.parts) > 1:
            raise OperatorError(f"bias needs one output, this network has {len(self.network.parts)}; add one to each result")
        dims = self.network.output.dims
        if not dims or any(axis not in self.network.sizes for axis in dims[-1]):
            raise OperatorError(f"bias needs a last output dimension of fixed size, got {self.network.output.pattern or 'a scalar'!r}")
        return math.prod(self.network.sizes[axis] for axis in dims[-1])

    def _prepare(self) -> None:
        """Plan for the usual case now, so that mistakes surface here and torch.compile never sees the planner."""
        self._inputs = self.network.inputs
        self._slots = [name if name in self.network.cores else None for name in self.network.names]  # None: the next input
        self._programs: dict[tuple, Program | EinsumProgram] = {}
        self._lead = self._row_operand()
        terms = (*map(self.network.term, self._inputs), *self.network.spec.outputs)
        outer = {axis for term in terms for axis in term.axes}
        self._tiny = math.prod(size for axis, size in self.network.sizes.items() if axis in outer) <= _TINY
        self._cells = cells(self.network)
        kind = "triton" if self.backend == "triton" else "planned"
        runs = [_Compiled(self.plan(sizes=self._cells.sizes(cell)), kind) for cell in range(len(self._cells))]
        self._compiled = [(math.inf, run) for run in runs]
        if self._lead:  # neighbouring ranges of rows with the same program are one, so that torch.compile makes no graph too many
            pairs = zip(ROW_RANGES, runs, [*runs[1:], None], strict=True)
            self._compiled = [(below, run) for (below, _), run, after in pairs if after is None or run.source != after.source]

    def _row_operand(self) -> tuple[int, int] | None:
        """(place of an operand with rows, elements it has for each row) if the number of rows is all that a call decides."""
        for place, name in enumerate(self.network.names):
            axes = self.network.term(name).axes
            if ROWS in axes and self.network.dynamic == (ROWS,):
                return place, max(math.prod(self.network.sizes[axis] for axis in axes if axis != ROWS), 1)
        return None

    def _apply(self, fn: Callable, recurse: bool = True) -> "Contraction":
        """Moved to another device or dtype: plan for that."""
        before = self._home()
        super()._apply(fn, recurse)
        if self._home() != before:
            self._prepare()
        return self

    def _home(self) -> tuple[torch.dtype, torch.device] | None:
        cores = [getattr(self, name) for name in self.network.cores]
        return (cores[0].dtype, cores[0].device) if cores else None

    def reset_parameters(self) -> None:
        """Draw the cores anew; the bias starts at zero."""
        last = {part.cores[-1] for part in self.network.parts if part.cores}
        for fan in self.network.fans():
            std = math.sqrt(min(fan.d_in, fan.d_out)) / max(fan.d_in, 1)
            core = getattr(self, fan.core)
            if self.zero_init and fan.core in last:
                nn.init.zeros_(core)
            elif core.numel() and not core.is_meta:  # on meta there is nothing to draw, and drawing imports the compiler
                nn.init.normal_(core, std=std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def plan(self, rows: int | None = None, grad: Iterable[str] | None = None, sizes: Mapping[str, int] | None = None) -> Plan:
        """The plan for a number of rows or sizes of dynamic axes, 1024 by default, with gradients of everything unless named otherwise.

        The layer itself runs the plan of the range that a call falls into; `tn.explain` shows those.
        """
        wanted = self.network.names if grad is None else tuple(grad)
        cores = [getattr(self, name) for name in self.network.cores]
        device = cores[0].device if cores else "cpu"
        dtype = cores[0].dtype if cores else torch.float32
        given = {**({ROWS: rows or DEFAULT_ROWS} if ROWS in self.network.axes else {}), **(sizes or {})}
        return plan(self.network, grad=wanted, sizes=given, dtype=dtype, device=device)

    def forward(self, *inputs: Tensor) -> Any:
        """inputs in spec order → the contraction, plus the bias; several outputs as a tuple in spec order."""
        if self._merged is not None and len(inputs) == 1 and isinstance(inputs[0], Tensor) and not torch.compiler.is_compiling():
            merged = self._merged(inputs[0])
            if merged is not None:
                return merged
        parameters: dict[str, Any] = self._parameters
        bias = parameters["bias"] if "bias" in parameters else self.bias  # noqa: SIM401 (get would look the slow attribute up always)
        return self._contract(*inputs, bias=bias)

    def _contract(self, *inputs: Tensor, bias: Tensor | None = None) -> Any:
        """The contraction, plus the bias if one is given. torch.compile sees the plain form chosen at construction, never the choice."""
        if len(inputs) != len(self._inputs) or not all(map(_is_tensor, inputs)):
            self._refuse(inputs)
        given = iter(inputs)
        parameters: dict[str, Any] = self._parameters
        # a core that is no plain parameter (a parametrisation, a replica of a data-parallel module) is an attribute
        operands = [
            next(given) if core is None else parameters[core] if core in parameters else getattr(self, core) for core in self._slots
        ]
        stored = operands
        if torch._C._is_any_autocast_enabled():
            operands = list(autocast(operands))
        first, lead, cast = operands[0], self._lead, stored is not operands
        rows = operands[lead[0]].numel() // lead[1] if lead is not None else 0
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():  # one graph for every number of rows, of aten calls alone
                return added(self._compiled[-1][1].plain(*operands), bias)
            if lead is None:
                return added(self._compiled[self._cells.find(operands)][1](operands), bias)
            return added(next(run for below, run in self._compiled if rows < below)(operands), bias)
        grads = tuple([t.requires_grad for t in operands]) if torch.is_grad_enabled() else None
        if lead is None:
            segment = self._cells.find(operands) if self._cells.groups else 0
        else:
            segment = (0 if rows < _FEW else 1) if rows < _SOME else 2 if rows < _MANY else 3
        if self._hoisted is not None and grads is not None:
            hoisted = self._hoisted(stored, first.dtype, grads, segment)
            if hoisted is not None:
                return added(hoisted, bias)
        key = (first.dtype, first.device, grads, _forced.get() or self.backend, segment, cast)
        run = self._programs.get(key)
        if run is None:
            self._check_alike(operands)
            run = self._programs[key] = self._bind(*key[:5])
        if bias is not None and isinstance(run, OperatorProgram):
            result = run(*operands, bias=bias)
        else:
            result = run(*operands)
            result = result if bias is None else result + bias.to(result.dtype)
        if tracing.recording():
            self._record(run.plan, operands, result)
        return result

    def _shaped(self, rows: Tensor) -> Tensor:
        """(..., outputs) in the stored shape of the output."""
        dims = [dim for dim in self.network.output.dims if dim != (ROWS,)]
        return rows.reshape(*rows.shape[:-1], *(math.prod(self.network.sizes[axis] for axis in dim) for dim in dims))

    def refresh(self) -> None:
        """Inside `tn.frozen` and `tn.accumulate`: forget merged cores, after a write through `.data`, which nothing can notice."""
        for kept in (self._merged, self._hoisted):
            if kept is not None:
                kept.refresh()

    def _refuse(self, inputs: tuple[object, ...]) -> None:
        if len(inputs) != len(self._inputs):
            raise OperatorError(f"the layer takes {len(self._inputs)} inputs ({', '.join(self._inputs)}), got {len(inputs)}")
        for name, value in zip(self._inputs, inputs, strict=True):
            if not isinstance(value, Tensor):
                raise OperatorError(f"input {name!r} is a {type(value).__name__}, expected a torch.Tensor")

    def _check_alike(self, operands: Iterable[Tensor]) -> None:
        """Raise OperatorError unless tensors have the dtype of the first core, as autocast leaves it, and are where it is."""
        core = next((getattr(self, name) for name in self.network.cores), None)
        if core is None:
            return
        (wanted,) = autocast([core]) if torch._C._is_any_autocast_enabled() else [core]
        for operand in operands:
            if operand.device != wanted.device:
                raise OperatorError(f"input is on {operand.device}, the layer on {wanted.device}: move one of them")
            if operand.dtype is not wanted.dtype:
                raise OperatorError(
                    f"input is {operand.dtype}, the layer {wanted.dtype}: convert the input by .to({wanted.dtype}), or the layer"
                )

    def _bind(
        self, dtype: torch.dtype, device: torch.device, grads: tuple[bool, ...] | None, backend: str, segment: int
    ) -> Program | EinsumProgram:
        wanted = [name for name, need in zip(self.network.names, grads or (), strict=False) if need]
        made = plan(self.network, grad=wanted, sizes=self._cells.sizes(segment), dtype=dtype, device=device)
        plain = backend == "planned" and grads is not None and self._tiny and not usable(device)
        return program(made, "plain" if plain else backend)

    def _record(self, used: Plan, operands: list[Tensor], result: Any) -> None:
        sizes = self.network.bind([t.shape for t in operands])
        count = sum(parameter.numel() for parameter in self._parameters.values() if parameter is not None)
        kept = sum(math.prod(sizes[axis] for axis in used.orders[value]) for value in used.kept)
        added = result.numel() if self.bias is not None else 0
        tracing.record(
            "contraction",
            str(self.network.spec),
            sizes=sizes,
            result=result,
            flops=used.flops_at(sizes),
            pointwise=added,
            parameters=count,
            kept=kept,
        )

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_programs", "_compiled", "_merged", "_hoisted")}

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._prepare()

    def __repr__(self) -> str:
        options = f", bias={self.bias is not None}" + (", zero_init=True" if self.zero_init else "")
        return f"Contraction({str(self.network.spec)!r}, sizes={dict(self.network.known)}, cores={self.network.cores}{options})"
