"""NumPy's side of the front ends: common dtypes, casting rules, memory orders. What torch lacks runs in NumPy, in the planned order."""

import dataclasses
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tn.errors import KindError, OperatorError, SizeError, unknown
from tn.letters import Equation
from tn.plan import Plan

CASTINGS = ("no", "equiv", "safe", "same_kind", "unsafe")
ORDERS = ("C", "F", "A", "K")

_IN_TORCH = {np.dtype(kind) for kind in ("?", "i1", "i2", "i4", "i8", "u1", "f2", "f4", "f8", "c8", "c16")}

Axes = tuple[str, ...]
Runner = Callable[[Equation, Sequence[np.ndarray]], np.ndarray]


def einsum_arrays(
    equation: Equation,
    arrays: Sequence[np.ndarray],
    run: Runner,
    *,
    out: Any,
    dtype: Any,
    order: str | None,
    casting: str | None,
    loose: bool,
) -> Any:
    """An equation over NumPy arrays, with the keywords of `numpy.einsum`.

    Args:
        run: computes an equation over arrays of one dtype.
        out: array to write to. dtype: that everything is computed in. order: "C", "F", "A" or "K". casting: what conversions are allowed.
        loose: whether the result may be written to an `out` of any dtype when no casting is named.

    Returns:
        `out`, or a new array (a view where one operand is only rearranged), or a scalar.

    Raises:
        KindError: dtypes that cannot be cast, an `out` that is no array. SizeError: an `out` of another shape.
        OperatorError: an unknown order or casting.
    """
    layout = _keyword("order", (order or "K").upper(), ORDERS)
    rule = _keyword("casting", casting or "safe", CASTINGS)
    common = common_dtype(arrays, dtype)
    for i, array in enumerate(arrays):
        _castable(array.dtype, common, rule, f"operand {i}")
    sizes, _ = equation.bind([array.shape for array in arrays])
    if out is not None:
        _check_out(out, tuple(sizes[word] for word in equation.output), common, "unsafe" if loose and casting is None else rule)
    if len(arrays) == 1:  # nothing to plan; NumPy gives a view where it can
        return _single(equation, arrays[0], out, dtype if dtype is None else common, layout, rule)
    if layout == "A":
        layout = "F" if all(array.flags.f_contiguous for array in arrays) else "C"
    memory = _memory(equation, arrays, layout)  # the result is computed as it shall lie in memory and turned, not copied
    turned = dataclasses.replace(equation, output=memory)
    made = run(turned, [array.astype(common, copy=False) for array in arrays])
    result = made.transpose([memory.index(word) for word in equation.output])
    if out is not None:
        np.copyto(out, result, casting="unsafe")  # the rule was checked before any work
        return out
    return (result if layout == "K" else np.asarray(result, order=layout))[()]  # type: ignore[call-overload]  # "C" or "F"


def run_plan(plan: Plan, arrays: Sequence[np.ndarray]) -> list[np.ndarray]:
    """A plan step by step in NumPy, for dtypes that torch has no products for.

    Args:
        arrays: one per name of the plan's network, of one dtype.

    Returns:
        The results, each with one dimension an axis of its output, `...` as one axis.
    """
    given = dict(zip(plan.network.names, arrays, strict=True))
    sizes = plan.network.bind([array.shape for array in arrays])
    values: list[np.ndarray] = []
    for term, kept in zip(plan.terms, plan.orders, strict=False):
        values.append(_step([given[term.name].reshape([sizes[axis] for axis in term.axes])], [term.axes], kept))
    for step in plan.tree_steps:
        orders = [plan.orders[step.left], plan.orders[step.right]]
        values.append(_step([values[step.left], values[step.right]], orders, plan.orders[step.out]))
    return [values[value] for value in plan.results]


def _step(arrays: Sequence[np.ndarray], terms: Sequence[Axes], result: Axes) -> np.ndarray:
    numbers = {axis: i for i, axis in enumerate(dict.fromkeys(axis for term in terms for axis in term))}
    lists = [[numbers[axis] for axis in term] for term in terms]
    interleaved = [item for array, labels in zip(arrays, lists, strict=True) for item in (array, labels)]
    return np.asarray(np.einsum(*interleaved, [numbers[axis] for axis in result]), dtype=arrays[0].dtype)


def _single(equation: Equation, array: np.ndarray, out: Any, dtype: np.dtype | None, order: str, casting: str) -> Any:
    numbers = {word: i for i, word in enumerate(dict.fromkeys(equation.terms[0]))}
    lists = [[numbers[word] for word in term] for term in (equation.terms[0], equation.output)]
    given = {"out": out, "dtype": dtype, "order": order, "casting": casting}
    keywords: Any = {name: value for name, value in given.items() if value is not None}
    return np.einsum(array, *lists, **keywords)


def _memory(equation: Equation, arrays: Sequence[np.ndarray], order: str) -> Axes:
    """The axes of the result as they should lie in memory; the result is transposed, not copied."""
    words = equation.output
    if order == "F":
        return words[::-1]
    if order == "C" or all(array.flags.c_contiguous for array in arrays):
        return words
    strides = dict.fromkeys(words, 0)  # "K": as the operands lie
    for term, array in zip(equation.terms, arrays, strict=True):
        for word, stride, size in zip(term, array.strides, array.shape, strict=True):
            if word in strides and size > 1:
                strides[word] = max(strides[word], abs(stride))
    return tuple(sorted(words, key=lambda word: -strides[word]))


def in_torch(dtype: np.dtype) -> bool:
    """Whether torch has products for a dtype."""
    return dtype in _IN_TORCH


def tensor_of(array: np.ndarray) -> Tensor:
    """The array's memory as a tensor; torch reads no negative strides and no foreign byte order."""
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = array.copy()
    if array.flags.writeable:
        return torch.from_numpy(array)
    with warnings.catch_warnings():  # that the array must not be written to: it will not be
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(array)


def common_dtype(arrays: Sequence[np.ndarray], asked: Any = None) -> np.dtype:
    """The dtype asked for, or the one all arrays promote to; in the machine's byte order. Raises KindError if there is none."""
    try:
        return (np.result_type(*arrays) if asked is None else np.dtype(asked)).newbyteorder("=")
    except TypeError as error:
        raise KindError(f"no dtype for the operands {', '.join(str(array.dtype) for array in arrays)}: {error}") from None


def _castable(given: np.dtype, wanted: np.dtype, rule: str, what: str) -> None:
    if not np.can_cast(given, wanted, casting=rule):
        raise KindError(f"{what} cannot be cast from {given} to {wanted} according to casting={rule!r}")


def _check_out(out: Any, shape: tuple[int, ...], common: np.dtype, rule: str) -> None:
    if not isinstance(out, np.ndarray):
        raise KindError(f"out is a {type(out).__name__}, expected a numpy.ndarray as the operands are")
    if out.shape != shape:
        raise SizeError(f"out has shape {out.shape}, expected {shape}")
    _castable(common, out.dtype, rule, "the result")


def _keyword(name: str, value: Any, candidates: Sequence[str]) -> str:
    if value not in candidates:
        raise OperatorError(unknown(name, value, candidates))
    return value
