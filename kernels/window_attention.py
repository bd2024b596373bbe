"""window_attention: softmax attention that does work for the window only.

    allow(q, k) = k ≤ q and (q − k ≤ W or k < sink)        y_q = Σ_k softmax_k(s q·k | allow) v_k

Positions count from the first key and the last query stands at the last key. A query sees itself, the W keys before it and the first
`sink` keys, however far the window has moved on (StreamingLLM, arXiv:2309.17453). Softmax is taken block by block with a running maximum
(FlashAttention, arXiv:2307.08691); a block of queries visits the blocks of sinks and those of its window, nothing between. Heads of k and v
may be fewer than those of q.

Gradients make the pattern p again from the logarithm of the softmax's denominator: with δ = Σ g ∘ y, dv_k = Σ p g, ds = p (g·v − δ),
dq = s ds k, dk = s ds q. Keys gather from the queries of their window; sinks are seen by every query, so what comes from beyond the
window is gathered by further programs in parts, which are added in a fixed order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tn.operators import Offer, OperatorError, Refusal, Region, register
from tn_kernels import tuning
from tn_kernels.launch import DTYPES, Config, block, ceil_div, config, launch, precision
from tn_kernels.registration import Operator
from tn_kernels.squared_attention import MOST_WIDTH, check_attention
from tn_kernels.views import Unfit, check_dtype

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _rows(ptr, o_s, o_d, S, D, s_s, s_d):
    """A block of rows of a matrix, zero outside."""
    return tl.load(ptr + o_s[:, None] * s_s + o_d[None, :] * s_d, mask=(o_s < S)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _visible(o_q, o_k, T, window, sink, TURNED: tl.constexpr):
    """Which keys the positions see: (positions, keys), TURNED (keys, positions)."""
    if TURNED:
        o_q, o_k = o_q[None, :], o_k[:, None]
    else:
        o_q, o_k = o_q[:, None], o_k[None, :]
    ahead = o_q - o_k
    return (ahead >= 0) & ((ahead <= window) | (o_k < sink)) & (o_k < T)


@triton.jit
def _blocks(i_q, T, window, sink, BM: tl.constexpr, BN: tl.constexpr):
    """For queries at positions i_q to i_q + BM: (blocks of sinks before the window, first block of the window, where the blocks end that
    need a mask, where those end that every query sees whole, how many in all)."""
    start = tl.maximum(i_q - window, 0) // BN
    before = tl.minimum(tl.cdiv(tl.minimum(sink, T), BN), start)
    count = before + tl.cdiv(tl.minimum(i_q + BM, T), BN) - start
    clear = tl.minimum(before + tl.maximum(tl.cdiv(tl.maximum(i_q + BM - 1 - window, 0), BN) - start, 0), count)
    return before, start, clear, tl.minimum(tl.maximum(before + (i_q + 1) // BN - start, clear), count), count


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, v_ptr, y_ptr, l_ptr, scale, window, sink, H, G, S, T, D, E,
    s_qb, s_qh, s_qs, s_qd, s_kb, s_kh, s_ks, s_kd, s_vb, s_vh, s_vs, s_ve, s_yb, s_yh, s_ys,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    across = tl.cdiv(S, BM)
    i_b, i_h = (tl.program_id(0) // across // H).to(tl.int64), (tl.program_id(0) // across % H).to(tl.int64)
    i_m, i_g = tl.program_id(0) % across * BM, i_h // (H // G)
    o_m, o_d, o_e = i_m + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BE)
    p_k, p_v = k_ptr + i_b * s_kb + i_g * s_kh, v_ptr + i_b * s_vb + i_g * s_vh
    b_q = _rows(q_ptr + i_b * s_qb + i_h * s_qh, o_m, o_d, S, D, s_qs, s_qd)
    top, below = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, BE), tl.float32)
    before, start, clear, partial, count = _blocks(i_m + T - S, T, window, sink, BM, BN)
    for part in tl.static_range(3):  # only the first and the last blocks need a mask
        for i in range(0 if part == 0 else clear if part == 1 else partial, clear if part == 0 else partial if part == 1 else count):
            o_n = tl.where(i < before, i, start + i - before) * BN + tl.arange(0, BN)
            b_k = _rows(p_k, o_n, o_d, T, D, s_ks, s_kd)
            a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
            if part != 1:
                a = tl.where(_visible(o_m + (T - S), o_n, T, window, sink, False), a, float("-inf"))
            peak = tl.maximum(top, tl.max(a, 1))
            # A row that has seen nothing yet keeps its maximum at −∞: subtract 0 there, not −∞ from itself.
            base = tl.where(peak == float("-inf"), 0.0, peak)
            p, fade = tl.exp2(a - base[:, None]), tl.exp2(top - base)
            below, top = below * fade + tl.sum(p, 1), peak
            b_v = _rows(p_v, o_n, o_e, T, E, s_vs, s_ve)
            total = tl.dot(p.to(b_v.dtype), b_v, total * fade[:, None], input_precision=PRECISION)
    m_m = o_m < S
    below = tl.where(m_m, below, 1.0)
    p_y = y_ptr + i_b * s_yb + i_h * s_yh + o_m[:, None] * s_ys + o_e[None, :]
    tl.store(p_y, (total / below[:, None]).to(y_ptr.dtype.element_ty), mask=m_m[:, None] & (o_e < E)[None, :])
    tl.store(l_ptr + (i_b * H + i_h) * S + o_m, (top + tl.log2(below)) / LOG2E, mask=m_m)


@triton.jit
def _query_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, l_ptr, e_ptr, dq_ptr, scale, window, sink, H, G, S, T, D, E,
    s_qb, s_qh, s_qs, s_qd, s_kb, s_kh, s_ks, s_kd, s_vb, s_vh, s_vs, s_ve, s_gb, s_gh, s_gs, s_ge, s_db, s_dh, s_ds,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of one block of queries. l: logarithm of the denominator, e: δ."""
    across = tl.cdiv(S, BM)
    i_b, i_h = (tl.program_id(0) // across // H).to(tl.int64), (tl.program_id(0) // across % H).to(tl.int64)
    i_m, i_g = tl.program_id(0) % across * BM, i_h // (H // G)
    o_m, o_d, o_e = i_m + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BE)
    p_k, p_v = k_ptr + i_b * s_kb + i_g * s_kh, v_ptr + i_b * s_vb + i_g * s_vh
    b_q = _rows(q_ptr + i_b * s_qb + i_h * s_qh, o_m, o_d, S, D, s_qs, s_qd)
    b_g = _rows(g_ptr + i_b * s_gb + i_h * s_gh, o_m, o_e, S, E, s_gs, s_ge)
    b_l = tl.load(l_ptr + (i_b * H + i_h) * S + o_m, mask=o_m < S, other=0.0) * LOG2E
    b_e = tl.load(e_ptr + (i_b * H + i_h) * S + o_m, mask=o_m < S, other=0.0)
    dq = tl.zeros((BM, BD), tl.float32)
    before, start, clear, partial, count = _blocks(i_m + T - S, T, window, sink, BM, BN)
    for part in tl.static_range(3):
        for i in range(0 if part == 0 else clear if part == 1 else partial, clear if part == 0 else partial if part == 1 else count):
            o_n = tl.where(i < before, i, start + i - before) * BN + tl.arange(0, BN)
            b_k = _rows(p_k, o_n, o_d, T, D, s_ks, s_kd)
            a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * (scale * LOG2E)
            p = tl.exp2(a - b_l[:, None])
            if part != 1:
                p = tl.where(_visible(o_m + (T - S), o_n, T, window, sink, False), p, 0.0)
            dp = tl.dot(b_g, tl.trans(_rows(p_v, o_n, o_e, T, E, s_vs, s_ve)), input_precision=PRECISION)
            dq = tl.dot((p * (dp - b_e[:, None])).to(b_k.dtype), b_k, dq, input_precision=PRECISION)
    p_d = dq_ptr + i_b * s_db + i_h * s_dh + o_m[:, None] * s_ds + o_d[None, :]
    tl.store(p_d, (dq * scale).to(dq_ptr.dtype.element_ty), mask=(o_m < S)[:, None] & (o_d < D)[None, :])


