"""One-call front ends: `contract` reads axis words; `einsum` and its companions read what torch, NumPy and opt_einsum read."""

import functools
import math
import operator
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tn.arrays import common_dtype, einsum_arrays, in_torch, run_plan, tensor_of
from tn.bridge.opt_einsum import PathReport, report, route
from tn.contraction import BACKENDS
from tn.errors import KindError, OperatorError, SizeError, SpecError, unknown
from tn.family import Structure, family, make, rearrange
from tn.graph import contract_call, converted, einsum_call, is_symbolic
from tn.letters import Equation, read, read_lists, spell
from tn.network import Network, network
from tn.spec import ROWS, Spec, looks_like_letters

Operand = Tensor | np.ndarray | np.generic
Axes = tuple[str, ...]

# dtypes that torch stores but has no products for → what they are computed in
_WIDER = {torch.bool: torch.float64, torch.complex32: torch.complex64}
_NARROWED: dict[torch.dtype, Callable[[Tensor], Tensor]] = {torch.bool: lambda t: t != 0, torch.complex32: lambda t: t.to(torch.complex32)}
_IN_NUMPY = {torch.uint16, torch.uint32, torch.uint64}

# What runs a call like one before: (equation, optimize, gradient mode, (shape, dtype, device, gradient) of each operand) → runner.
# `contract` and arrays have keys of their own.
_BOUND: dict[tuple, Callable[..., Any]] = {}
_BOUND_LIMIT = 8192


def einsum(
    *args: Any,
    optimize: Any = None,
    out: Any = None,
    dtype: Any = None,
    order: str | None = None,
    casting: str | None = None,
) -> Any:
    """Einstein summation: a drop-in for `torch.einsum`, `numpy.einsum` and `opt_einsum.contract`.

    Args:
        args: an equation and its operands, `einsum("ij,jk->ik", a, b)`, or operands with lists of labels,
            `einsum(a, [0, 1], b, [1, 2], [0, 2])`. Letters of any alphabet; `...`; repeated letters; an output that may be left out
            (labels that occur once, sorted). A dimension of size 1 broadcasts. Operands are torch tensors of one dtype and device, or
            NumPy arrays, numbers and lists.
        optimize: None, True or "auto": the planner here. False: the order as written. A path of opt_einsum or NumPy, the name of one of
            their searches, or an optimizer object of opt_einsum or cotengra: that order.
        out: tensor or array to write to. dtype: that everything is computed in; torch tensors are only widened to it, as
            `torch.promote_types` widens, and NumPy arrays as `casting` allows.
        order, casting: as in NumPy, for NumPy operands only.

    Returns:
        A tensor for tensors; an array or scalar otherwise. One operand that is only rearranged gives a view.

    Raises:
        SpecError: an equation that cannot be read. SizeError: sizes that disagree, naming the operand. KindError (a TypeError): operands
        or keywords of the wrong kind. PathError: an impossible path. OperatorError: anything else that is refused.

    Cost: an order is planned once for a structure (equation, dtype, device, which operands need gradients); sizes that change become
    dynamic, so that a loop over batch sizes does not plan again.

    >>> import torch
    >>> einsum("bij,bjk->bik", torch.ones(2, 3, 4), torch.ones(2, 4, 5)).shape
    torch.Size([2, 3, 5])
    >>> einsum([[1, 2], [3, 4]], [0, 1], [1, 1], [1])
    array([3, 7])
    """
    if torch.compiler.is_compiling():
        if order is not None or casting is not None:
            raise OperatorError("order= and casting= act on NumPy operands; inside torch.compile they are torch tensors: leave them out")
        result = einsum_call(args, optimize, dtype)
        return result if out is None else out.copy_(result)
    key: tuple | None = None
    if out is None and dtype is None and order is None and casting is None:
        operands: Sequence[Any] = args[1:]
        try:
            key = (args[0], optimize, torch.is_grad_enabled(), *[(t.shape, t.dtype, t.device, t.requires_grad) for t in operands])
            run = _BOUND.get(key)
        except (AttributeError, IndexError, TypeError):  # no operands, arrays, lists, numbers, an optimize= that is a list
            key = _array_key(args, optimize)
            run = _BOUND.get(key) if key is not None else None
        if run is not None:
            return run(*operands)
    ranked, operands = _split(args)
    if any(isinstance(operand, Tensor) for operand in operands):
        tensors = _tensors(operands, dtype, order, casting)
        if is_symbolic(tensors):
            result = einsum_call(args, optimize, dtype)
            return result if out is None else _write(result, out)
        run = _bind(ranked(tuple(tensor.dim() for tensor in tensors)), tensors, route(optimize))
        if key is not None and isinstance(args[0], str):
            _remember(key, run)
        result = run(*tensors)
        return result if out is None else _write(result, out)
    arrays = [_array(operand, i) for i, operand in enumerate(operands)]
    equation = ranked(tuple(array.ndim for array in arrays))
    if key is not None:
        inner = _bind(equation, list(map(torch.from_numpy, arrays)), route(optimize))
        run = lambda *a: inner(*map(torch.from_numpy, a)).numpy()[()]
        _remember(key, run)
        return run(*arrays)
    loose = optimize is not None and optimize is not False  # as in NumPy, whose optimised einsum assigns its result to `out`
    run_arrays = functools.partial(_run_arrays, route(optimize))
    return einsum_arrays(equation, arrays, run_arrays, out=out, dtype=dtype, order=order, casting=casting, loose=loose)


