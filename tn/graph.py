"""The front ends inside torch.compile and torch.export: operators that a graph holds as one call and that dissolve into aten calls.

They are CompositeImplicitAutograd, as torch's own einsum is: the compiler, autograd and torch.func see through them. Planning happens while
the graph is made, for the sizes seen then; sizes that the graph leaves open are dynamic axes of the plan.
"""

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from tn.bridge.opt_einsum import route
from tn.errors import KindError, OperatorError
from tn.family import Structure, make, rearrange
from tn.letters import read, symbol
from tn.network import network
from tn.planner import DEFAULT_ROWS
from tn.program import EinsumProgram, Program
from tn.spec import ROWS

_LIBRARY = torch.library.Library("tn", "FRAGMENT")
_LIBRARY.define("einsum(str equation, Tensor[] operands, str optimize) -> Tensor")
_LIBRARY.define("contract(str spec, Tensor[] operands, str backend) -> Tensor[]")


def einsum_call(args: Sequence[Any], optimize: Any, dtype: torch.dtype | None) -> Tensor:
    """The call of `tn.einsum` as a graph holds it. The compiler runs this function symbolically: text and tensors only, nothing clever."""
    if isinstance(args[0], str):
        equation, operands = args[0], list(args[1:])
        if len(operands) == 1 and isinstance(operands[0], list | tuple):
            operands = list(operands[0])
    else:
        lists = [list(labels) for labels in args[1::2]]
        operands = list(args[: 2 * len(lists) : 2])
        output = list(args[-1]) if len(args) % 2 else None
        equation = _lettered(lists, output)
    for operand in operands:
        if not isinstance(operand, Tensor):
            raise KindError(f"an operand is a {type(operand).__name__}; inside torch.compile tn.einsum takes torch tensors only")
    if dtype is not None:
        operands = converted(operands, dtype)
    return torch.ops.tn.einsum(equation, operands, _as_text(optimize))


def converted(operands: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Operands in a dtype that holds their values. Raises KindError for one that would lose some, as NumPy's casting="safe" does."""
    for i, operand in enumerate(operands):
        if torch.promote_types(operand.dtype, dtype) != dtype:
            raise KindError(f"operand {i} is {operand.dtype}, which dtype={dtype} cannot hold: convert it with .to() if that is meant")
    return [operand.to(dtype) for operand in operands]


def contract_call(spec: str, operands: Sequence[Any], backend: str) -> Any:
    """The call of `tn.contract` as a graph holds it."""
    for operand in operands:
        if not isinstance(operand, Tensor):
            raise KindError(f"an operand is a {type(operand).__name__}; inside torch.compile tn.contract takes torch tensors only")
    made = torch.ops.tn.contract(spec, list(operands), backend)
    return tuple(made) if "," in spec.partition("->")[2] else made[0]


def is_symbolic(operands: Sequence[Tensor]) -> bool:
    """Whether a size is left open, as where make_fx traces with symbols."""
    return any(isinstance(size, torch.SymInt) for operand in operands for size in operand.shape)


def _einsum(equation: str, operands: Sequence[Tensor], optimize: str) -> Tensor:
    read_as = read(equation, tuple(operand.dim() for operand in operands))
    sizes, narrow = read_as.bind([operand.shape for operand in operands])
    if len(operands) == 1:
        return rearrange(operands[0], read_as.terms[0], read_as.output)
    found = _program(read_as.spec(narrow), operands, sizes, _from_text(optimize), "planned")
    return found(*(operand.squeeze(drop) if drop else operand for operand, drop in zip(operands, narrow, strict=True)))


def _contract(spec: str, operands: Sequence[Tensor], backend: str) -> list[Tensor]:
    net = network(spec)
    sizes = net.bind([operand.shape for operand in operands])
    made = _program(net.spec, operands, sizes, "auto", backend)(*operands)
    return [made] if isinstance(made, Tensor) else list(made)


for _key in ("CompositeImplicitAutograd", "FuncTorchBatchedDecomposition"):  # vmap has a dispatch key of its own for the same thing
    _LIBRARY.impl("einsum", _einsum, _key)
    _LIBRARY.impl("contract", _contract, _key)


def _program(spec: Any, operands: Sequence[Tensor], sizes: Mapping[str, Any], asked: Hashable, backend: str) -> Program | EinsumProgram:
    """A program for the sizes seen now, dynamic where the graph leaves them open."""
    open_axes = frozenset(axis for axis, size in sizes.items() if isinstance(size, torch.SymInt) or axis == ROWS)
    seen = tuple((axis, _hint(size)) for axis, size in sizes.items())
    first = operands[0]
    grads = tuple(operand.requires_grad for operand in operands)
    return make(Structure(spec, first.dtype, first.device, grads, asked, backend), seen, open_axes)


def _hint(size: Any) -> int:
    """The size a graph was made for, without making the graph depend on it."""
    if not isinstance(size, torch.SymInt):
        return size
    from torch.fx.experimental.symbolic_shapes import optimization_hint  # late: loads sympy, and is loaded where there are symbols

    return max(optimization_hint(size, fallback=DEFAULT_ROWS), 1)


def _lettered(lists: Sequence[Sequence[Any]], output: Sequence[Any] | None) -> str:
    """Lists of labels as text whose letters sort as the labels do."""
    labels = sorted({label for term in lists for label in term if label is not ...})
    letters = {label: symbol(i) for i, label in enumerate(labels)}
    terms = ["".join("..." if label is ... else letters[label] for label in term) for term in lists]
    if output is None:
        return ",".join(terms)
    return ",".join(terms) + "->" + "".join("..." if label is ... else letters[label] for label in output)


def _as_text(optimize: Any) -> str:
    """`optimize=` as the text that an operator can take: a name, or a path such as "0 1,0 1"."""
    if optimize is None or optimize is True:
        return "auto"
    if optimize is False:
        return "left_to_right"
    if isinstance(optimize, str):
        return optimize
    if isinstance(optimize, list | tuple):
        return ",".join([" ".join([str(position) for position in step]) for step in optimize if not isinstance(step, str)])
    raise OperatorError("inside torch.compile optimize= is True, False, a name or a path: call tn.contract_path with the optimizer before")


def _from_text(text: str) -> Hashable:
    if text in ("auto", "left_to_right"):
        return text
    if text and text[0].isdigit():
        return route([tuple(int(position) for position in step.split()) for step in text.split(",")])
    return route(text)
