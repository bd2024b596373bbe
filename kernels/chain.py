"""chain: x · A · C, two contractions in one kernel, the intermediate never in global memory.

    z[n, i, r, k] = Σ_j x[n, i, j] A[i, j, r, k]            y[n, k, l] = Σ_ir z[n, i, r, k] C[k, i, r, l] + bias[k, l]

covers block tensor trains as they stand; Monarch matrices (i, k: blocks; r: rows of a block); low rank (i = k = 1); two tensor-train
cores "x: n (i j), A: j r k, C: i r l" (A broadcast along i, C along k: stride 0). Operands have any strides.

A program owns some rows, some k and all or some l, and goes over i in pieces: z of a piece is a batched product over i, stays in
registers, is turned from (i, n, k·r) to (k, n, i·r), and is consumed by a batched product over k. When all of i is one piece, z is
made once and l is walked over instead.

What bounds it, derived and not measured: x is read once for every group of k (K / BK times) and both cores once for every block of rows
(N / BN times), mostly from the L2 cache. The accumulator, BK · BN · BL fp32 numbers, fills the registers, so at width 4096
(i = j = k = l = 64) neither count can be small. There z goes through L2 instead, panel by panel in one launch: `chain_panels`, taken
where it moves clearly fewer bytes.

Gradients make z again, in either form. dx is the same chain, C first, A second. dC[k, i, r, l] = Σ_n z[n, i, r, k] g[n, k, l] is
`_weight`; dA is dC with the roles of x, A and g, C exchanged.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tn.operators import Layout, Offer, OperatorError, Refusal, Region, register
from tn_kernels import chain_panels, tuning
from tn_kernels.launch import DTYPES, Config, block, ceil_div, config, launch, precision
from tn_kernels.registration import Operator
from tn_kernels.views import Unfit, check_dtype, check_result, order_of, shape_of, view

MOST_RANK = 128  # z of one piece has to fit registers


@triton.jit
def _intermediate(
    x_ptr, a_ptr, o_n, o_i, i_k, N, I, J, R, K,
    s_xn, s_xi, s_xj, s_ai, s_aj, s_ar, s_ak,
    BN: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z[i, n, (k r)] of one piece of i, in fp32."""
    o_kr = tl.arange(0, BK * BR)
    o_k, o_r = i_k * BK + o_kr // BR, o_kr % BR
    m_i = (o_i < I)[:, None, None]
    m_x, m_a = m_i & (o_n < N)[None, :, None], m_i & ((o_k < K) & (o_r < R))[None, None, :]
    p_x = x_ptr + o_i[:, None, None] * s_xi + o_n[None, :, None] * s_xn
    p_a = a_ptr + o_i[:, None, None] * s_ai + (o_k * s_ak + o_r * s_ar)[None, None, :]
    z = tl.zeros((BI, BN, BK * BR), tl.float32)
    for j in range(0, J, BJ):
        o_j = j + tl.arange(0, BJ)
        b_x = tl.load(p_x + o_j[None, None, :] * s_xj, mask=m_x & (o_j < J)[None, None, :], other=0.0)
        b_a = tl.load(p_a + o_j[None, :, None] * s_aj, mask=m_a & (o_j < J)[None, :, None], other=0.0)
        z = tl.dot(b_x, b_a, z, input_precision=PRECISION)
    return z


@triton.jit
def _turned(z, BI: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr):
    """(i, n, k·r) → (k, n, i·r)."""
    return tl.reshape(tl.permute(tl.reshape(z, (BI, BN, BK, BR)), (2, 1, 0, 3)), (BK, BN, BI * BR))