def _array(operand: Any, position: int) -> np.ndarray:
    """An array, a number or a list as an array. What has a shape but no way to become an array is refused, not wrapped as an object."""
    if hasattr(operand, "shape") and not hasattr(operand, "__array__"):
        raise KindError(f"operand {position} is a {type(operand).__name__}, expected torch tensors, or NumPy arrays, numbers and lists")
    if operand is None or isinstance(operand, str | bytes | dict | set):
        raise KindError(f"operand {position} is a {type(operand).__name__}, expected an array, a number or a list of them")
    try:
        return np.asanyarray(operand)
    except ValueError as error:  # rows of different lengths
        raise KindError(f"operand {position} is a {type(operand).__name__} that is no array: {error}") from None


def _array_key(args: tuple, optimize: Any) -> tuple | None:
    """What a call on NumPy arrays is remembered by, where torch can read them as they are and the result needs no turning."""
    arrays = args[1:]
    if len(arrays) < 2 or not isinstance(args[0], str) or not (optimize is None or isinstance(optimize, bool | str)):
        return None
    if not all(type(array) is np.ndarray and array.flags.carray and in_torch(array.dtype) for array in arrays):
        return None
    dtype = arrays[0].dtype
    return None if any(array.dtype != dtype for array in arrays) else (args[0], optimize, dtype, *[array.shape for array in arrays])


def _remember(key: tuple, run: Callable[..., Any]) -> None:
    if len(_BOUND) >= _BOUND_LIMIT:
        _BOUND.clear()
    _BOUND[key] = run


def contract(spec: str, *operands: Operand, backend: str = "planned") -> Any:
    """Contract tensors once. Plans are cached by structure: sizes that change from call to call become dynamic.

    Args:
        spec: axis words, see `tn.network`. operands: one per tensor name, in spec order; torch tensors, or numpy arrays throughout.
        backend: "planned" or "einsum", the readable reference.

    Returns:
        A tensor, or an array when all operands are arrays; a tuple of them for several outputs.

    Raises:
        SpecError, SizeError, OperatorError: before any work.

    >>> import torch
    >>> contract("... (i j), i j r, i r o -> ... o", torch.ones(2, 6), torch.ones(2, 3, 4), torch.ones(2, 4, 5)).shape
    torch.Size([2, 5])
    """
    if backend not in BACKENDS:
        raise OperatorError(unknown("backend", backend, BACKENDS))
    if not isinstance(spec, str):
        raise KindError(f"the spec is a {type(spec).__name__}, expected text such as 'i j, j k -> i k'")
    if torch.compiler.is_compiling():
        return contract_call(spec, operands, backend)
    try:
        key = (spec, backend, torch.is_grad_enabled(), *[(t.shape, t.dtype, t.device, t.requires_grad) for t in operands])
        run = _BOUND.get(key)
    except (AttributeError, TypeError):  # arrays; whatever is refused below
        run = None
    if run is not None:
        return run(*operands)
    if operands and all(isinstance(operand, np.ndarray | np.generic) for operand in operands):
        return _contract_arrays(spec, [np.asarray(operand) for operand in operands], backend)
    tensors = _tensors(operands)
    if is_symbolic(tensors):
        return contract_call(spec, tensors, backend)
    kind = tensors[0].dtype if tensors else torch.float32
    if kind in _WIDER:
        made = contract(spec, *(tensor.to(_WIDER[kind]) for tensor in tensors), backend=backend)
        return _NARROWED[kind](made) if isinstance(made, Tensor) else tuple(map(_NARROWED[kind], made))
    net = _network(spec)
    sizes = _sizes(net, spec, [tuple(tensor.shape) for tensor in tensors])
    run = family(_structure(net.spec, tensors, "auto", backend)).find(sizes)
    _remember(key, run)
    return run(*tensors)


