"""One-call front ends: `contract` reads axis words, `einsum` reads letters."""

import functools
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tn.contraction import BACKENDS, program
from tn.errors import OperatorError, SizeError, SpecError, unknown
from tn.network import Network, network
from tn.plan import plan
from tn.program import EinsumProgram, Program
from tn.spec import ROWS

Operand = Tensor | np.ndarray | np.generic


def contract(spec: str, *operands: Operand, backend: str = "planned") -> Operand:
    """Contract tensors once; plans are cached by spec and sizes.

    Args:
        spec: axis words, see `tn.network`. operands: one per tensor name, in spec order; torch tensors, or numpy arrays throughout.
        backend: "planned" or "einsum", the readable reference.

    Returns:
        A tensor, or an array when all operands are arrays.

    Raises:
        SpecError, SizeError, OperatorError: before any work.

    >>> import torch
    >>> contract("... (i j), i j r, i r o -> ... o", torch.ones(2, 6), torch.ones(2, 3, 4), torch.ones(2, 4, 5)).shape
    torch.Size([2, 5])
    """
    if backend not in BACKENDS:
        raise OperatorError(unknown("backend", backend, BACKENDS))
    tensors, numpy = _tensors(operands)
    net = _network(spec)
    sizes = net.bind([t.shape for t in tensors])
    grads = tuple(name for name, t in zip(net.names, tensors, strict=True) if t.requires_grad) if torch.is_grad_enabled() else ()
    first = next((t for t in tensors if t.dim()), tensors[0])
    run = _program(net, tuple(sizes.items()), grads, first.dtype, first.device, backend)
    result = run(*tensors)
    return result.numpy() if numpy else result


@functools.lru_cache(maxsize=4096)
def _network(spec: str) -> Network:
    return network(spec)


@functools.lru_cache(maxsize=4096)
def _program(
    net: Network, sizes: tuple[tuple[str, int], ...], grads: tuple[str, ...], dtype: torch.dtype, device: torch.device, backend: str
) -> Program | EinsumProgram:
    fixed = network(net.spec, {axis: size for axis, size in sizes if axis != ROWS})
    return program(plan(fixed, grad=grads, rows=dict(sizes).get(ROWS), dtype=dtype, device=device), backend)


def _tensors(operands: tuple) -> tuple[list[Tensor], bool]:
    numpy = bool(operands) and all(isinstance(operand, np.ndarray | np.generic) for operand in operands)
    if numpy:
        arrays = [np.asarray(operand) for operand in operands]  # torch knows no negative strides
        return [torch.from_numpy(a.copy() if any(stride < 0 for stride in a.strides) else a) for a in arrays], True
    for i, operand in enumerate(operands):
        if not isinstance(operand, Tensor):
            raise OperatorError(f"operand {i} is a {type(operand).__name__}, expected a torch.Tensor (or numpy arrays throughout)")
    kinds = {(operand.dtype, operand.device) for operand in operands}
    if len(kinds) > 1:
        raise OperatorError(
            f"operands have different dtypes or devices: {', '.join(f'{dtype} on {device}' for dtype, device in sorted(kinds, key=str))}"
        )
    return list(operands), False


def einsum(equation: str, *operands: Operand, optimize: bool | str | None = None) -> Operand:
    """Einstein summation with letters, as torch.einsum: "ij,jk->ik", implicit output, ellipsis, repeated letters, size-1 broadcasting.

    Args:
        equation: letters; the output may be left out (letters that occur once, sorted). operands: as in `contract`.
        optimize: None, True or "auto": the planner; False: the order as written.

    Returns:
        A tensor, or an array when all operands are arrays.

    Raises:
        SpecError: an equation that cannot be read. SizeError: sizes that disagree, naming the operand.

    >>> import torch
    >>> einsum("bij,bjk->bik", torch.ones(2, 3, 4), torch.ones(2, 4, 5)).shape
    torch.Size([2, 3, 5])
    """
    if optimize not in (None, True, False, "auto"):
        raise OperatorError(f"optimize={optimize!r} is not available yet, only None, True, 'auto' and False")
    tensors, numpy = _tensors(operands)
    inputs, output, squeezed = _read(equation, tensors)
    tensors = [t.squeeze(tuple(dims)) if dims else t for t, dims in zip(tensors, squeezed, strict=True)]
    spec = ", ".join(f"t{i}: {' '.join(axes)}" for i, axes in enumerate(inputs)) + f" -> {' '.join(axis for axis in output if axis)}"
    missing = [i for i, axis in enumerate(output) if axis is None]
    result: Any
    if optimize is False:
        net = network(spec)
        result = program(plan(net, search="left_to_right", sizes=net.bind([t.shape for t in tensors])), "planned")(*tensors)
    else:
        result = contract(spec, *tensors)
    for i in missing:
        result = result.unsqueeze(i)
    return result.numpy() if numpy else result