@triton.jit
def _key_kernel(
    q_ptr, k_ptr, v_ptr, g_ptr, l_ptr, e_ptr, dk_ptr, dv_ptr, scale, window, sink, H, G, S, T, D, E, keys, parts,
    s_qb, s_qh, s_qs, s_qd, s_kb, s_kh, s_ks, s_kd, s_vb, s_vh, s_vs, s_ve, s_gb, s_gh, s_gs, s_ge,
    s_dp, s_db, s_dh, s_ds, s_ep, s_eb, s_eh, s_es,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, FAR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of one block of the first `keys` keys: from the queries of its window, or FAR, from one part of those beyond."""
    across = tl.cdiv(keys, BN)
    i_b, i_g = (tl.program_id(0) // across // G).to(tl.int64), (tl.program_id(0) // across % G).to(tl.int64)
    i_n, part = tl.program_id(0) % across * BN, tl.program_id(1)
    o_n, o_d, o_e = i_n + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)
    b_k = _rows(k_ptr + i_b * s_kb + i_g * s_kh, o_n, o_d, T, D, s_ks, s_kd)
    b_v = _rows(v_ptr + i_b * s_vb + i_g * s_vh, o_n, o_e, T, E, s_vs, s_ve)
    dk, dv = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BE), tl.float32)
    first = tl.maximum(i_n - (T - S), 0) // BM
    last = tl.cdiv(tl.maximum(tl.minimum(S, i_n + BN + window - (T - S)), 0), BM)
    if FAR:
        beyond = tl.maximum(tl.cdiv(S, BM) - last, 0)
        each = tl.cdiv(beyond, parts)
        first, last = last + part * each, last + tl.minimum(part * each + each, beyond)
    for head in range(H // G):
        i_h = i_g * (H // G) + head
        for m in range(first, last):
            o_m = m * BM + tl.arange(0, BM)
            b_q = _rows(q_ptr + i_b * s_qb + i_h * s_qh, o_m, o_d, S, D, s_qs, s_qd)
            b_g = _rows(g_ptr + i_b * s_gb + i_h * s_gh, o_m, o_e, S, E, s_gs, s_ge)
            b_l = tl.load(l_ptr + (i_b * H + i_h) * S + o_m, mask=o_m < S, other=0.0) * LOG2E
            b_e = tl.load(e_ptr + (i_b * H + i_h) * S + o_m, mask=o_m < S, other=0.0)
            # Keys as rows from the start: turning the weights round costs registers that then spill.
            a = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * (scale * LOG2E)
            see = _visible(o_m + (T - S), o_n, T, window, sink, True) & (o_m < S)[None, :]
            p = tl.where(see, tl.exp2(a - b_l[None, :]), 0.0)
            dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION)
            dv = tl.dot(p.to(b_g.dtype), b_g, dv, input_precision=PRECISION)
            dk = tl.dot((p * (dp - b_e[None, :])).to(b_q.dtype), b_q, dk, input_precision=PRECISION)
    m_n = (o_n < keys)[:, None]
    p_dk = dk_ptr + part * s_dp + i_b * s_db + i_g * s_dh + o_n[:, None] * s_ds + o_d[None, :]
    tl.store(p_dk, (dk * scale).to(dk_ptr.dtype.element_ty), mask=m_n & (o_d < D)[None, :])
    p_dv = dv_ptr + part * s_ep + i_b * s_eb + i_g * s_eh + o_n[:, None] * s_es + o_e[None, :]
    tl.store(p_dv, dv.to(dv_ptr.dtype.element_ty), mask=m_n & (o_e < E)[None, :])


def _check(q: Tensor, k: Tensor, v: Tensor, window: int, sink: int) -> None:
    check_attention("window_attention", q, k, v, True)
    if window < 0 or sink < 0:
        raise OperatorError(f"window {window}, sink {sink}: expected integers of at least 0")


def _cut(kernel: str, q: Tensor, k: Tensor, v: Tensor, window: int) -> Config:
    (s, d), t, e = q.shape[2:], k.shape[2], v.shape[3]
    half, width = q.element_size() == 2, max(block(d, 16, MOST_WIDTH), block(v.shape[3], 16, MOST_WIDTH))

    def heuristic() -> Config:
        # Short blocks of queries see less outside their window. A third stage makes the key kernel spill (compute capability 9.0).
        most = 64 if half and width <= 128 else 32
        return config(BM=block(s, 16, most), BN=block(t, 16, most), warps=4, stages=3 if half and not kernel.endswith("keys") else 2)

    def space() -> list[Config]:
        found = []
        for rows in sorted({block(s, 16, most) for most in (32, 64, 128)}):
            for columns in sorted({block(t, 16, most) for most in (32, 64, 128)}):
                if tuning.fits((rows + columns) * width, 3 * q.element_size() * (rows + columns) * width):
                    found += [config(BM=rows, BN=columns, warps=warps, stages=stages) for warps in (4, 8) for stages in (2, 3)]
        return found

    return tuning.cut(kernel, q, {"s": s, "t": t, "d": d, "e": e, "w": min(window, t)}, heuristic, space)


def _common(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int, sink: int) -> tuple[Any, ...]:
    """Arguments all kernels take alike: scale, window, sink, H, G, S, T, D, E."""
    t = k.shape[2]
    return float(scale), min(window, t), min(sink, t), q.shape[1], k.shape[1], q.shape[2], t, q.shape[3], v.shape[3]


def _widths(q: Tensor, v: Tensor) -> dict[str, Any]:
    return {"BD": block(q.shape[3], 16, MOST_WIDTH), "BE": block(v.shape[3], 16, MOST_WIDTH), "PRECISION": precision(q)}


def forward(q: Tensor, k: Tensor, v: Tensor, window: int, sink: int, scale: float) -> tuple[Tensor, Tensor]:
    """The kernel: q (b, h, s, d), k (b, g, t, d), v (b, g, t, e) of any strides → y (b, h, s, e), log of the denominators (b, h, s)."""
    _check(q, k, v, window, sink)
    y, denominators = shapes(q, k, v, window, sink, scale)
    if denominators.numel():
        cut = _cut("window_attention_forward", q, k, v, window)
        launch(
            _forward_kernel, (q.shape[0] * q.shape[1] * ceil_div(q.shape[2], cut["BM"]),), q, k, v, y, denominators,
            *_common(q, k, v, scale, window, sink), *q.stride(), *k.stride(), *v.stride(), *y.stride()[:3], cut=cut, **_widths(q, v),
        )  # fmt: skip
    return y, denominators


def reference(q: Tensor, k: Tensor, v: Tensor, window: int, sink: int, scale: float) -> tuple[Tensor, Tensor]:
    """The same in torch, with the whole pattern in memory."""
    _check(q, k, v, window, sink)
    share = q.shape[1] // max(k.shape[1], 1)
    k, v = (x if share == 1 else x.repeat_interleave(share, 1) for x in (k, v))
    s, t = q.shape[2], k.shape[2]
    at, key = torch.arange(t - s, t, device=q.device)[:, None], torch.arange(t, device=q.device)[None, :]
    allow = (key <= at) & ((at - key <= window) | (key < sink))
    scores = (scale * (q @ k.mT)).to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~allow, float("-inf"))
    return (scores.softmax(-1).to(q.dtype) @ v).contiguous(), scores.logsumexp(-1)


def shapes(q: Tensor, k: Tensor, v: Tensor, window: int, sink: int, scale: float) -> tuple[Tensor, Tensor]:
    """The results without numbers."""
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=wide)


def backward(g: Tensor, inputs: list[Any], results: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """Gradients of q, k and v."""
    q, k, v, window, sink, scale = inputs
    y, denominators = results
    dq, dk, dv = (tensor.new_empty(tensor.shape) for tensor in (q, k, v))
    if not denominators.numel():
        return [tensor.zero_() for tensor in (dq, dk, dv)]
    common, constants = _common(q, k, v, scale, window, sink), _widths(q, v)
    delta = (g.float() * y.float()).sum(-1)
    tensors, strides = (q, k, v, g, denominators, delta), (*q.stride(), *k.stride(), *v.stride(), *g.stride())
    if needs[0]:
        cut = _cut("window_attention_queries", q, k, v, window)
        grid = (q.shape[0] * q.shape[1] * ceil_div(q.shape[2], cut["BM"]),)
        launch(_query_kernel, grid, *tensors, dq, *common, *strides, *dq.stride()[:3], cut=cut, **constants)
    if needs[1] or needs[2]:
        cut = _cut("window_attention_keys", q, k, v, window)
        t, heads = k.shape[2], k.shape[0] * k.shape[1]
        launch(
            _key_kernel, (heads * ceil_div(t, cut["BN"]), 1), *tensors, dk, dv, *common, t, 1, *strides,
            0, *dk.stride()[:3], 0, *dv.stride()[:3], cut=cut, FAR=False, **constants,
        )  # fmt: skip
        sinks = min(sink, t)
        if sinks and window < t - 1:  # some query may stand beyond the window of a sink
            parts = min(ceil_div(q.shape[2], 4 * cut["BM"]), 32)
            far_k, far_v = (x.new_empty(parts, *x.shape[:2], sinks, x.shape[3], dtype=torch.float32) for x in (k, v))
            launch(
                _key_kernel, (heads * ceil_div(sinks, cut["BN"]), parts), *tensors, far_k, far_v, *common, sinks, parts, *strides,
                *far_k.stride()[:4], *far_v.stride()[:4], cut=cut, FAR=True, **constants,
            )  # fmt: skip
            for near, far in ((dk, far_k), (dv, far_v)):
                near[:, :, :sinks] = (near[:, :, :sinks].float() + far.sum(0)).to(near.dtype)
    return [tensor if need else None for tensor, need in zip((dq, dk, dv), needs, strict=True)]


_operator = Operator("window_attention", forward=forward, reference=reference, shapes=shapes, backward=backward)


def window_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, sink: int = 0, scale: float | None = None) -> Tensor:
    """Causal softmax attention in a window, with sinks that are always seen.

    Args:
        q: (b, heads, queries, d). k: (b, groups, keys, d), groups dividing heads. v: (b, groups, keys, e). d, e at most 256.
        window: keys before itself that a query sees; None for all. sink: first keys that every later query sees.
        scale: 1 / √d if None.

    Returns:
        (b, heads, queries, e). Raises OperatorError for operands that do not belong together.
    """
    reach = k.shape[-2] if window is None else window
    return _operator(q, k, v, reach, sink, q.shape[-1] ** -0.5 if scale is None else scale)[0]


def ask(region: Region) -> Offer | Refusal:
    """Offers for an "attention" region: q (batch heads queries d), k, v; options mask (with causal, window, sink) and scale."""
    name, mask = "window_attention", region.option.get("mask")
    if region.what != "attention" or len(region.operands) != 3 or mask is None:
        return Refusal(name, f"takes softmax attention of q, k and v with a mask, this is a {region.what} of {len(region.operands)}")
    causal, window, sink = (getattr(mask, field) for field in ("causal", "window", "sink"))
    q, k, v = ([region.size[axis] for axis in layout.axes] for layout in region.operands)
    try:
        check_dtype(region, DTYPES)
        if any(len(layout.axes) != 4 for layout in region.operands):
            raise Unfit("takes four dimensions: batch, heads, positions, width")
        if not causal:
            raise Unfit("the mask is not causal")
        if max(q[3], v[3]) > MOST_WIDTH:
            raise Unfit(f"heads of width {max(q[3], v[3])}; blocks fit up to {MOST_WIDTH}")
        if q[2] > k[2] or q[1] % max(k[1], 1):
            raise Unfit(f"{q[2]} queries of {q[1]} heads, {k[2]} keys of {k[1]}: keys are as many at least, their heads divide the others")
    except Unfit as unfit:
        return Refusal(name, str(unfit))
    scale = region.option.get("scale")

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return window_attention(q, k, v, window=window, sink=sink, scale=scale)  # type: ignore[arg-type]

    sizes = {"s": q[2], "t": k[2], "d": q[3], "e": v[3], "w": k[2] if window is None else min(window, k[2])}
    return Offer(name, run, tuning.case(name, sizes, region.dtype))


register("window_attention", ask, tuning.tune)
