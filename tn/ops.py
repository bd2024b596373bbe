"""Operations that are not one contraction, each with its torch reference: lookup, attention, norms, activations, loss.

Every operation describes itself to a trace as Networks and named pointwise nodes, so that a whole model can be printed.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

from tn import tracing
from tn.errors import OperatorError, SizeError, unknown
from tn.operators import Layout, Region, require

# Approximate arithmetic of one element of a pointwise node, for reports; matrix products are counted exactly elsewhere.
_WORK = {
    "softmax": 5, "layer_norm": 8, "rms_norm": 6, "add": 1, "multiply": 1, "dropout": 2, "cross_entropy": 6,
    "relu": 1, "gelu": 10, "gelu_tanh": 10, "silu": 5, "sigmoid": 4, "square": 1,
}  # fmt: skip


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
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "relu": functional.relu,
    "gelu": functional.gelu,
    "gelu_tanh": functools.partial(functional.gelu, approximate="tanh"),
    "silu": functional.silu,
    "sigmoid": torch.sigmoid,
    "square": torch.square,
}
BACKENDS = ("torch", "triton")


def _kernel_wanted(what: str, backend: str, x: Tensor) -> bool:
    """Whether a kernel is asked for; on the meta device, where a trace runs, nothing runs. Raises OperatorError for an unknown backend."""
    if backend not in BACKENDS:
        raise OperatorError(unknown(f"{what} backend", backend, BACKENDS))
    return backend == "triton" and not x.is_meta


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask = CAUSAL, scale: float | None = None, backend: Literal["torch", "triton"] = "torch"
) -> Tensor:
    """Softmax attention: y = softmax(scale · q kᵀ + mask) v, two contractions around a softmax.

    Args:
        q: (..., heads, queries, head_dim). k: (..., groups, keys, head_dim). v: (..., groups, keys, value_dim). As many groups as heads, or
            fewer that divide them: neighbouring heads share a group's keys and values.
        mask: with fewer queries than keys, the queries are the last positions. scale: 1 / √head_dim if None.
        backend: "torch" runs SDPA; "triton" a kernel whose work is proportional to the window, on CUDA or in Triton's interpreter.

    Returns:
        (..., heads, queries, value_dim).

    Raises:
        SizeError: shapes that do not belong together, or more queries than keys under a causal mask.
        OperatorError: an unknown backend, or no kernel can run this, with every reason.
    """
    wanted = _kernel_wanted("attention", backend, q)
    fits = q.dim() >= 2 and q.shape[:-3] == k.shape[:-3] and k.shape[:-1] == v.shape[:-1] and q.shape[-1] == k.shape[-1]
    heads, groups = (t.shape[-3] if t.dim() > 2 else 1 for t in (q, k))
    if not fits or (heads != groups and (groups == 0 or heads % groups)):
        raise SizeError(
            f"attention of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}: "
            "expected (..., heads, queries, d), (..., groups, keys, d), (..., groups, keys, e), groups that divide the heads"
        )
    queries, keys = q.shape[-2], k.shape[-2]
    if queries > keys and mask.causal:
        raise SizeError(f"{queries} queries see {keys} keys: a causal mask needs at least as many keys as queries")
    sdpa = functools.partial(functional.scaled_dot_product_attention, q, k, v, scale=scale, enable_gqa=heads != groups)
    if wanted:
        result = _attention_kernel(q, k, v, mask, scale)
    elif mask.window is None and (not mask.causal or queries == 1):
        result = sdpa()
    elif mask == CAUSAL and queries == keys:
        result = sdpa(is_causal=True)
    else:
        result = sdpa(attn_mask=mask.matrix(queries, keys, q.device))
    if tracing.recording():
        _record_attention(q, k, v, result)
    return result


def _attention_kernel(q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float | None) -> Tensor:
    """Attention through the first operator that offers. Raises OperatorError with every reason when none does."""
    axes = [("batch", "head", "query", "d"), ("batch", "group", "key", "d"), ("batch", "group", "key", "e")]
    four = [tensor.reshape(math.prod(tensor.shape[:-3]), *((1,) * (tensor.dim() == 2)), *tensor.shape[-3:]) for tensor in (q, k, v)]
    sizes = {axis: size for names, tensor in zip(axes, four, strict=True) for axis, size in zip(names, tensor.shape, strict=True)}
    operands = tuple(zip(axes, four, strict=True))
    result = _run("attention", operands, ("batch", "head", "query", "e"), sizes, mask=mask, scale=scale)
    return result.reshape(*q.shape[:-1], v.shape[-1])


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
    wanted = _kernel_wanted("attention", backend, q)
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
    if wanted:
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
    operands, out = tuple(zip(axes, four, strict=True)), ("batch", "head", "query", "e")
    result = _run("squared_attention", operands, out, sizes, mask=mask, scale=scale, rotary=rotary is not None)
    return result.reshape(*q.shape[:-1], v.shape[-1])


def gated(x: Tensor, w: Tensor, v: Tensor, activation: str = "none", *, backend: Literal["torch", "triton"] = "torch") -> Tensor:
    """f(x W) ∘ (x V): SwiGLU with f = silu, GEGLU with gelu, the bilinear layer with none.

    Args:
        x: (..., d). w, v: (d, e). activation: one of `ACTIVATIONS`.
        backend: "torch" writes both products; "triton" makes them in one pass and writes neither, on CUDA or in Triton's interpreter.

    Returns:
        (..., e).

    Raises:
        SizeError: shapes that do not belong together. OperatorError: an unknown activation or backend, or no kernel can run this, with
            every reason.

    >>> import torch
    >>> gated(torch.ones(2, 3), torch.ones(3, 1), 2 * torch.ones(3, 1), "square")[0]
    tensor([54.])
    """
    wanted = _kernel_wanted("gated", backend, x)
    if activation not in ACTIVATIONS:
        raise OperatorError(unknown("activation", activation, tuple(ACTIVATIONS)))
    if x.dim() < 1 or w.dim() != 2 or w.shape != v.shape or x.shape[-1] != w.shape[0]:
        raise SizeError(f"gated of x {tuple(x.shape)}, w {tuple(w.shape)}, v {tuple(v.shape)}: expected (..., d), (d, e), (d, e)")
    if wanted:
        size = {"row": math.prod(x.shape[:-1]), "d": w.shape[0], "e": w.shape[1]}
        operands = ((("row", "d"), x.reshape(size["row"], size["d"])), (("d", "e"), w), (("d", "e"), v))
        result = _run("gated", operands, ("row", "e"), size, activation=activation).reshape(*x.shape[:-1], w.shape[1])
    else:
        result = ACTIVATIONS[activation](x @ w) * (x @ v)
    if tracing.recording():
        size = {"...": math.prod(x.shape[:-1]), "d": w.shape[0], "e": w.shape[1]}
        for name in "wv":
            flops = 2 * math.prod(size.values())
            tracing.record("contraction", f"x: ... d, {name}: d e -> ... e", sizes=size, result=result, flops=flops, parameters=w.numel())
        for what in ("multiply",) if activation == "none" else (activation, "multiply"):
            _pointwise(what, result, result.numel())
    return result


def mla_decode(
    q: Tensor,
    qr: Tensor,
    latent: Tensor,
    rope: Tensor,
    lengths: Tensor | None = None,
    *,
    scale: float,
    backend: Literal["torch", "triton"] = "torch",
) -> Tensor:
    """Absorbed latent attention over a compressed cache: y = softmax(scale (q · latent + qr · rope)) latent, for decoding.

    Keys and values are the same numbers, c + r of them a token for all heads: q is the query after the keys' up-projection has been
    absorbed into it, and the values' up-projection comes after (DeepSeek-V2, arXiv:2405.04434).

    Args:
        q: (batch, queries, heads, c). qr: (batch, queries, heads, r), its rotated part.
        latent: (batch, tokens, c). rope: (batch, tokens, r), the rotated keys that all heads share.
        lengths: (batch) integers, how many tokens of each cache are filled; all if None. The queries are the last positions of them, and a
            query that sees nothing gives 0. scale: 1 / √(n + r) for keys of n + r numbers before absorption.
        backend: "torch" stores the scores; "triton" reads the cache once, on CUDA or in Triton's interpreter.

    Returns:
        (batch, queries, heads, c).

    Raises:
        SizeError: shapes that do not belong together. OperatorError: an unknown backend, or no kernel can run this, with every reason.

    >>> import torch
    >>> q, cache = torch.zeros(1, 1, 2, 3), torch.arange(6.0).view(1, 2, 3)
    >>> mla_decode(q, q, cache, cache, scale=1.0)[0, 0]
    tensor([[1.5000, 2.5000, 3.5000],
            [1.5000, 2.5000, 3.5000]])
    """
    wanted = _kernel_wanted("mla_decode", backend, q)
    fits = q.dim() == qr.dim() == 4 and latent.dim() == rope.dim() == 3 and q.shape[:3] == qr.shape[:3] and q.shape[0] == latent.shape[0]
    if not fits or latent.shape[:2] != rope.shape[:2] or q.shape[3] != latent.shape[2] or qr.shape[3] != rope.shape[2]:
        raise SizeError(
            f"mla_decode of q {tuple(q.shape)}, qr {tuple(qr.shape)}, latent {tuple(latent.shape)}, rope {tuple(rope.shape)}: "
            "expected (batch, queries, heads, c), (batch, queries, heads, r), (batch, tokens, c), (batch, tokens, r)"
        )
    (batch, queries, heads, c), (tokens, r) = q.shape, rope.shape[1:]
    if lengths is None:
        lengths = torch.full((batch,), tokens, device=q.device, dtype=torch.int32)
    if lengths.shape != (batch,) or lengths.dtype is torch.bool or lengths.is_floating_point() or lengths.is_complex():
        raise SizeError(f"lengths {lengths.dtype} {tuple(lengths.shape)}: expected {batch} integers, the filled tokens of each cache")
    lengths = lengths.int()  # unsigned ones would wrap around below
    if wanted:
        size = {"batch": batch, "query": queries, "head": heads, "c": c, "r": r, "token": tokens}
        names = ("batch query head c", "batch query head r", "batch token c", "batch token r", "batch")
        operands = zip([tuple(name.split()) for name in names], (q, qr, latent, rope, lengths), strict=True)
        result = _run("mla_decode", tuple(operands), ("batch", "query", "head", "c"), size, scale=float(scale))
    else:
        seen = torch.arange(tokens, device=q.device) <= (lengths[:, None] - queries + torch.arange(queries, device=q.device))[..., None]
        scores = scale * (torch.einsum("bshc,btc->bsht", q, latent) + torch.einsum("bshr,btr->bsht", qr, rope))
        scores = scores.to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~seen[:, :, None], -torch.inf)
        weights = scores.softmax(-1).masked_fill(~seen[:, :, None], 0).to(q.dtype)  # a row that sees nothing is NaN before
        result = torch.einsum("bsht,btc->bshc", weights, latent)
    if tracing.recording():
        _record_latent(q, qr, latent, result)
    return result


def _record_latent(q: Tensor, qr: Tensor, latent: Tensor, result: Tensor) -> None:
    (batch, queries, heads, c), r, tokens = q.shape, qr.shape[3], latent.shape[1]
    pairs, sizes = batch * queries * heads * tokens, {"batch": batch, "query": queries, "head": heads, "token": tokens}
    scores = q.new_empty((batch, queries, heads, tokens))
    parts = (("q: batch query head c, latent: batch token c", {"c": c}), ("qr: batch query head r, rope: batch token r", {"r": r}))
    for what, more in parts:
        flops = 2 * pairs * math.prod(more.values())
        tracing.record("contraction", f"{what} -> batch query head token", sizes={**sizes, **more}, result=scores[..., :0], flops=flops)
    tracing.record("pointwise", "add", sizes={}, result=scores[..., :0], pointwise=_WORK["add"] * pairs)
    tracing.record("pointwise", "softmax", sizes={}, result=scores[..., :0], pointwise=_WORK["softmax"] * pairs)
    what = "p: batch query head token, latent: batch token c -> batch query head c"
    tracing.record("contraction", what, sizes={**sizes, "c": c}, result=result, flops=2 * pairs * c)


def _run(
    what: str, operands: Sequence[tuple[tuple[str, ...], Tensor]], out: tuple[str, ...], sizes: Mapping[str, int], **options: object
) -> Tensor:
    """The first operator that offers for operands with these axes. Raises OperatorError with every reason when none does."""
    layouts = tuple(Layout(axes, tensor.stride()) for axes, tensor in operands)
    first = operands[0][1]
    region = Region(what, layouts, out, tuple(sizes.items()), first.dtype, first.device.type, tuple(options.items()))
    return require(region).run(*(tensor for _, tensor in operands))


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