def _contract_arrays(spec: str, arrays: Sequence[np.ndarray], backend: str) -> Any:
    common = common_dtype(arrays)
    if any(array.dtype.newbyteorder("=") != common for array in arrays):
        raise OperatorError(f"operands have different dtypes: {', '.join(str(array.dtype) for array in arrays)}")
    arrays = [array.astype(common, copy=False) for array in arrays]
    if common != np.bool_ and in_torch(common):
        made = contract(spec, *map(tensor_of, arrays), backend=backend)
        return made.numpy() if isinstance(made, Tensor) else tuple(result.numpy() for result in made)
    net = _network(spec)
    sizes = _sizes(net, spec, [array.shape for array in arrays])
    structure = Structure(net.spec, torch.float64, torch.device("cpu"), (False,) * len(arrays))
    found = run_plan(family(structure).find(sizes).plan, arrays)
    lead: tuple[int, ...] = ()
    for term, array in zip(map(net.term, net.names), arrays, strict=True):
        if ROWS in term.axes:
            lead = array.shape[: array.ndim - len(term.dims) + 1]
    results = []
    for term, made in zip(net.spec.outputs, found, strict=True):
        dims = [math.prod(sizes[axis] for axis in dim) for dim in term.dims if dim != (ROWS,)]
        results.append(made.reshape((*(lead if ROWS in term.axes else ()), *dims)))
    return results[0] if len(results) == 1 else tuple(results)


def contract_path(*args: Any, optimize: Any = None, shapes: bool = False) -> PathReport:
    """The order in which `einsum` contracts, as opt_einsum reports it.

    Args:
        args: as in `einsum`; with `shapes=True`, shapes instead of operands. optimize: as in `einsum`.

    Returns:
        An `opt_einsum.contract.PathInfo`, which unpacks into (path, info) as the pair does that `opt_einsum.contract_path` returns.

    Raises:
        As `einsum`.

    >>> path, info = contract_path("ij,jk,kl->il", (2, 90), (90, 3), (3, 4), shapes=True)
    >>> path, info.opt_cost
    ([(0, 1), (0, 1)], Decimal('1128'))
    """
    ranked, operands = _split(args)
    given = [_shape(operand, i) if shapes else _dims(operand, i) for i, operand in enumerate(operands)]
    equation = ranked(tuple(map(len, given)))
    sizes, narrow = equation.bind(given)
    spec = equation.spec(narrow)
    if not shapes and all(isinstance(operand, Tensor) for operand in operands):
        structure = _structure(spec, operands, route(optimize))
    else:
        structure = Structure(spec, torch.float32, torch.device("cpu"), (False,) * len(given), route(optimize))
    made = make(structure, tuple(sizes.items()), frozenset()).plan
    return report(equation.letters, given, made.path)


def tensordot(a: Operand, b: Operand, axes: int | Sequence = 2) -> Any:
    """Sum over pairs of dimensions, as `numpy.tensordot`; with `einsum`, what opt_einsum's `backend="tn"` and cotengra's
    `implementation=(tn.einsum, tn.tensordot)` call.

    Args:
        axes: how many last dimensions of `a` meet the first of `b`, or the dimensions of each.

    Returns:
        The other dimensions of `a`, then those of `b`.

    Raises:
        SpecError: dimensions that do not exist or do not pair up. Otherwise as `einsum`.

    >>> import torch
    >>> tensordot(torch.ones(2, 3, 4), torch.ones(4, 3, 5), axes=([1, 2], [1, 0])).shape
    torch.Size([2, 5])
    """
    ranks = (len(_dims(a, 0)), len(_dims(b, 1)))
    return einsum(_dot(ranks, _dot_axes(axes)), a, b)


def _dims(operand: Any, position: int) -> tuple[int, ...]:
    """Shape of an operand."""
    return tuple(operand.shape) if isinstance(operand, Tensor) else _array(operand, position).shape


def _shape(shape: Any, position: int) -> tuple[int, ...]:
    """A shape that stands for an operand."""
    try:
        return tuple(operator.index(size) for size in shape)
    except TypeError:
        raise KindError(f"operand {position} is {shape!r}, expected a shape such as (2, 3), as shapes=True says") from None


