"""mla_decode: absorbed latent attention over a compressed cache, one pass over it for all heads.

    a[b, s, h, t] = scale (Σ_c q[b, s, h, c] latent[b, t, c] + Σ_r qr[b, s, h, r] rope[b, t, r])
    o[b, s, h, c] = Σ_t softmax_t(a | t ≤ length − S + s)[b, s, h, t] latent[b, t, c]

q is the query after W_UK has been absorbed, o is what W_UV takes (DeepSeek-V2, arXiv:2405.04434): keys and values are the same numbers,
c + r of them a token, read once. The S queries are the last positions of each sequence's `length` tokens; one that sees nothing gives 0.

The cache of a sequence is cut into parts, one program each for up to 16 rows of (s, h), because a single sequence's heads cannot fill a
device; a second kernel joins the parts by their maxima and sums. It reads B T (c + r) elements of the cache, and writes and reads
B · parts · S H c numbers in fp32 between the kernels.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from tn.operators import Offer, OperatorError, Refusal, Region, register
from tn_kernels import tuning
from tn_kernels.launch import DTYPES, block, ceil_div, config, launch, precision
from tn_kernels.registration import Operator
from tn_kernels.views import Unfit, check_dtype

LOG2E = tl.constexpr(1.4426950408889634)
MOST_LATENT, MOST_ROPE = 512, 128  # a program holds 16 rows of the result, and a block of the cache of that width
PROGRAMS = 264  # two for each of 132 multiprocessors


@triton.jit
def _part_kernel(
    q_ptr, r_ptr, c_ptr, k_ptr, n_ptr, o_ptr, l_ptr, scale, S, H, T, C, R, split, rows,
    s_qb, s_qs, s_qh, s_qc, s_rb, s_rs, s_rh, s_rr, s_cb, s_ct, s_cc, s_kb, s_kt, s_kr,
    BM: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of one sequence's cache for BM rows of (s, h): their sums, divided, and the base-2 logarithms of their denominators."""
    across = tl.cdiv(S * H, BM)
    i_b, part = (tl.program_id(0) // across).to(tl.int64), tl.program_id(1)
    o_m = tl.program_id(0) % across * BM + tl.arange(0, BM)
    o_s, o_h, o_c, o_r = o_m // H, o_m % H, tl.arange(0, BC), tl.arange(0, BR)
    m_m, m_c, m_r = o_m < S * H, o_c < C, o_r < R
    p_q = q_ptr + i_b * s_qb + (o_s * s_qs + o_h * s_qh)[:, None] + o_c[None, :] * s_qc
    p_r = r_ptr + i_b * s_rb + (o_s * s_rs + o_h * s_rh)[:, None] + o_r[None, :] * s_rr
    b_q = tl.load(p_q, mask=m_m[:, None] & m_c[None, :], other=0.0)
    b_r = tl.load(p_r, mask=m_m[:, None] & m_r[None, :], other=0.0)
    length = tl.load(n_ptr + i_b).to(tl.int32)
    see = length - S + o_s  # the last position a row sees
    top, below = tl.full((BM,), float("-inf"), tl.float32), tl.zeros((BM,), tl.float32)
    total = tl.zeros((BM, BC), tl.float32)
    for n in range(part * split, tl.minimum(part * split + split, tl.minimum(length, T)), BN):
        o_n = n + tl.arange(0, BN)
        m_n = o_n < tl.minimum(length, T)
        p_c = c_ptr + i_b * s_cb + o_n.to(tl.int64)[:, None] * s_ct + o_c[None, :] * s_cc
        p_k = k_ptr + i_b * s_kb + o_n.to(tl.int64)[:, None] * s_kt + o_r[None, :] * s_kr
        b_c = tl.load(p_c, mask=m_n[:, None] & m_c[None, :], other=0.0)
        b_k = tl.load(p_k, mask=m_n[:, None] & m_r[None, :], other=0.0)
        a = tl.dot(b_q, tl.trans(b_c), input_precision=PRECISION)
        a = tl.dot(b_r, tl.trans(b_k), a, input_precision=PRECISION) * (scale * LOG2E)
        a = tl.where(m_n[None, :] & (o_n[None, :] <= see[:, None]), a, float("-inf"))
        peak = tl.maximum(top, tl.max(a, 1))
        base = tl.where(peak == float("-inf"), 0.0, peak)  # a row that has seen nothing yet
        p, fade = tl.exp2(a - base[:, None]), tl.exp2(top - base)
        below, top = below * fade + tl.sum(p, 1), peak
        total = tl.dot(p.to(b_c.dtype), b_c, total * fade[:, None], input_precision=PRECISION)
    at = (part * (rows // (S * H)) + i_b) * (S * H) + o_m
    logarithm = tl.where(below > 0.0, top + tl.log2(tl.where(below > 0.0, below, 1.0)), float("-inf"))
    tl.store(l_ptr + at, logarithm, mask=m_m)
    total = total / tl.where(below > 0.0, below, 1.0)[:, None]
    tl.store(o_ptr + at[:, None] * C + o_c[None, :], total, mask=m_m[:, None] & m_c[None, :])


@triton.jit
def _join_kernel(
    o_ptr, l_ptr, y_ptr, d_ptr, C, parts, rows, BC: tl.constexpr,
):  # fmt: skip
    """One row: the parts weighted by their denominators."""
    i_m = tl.program_id(0).to(tl.int64)
    o_c = tl.arange(0, BC)
    top = tl.full((), float("-inf"), tl.float32)
    for part in range(parts):
        top = tl.maximum(top, tl.load(l_ptr + part * rows + i_m))
    base = tl.where(top == float("-inf"), 0.0, top)
    total, below = tl.zeros((BC,), tl.float32), tl.zeros((), tl.float32)
    for part in range(parts):
        weight = tl.exp2(tl.load(l_ptr + part * rows + i_m) - base)
        below += weight
        total += weight * tl.load(o_ptr + (part * rows + i_m) * C + o_c, mask=o_c < C, other=0.0)
    some = below > 0.0
    tl.store(y_ptr + i_m * C + o_c, (total / tl.where(some, below, 1.0)).to(y_ptr.dtype.element_ty), mask=o_c < C)
    tl.store(d_ptr + i_m, tl.where(some, (base + tl.log2(tl.where(some, below, 1.0))) / LOG2E, float("-inf")))


def _check(q: Tensor, qr: Tensor, latent: Tensor, rope: Tensor, lengths: Tensor) -> None:
    given = f"mla_decode of q {tuple(q.shape)}, qr {tuple(qr.shape)}, latent {tuple(latent.shape)}, rope {tuple(rope.shape)}"
    fits = q.dim() == qr.dim() == 4 and latent.dim() == rope.dim() == 3 and q.shape[:3] == qr.shape[:3]
    if not fits or latent.shape[:2] != rope.shape[:2] or q.shape[::3] != latent.shape[::2] or qr.shape[3] != rope.shape[2]:
        raise OperatorError(f"{given}: expected (b s h c), (b s h r), (b t c), (b t r)")
    if lengths.shape != q.shape[:1] or lengths.dtype not in (torch.int32, torch.int64):
        wanted = f"expected {q.shape[0]} integers, the filled tokens of each sequence"
        raise OperatorError(f"lengths {lengths.dtype} {tuple(lengths.shape)}: {wanted}")
    if len({tensor.dtype for tensor in (q, qr, latent, rope)}) > 1:
        raise OperatorError(f"mla_decode of {q.dtype}, {qr.dtype}, {latent.dtype} and {rope.dtype}: expected one dtype")
    if q.shape[3] > MOST_LATENT or qr.shape[3] > MOST_ROPE:
        raise OperatorError(f"{given}: c up to {MOST_LATENT}, r up to {MOST_ROPE}")


def forward(q: Tensor, qr: Tensor, latent: Tensor, rope: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The kernels: q (b s h c), qr (b s h r), latent (b t c), rope (b t r), lengths (b) → o (b s h c), logs of denominators (b s h)."""
    _check(q, qr, latent, rope, lengths)
    y, denominators = shapes(q, qr, latent, rope, lengths, scale)
    (b, s, h, c), (t, r) = q.shape, (latent.shape[1], rope.shape[2])
    if not denominators.numel():
        return y, denominators
    if not t:
        return y.zero_(), denominators.fill_(float("-inf"))
    width = q.element_size()
    cut = tuning.cut(
        "mla_decode", q, {"b": b, "m": s * h, "t": t, "c": c, "r": r},
        lambda: config(BM=16, BN=block(t, 16, 64 if width == 2 else 16), warps=4, stages=2),
        lambda: [config(BM=16, BN=n, warps=w, stages=stages) for n in (16, 32, 64, 128) for w in (4, 8) for stages in (1, 2, 3)
                 if tuning.fits(16 * block(c, 16, MOST_LATENT), stages * width * n * (c + r))],
    )  # fmt: skip
    rows, groups = b * s * h, b * ceil_div(s * h, cut["BM"])
    split = ceil_div(t, _parts(groups, ceil_div(t, 4 * cut["BN"])))
    split = ceil_div(split, cut["BN"]) * cut["BN"]
    parts = ceil_div(t, split)
    made = q.new_empty(parts, rows, c, dtype=torch.float32)
    logs = q.new_empty(parts, rows, dtype=torch.float32)
    launch(
        _part_kernel, (groups, parts), q, qr, latent, rope, lengths, made, logs, float(scale), s, h, t, c, r, split, rows,
        *q.stride(), *qr.stride(), *latent.stride(), *rope.stride(),
        cut=cut, wide_offsets=True, BC=block(c, 16, MOST_LATENT), BR=block(r, 16, MOST_ROPE), PRECISION=precision(q),
    )  # fmt: skip
    joins = [config(warps=warps, stages=1) for warps in (4, 1)]
    join = tuning.cut("mla_decode_join", q, {"c": c}, lambda: joins[0], lambda: joins)
    launch(_join_kernel, (rows,), made, logs, y, denominators, c, parts, rows, cut=join, wide_offsets=True, BC=block(c, 16, MOST_LATENT))
    return y, denominators


def _parts(groups: int, most: int) -> int:
    """Parts to cut each sequence into: as few as keep a device busy to the end, and long enough that joining them costs little.

    >>> _parts(1, 512), _parts(128, 32), _parts(300, 32), _parts(1000, 1)
    (264, 2, 7, 1)
    """
    counts = range(1, max(1, min(most, max(8, PROGRAMS // groups))) + 1)
    return min(counts, key=lambda parts: ceil_div(groups * parts, PROGRAMS) / parts)


def reference(q: Tensor, qr: Tensor, latent: Tensor, rope: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The same in torch, with the scores in memory."""
    _check(q, qr, latent, rope, lengths)
    s, t = q.shape[1], latent.shape[1]
    scores = torch.einsum("bshc,btc->bsht", q, latent) + torch.einsum("bshr,btr->bsht", qr, rope)
    at = lengths[:, None] - s + torch.arange(s, device=q.device)
    allow = (torch.arange(t, device=q.device) <= at[..., None])[:, :, None]
    scores = (scale * scores).to(torch.promote_types(q.dtype, torch.float32)).masked_fill(~allow, float("-inf"))
    weights = scores.softmax(-1).masked_fill(~allow, 0.0).to(q.dtype)
    return torch.einsum("bsht,btc->bshc", weights, latent).contiguous(), scores.logsumexp(-1)


def shapes(q: Tensor, qr: Tensor, latent: Tensor, rope: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The results without numbers."""
    return q.new_empty(q.shape), q.new_empty(q.shape[:3], dtype=torch.promote_types(q.dtype, torch.float32))


_operator = Operator("mla_decode", forward=forward, reference=reference, shapes=shapes)


def mla_decode(q: Tensor, qr: Tensor, latent: Tensor, rope: Tensor, lengths: Tensor | None = None, *, scale: float) -> Tensor:
    """Absorbed latent attention of the last S positions of each sequence over its cache.

    Args:
        q: (b, s, heads, c), the queries with W_UK absorbed. qr: (b, s, heads, r), their rotated part.
        latent: (b, t, c), the normed latents. rope: (b, t, r), the rotated keys that all heads share. c at most 512, r at most 128.
        lengths: (b) integers on the same device, how many of the t tokens each sequence has filled; all if None.
        scale: of the scores, 1 / √(n + r) for keys of n + r numbers before absorption.

    Returns:
        (b, s, heads, c). Gradients come from the torch path, which keeps the scores: training does not absorb.
    """
    if lengths is None:
        lengths = torch.full((q.shape[0],), latent.shape[1], device=q.device, dtype=torch.int32)
    return _operator(q, qr, latent, rope, lengths, scale)[0]


def ask(region: Region) -> Offer | Refusal:
    """Offers for an "mla_decode" region: q, qr, latent, rope, lengths as `mla_decode` takes them; option scale."""
    name = "mla_decode"
    if region.what != name or len(region.operands) != 5:
        return Refusal(name, f"takes latent attention over a cache of q, qr, latent, rope and lengths, this is a {region.what}")
    like = [torch.empty([region.size[axis] for axis in layout.axes], dtype=region.dtype, device="meta") for layout in region.operands]
    scale = region.option.get("scale")
    try:
        check_dtype(region, DTYPES)
        _check(*like[:4], like[4].int())
        if not isinstance(scale, float):
            raise Unfit(f"scale {scale!r}; expected a float")
    except (Unfit, OperatorError) as unfit:
        return Refusal(name, str(unfit))

    def run(q: Tensor, qr: Tensor, latent: Tensor, rope: Tensor, lengths: Tensor) -> Tensor:
        return mla_decode(q, qr, latent, rope, lengths, scale=scale)

    sizes = dict(zip("bshctr", (*like[0].shape, *like[3].shape[1:]), strict=True))
    return Offer(name, run, tuning.case(name, sizes, region.dtype))


register("mla_decode", ask, tuning.tune)
