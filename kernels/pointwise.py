"""Activations inside kernels, their slopes, and the same as torch functions.

In fp32. The exact GELU takes erf; tanh is written with the logistic function, because Triton's own language has no tanh.
"""

from collections.abc import Callable

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional

from tn.operators import OperatorError

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": lambda x: x.sigmoid(),
    "square": lambda x: x * x,
}


def check_activation(name: str) -> None:
    """Raise OperatorError for an activation nobody knows."""
    if name not in ACTIVATIONS:
        raise OperatorError(f"unknown activation {name!r}: one of {', '.join(ACTIVATIONS)}")


@triton.jit
def _tanh_inside(x):
    """√(2/π) (x + 0.044715 x³)"""
    return 0.7978845608028654 * (x + 0.044715 * x * x * x)


@triton.jit
def activate(x, KIND: tl.constexpr):
    """The activation of fp32 numbers."""
    if KIND == "relu":
        x = tl.maximum(x, 0.0)
    elif KIND == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif KIND == "gelu_tanh":
        x = x * tl.sigmoid(2.0 * _tanh_inside(x))
    elif KIND == "silu":
        x = x * tl.sigmoid(x)
    elif KIND == "sigmoid":
        x = tl.sigmoid(x)
    elif KIND == "square":
        x = x * x
    return x


@triton.jit
def slope(x, KIND: tl.constexpr):
    """The derivative of the activation at fp32 numbers."""
    if KIND == "relu":
        d = tl.where(x > 0.0, 1.0, 0.0)
    elif KIND == "gelu":
        d = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif KIND == "gelu_tanh":
        s = tl.sigmoid(2.0 * _tanh_inside(x))
        d = s + x * s * (1.0 - s) * 2.0 * 0.7978845608028654 * (1.0 + 3.0 * 0.044715 * x * x)
    elif KIND == "silu":
        s = tl.sigmoid(x)
        d = s * (1.0 + x * (1.0 - s))
    elif KIND == "sigmoid":
        s = tl.sigmoid(x)
        d = s * (1.0 - s)
    elif KIND == "square":
        d = 2.0 * x
    else:
        d = x * 0.0 + 1.0
    return d