def _dot_axes(axes: Any) -> int | tuple[tuple[int, ...], ...]:
    """The axes of a tensordot as a count or two tuples."""
    expected = "a number of dimensions ≥ 0, or the dimensions of each operand such as ([1], [0])"
    if isinstance(axes, bool | str | bytes):
        raise KindError(f"tensordot axes={axes!r}, expected {expected}")
    try:
        if hasattr(axes, "__index__"):
            count = operator.index(axes)
        else:
            sides = tuple((operator.index(side),) if hasattr(side, "__index__") else tuple(map(operator.index, side)) for side in axes)
    except TypeError:
        raise KindError(f"tensordot axes={axes!r}, expected {expected}") from None
    if hasattr(axes, "__index__"):
        if count < 0:
            raise SpecError(f"tensordot axes={count}, expected {expected}")
        return count
    if len(sides) != 2:
        raise SpecError(f"tensordot axes={axes!r} are {len(sides)} lists, expected {expected}")
    return sides


@functools.lru_cache(maxsize=4096)
def _dot(ranks: tuple[int, int], axes: int | tuple[tuple[int, ...], ...]) -> str:
    """The equation of a tensordot."""
    if isinstance(axes, int) and axes > min(ranks):
        raise SpecError(f"tensordot axes={axes} sums over more dimensions than the operands have: {ranks[0]} and {ranks[1]}")
    left, right = (tuple(range(ranks[0] - axes, ranks[0])), tuple(range(axes))) if isinstance(axes, int) else axes
    if len(left) != len(right):
        raise SpecError(f"tensordot axes {left} and {right} differ in number")
    for operand, (side, rank) in enumerate(zip((left, right), ranks, strict=True)):
        for axis in side:
            if not -rank <= axis < rank:
                raise SpecError(f"tensordot axis {axis} of operand {operand} does not exist: it has {rank} dimensions")
        if len({axis % rank for axis in side}) < len(side):
            raise SpecError(f"tensordot axes {side} of operand {operand} name a dimension twice")
    first, second = ([f"{name}{i}" for i in range(rank)] for name, rank in zip("ab", ranks, strict=True))
    for i, j in zip(left, right, strict=True):
        second[j] = first[i]
    kept = [name for name in (*first, *second) if name not in set(first) & set(second)]
    return spell([first, second], kept)


def transpose(a: Operand, axes: Sequence[int]) -> Any:
    """The dimensions in another order, as `numpy.transpose`: the third function that opt_einsum's `backend="tn"` calls. A view.

    Raises:
        KindError: axes that are no integers. SpecError: axes that are not each dimension once.

    >>> import torch
    >>> transpose(torch.ones(2, 3, 4), (2, 0, 1)).shape
    torch.Size([4, 2, 3])
    """
    rank = len(_dims(a, 0))
    try:
        wanted = tuple(map(operator.index, axes))
    except TypeError:
        raise KindError(f"transpose axes={axes!r}, expected an order of the {rank} dimensions such as {tuple(range(rank))[::-1]}") from None
    if sorted(axis % rank if -rank <= axis < rank else -1 for axis in wanted) != list(range(rank)):
        raise SpecError(f"transpose axes={wanted} are not each of the operand's {rank} dimensions once")
    return a.permute(wanted) if isinstance(a, Tensor) else np.transpose(a, wanted)


Reader = Callable[[tuple[int, ...]], Equation]  # ranks of the operands → the equation


def _split(args: tuple) -> tuple[Reader, Sequence[Any]]:
    """What reads the equation once the ranks are known, and the operands."""
    if not args:
        raise SpecError("einsum needs an equation and its operands, or operands with lists of labels")
    if isinstance(args[0], str):
        operands = args[1:]
        if len(operands) == 1 and isinstance(operands[0], list | tuple) and any(isinstance(item, Tensor) for item in operands[0]):
            operands = tuple(operands[0])  # torch takes them in a list too
        return functools.partial(read, args[0]), operands
    if len(args) < 2 or args[0] is None or isinstance(args[0], bytes):
        raise KindError(f"the equation is a {type(args[0]).__name__}, expected text such as 'ij,jk->ik'")
    lists, output = args[1::2], None
    if len(args) % 2:
        lists, output = args[1:-1:2], args[-1]
    return functools.partial(read_lists, lists, output), args[: 2 * len(lists) : 2]


