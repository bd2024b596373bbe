"""Operations that are not one contraction, each with its torch reference: lookup, attention, norms, activations, loss.

Every operation describes itself to a trace as Networks and named pointwise nodes, so that a whole model can be printed.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tn import tracing
from tn.errors import OperatorError, SizeError, unknown
from tn.operators import Layout, Region, require

# Approximate arithmetic of one element of a pointwise node, for reports; matrix products are counted exactly elsewhere.
_WORK = {"softmax": 5, "layer_norm": 8, "rms_norm": 6, "gelu": 10, "add": 1, "multiply": 1, "dropout": 2, "cross_entropy": 6}


def _pointwise(what: str, result: Tensor, elements: int, parameters: int = 0) -> None:
    if tracing.recording():
        tracing.record("pointwise", what, sizes={}, result=result, pointwise=_WORK[what] * elements, parameters=parameters)


def embedding(numbers: Tensor, table: Tensor) -> Tensor:
    """Rows of a table: y[..., w] = Σ_v onehot(numbers)[..., v] table[v, w], run as a gather.

    Args:
        numbers: integers (...) in [0, count). table: (count, width).

    Returns:
        (..., width). Raises OperatorError for a table that is not a matrix or numbers that are not integers.
    """
    if table.dim() != 2 or numbers.is_floating_point():
        raise OperatorError(f"embedding takes integers and a matrix, got {numbers.dtype} and a table of shape {tuple(table.shape)}")
    result = functional.embedding(numbers, table)
    if tracing.recording():
        sizes = {"...": numbers.numel(), "count": table.shape[0], "width": table.shape[1]}
        what = "onehot: ... count, table: count width -> ... width"
        tracing.record("gather", what, sizes=sizes, result=result, parameters=table.numel())
    return result


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float = 1e-5) -> Tensor:
    """(x − mean) / √(var + eps) · weight + bias over the last dimension. weight and bias (width,) or None."""
    result = functional.layer_norm(x, x.shape[-1:], weight, bias, eps)
    _pointwise("layer_norm", result, x.numel(), sum(p.numel() for p in (weight, bias) if p is not None))
    return result


def rms_norm(x: Tensor, weight: Tensor | None, eps: float = 1e-6) -> Tensor:
    """x / √(mean(x²) + eps) · weight over the last dimension. weight (width,) or None."""
    result = functional.rms_norm(x, x.shape[-1:], weight, eps)
    _pointwise("rms_norm", result, x.numel(), 0 if weight is None else weight.numel())
    return result


def gelu(x: Tensor, approximate: str = "tanh") -> Tensor:
    """x Φ(x), exactly ("none") or through tanh ("tanh", as GPT-2)."""
    if approximate not in ("tanh", "none"):
        raise OperatorError(unknown("gelu approximation", approximate, ("tanh", "none")))
    result = functional.gelu(x, approximate=approximate)
    _pointwise("gelu", result, x.numel())
    return result


def add(x: Tensor, y: Tensor) -> Tensor:
    """x + y, such as a residual connection."""
    result = x + y
    _pointwise("add", result, result.numel())
    return result


def multiply(x: Tensor, y: Tensor) -> Tensor:
    """x · y elementwise, such as a gate."""
    result = x * y
    _pointwise("multiply", result, result.numel())
    return result


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """x with elements zeroed with probability p while training, the rest scaled by 1 / (1 − p)."""
    if not training or p == 0.0:
        return x
    result = functional.dropout(x, p, training)
    _pointwise("dropout", result, x.numel())
    return result


@dataclass(frozen=True, slots=True)
class Mask:
    """Which keys a query sees. Positions count from the first key; the last query stands at the last key.

    Attributes:
        causal: a query sees no later key.
        window: a query sees at most this many keys before itself, and itself; None for all.
        sink: the first keys, seen however far the window has moved on.
    """

    causal: bool = True
    window: int | None = None
    sink: int = 0

    def __post_init__(self) -> None:
        if self.window is not None and self.window < 0:
            raise SizeError(f"window is {self.window}, expected an integer ≥ 0 or None")
        if self.sink < 0:
            raise SizeError(f"sink is {self.sink}, expected an integer ≥ 0")

    def matrix(self, queries: int, keys: int, device: torch.device | str | None = None) -> Tensor:
        """Boolean (queries, keys), True where the query sees the key."""
        q = torch.arange(keys - queries, keys, device=device)[:, None]
        k = torch.arange(keys, device=device)[None, :]
        seen = k <= q if self.causal else torch.ones(queries, keys, dtype=torch.bool, device=device)
        if self.window is not None:
            seen = seen & (((q - k).abs() <= self.window) | (k < self.sink))
        return seen


CAUSAL = Mask()
BACKENDS = ("torch", "triton")


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = CAUSAL, scale: float | None = None, backend: Literal["torch", "triton"] = "torch"
) -> Tensor:
    """Softmax attention: y = softmax(scale · q kᵀ + mask) v, two contractions around a softmax.

    Args:
        q: (..., heads, queries, head_dim). k: (..., heads, keys, head_dim). v: (..., heads, keys, value_dim).
        mask: with fewer queries than keys, the queries are the last positions. scale: 1 / √head_dim if None.
        backend: "torch" runs SDPA; "triton" a kernel whose work is proportional to the window, on CUDA or in Triton's interpreter.

    Returns:
        (..., heads, queries, value_dim).

    Raises:
        SizeError: shapes that do not belong together, or more queries than keys under a causal mask.
        OperatorError: an unknown backend, or no kernel can run this, with every reason.
    """
    if backend not in BACKENDS:
        raise OperatorError(unknown("attention backend", backend, BACKENDS))
    if q.dim() < 2 or q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise SizeError(
            f"attention of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
            "expected (..., queries, d), (..., keys, d), (..., keys, e)"
        )
    queries, keys = q.shape[-2], k.shape[-2]
    if queries > keys and mask.causal:
        raise SizeError(f"{queries} queries see {keys} keys: a causal mask needs at least as many keys as queries")
    if backend == "triton":
        result = _attention_kernel(q, k, v, mask, scale)
    elif mask.window is None and (not mask.causal or queries == 1):
        result = functional.scaled_dot_product_attention(q, k, v, scale=scale)
    elif mask == CAUSAL and queries == keys:
        result = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
    else:
        result = functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.matrix(queries, keys, q.device), scale=scale)
    if tracing.recording():
        _record_attention(q, k, v, result)
    return result


def _attention_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """Attention through the first operator that offers. Raises OperatorError with every reason when none does."""
    axes = [("batch", "head", "query", "d"), ("batch", "head", "key", "d"), ("batch", "head", "key", "e")]
    heads = q.shape[-3] if q.dim() > 2 else 1
    four = [tensor.reshape(-1, heads, *tensor.shape[-2:]) for tensor in (q, k, v)]
    sizes = {axis: size for names, tensor in zip(axes, four, strict=True) for axis, size in zip(names, tensor.shape, strict=True)}
    layouts = tuple(Layout(names, tensor.stride()) for names, tensor in zip(axes, four, strict=True))
    options = (("mask", mask), ("scale", scale))
    offer = require(Region("attention", layouts, ("batch", "head", "query", "e"), tuple(sizes.items()), q.dtype, q.device.type, options))
    return offer.run(*four).reshape(*q.shape[:-1], v.shape[-1])


def squared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
    *,
    mask: Mask = CAUSAL,
    scale: float | None = None,
    rotary: tuple[Tensor, Tensor] | None = None,
    backend: Literal["torch", "triton"] = "torch",
) -> Tensor:
    """Attention without softmax, a polynomial of its inputs: y = Σ_key mask (scale q·k) (scale q2·k2) v, nothing normalised.

    Args:
        q, q2: (..., heads, queries, d). k, k2: (..., heads, keys, d). v: (..., heads, keys, e). The second pair is the first if None:
            weights (scale q·k)²; another one gives the bilinear form, with weights of either sign.
        mask: with fewer queries than keys, the queries are the last positions. scale: 1 / d if None.
        rotary: cos and sin (keys, r), 2 r ≤ d, of angles that turn queries and keys: (x, y) → (x cos − y sin, y cos + x sin) for the
            halves x, y of the first 2 r numbers.
        backend: "torch" stores the pattern; "triton" never does, and takes linear time where that costs fewer FLOPs.

    Returns:
        (..., heads, queries, e).

    Raises:
        SizeError: shapes that do not belong together. OperatorError: an unknown backend, or no kernel can run this, with every reason.

    >>> import torch
    >>> x = torch.ones(2, 3, 4)
    >>> squared_attention(x, x, x)[0, :, 0]
    tensor([1., 2., 3.])
    """
    if backend not in BACKENDS:
        raise OperatorError(unknown("attention backend", backend, BACKENDS))
    pair = (q, k) if q2 is None or k2 is None else (q2, k2)
    given = f"squared attention of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if (q2 is None) != (k2 is None) or pair[0].shape != q.shape or pair[1].shape != k.shape:
        raise SizeError(f"{given}: q2 and k2 come together and have the shapes of q and k")
    if q.dim() < 2 or q.shape[:-2] != k.shape[:-2] or k.shape[:-1] != v.shape[:-1] or q.shape[-1] != k.shape[-1]:
        raise SizeError(f"{given}: expected (..., queries, d), (..., keys, d), (..., keys, e)")
    queries, keys, d = q.shape[-2], k.shape[-2], q.shape[-1]
    if queries > keys and (mask.causal or rotary is not None):
        raise SizeError(f"{queries} queries see {keys} keys: a causal mask and rotary need at least as many keys as queries")
    if rotary is not None:
        fits = all(t.dim() == 2 and t.shape == rotary[0].shape and len(t) >= keys and 2 * t.shape[1] <= d for t in rotary)
        if len(rotary) != 2 or not fits:
            raise SizeError(f"rotary tables {[tuple(t.shape) for t in rotary]}: expected cos and sin ({keys}, at most {d // 2})")
    scale = 1 / max(d, 1) if scale is None else scale
    if backend == "triton":
        result = _squared_kernel(q, k, v, None if q2 is None else pair, mask, scale, rotary)
    else:
        turned = [t if rotary is None else _turn(t, *rotary, keys) for t in (q, k, *pair)]
        pattern = scale * (turned[0] @ turned[1].mT)
        pattern = pattern * pattern if q2 is None else pattern * (scale * (turned[2] @ turned[3].mT))
        seen = mask.causal or mask.window is not None
        result = (pattern.masked_fill(~mask.matrix(queries, keys, q.device), 0) if seen else pattern) @ v
    if tracing.recording():
        _record_attention(q, k, v, result, "multiply", 1 if q2 is None else 2)
    return result


def _turn(x: Tensor, cos: Tensor, sin: Tensor, keys: int) -> Tensor:
    """x (..., positions, d) turned by the last of `keys` angles."""
    r, first = cos.shape[1], keys - x.shape[-2]
    cos, sin = (table[first:keys].to(x.dtype) for table in (cos, sin))
    one, two, rest = x.split([r, r, x.shape[-1] - 2 * r], -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], -1)


def _squared_kernel(
    q: Tensor, k: Tensor, v: Tensor, pair: tuple[Tensor, Tensor] | None, mask: Mask, scale: float, rotary: tuple[Tensor, Tensor] | None
) -> Tensor:
    """Squared attention through the first operator that offers. Raises OperatorError with every reason when none does."""
    axes = [("batch", "head", *rest.split()) for rest in ("query d", "key d", "key e", "query d", "key d")]
    heads = q.shape[-3] if q.dim() > 2 else 1
    four = [tensor.reshape(-1, heads, *tensor.shape[-2:]) for tensor in (q, k, v, *(pair or ()))]
    axes = axes[: len(four)]
    if rotary is not None:
        four += [table[: k.shape[-2]] for table in rotary]
        axes += [("key", "r"), ("key", "r")]
    sizes = {axis: size for names, tensor in zip(axes, four, strict=True) for axis, size in zip(names, tensor.shape, strict=True)}
    layouts = tuple(Layout(names, tensor.stride()) for names, tensor in zip(axes, four, strict=True))
    options = (("mask", mask), ("scale", scale), ("rotary", rotary is not None))
    out = ("batch", "head", "query", "e")
    offer = require(Region("squared_attention", layouts, out, tuple(sizes.items()), q.dtype, q.device.type, options))
    return offer.run(*four).reshape(*q.shape[:-1], v.shape[-1])


def _record_attention(q: Tensor, k: Tensor, v: Tensor, result: Tensor, between: str = "softmax", pairs: int = 1) -> None:
    """Scores of as many pairs of q and k, a pointwise node, and the values."""
    rows, queries, keys, d, e = math.prod(q.shape[:-2]), q.shape[-2], k.shape[-2], q.shape[-1], v.shape[-1]
    scores = q.new_empty((*q.shape[:-1], keys))
    sizes = {"...": rows, "query": queries, "key": keys}
    first = "q: ... query d, k: ... key d -> ... query key"
    second = "p: ... query key, v: ... key e -> ... query e"
    for _ in range(pairs):
        tracing.record("contraction", first, sizes={**sizes, "d": d}, result=scores[..., :0], flops=2 * rows * queries * keys * d)
    tracing.record("pointwise", between, sizes={}, result=scores[..., :0], pointwise=_WORK[between] * scores.numel())
    tracing.record("contraction", second, sizes={**sizes, "e": e}, result=result, flops=2 * rows * queries * keys * e)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """−log softmax(logits)[target] in nats, in fp32 whatever the logits' dtype.

    Args:
        logits: (..., classes). targets: integers (...); those equal to `ignore_index` do not count.
        reduction: "mean" over the targets that count, "sum", or "none" for (...).

    Returns:
        A scalar, or (...) for "none". A mean over no targets at all is NaN, as in torch.
    """
    if logits.shape[:-1] != targets.shape:
        raise SizeError(f"logits {tuple(logits.shape)} and targets {tuple(targets.shape)}: expected (..., classes) and (...)")
    flat = logits.reshape(-1, logits.shape[-1]).float()
    result = functional.cross_entropy(flat, targets.reshape(-1), ignore_index=ignore_index, reduction=reduction)
    _pointwise("cross_entropy", result, logits.numel())
    return result.reshape(targets.shape) if reduction == "none" else result