@triton.jit
def _second(
    c_ptr, i, i_k, o_l, I, R, K, L, s_ck, s_ci, s_cr, s_cl,
    BI: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """C[k, (i r), l] of one piece of i, one group of k, one block of l."""
    o_k, o_ir = i_k * BK + tl.arange(0, BK), tl.arange(0, BI * BR)
    o_i, o_r = i + o_ir // BR, o_ir % BR
    mask = (o_k < K)[:, None, None] & ((o_i < I) & (o_r < R))[None, :, None] & (o_l < L)[None, None, :]
    offsets = o_k[:, None, None] * s_ck + (o_i * s_ci + o_r * s_cr)[None, :, None] + o_l[None, None, :] * s_cl
    return tl.load(c_ptr + offsets, mask=mask, other=0.0)


@triton.jit
def _store(
    y_ptr, value, bias_ptr, o_n, i_k, o_l, N, K, L, s_yn, s_yk, s_yl, s_vk, s_vl, BK: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    o_k = i_k * BK + tl.arange(0, BK)
    if BIAS:
        m_v = (o_k < K)[:, None] & (o_l < L)[None, :]
        b_v = tl.load(bias_ptr + o_k[:, None] * s_vk + o_l[None, :] * s_vl, mask=m_v, other=0.0)
        value += b_v.to(tl.float32)[:, None, :]
    mask = (o_k < K)[:, None, None] & (o_n < N)[None, :, None] & (o_l < L)[None, None, :]
    offsets = o_k[:, None, None] * s_yk + o_n[None, :, None] * s_yn + o_l[None, None, :] * s_yl
    tl.store(y_ptr + offsets, value.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _forward_kernel(
    x_ptr, a_ptr, c_ptr, y_ptr, bias_ptr, N, I, J, R, K, L,
    s_xn, s_xi, s_xj, s_ai, s_aj, s_ar, s_ak, s_ck, s_ci, s_cr, s_cl, s_yn, s_yk, s_yl, s_vk, s_vl,
    BN: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    WHOLE: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """WHOLE: all of i is one piece, so z is made once and l is walked over; otherwise l is cut by the grid and i is walked over."""
    # Groups of k are neighbours in the grid, so that the rows they share are still in L2.
    groups = tl.cdiv(K, BK)
    i_k = tl.program_id(0) % groups
    o_n = (tl.program_id(0) // groups).to(tl.int64) * BN + tl.arange(0, BN)
    if WHOLE:
        z = _intermediate(
            x_ptr, a_ptr, o_n, tl.arange(0, BI), i_k, N, I, J, R, K, s_xn, s_xi, s_xj, s_ai, s_aj, s_ar, s_ak,
            BN, BI, BJ, BR, BK, PRECISION,
        )  # fmt: skip
        b_z = _turned(z.to(x_ptr.dtype.element_ty), BI, BN, BK, BR)
        for l in range(0, L, BL):
            o_l = l + tl.arange(0, BL)
            b_c = _second(c_ptr, 0, i_k, o_l, I, R, K, L, s_ck, s_ci, s_cr, s_cl, BI, BR, BK)
            y = tl.dot(b_z, b_c, input_precision=PRECISION)
            _store(y_ptr, y, bias_ptr, o_n, i_k, o_l, N, K, L, s_yn, s_yk, s_yl, s_vk, s_vl, BK, BIAS)
    else:
        o_l = tl.program_id(1) * BL + tl.arange(0, BL)
        total = tl.zeros((BK, BN, BL), tl.float32)
        for i in range(0, I, BI):
            z = _intermediate(
                x_ptr, a_ptr, o_n, i + tl.arange(0, BI), i_k, N, I, J, R, K, s_xn, s_xi, s_xj, s_ai, s_aj, s_ar, s_ak,
                BN, BI, BJ, BR, BK, PRECISION,
            )  # fmt: skip
            b_z = _turned(z.to(x_ptr.dtype.element_ty), BI, BN, BK, BR)
            b_c = _second(c_ptr, i, i_k, o_l, I, R, K, L, s_ck, s_ci, s_cr, s_cl, BI, BR, BK)
            total = tl.dot(b_z, b_c, total, input_precision=PRECISION)
        _store(y_ptr, total, bias_ptr, o_n, i_k, o_l, N, K, L, s_yn, s_yk, s_yl, s_vk, s_vl, BK, BIAS)


@triton.jit
def _weight_kernel(
    x_ptr, a_ptr, g_ptr, d_ptr, N, I, J, R, K, L, split,
    s_xn, s_xi, s_xj, s_ai, s_aj, s_ar, s_ak, s_gn, s_gk, s_gl, s_ds, s_dk, s_di, s_dr, s_dl,
    BN: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_n z[n, i, r, k] g[n, k, l] over one part of the rows, `split` of them."""
    groups = tl.cdiv(I, BI)
    i_k, i = tl.program_id(0) // groups, tl.program_id(0) % groups * BI
    o_l = tl.program_id(1) * BL + tl.arange(0, BL)
    first = tl.program_id(2).to(tl.int64) * split
    o_k = i_k * BK + tl.arange(0, BK)
    m_g = (o_k < K)[:, None, None] & (o_l < L)[None, None, :]
    p_g = g_ptr + o_k[:, None, None] * s_gk + o_l[None, None, :] * s_gl
    total = tl.zeros((BK, BI * BR, BL), tl.float32)
    for n in range(0, split, BN):
        o_n = first + n + tl.arange(0, BN)
        z = _intermediate(
            x_ptr, a_ptr, o_n, i + tl.arange(0, BI), i_k, N, I, J, R, K, s_xn, s_xi, s_xj, s_ai, s_aj, s_ar, s_ak,
            BN, BI, BJ, BR, BK, PRECISION,
        )  # fmt: skip
        b_z = _turned(z.to(x_ptr.dtype.element_ty), BI, BN, BK, BR)
        b_g = tl.load(p_g + o_n[None, :, None] * s_gn, mask=m_g & (o_n < N)[None, :, None], other=0.0)
        total = tl.dot(tl.permute(b_z, (0, 2, 1)), b_g, total, input_precision=PRECISION)
    o_ir = tl.arange(0, BI * BR)
    o_i, o_r = i + o_ir // BR, o_ir % BR
    mask = (o_k < K)[:, None, None] & ((o_i < I) & (o_r < R))[None, :, None] & (o_l < L)[None, None, :]
    offsets = o_k[:, None, None] * s_dk + (o_i * s_di + o_r * s_dr)[None, :, None] + o_l[None, None, :] * s_dl
    tl.store(d_ptr + tl.program_id(2) * s_ds + offsets, total.to(d_ptr.dtype.element_ty), mask=mask)


def _sizes(x: Tensor, a: Tensor, c: Tensor, bias: Tensor | None = None) -> dict[str, int]:
    """Sizes by axis. Raises OperatorError when the shapes do not belong together."""
    if (x.dim(), a.dim(), c.dim()) != (3, 4, 4) or x.shape[1:] != a.shape[:2] or (a.shape[3], a.shape[0], a.shape[2]) != c.shape[:3]:
        raise OperatorError(f"chain of x {tuple(x.shape)}, a {tuple(a.shape)}, c {tuple(c.shape)}: expected (n i j), (i j r k), (k i r l)")
    if not x.dtype == a.dtype == c.dtype == (x if bias is None else bias).dtype:
        also = "" if bias is None else f", bias {bias.dtype}"
        raise OperatorError(f"chain of {x.dtype}, {a.dtype} and {c.dtype}{also}: expected one dtype")
    if bias is not None and bias.shape != c.shape[::3]:
        raise OperatorError(f"chain with bias {tuple(bias.shape)}: expected {tuple(c.shape[::3])}")
    return dict(zip("nijrkl", (*x.shape, a.shape[2], *c.shape[::3]), strict=True))


Sizes = tuple[tuple[str, int], ...]


def _held(cut: Config, weight: bool) -> int:
    """fp32 numbers of z and of the accumulator, whichever are more."""
    n, i, r, k, l = (cut[name] for name in ("BN", "BI", "BR", "BK", "BL"))
    return max(i * n * k * r, k * i * r * l if weight else k * n * l)


@functools.lru_cache(maxsize=1024)
def _space(known: Sizes, weight: bool, width: int) -> tuple[Config, ...]:
    """Every sensible way to cut that fits; `width` is bytes of an element.

    tl.dot wants 16 of everything: ranks are padded to a power of two, i and k are grouped."""
    sizes = dict(known)
    rank, found = block(sizes["r"], 1), []
    least = max(16 // rank, 1)
    for n, i, k, j in itertools.product(
        sorted({block(sizes["n"], 16, most) for most in (16, 32, 64, 128)}),
        sorted({block(sizes["i"], least, most) for most in (least, 2 * least, 32)}),
        sorted({block(sizes["k"], least, most) for most in (least, 2 * least, 32)}),
        sorted({block(sizes["j"], 16, most) for most in (32, 64)}),
    ):
        for l in sorted({block(sizes["l"], 16, most) for most in (32, 64)}):
            shared = 2 * width * i * (n * j + j * k * rank) + width * k * l * max(i * rank, n)
            cut = config(BN=n, BI=i, BJ=j, BR=rank, BK=k, BL=l)
            if tuning.fits(_held(cut, weight) + j * k * rank, shared):
                counts = (8, 16) if _held(cut, weight) > 1 << 14 else (4, 8)
                found += [dataclasses.replace(cut, warps=warps, stages=stages) for warps in counts for stages in (1, 2)]
    return tuple(found)


def _moved(known: Sizes, weight: bool, cut: Config) -> int:
    """Elements read, mostly from L2."""
    n, i, j, r, k, l = (size for _, size in known)
    again_k, again_l = ceil_div(k, cut["BK"]), ceil_div(l, cut["BL"])
    if weight:
        return again_k * again_l * n * i * j + ceil_div(i, cut["BI"]) * n * k * l
    again = 1 if i <= cut["BI"] else again_l
    return again_k * again * n * i * j + ceil_div(n, cut["BN"]) * (again * i * j * r * k + k * i * r * l)


@functools.lru_cache(maxsize=1024)
def _heuristic(known: Sizes, weight: bool, width: int) -> Config:
    """The cut that moves the fewest elements among those whose accumulators leave registers for everything else."""
    # By the assembler's account for compute capability 9.0, 16 Ki accumulators do not spill over eight warps (Triton 3.6: 88 bytes at width
    # 1024, rank 4), and 32 Ki do over sixteen.
    space = _space(known, weight, width)
    calm = [cut for cut in space if _held(cut, weight) <= 1 << 14]
    best = min(calm or space, key=lambda cut: (_moved(known, weight, cut), _held(cut, weight), cut["BJ"]))
    # Products in fp32 take no tensor cores: their operands stand in registers too.
    held = _held(best, weight)
    return dataclasses.replace(best, warps=16 if held > 1 << 14 else 8 if width > 2 or held > 1 << 13 else 4, stages=2)


def _cut(kernel: str, x: Tensor, sizes: dict[str, int]) -> Config:
    known, weight, width = tuple(sizes.items()), kernel == "chain_weight", x.element_size()
    return tuning.cut(kernel, x, sizes, lambda: _heuristic(known, weight, width), lambda: _space(known, weight, width))


def _in_panels(x: Tensor, sizes: dict[str, int], weight: bool) -> bool:
    """Whether z goes through memory: where that moves clearly fewer bytes (that programs wait for each other is not in the count)."""
    if not chain_panels.fits(sizes):
        return False
    if tuning.forced("chain_panels"):
        return True
    if x.element_size() > 2:  # products in fp32 take no tensor cores: traffic is not what bounds them
        return False
    known = tuple(sizes.items())
    registers = _moved(known, weight, _heuristic(known, weight, x.element_size())) + (0 if weight else sizes["n"] * sizes["k"] * sizes["l"])
    return 3 * chain_panels.moved(sizes, weight) < 2 * registers


def _run(x: Tensor, a: Tensor, c: Tensor, y: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fill y (n, k, l), of any strides."""
    sizes = _sizes(x, a, c, bias)
    if not y.numel():
        return y
    if not x.numel() or not a.numel() or not c.numel():
        return y.zero_() if bias is None else y.copy_(bias)
    if _in_panels(x, sizes, weight=False):
        chain_panels.run(x, a, c, y, sizes, bias=bias)
        return y
    cut = _cut("chain", x, sizes)
    whole = sizes["i"] <= cut["BI"]
    grid = (ceil_div(sizes["k"], cut["BK"]) * ceil_div(sizes["n"], cut["BN"]), 1 if whole else ceil_div(sizes["l"], cut["BL"]))
    launch(
        _forward_kernel, grid, x, a, c, y, x if bias is None else bias, *sizes.values(),
        *x.stride(), *a.stride(), *c.stride(), *y.stride(), *((0, 0) if bias is None else bias.stride()),
        cut=cut, WHOLE=whole, BIAS=bias is not None, PRECISION=precision(x),
    )  # fmt: skip
    return y


def _weight(x: Tensor, a: Tensor, g: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Σ_n z[n, i, r, k] g[n, k, l], contiguous in `shape`, of which `order` names the dimensions k, i, r, l."""
    sizes = dict(zip("nijrkl", (*x.shape, *a.shape[2:], g.shape[2]), strict=True))
    if not x.numel() or not a.numel() or not g.numel():
        return x.new_zeros(shape)
    if _in_panels(x, sizes, weight=True):
        made = x.new_empty((chain_panels.panels(x, sizes), *shape), dtype=torch.float32)
        chain_panels.run(x, a, g, made.permute(0, *(1 + place for place in order)), sizes, weight=True)
        return made.sum(0).to(x.dtype)
    cut = _cut("chain_weight", x, sizes)
    cells = ceil_div(sizes["k"], cut["BK"]) * ceil_div(sizes["i"], cut["BI"])
    blocks_l = ceil_div(sizes["l"], cut["BL"])
    # Enough programs for a large device; the parts are added in a fixed order, so results repeat bit by bit.
    parts = max(1, min(256 // (cells * blocks_l), sizes["n"] // (8 * cut["BN"])))
    split = ceil_div(ceil_div(sizes["n"], parts), cut["BN"]) * cut["BN"]
    parts = ceil_div(sizes["n"], split)
    made = x.new_empty((parts, *shape), dtype=x.dtype if parts == 1 else torch.float32)
    d_strides = [made.stride(1 + place) for place in order]
    launch(
        _weight_kernel, (cells, blocks_l, parts), x, a, g, made, *sizes.values(), split,
        *x.stride(), *a.stride(), *g.stride(), made.stride(0), *d_strides, cut=cut, PRECISION=precision(x),
    )  # fmt: skip
    return made[0] if parts == 1 else made.sum(0).to(x.dtype)


def forward(x: Tensor, a: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """The kernel: x (n, i, j), a (i, j, r, k), c (k, i, r, l), bias (k, l), of any strides → (n, k, l), contiguous."""
    sizes = _sizes(x, a, c, bias)
    return _run(x, a, c, x.new_empty(sizes["n"], sizes["k"], sizes["l"]), bias)


def reference(x: Tensor, a: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """The same as two pairwise torch contractions."""
    _sizes(x, a, c, bias)
    z = torch.einsum("nij,ijrk->nirk", x, a)
    y = torch.einsum("nirk,kirl->nkl", z, c).contiguous()
    return y if bias is None else y + bias


def shapes(x: Tensor, a: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """The result without numbers."""
    return x.new_empty(x.shape[0], c.shape[0], c.shape[3])


def backward(g: Tensor, inputs: list[Any], results: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """Gradients of x, a, c and of the bias, if there is one, from g (n, k, l)."""
    x, a, c, bias = inputs
    first, second = c.permute(0, 3, 2, 1), a.permute(0, 3, 2, 1)  # the chain in reverse: g (n k l) · c (k l r i) · a (i k r j)
    made: list[Tensor | None] = [
        _run(g, first, second, x.new_empty(x.shape)) if needs[0] else None,
        _weight(g, first, x, a.shape, (0, 3, 2, 1)) if needs[1] else None,
        _weight(x, a, g, c.shape, (0, 1, 2, 3)) if needs[2] else None,
    ]
    if bias is not None:
        made.append(g.sum(0, dtype=torch.float32).to(g.dtype) if needs[3] else None)
    return made


_operator = Operator("chain", forward=forward, reference=reference, shapes=shapes, backward=backward)


def chain(x: Tensor, a: Tensor, c: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[n, k, l] = Σ_ir (Σ_j x[n, i, j] a[i, j, r, k]) c[k, i, r, l] + bias[k, l].

    Args:
        x: (n, i, j). a: (i, j, r, k). c: (k, i, r, l). bias: (k, l) or None. Any strides, one dtype.

    Returns:
        (n, k, l), contiguous. Raises OperatorError for shapes or dtypes that do not belong together.
    """
    return _operator(x, a, c, bias)


# Which tensors an axis of each role is on: x, A, C, the result.
_ROLES = {
    "1001": "n", "1110": "i", "1010": "i", "1100": "j", "0110": "r", "0111": "k", "0101": "k", "0011": "l",
}  # fmt: skip


def _roles(tensors: Sequence[Layout], region: Region) -> dict[str, list[str]]:
    """role → axes, for operands in the order x, A, C. Raises Unfit."""
    found: dict[str, list[str]] = {role: [] for role in "nijrkl"}
    for axis, size in region.sizes:
        on = [axis in axes for axes in (*(layout.axes for layout in tensors), region.out)]
        role = _ROLES.get("".join(str(int(is_on)) for is_on in on))
        if role is not None:
            found[role].append(axis)
        elif size != 1 and any(on):
            raise Unfit(f"axis {axis} is on {' '.join(name for name, is_on in zip(('x', 'A', 'C', 'y'), on, strict=True) if is_on)}")
    if not found["r"] and not found["k"]:
        raise Unfit("no axis leads through the middle operand")
    return found


def ask(region: Region) -> Offer | Refusal:
    """Offers for a contraction of three tensors in a row whose result is wanted as (rows, k, l); option bias (True when one follows)."""
    biased = bool(region.option.get("bias"))
    if region.what != "contraction" or len(region.operands) != 3 + biased:
        return Refusal("chain", f"takes a contraction of three tensors, this is a {region.what} of {len(region.operands)}")
    size, found, reason = region.size, [], ""
    for places in itertools.permutations(range(3)):
        try:
            roles = _roles([region.operands[place] for place in places], region)
            rows_first = set(region.out[: len(roles["n"])]) == set(roles["n"])
            found.append((rows_first, *(math.prod(size[axis] for axis in roles[role]) for role in "nj"), places, roles))
        except Unfit as unfit:
            reason = reason or str(unfit)
    if not found:
        return Refusal("chain", reason)
    # A chain can be read backwards, where rows are what there is most of, or as one sum over everything, with no j.
    *_, places, roles = max(found, key=lambda candidate: candidate[:3])
    tensors = [region.operands[place] for place in places]
    try:
        check_dtype(region, DTYPES)
        result = Layout.dense(region.out, size)
        merged = {role: order_of(axes, [*tensors, result, *region.operands[3:]], size) for role, axes in roles.items()}
        check_result(region, [merged[role] for role in "nkl"])
        if biased and not {axis for axis in region.operands[-1].axes if size[axis] != 1} <= {*roles["k"], *roles["l"]}:
            raise Unfit(f"a bias along {' '.join(region.operands[-1].axes)}; it is added along {' '.join((*roles['k'], *roles['l']))}")
        sizes = {role: math.prod(size[axis] for axis in axes) for role, axes in merged.items()}
        if sizes["r"] > MOST_RANK:
            raise Unfit(f"rank {sizes['r']}; the intermediate stays in registers up to rank {MOST_RANK}")
        named = zip(tensors, ("nij", "ijrk", "kirl"), strict=True)
        views = [view(layout, [merged[role] for role in axes], region) for layout, axes in named]
        see_bias = view(region.operands[-1], [merged["k"], merged["l"]], region) if biased else None
        shape = shape_of(region)
    except Unfit as unfit:
        return Refusal("chain", str(unfit))

    def run(*operands: Tensor) -> Tensor:
        x, a, c = (see(operands[place]) for see, place in zip(views, places, strict=True))
        return chain(x, a, c, None if see_bias is None else see_bias(operands[-1])).reshape(shape)

    return Offer("chain", run, tuning.case("chain", sizes, region.dtype))


register("chain", ask, tuning.tune)