def _tensors(operands: Sequence[Any], dtype: Any = None, order: str | None = None, casting: str | None = None) -> list[Tensor]:
    """Operands that are tensors throughout, in the dtype asked for."""
    for i, operand in enumerate(operands):
        if not isinstance(operand, Tensor):
            raise KindError(f"operand {i} is a {type(operand).__name__}, expected a torch.Tensor (or numpy arrays throughout)")
    if not operands:
        raise SpecError("there are no operands; the equation or spec needs at least one")
    for name, value in (("order", order), ("casting", casting)):
        if value is not None:
            raise OperatorError(f"{name}={value!r} acts on NumPy operands; these are torch tensors: leave it out")
    if dtype is not None:
        if not isinstance(dtype, torch.dtype):
            raise KindError(f"dtype={dtype!r}: expected a torch.dtype, as the operands are torch tensors")
        operands = converted(operands, dtype)
    kinds = {(operand.dtype, operand.device) for operand in operands}
    if len(kinds) > 1:
        raise OperatorError(
            f"operands have different dtypes or devices: {', '.join(f'{kind} on {device}' for kind, device in sorted(kinds, key=str))}"
        )
    return list(operands)


def _write(result: Tensor, out: Any) -> Tensor:
    if not isinstance(out, Tensor):
        raise KindError(f"out is a {type(out).__name__}, expected a torch.Tensor as the operands are")
    if out.shape != result.shape:
        raise SizeError(f"out has shape {tuple(out.shape)}, expected {tuple(result.shape)}")
    if not torch.can_cast(result.dtype, out.dtype):
        raise KindError(f"the result is {result.dtype}, which out of {out.dtype} cannot hold")
    if result.requires_grad or (out.requires_grad and torch.is_grad_enabled()):
        raise OperatorError("out= has no gradient, but an operand or out needs one: leave it out, or work under torch.no_grad()")
    return out.copy_(result)


def _bind(equation: Equation, tensors: Sequence[Tensor], asked: Hashable) -> Callable[..., Tensor]:
    """What runs the equation on tensors of these shapes, dtype and device."""
    dtype = tensors[0].dtype
    if dtype in _WIDER:
        wide = _WIDER[dtype]
        run, narrowed = _bind(equation, [tensor.to(wide) for tensor in tensors], asked), _NARROWED[dtype]
        return lambda *t: narrowed(run(*(x.to(wide) for x in t)))
    sizes, narrow = equation.bind([tensor.shape for tensor in tensors])
    if len(tensors) == 1:
        return functools.partial(rearrange, term=equation.terms[0], output=equation.output)
    if dtype in _IN_NUMPY:
        return lambda *t: torch.from_numpy(_run_arrays(asked, equation, [x.numpy() for x in t]))
    found = family(_structure(equation.spec(narrow), tensors, asked)).find(sizes)
    if not any(narrow):
        return found
    return lambda *t: found(*(x.squeeze(drop) if drop else x for x, drop in zip(t, narrow, strict=True)))


def _run_arrays(asked: Hashable, equation: Equation, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """An equation over at least two arrays of one dtype: in torch where it can, else in NumPy in the planned order."""
    if in_torch(arrays[0].dtype):
        tensors = list(map(tensor_of, arrays))
        return _bind(equation, tensors, asked)(*tensors).numpy()
    sizes, narrow = equation.bind([array.shape for array in arrays])
    stand_in = Structure(equation.spec(narrow), torch.float64, torch.device("cpu"), (False,) * len(arrays), asked)
    return run_plan(family(stand_in).find(sizes).plan, [array.squeeze(drop) for array, drop in zip(arrays, narrow, strict=True)])[0]


def _structure(spec: Spec, tensors: Sequence[Tensor], asked: Hashable, backend: str = "planned") -> Structure:
    tracked = torch.is_grad_enabled()
    return Structure(spec, tensors[0].dtype, tensors[0].device, tuple(tracked and t.requires_grad for t in tensors), asked, backend)


@functools.lru_cache(maxsize=4096)
def _network(spec: str) -> Network:
    return network(spec)


def _sizes(net: Network, spec: str, shapes: Sequence[tuple[int, ...]]) -> dict[str, int]:
    """Sizes of the axes; where each operand has a dimension for every letter of its term, the mistake is plain."""
    try:
        return net.bind(shapes)
    except SizeError:
        spelt = [len("".join(term.axes).replace(ROWS, "")) for term in net.spec.operands]
        if looks_like_letters(net.spec) and spelt == [len(shape) for shape in shapes] and max(spelt) > 1:
            raise SpecError(f"spec {spec!r} looks like letters, and this call reads axis words: call tn.einsum for letters") from None
        raise