def _read(equation: str, tensors: list[Tensor]) -> tuple[list[list[str]], list[str | None], list[list[int]]]:
    """Axes of every operand without broadcast dimensions of size one, axes of the output (None where all operands broadcast), and the
    dimensions to squeeze."""
    text = equation.replace(" ", "")
    left, arrow, right = text.partition("->")
    terms = left.split(",")
    if len(terms) != len(tensors):
        raise SpecError(f"equation {equation!r} has {len(terms)} terms for {len(tensors)} operands")
    spread = []
    for i, (term, tensor) in enumerate(zip(terms, tensors, strict=True)):
        spread.append(_spread(term, tensor.dim(), equation, i))
    width = max((sum(letter.startswith("dot") for letter in letters) for letters in spread), default=0)
    dots = [f"dot{i}" for i in range(width - 1, -1, -1)]
    if arrow:
        out = _spread(right, len(right.replace("...", "")) + width, equation, None) if "..." in right else list(right)
    else:
        flat = "".join(term.replace("...", "") for term in terms)
        out = dots + sorted(letter for letter in set(flat) if flat.count(letter) == 1)
    sizes: dict[str, int] = {}
    for i, (letters, tensor) in enumerate(zip(spread, tensors, strict=True)):
        own: dict[str, int] = {}
        for letter, size in zip(letters, tensor.shape, strict=True):
            if own.setdefault(letter, size) != size:
                raise SizeError(f"equation {equation!r}: operand {i} has sizes {own[letter]} and {size} for {letter!r}")
    for i, (letters, tensor) in enumerate(zip(spread, tensors, strict=True)):
        for letter, size in zip(letters, tensor.shape, strict=True):
            known = sizes.setdefault(letter, size)
            if 1 not in (known, size) and known != size:
                raise _disagree(equation, i, letter, size, known)
            sizes[letter] = size if known == 1 else known
    for letter in out:
        if letter not in sizes:
            raise SpecError(f"equation {equation!r}: output {letter!r} is on no operand")
        if out.count(letter) > 1:
            raise SpecError(f"equation {equation!r}: output {letter!r} is repeated")
    squeezed = [[d for d, letter in enumerate(letters) if t.shape[d] == 1] for letters, t in zip(spread, tensors, strict=True)]
    inputs = [[_word(a) for d, a in enumerate(letters) if d not in drop] for letters, drop in zip(spread, squeezed, strict=True)]
    return inputs, [_word(letter) if sizes[letter] != 1 else None for letter in out], squeezed


def _disagree(equation: str, i: int, letter: str, size: int, known: int) -> SizeError:
    return SizeError(f"equation {equation!r}: operand {i} has size {size} for {letter!r}, another has {known}")


def _spread(term: str, dims: int, equation: str, operand: int | None) -> list[str]:
    """The letters of a term, its ellipsis written out as dot axes counted from the right."""
    before, dots, after = term.partition("...")
    letters = [*before, *after]
    where = "the output" if operand is None else f"operand {operand}"
    for letter in letters:
        if not letter.isalpha():
            raise SpecError(f"equation {equation!r}: cannot read {letter!r} in {where}")
    hidden = dims - len(letters)
    if hidden < 0 or (hidden and not dots):
        raise SpecError(f"equation {equation!r}: {where} has {dims} dimensions, its term {term!r} names {len(letters)}")
    return [*before, *(f"dot{i}" for i in range(hidden - 1, -1, -1)), *after]


def _word(letter: str) -> str:
    return letter if letter.startswith("dot") else f"letter_{ord(letter)}"
