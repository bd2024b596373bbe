"""squared_attention: y_i = Σ_j allow(i, j) (s q_i·k_j) (s q'_i·k'_j) v_j: attention without softmax, exact polynomials of its inputs.

q' = q, k' = k gives the squared pattern, weights (q·k / d)²; another pair q', k' the bilinear one, with weights of either sign. Nothing of
the size queries × keys is stored. Nothing is normalised, so blocks of keys are simply added.

    p = s² a b,  a = q·k, b = q'·k'        dv_j = Σ_i p_ij g_i        da = s² b (g·v), db = s² a (g·v)
    dq_i = Σ_j da_ij k_j                   dk_j = Σ_i da_ij q_i       (q', k' with db; for one pair the two add)

Two kernels make the gradients: one owns queries, one owns keys. Heads of k and v may be fewer than those of q (grouped queries).
Rotary embeddings turn q and k before, see `rotary`.

The same sum in linear time: (q·k)(q'·k') = ⟨q⊗q', k⊗k'⟩, so keys before a chunk are one state Σ_j k_j⊗k'_j⊗v_j; see `chunked` and
`pair_state`. A token then costs 4 D² E + 4 C D + 2 C E FLOPs, C a chunk, instead of T (2 D + E) at sequence length T, causal.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tn.operators import Offer, OperatorError, Refusal, Region, register
from tn_kernels import tuning
from tn_kernels.launch import DTYPES, Config, block, ceil_div, config, launch, precision
from tn_kernels.pair_state import pair_read, pair_write
from tn_kernels.registration import Operator
from tn_kernels.rotary import check_tables
from tn_kernels.rotary import rotary as turn
from tn_kernels.views import Unfit, check_dtype

MOST_WIDTH = 256  # of q and of v: their blocks stay in shared memory
CHUNK = 128


@triton.jit
def _rows(ptr, o_s, o_d, S, D, s_s, s_d):
    """A block of rows of a matrix, zero outside."""
    return tl.load(ptr + o_s[:, None] * s_s + o_d[None, :] * s_d, mask=(o_s < S)[:, None] & (o_d < D)[None, :], other=0.0)


@triton.jit
def _turn(i, blocks, CAUSAL: tl.constexpr):
    """Which block of queries a program owns: under a causal pattern the last ones, which see most, start first."""
    return blocks - 1 - i if CAUSAL else i


@triton.jit
def _bounds(i_m, S, T, BM: tl.constexpr, BN: tl.constexpr, CAUSAL: tl.constexpr):
    """(keys in whole blocks that every query of a block sees, keys that any of them sees). Only those between need a mask."""
    if CAUSAL:
        return (i_m + T - S + 1) // BN * BN, tl.minimum(T, i_m + BM + T - S)
    return T, T


@triton.jit
def _forward_kernel(
    q_ptr, k_ptr, q2_ptr, k2_ptr, v_ptr, y_ptr, scale, H, G, S, T, D, E,
    s_qb, s_qh, s_qs, s_qd, s_kb, s_kh, s_ks, s_kd, s_q2b, s_q2h, s_q2s, s_q2d, s_k2b, s_k2h, s_k2s, s_k2d,
    s_vb, s_vh, s_vs, s_ve, s_yb, s_yh, s_ys,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    PAIR: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(S, BM)
    i_b, i_h = (tl.program_id(0) // blocks // H).to(tl.int64), (tl.program_id(0) // blocks % H).to(tl.int64)
    i_m, i_g = _turn(tl.program_id(0) % blocks, blocks, CAUSAL) * BM, i_h // (H // G)
    o_m, o_d, o_e = i_m + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BE)
    p_k, p_k2 = k_ptr + i_b * s_kb + i_g * s_kh, k2_ptr + i_b * s_k2b + i_g * s_k2h
    p_v = v_ptr + i_b * s_vb + i_g * s_vh
    b_q = _rows(q_ptr + i_b * s_qb + i_h * s_qh, o_m, o_d, S, D, s_qs, s_qd)
    if PAIR:
        b_q2 = _rows(q2_ptr + i_b * s_q2b + i_h * s_q2h, o_m, o_d, S, D, s_q2s, s_q2d)
    total = tl.zeros((BM, BE), tl.float32)
    clear, end = _bounds(i_m, S, T, BM, BN, CAUSAL)
    for masked in tl.static_range(2 if CAUSAL else 1):
        for n in range(clear if masked else 0, end if masked else clear, BN):
            o_n = n + tl.arange(0, BN)
            a = tl.dot(b_q, tl.trans(_rows(p_k, o_n, o_d, T, D, s_ks, s_kd)), input_precision=PRECISION) * scale
            if PAIR:
                b = tl.dot(b_q2, tl.trans(_rows(p_k2, o_n, o_d, T, D, s_k2s, s_k2d)), input_precision=PRECISION) * scale
                p = a * b
            else:
                p = a * a
            if masked:
                p = tl.where(o_n[None, :] <= o_m[:, None] + (T - S), p, 0.0)
            b_v = _rows(p_v, o_n, o_e, T, E, s_vs, s_ve)
            total = tl.dot(p.to(b_v.dtype), b_v, total, input_precision=PRECISION)
    p_y = y_ptr + i_b * s_yb + i_h * s_yh + o_m[:, None] * s_ys + o_e[None, :]
    tl.store(p_y, total.to(y_ptr.dtype.element_ty), mask=(o_m < S)[:, None] & (o_e < E)[None, :])


@triton.jit
def _query_kernel(
    q_ptr, k_ptr, q2_ptr, k2_ptr, v_ptr, g_ptr, dq_ptr, dq2_ptr, scale, H, G, S, T, D, E,
    s_qb, s_qh, s_qs, s_qd, s_kb, s_kh, s_ks, s_kd, s_q2b, s_q2h, s_q2s, s_q2d, s_k2b, s_k2h, s_k2s, s_k2d,
    s_vb, s_vh, s_vs, s_ve, s_gb, s_gh, s_gs, s_ge, s_db, s_dh, s_ds,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    PAIR: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of q and q' for one block of queries."""
    blocks = tl.cdiv(S, BM)
    i_b, i_h = (tl.program_id(0) // blocks // H).to(tl.int64), (tl.program_id(0) // blocks % H).to(tl.int64)
    i_m, i_g = _turn(tl.program_id(0) % blocks, blocks, CAUSAL) * BM, i_h // (H // G)
    o_m, o_d, o_e = i_m + tl.arange(0, BM), tl.arange(0, BD), tl.arange(0, BE)
    p_k, p_k2 = k_ptr + i_b * s_kb + i_g * s_kh, k2_ptr + i_b * s_k2b + i_g * s_k2h
    p_v = v_ptr + i_b * s_vb + i_g * s_vh
    b_q = _rows(q_ptr + i_b * s_qb + i_h * s_qh, o_m, o_d, S, D, s_qs, s_qd)
    b_g = _rows(g_ptr + i_b * s_gb + i_h * s_gh, o_m, o_e, S, E, s_gs, s_ge)
    dq = tl.zeros((BM, BD), tl.float32)
    if PAIR:
        b_q2 = _rows(q2_ptr + i_b * s_q2b + i_h * s_q2h, o_m, o_d, S, D, s_q2s, s_q2d)
        dq2 = tl.zeros((BM, BD), tl.float32)
    clear, end = _bounds(i_m, S, T, BM, BN, CAUSAL)
    for masked in tl.static_range(2 if CAUSAL else 1):
        for n in range(clear if masked else 0, end if masked else clear, BN):
            o_n = n + tl.arange(0, BN)
            b_k = _rows(p_k, o_n, o_d, T, D, s_ks, s_kd)
            a = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            dp = tl.dot(b_g, tl.trans(_rows(p_v, o_n, o_e, T, E, s_vs, s_ve)), input_precision=PRECISION) * (scale * scale)
            if masked:
                dp = tl.where(o_n[None, :] <= o_m[:, None] + (T - S), dp, 0.0)
            if PAIR:
                b_k2 = _rows(p_k2, o_n, o_d, T, D, s_k2s, s_k2d)
                b = tl.dot(b_q2, tl.trans(b_k2), input_precision=PRECISION)
                dq = tl.dot((dp * b).to(b_k.dtype), b_k, dq, input_precision=PRECISION)
                dq2 = tl.dot((dp * a).to(b_k.dtype), b_k2, dq2, input_precision=PRECISION)
            else:
                dq = tl.dot((dp * 2.0 * a).to(b_k.dtype), b_k, dq, input_precision=PRECISION)
    offsets = i_b * s_db + i_h * s_dh + o_m[:, None] * s_ds + o_d[None, :]
    mask = (o_m < S)[:, None] & (o_d < D)[None, :]
    tl.store(dq_ptr + offsets, dq.to(dq_ptr.dtype.element_ty), mask=mask)
    if PAIR:
        tl.store(dq2_ptr + offsets, dq2.to(dq2_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _key_kernel(
    q_ptr, k_ptr, q2_ptr, k2_ptr, v_ptr, g_ptr, dk_ptr, dk2_ptr, dv_ptr, scale, H, G, S, T, D, E,
    s_qb, s_qh, s_qs, s_qd, s_kb, s_kh, s_ks, s_kd, s_q2b, s_q2h, s_q2s, s_q2d, s_k2b, s_k2h, s_k2s, s_k2d,
    s_vb, s_vh, s_vs, s_ve, s_gb, s_gh, s_gs, s_ge, s_db, s_dh, s_ds, s_eb, s_eh, s_es,
    BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    PAIR: tl.constexpr, CAUSAL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of k, k' and v for one block of keys, from all heads that share them. BN counts keys, BM queries."""
    blocks = tl.cdiv(T, BN)
    i_b, i_g = (tl.program_id(0) // blocks // G).to(tl.int64), (tl.program_id(0) // blocks % G).to(tl.int64)
    i_n = tl.program_id(0) % blocks * BN
    o_n, o_d, o_e = i_n + tl.arange(0, BN), tl.arange(0, BD), tl.arange(0, BE)
    b_k = _rows(k_ptr + i_b * s_kb + i_g * s_kh, o_n, o_d, T, D, s_ks, s_kd)
    b_v = _rows(v_ptr + i_b * s_vb + i_g * s_vh, o_n, o_e, T, E, s_vs, s_ve)
    dk, dv = tl.zeros((BN, BD), tl.float32), tl.zeros((BN, BE), tl.float32)
    if PAIR:
        b_k2 = _rows(k2_ptr + i_b * s_k2b + i_g * s_k2h, o_n, o_d, T, D, s_k2s, s_k2d)
        dk2 = tl.zeros((BN, BD), tl.float32)
    # The first queries see some of these keys, those from `clear` on see all.
    begin = tl.maximum(i_n - (T - S), 0) // BM * BM if CAUSAL else 0
    clear = tl.minimum(tl.cdiv(tl.maximum(i_n + BN - 1 - (T - S), 0), BM) * BM, tl.cdiv(S, BM) * BM) if CAUSAL else 0
    for head in range(H // G):
        i_h = i_g * (H // G) + head
        for masked in tl.static_range(2 if CAUSAL else 1):
            for m in range(begin if masked else clear, clear if masked else S, BM):
                o_m = m + tl.arange(0, BM)
                b_q = _rows(q_ptr + i_b * s_qb + i_h * s_qh, o_m, o_d, S, D, s_qs, s_qd)
                b_g = _rows(g_ptr + i_b * s_gb + i_h * s_gh, o_m, o_e, S, E, s_gs, s_ge)
                a = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
                dp = tl.dot(b_v, tl.trans(b_g), input_precision=PRECISION) * scale
                if PAIR:
                    b_q2 = _rows(q2_ptr + i_b * s_q2b + i_h * s_q2h, o_m, o_d, S, D, s_q2s, s_q2d)
                    b = tl.dot(b_k2, tl.trans(b_q2), input_precision=PRECISION) * scale
                    p, da, db = a * b, dp * b, dp * a
                else:
                    p, da = a * a, dp * 2.0 * a
                if masked:
                    allow = o_n[:, None] <= o_m[None, :] + (T - S)
                    p, da = tl.where(allow, p, 0.0), tl.where(allow, da, 0.0)
                dv = tl.dot(p.to(b_g.dtype), b_g, dv, input_precision=PRECISION)
                dk = tl.dot(da.to(b_q.dtype), b_q, dk, input_precision=PRECISION)
                if PAIR:
                    if masked:
                        db = tl.where(allow, db, 0.0)
                    dk2 = tl.dot(db.to(b_q.dtype), b_q2, dk2, input_precision=PRECISION)
    offsets, mask = i_b * s_db + i_g * s_dh + o_n[:, None] * s_ds + o_d[None, :], (o_n < T)[:, None] & (o_d < D)[None, :]
    tl.store(dk_ptr + offsets, dk.to(dk_ptr.dtype.element_ty), mask=mask)
    if PAIR:
        tl.store(dk2_ptr + offsets, dk2.to(dk2_ptr.dtype.element_ty), mask=mask)
    p_dv = dv_ptr + i_b * s_eb + i_g * s_eh + o_n[:, None] * s_es + o_e[None, :]
    tl.store(p_dv, dv.to(dv_ptr.dtype.element_ty), mask=(o_n < T)[:, None] & (o_e < E)[None, :])


def check_attention(name: str, q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    """Raise OperatorError unless q (b, h, s, d), k (b, g, t, d), v (b, g, t, e) belong together, g dividing h."""
    shapes = f"{name} of q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.dim() == k.dim() == v.dim() == 4 or q.shape[0] != k.shape[0] or k.shape[:3] != v.shape[:3] or q.shape[3] != k.shape[3]:
        raise OperatorError(f"{shapes}: expected (b h s d), (b g t d), (b g t e)")
    if q.shape[1] % max(k.shape[1], 1):
        raise OperatorError(f"{shapes}: {q.shape[1]} heads of q do not share {k.shape[1]} heads of k evenly")
    if causal and q.shape[2] > k.shape[2]:
        raise OperatorError(f"{shapes}: a causal pattern needs at least as many keys as queries")
    if not q.dtype == k.dtype == v.dtype:
        raise OperatorError(f"{name} of {q.dtype}, {k.dtype} and {v.dtype}: expected one dtype")
    if max(q.shape[3], v.shape[3]) > MOST_WIDTH:
        raise OperatorError(f"{shapes}: head widths up to {MOST_WIDTH}")


def _check(q: Tensor, k: Tensor, v: Tensor, q2: Tensor | None, k2: Tensor | None, causal: bool) -> None:
    check_attention("squared_attention", q, k, v, causal)
    if (q2 is None) != (k2 is None):
        raise OperatorError("squared_attention takes the second pair whole: both q2 and k2, or neither")
    for name, tensor, like in (("q2", q2, q), ("k2", k2, k)):
        if tensor is not None and (tensor.shape != like.shape or tensor.dtype != like.dtype):
            raise OperatorError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, expected {like.dtype} {tuple(like.shape)} as {name[0]}")


def _sizes(q: Tensor, k: Tensor, v: Tensor) -> tuple[int, ...]:
    """H, G, S, T, D, E"""
    return q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3]


def _cut(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> Config:
    _, _, s, t, d, e = _sizes(q, k, v)
    half = q.element_size() == 2
    narrow = max(block(d, 16, MOST_WIDTH), block(e, 16, MOST_WIDTH)) <= 64

    def heuristic() -> Config:
        if not half:  # products in fp32 take no tensor cores: their operands stand in registers too
            return config(BM=block(s, 16, 64 if narrow else 32), BN=block(t, 16, 32), warps=8, stages=2)
        most = 128 if narrow and kernel.endswith("forward") else 64
        # By the assembler's account for compute capability 9.0, a third stage makes the key kernel spill.
        stages = 2 if kernel.endswith("keys") else 3
        return config(BM=block(s, 16, most), BN=block(t, 16, 64), warps=8 if most == 128 else 4, stages=stages)

    def space() -> list[Config]:
        found = []
        for rows in sorted({block(s, 16, most) for most in (32, 64, 128)}):
            for columns in sorted({block(t, 16, most) for most in (32, 64, 128)}):
                held = rows * (block(e, 16, 256) + columns) + (0 if kernel.endswith("forward") else columns * (block(d, 16, 256) + rows))
                if tuning.fits(held, 3 * q.element_size() * (rows + columns) * max(d, e)):
                    found += [config(BM=rows, BN=columns, warps=warps, stages=stages) for warps in (4, 8) for stages in (2, 3)]
        return found

    return tuning.cut(kernel, q, {"s": s, "t": t, "d": d, "e": e}, heuristic, space)


def _widths(q: Tensor, v: Tensor) -> dict[str, int]:
    return {"BD": block(q.shape[3], 16, MOST_WIDTH), "BE": block(v.shape[3], 16, MOST_WIDTH)}


def forward(q: Tensor, k: Tensor, v: Tensor, q2: Tensor | None, k2: Tensor | None, scale: float, causal: bool) -> Tensor:
    """The kernel: q, q2 (b, h, s, d), k, k2 (b, g, t, d), v (b, g, t, e) of any strides → (b, h, s, e), contiguous."""
    _check(q, k, v, q2, k2, causal)
    y = q.new_empty(*q.shape[:3], v.shape[3])
    if not y.numel():
        return y
    if not k.numel():
        return y.zero_()
    two = (q if q2 is None else q2, k if k2 is None else k2)
    cut = _cut("squared_attention_forward", q, k, v)
    launch(
        _forward_kernel, (q.shape[0] * q.shape[1] * ceil_div(q.shape[2], cut["BM"]),), q, k, *two, v, y, float(scale), *_sizes(q, k, v),
        *q.stride(), *k.stride(), *two[0].stride(), *two[1].stride(), *v.stride(), *y.stride()[:3],
        cut=cut, **_widths(q, v), PAIR=q2 is not None, CAUSAL=causal, PRECISION=precision(q),
    )  # fmt: skip
    return y


def reference(q: Tensor, k: Tensor, v: Tensor, q2: Tensor | None, k2: Tensor | None, scale: float, causal: bool) -> Tensor:
    """The same in torch, with the whole pattern in memory."""
    _check(q, k, v, q2, k2, causal)
    pattern = _scores(q, k) * scale
    pattern = pattern * pattern if q2 is None else pattern * (_scores(q2, k2) * scale)
    if causal:
        pattern = pattern.tril(k.shape[2] - q.shape[2])
    return (pattern @ _shared(v, q.shape[1])).contiguous()


def _scores(q: Tensor, k: Tensor) -> Tensor:
    return q @ _shared(k, q.shape[1]).mT


def _shared(k: Tensor, heads: int) -> Tensor:
    """One head of keys for each head of queries."""
    return k if k.shape[1] == heads else k.repeat_interleave(heads // k.shape[1], 1)


def shapes(q: Tensor, k: Tensor, v: Tensor, q2: Tensor | None, k2: Tensor | None, scale: float, causal: bool) -> Tensor:
    """The result without numbers."""
    return q.new_empty(*q.shape[:3], v.shape[3])


def backward(g: Tensor, inputs: list[Any], results: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """Gradients of q, k, v and, where there is a second pair, q2, k2."""
    q, k, v, q2, k2, scale, causal = inputs
    tensors = [tensor for tensor in (q, k, v, q2, k2) if tensor is not None]
    made: list[Tensor | None] = [tensor.new_empty(tensor.shape) for tensor in tensors]
    if not g.numel() or not k.numel() or not q.numel():
        return [tensor.zero_() for tensor in made if tensor is not None]
    pair = q2 is not None
    dq, dk, dv = made[:3]
    dq2, dk2 = made[3:] if pair else (dq, dk)
    two = (q2, k2) if pair else (q, k)
    common = (float(scale), *_sizes(q, k, v))
    strides = (*q.stride(), *k.stride(), *two[0].stride(), *two[1].stride(), *v.stride(), *g.stride())
    constants = {**_widths(q, v), "PAIR": pair, "CAUSAL": causal, "PRECISION": precision(q)}
    if needs[0] or (pair and needs[3]):
        cut = _cut("squared_attention_queries", q, k, v)
        grid = (q.shape[0] * q.shape[1] * ceil_div(q.shape[2], cut["BM"]),)
        launch(_query_kernel, grid, q, k, *two, v, g, dq, dq2, *common, *strides, *dq.stride()[:3], cut=cut, **constants)
    if needs[1] or needs[2] or (pair and needs[4]):
        cut = _cut("squared_attention_keys", q, k, v)
        grid = (k.shape[0] * k.shape[1] * ceil_div(k.shape[2], cut["BN"]),)
        launch(
            _key_kernel, grid, q, k, *two, v, g, dk, dk2, dv, *common, *strides, *dk.stride()[:3], *dv.stride()[:3], cut=cut, **constants
        )
    return [tensor if need else None for tensor, need in zip(made, needs, strict=True)]


_operator = Operator("squared_attention", forward=forward, reference=reference, shapes=shapes, backward=backward)


def squared_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = True,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y = Σ_j (scale q·k_j) (scale q2·k2_j) v_j, the second pair being the first where it is None.

    Args:
        q, q2: (b, heads, queries, d). k, k2: (b, groups, keys, d), groups dividing heads. v: (b, groups, keys, e). d, e at most 256.
        scale: 1 / d if None. causal: the last query stands at the last key and sees no later one.
        rotary: cos and sin (keys, r) that turn queries and keys of both pairs, see `rotary`; the last query stands at the last key.

    Returns:
        (b, heads, queries, e). Raises OperatorError for operands that do not belong together.
    """
    q, k, q2, k2 = _turned(q, k, q2, k2, rotary)
    return _operator(q, k, v, q2, k2, 1 / max(q.shape[-1], 1) if scale is None else scale, causal)


def _turned(
    q: Tensor, k: Tensor, q2: Tensor | None, k2: Tensor | None, tables: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Queries and keys, turned where there are tables."""
    if tables is None:
        return q, k, q2, k2
    cos, sin = tables
    first = k.shape[-2] - q.shape[-2]
    if first < 0:
        raise OperatorError(f"rotary of {q.shape[-2]} queries and {k.shape[-2]} keys: expected at least as many keys")
    q, k = turn(q, cos[first:], sin[first:]), turn(k, cos, sin)
    return q, k, q2 if q2 is None else turn(q2, cos[first:], sin[first:]), k2 if k2 is None else turn(k2, cos, sin)


def chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q2: Tensor | None = None,
    k2: Tensor | None = None,
    *,
    scale: float | None = None,
    chunk: int = CHUNK,
    rotary: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """`squared_attention`, causal, in time linear in the sequence: inside a chunk as it stands, before it through a state of d·d·e numbers.

    Args:
        as `squared_attention`, with as many queries as keys. chunk: tokens whose pattern is made; it need not divide the sequence.

    Returns:
        (b, heads, queries, e). The state is kept in the operands' dtype and grows with the sequence: fp16 overflows where the sums do.
    """
    q, k, q2, k2 = _turned(q, k, q2, k2, rotary)
    _check(q, k, v, q2, k2, True)
    (b, h, t, d), g, e = q.shape, k.shape[1], v.shape[3]
    if k.shape[2] != t:
        raise OperatorError(f"chunked attention of {t} queries and {k.shape[2]} keys: expected as many of both")
    if not q.numel() or not v.numel():
        return q.new_zeros(b, h, t, e)
    scale = 1 / d if scale is None else scale
    count = ceil_div(t, chunk)

    def cut(x: Tensor) -> Tensor:
        """(b, heads, t, ·) → (b, heads, chunks, chunk, ·), the last chunk filled up with zeros, which add nothing."""
        return torch.nn.functional.pad(x, (0, 0, 0, count * chunk - t)).unflatten(2, (count, chunk))

    def alone(x: Tensor) -> Tensor:
        """Every chunk as a sequence of its own: (b · chunks, heads, chunk, ·)."""
        return x.transpose(1, 2).flatten(0, 1)

    q, k, v = cut(q * scale), cut(k), cut(v)
    q2, k2 = (q, k) if q2 is None or k2 is None else (cut(q2 * scale), cut(k2))
    pair = (alone(q2), alone(k2)) if q2 is not q else (None, None)
    inside = _operator(alone(q), alone(k), alone(v), *pair, 1.0, True).unflatten(0, (b, count)).transpose(1, 2)
    written = pair_write(k.flatten(0, 2), k2.flatten(0, 2), v.flatten(0, 2)).unflatten(0, (b, g, count))
    before = (written.cumsum(2, dtype=torch.float32) - written.float()).to(q.dtype)  # what was written before each chunk
    states = before[:, :, None].expand(b, g, h // g, count, d, d, e).reshape(-1, d, d, e)
    outside = pair_read(q.flatten(0, 2), q2.flatten(0, 2), states).view(b, h, count, chunk, e)
    return (inside + outside).flatten(2, 3)[:, :, :t]


def flops(q: Tensor, k: Tensor, v: Tensor, pairs: int = 1, chunk: int | None = None) -> int:
    """FLOPs of a causal pattern's products: of the whole pattern, or with `chunk` of the linear form."""
    b, (h, g, s, t, d, e) = q.shape[0], _sizes(q, k, v)
    if chunk is None:
        seen = s * t - s * (s - 1) // 2  # pairs of a query and a key it sees
        return 2 * b * h * seen * (pairs * d + e)
    inside = t * (chunk + 1) // 2
    return 2 * b * (h * inside * (pairs * d + e) + (h + g) * t * d * d * e)


def cheaper_chunked(q: Tensor, k: Tensor, v: Tensor, pairs: int = 1, chunk: int = CHUNK) -> bool:
    """Whether the linear form takes fewer FLOPs, which it does for long sequences of narrow heads."""
    return q.shape[2] == k.shape[2] and flops(q, k, v, pairs, chunk) < flops(q, k, v, pairs)


def ask(region: Region) -> Offer | Refusal:
    """Offers for a "squared_attention" region: q, k, v and perhaps q2, k2 with four dimensions; options causal (or a mask) and scale, and
    rotary, True when cos and sin follow.

    The linear form runs where it takes fewer FLOPs."""
    name, turned = "squared_attention", bool(region.option.get("rotary"))
    count = len(region.operands) - 2 * turned
    if region.what != name or count not in (3, 5):
        return Refusal(name, f"takes squared attention of q, k, v and perhaps a second pair, this is a {region.what} of {count}")
    mask, scale = region.option.get("mask"), region.option.get("scale")
    causal = bool(region.option.get("causal", True) if mask is None else mask.causal)  # type: ignore[attr-defined]
    like = [torch.empty([region.size[axis] for axis in layout.axes], dtype=region.dtype, device="meta") for layout in region.operands]
    pair, tables = like[3:count] or [None, None], like[count:]
    try:
        check_dtype(region, DTYPES)
        if getattr(mask, "window", None) is not None:
            raise Unfit("the mask has a window")
        if turned:
            check_tables(*tables, max(like[0].shape[2], like[1].shape[2]), like[0].shape[3])
        _check(*like[:3], *pair, causal)
    except (Unfit, OperatorError) as unfit:
        return Refusal(name, str(unfit))
    q, k, v = like[:3]
    linear = causal and cheaper_chunked(q, k, v, (count - 1) // 2)

    def run(*operands: Tensor) -> Tensor:
        rotary = (operands[-2], operands[-1]) if turned else None
        if linear:
            return chunked(*operands[:count], scale=scale, rotary=rotary)  # type: ignore[arg-type]
        return squared_attention(*operands[:count], scale=scale, causal=causal, rotary=rotary)  # type: ignore[arg-type]

    sizes = {"b": q.shape[0], **dict(zip("hgstde", _sizes(q, k, v), strict=True)), "pairs": (count - 1) // 2}
    return Offer(name, run, tuning.case("chunked" if linear else name, sizes, region.dtype))


register("squared_attention", ask, tuning.tune)
