"""The chain's second form: z in global memory, one panel of rows at a time, so that it is written and read in L2. One launch.

    z[n, i, r, k] = Σ_j x[n, i, j] A[i, j, r, k]            y[n, k, l] = Σ_ir z[n, i, r, k] C[k, i, r, l]

A program makes z of one panel for one i, or y of one panel for one k; its core stays where it is while it walks over the panel's rows.
z lies rows last, so both stages read and write runs of rows. Programs take tickets in the order they start in: the first stage of a panel,
then the second stage of the panel AHEAD panels before. A program waits only for such with smaller tickets, which run already, so it
cannot wait for ever however few run at once. The slots of RING panels are used in turns.

Bytes of the forward pass, derived and not measured; 16k rows, width 4096 = 64 · 64, bf16; what bounds is set against 4.3 TB/s of memory
and about 6 TB/s of L2, the dense product takes 0.7 ms:

    rank   form                memory    L2 (x + z twice + y + cores)            bound
    1      z in registers      0.27 GB   x 4 times, cores 1024 times: 1.7 GB     L2, 0.29 ms
    1      two products        0.54 GB   0.54 GB + cores 128 times: 0.67 GB      memory, 0.13 ms
    1      panels              0.27 GB   0.54 GB + cores 16 times: 0.55 GB       L2, 0.09 ms
    4      z in registers      0.27 GB   x 8 times, cores 512 times: 3.4 GB      L2, 0.56 ms
    4      two products        1.34 GB   1.34 GB + cores 128 times: 1.9 GB       memory and L2, 0.31 ms
    4      panels              0.27 GB   1.34 GB + cores 64 times: 1.6 GB        L2, 0.27 ms

Panels launched one by one move as little, but at rank 4 that is 128 launches of about 2 µs of work each.
"""

import functools
import itertools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from tn_kernels import tuning
from tn_kernels.launch import Config, block, ceil_div, config, launch, precision

SCRATCH = 25 << 20  # bytes of z: half of the L2 cache of an H200
MOST = 256  # of j and of i · r: a core's block is held whole
Sizes = tuple[tuple[str, int], ...]


@triton.jit
def _wait(flag_ptr, count):
    """Until so many programs have signalled; what they wrote before can be read after."""
    while tl.atomic_add(flag_ptr, 0, sem="acquire") < count:
        pass


@triton.jit
def _signal(flag_ptr):
    tl.debug_barrier()  # every thread has written and read what it had to
    tl.atomic_add(flag_ptr, 1, sem="release")


@triton.jit
def _first(
    x_ptr, a_ptr, z_ptr, row, rows, i, o_rk, N, J, R, K, s_xn, s_xi, s_xj, s_ai, s_aj, s_ar, s_ak,
    ROWS: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """z of one panel for one i."""
    o_j, m_rk = tl.arange(0, BJ), o_rk < R * K
    m_j = o_j < J
    p_a = a_ptr + i * s_ai + o_j[:, None] * s_aj + (o_rk // K * s_ar + o_rk % K * s_ak)[None, :]
    b_a = tl.load(p_a, mask=m_j[:, None] & m_rk[None, :], other=0.0)
    for m in range(0, rows, BM):
        o_m = m + tl.arange(0, BM)
        o_n = row + o_m
        p_x = x_ptr + i * s_xi + o_n[:, None] * s_xn + o_j[None, :] * s_xj
        b_x = tl.load(p_x, mask=(o_n < N)[:, None] & m_j[None, :], other=0.0, eviction_policy="evict_first")
        z = tl.dot(b_x, b_a, input_precision=PRECISION)
        tl.store(z_ptr + (i * R * K + o_rk)[None, :] * ROWS + o_m[:, None], z.to(z_ptr.dtype.element_ty), mask=m_rk[None, :])


@triton.jit
def _second(
    z_ptr, c_ptr, y_ptr, bias_ptr, row, rows, k, o_l, N, I, R, K, L, s_ck, s_ci, s_cr, s_cl, s_yn, s_yk, s_yl, s_vk, s_vl,
    ROWS: tl.constexpr, BM: tl.constexpr, BIR: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y of one panel for one k."""
    o_ir, m_l = tl.arange(0, BIR), (o_l < L)[None, :]
    m_ir = o_ir < I * R
    p_c = c_ptr + k * s_ck + (o_ir // R * s_ci + o_ir % R * s_cr)[:, None] + o_l[None, :] * s_cl
    b_c = tl.load(p_c, mask=m_ir[:, None] & m_l, other=0.0)
    for m in range(0, rows, BM):
        o_m = m + tl.arange(0, BM)
        o_n = row + o_m
        # Past the cache of the multiprocessor, which may hold what the slot had before.
        b_z = tl.load(z_ptr + (o_ir * K + k)[None, :] * ROWS + o_m[:, None], mask=m_ir[None, :], other=0.0, cache_modifier=".cg")
        y = tl.dot(b_z, b_c, input_precision=PRECISION)
        if BIAS:
            y += tl.load(bias_ptr + k * s_vk + o_l * s_vl, mask=o_l < L, other=0.0).to(tl.float32)[None, :]
        p_y = y_ptr + o_n[:, None] * s_yn + k * s_yk + o_l[None, :] * s_yl
        tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=(o_n < N)[:, None] & m_l, eviction_policy="evict_first")


@triton.jit
def _second_weight(
    z_ptr, g_ptr, d_ptr, row, rows, k, o_l, N, I, R, K, L, s_gn, s_gk, s_gl, s_dk, s_di, s_dr, s_dl,
    ROWS: tl.constexpr, BM: tl.constexpr, BIR: tl.constexpr, BL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ z g over one panel for one k."""
    o_ir, m_l = tl.arange(0, BIR), (o_l < L)[None, :]
    m_ir = (o_ir < I * R)[:, None]
    total = tl.zeros((BIR, BL), tl.float32)
    for m in range(0, rows, BM):
        o_m = m + tl.arange(0, BM)
        o_n = row + o_m
        b_z = tl.load(z_ptr + (o_ir * K + k)[:, None] * ROWS + o_m[None, :], mask=m_ir, other=0.0, cache_modifier=".cg")
        p_g = g_ptr + o_n[:, None] * s_gn + k * s_gk + o_l[None, :] * s_gl
        b_g = tl.load(p_g, mask=(o_n < N)[:, None] & m_l, other=0.0, eviction_policy="evict_first")
        total = tl.dot(b_z, b_g, total, input_precision=PRECISION)
    p_d = d_ptr + k * s_dk + (o_ir // R * s_di + o_ir % R * s_dr)[:, None] + o_l[None, :] * s_dl
    tl.store(p_d, total.to(d_ptr.dtype.element_ty), mask=m_ir & m_l)


@triton.jit
def _panels_kernel(
    x_ptr, a_ptr, c_ptr, y_ptr, z_ptr, bias_ptr, flag_ptr, panels, N, I, J, R, K, L,
    s_xn, s_xi, s_xj, s_ai, s_aj, s_ar, s_ak, s_c1, s_c2, s_c3, s_c4, s_y1, s_y2, s_y3, s_y4, s_y5, s_vk, s_vl,
    ROWS: tl.constexpr, AHEAD: tl.constexpr, RING: tl.constexpr, BM: tl.constexpr, BJ: tl.constexpr, BRK: tl.constexpr,
    BIR: tl.constexpr, BL: tl.constexpr, WEIGHT: tl.constexpr, BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Numbered strides are k i r l of C and n k l of y; with WEIGHT they are n k l of g, in the place of C, and panel k i r l of dC."""
    across, over = tl.cdiv(R * K, BRK), tl.cdiv(L, BL)
    first, second = I * across, K * over  # programs of a panel's two stages
    ticket = tl.atomic_add(flag_ptr, 1)
    task = ticket % (first + second)
    is_first = task < first
    panel = ticket // (first + second) - tl.where(is_first, 0, AHEAD)
    if (panel >= 0) & (panel < panels):
        row = panel.to(tl.int64) * ROWS
        rows = tl.minimum(N - panel * ROWS, ROWS)
        p_z = z_ptr + panel % RING * (I * R * K * ROWS)
        made, read = flag_ptr + 1 + panel, flag_ptr + 1 + panels + panel
        if is_first:
            if panel >= RING:
                _wait(read - RING, second)
            o_rk = task % across * BRK + tl.arange(0, BRK)
            _first(
                x_ptr, a_ptr, p_z, row, rows, task // across, o_rk, N, J, R, K, s_xn, s_xi, s_xj, s_ai, s_aj, s_ar, s_ak,
                ROWS, BM, BJ, PRECISION,
            )  # fmt: skip
            _signal(made)
        else:
            _wait(made, first)
            k, o_l = (task - first) // over, (task - first) % over * BL + tl.arange(0, BL)
            if WEIGHT:
                _second_weight(
                    p_z, c_ptr, y_ptr + panel.to(tl.int64) * s_y1, row, rows, k, o_l, N, I, R, K, L,
                    s_c1, s_c2, s_c3, s_y2, s_y3, s_y4, s_y5,
                    ROWS, BM, BIR, BL, PRECISION,
                )  # fmt: skip
            else:
                _second(
                    p_z, c_ptr, y_ptr, bias_ptr, row, rows, k, o_l, N, I, R, K, L,
                    s_c1, s_c2, s_c3, s_c4, s_y1, s_y2, s_y3, s_vk, s_vl, ROWS, BM, BIR, BIAS, PRECISION,
                )  # fmt: skip
            _signal(read)


def _scratch(sizes: dict[str, int], cut: Config) -> int:
    """Elements of z that exist at once, in slots of one panel each."""
    return (cut["AHEAD"] + 2) * cut["ROWS"] * sizes["i"] * sizes["r"] * sizes["k"]


@functools.lru_cache(maxsize=1024)
def _space(known: Sizes) -> tuple[Config, ...]:
    """Ways to cut whose slots stay in L2 and whose cores fit shared memory, those with long panels first."""
    sizes, found = dict(known), []
    inner, outer = block(sizes["j"], 16, MOST), block(sizes["i"] * sizes["r"], 16, MOST)
    wide, across = block(sizes["r"] * sizes["k"], 16, MOST), block(sizes["l"], 16, 64)
    for rows, ahead, m in itertools.product((2048, 1024, 512, 256, 128), (1, 2), (64, 128)):
        for warps, stages in itertools.product((8, 4), (2, 3)):
            cut = config(ROWS=rows, AHEAD=ahead, BM=m, BRK=wide, BL=across, warps=warps, stages=stages)
            shared = 2 * max(inner * wide + stages * m * inner + m * wide, outer * across + stages * m * outer)
            if 2 * _scratch(sizes, cut) <= SCRATCH and tuning.fits(max(m * wide, outer * across), shared):
                found.append(cut)
    return tuple(found)


def fits(sizes: dict[str, int]) -> bool:
    """Whether cores are held whole and the slots of some panels stay in L2."""
    return max(sizes["j"], sizes["i"] * sizes["r"]) <= MOST and bool(_space(tuple(sizes.items())))


def moved(sizes: dict[str, int], weight: bool) -> int:
    """Elements read and written, mostly in L2, with the usual cut."""
    n, i, j, r, k, l = sizes.values()
    cut = _space(tuple(sizes.items()))[0]
    panels, both = ceil_div(n, cut["ROWS"]), n * (ceil_div(r * k, cut["BRK"]) * i * j + (1 + ceil_div(l, cut["BL"])) * i * r * k + k * l)
    return both + panels * (i * j * r * k + (4 if weight else 1) * k * i * r * l)  # parts of dC in fp32, written and read


def run(x: Tensor, a: Tensor, c: Tensor, y: Tensor, sizes: dict[str, int], weight: bool = False, bias: Tensor | None = None) -> None:
    """Fill y (n, k, l) from x (n, i, j), a (i, j, r, k), c (k, i, r, l) and bias (k, l), of any strides.

    With `weight`, c is g (n, k, l), and y (panels, k, i, r, l) gets a part of the sum over rows from each of the `panels`.
    """
    cut, count = _cut(x, sizes), panels(x, sizes)
    z, flags = x.new_empty(_scratch(sizes, cut)), torch.zeros(1 + 2 * count, dtype=torch.int32, device=x.device)
    of_panel = sizes["i"] * ceil_div(sizes["r"] * sizes["k"], cut["BRK"]) + sizes["k"] * ceil_div(sizes["l"], cut["BL"])
    launch(
        _panels_kernel, ((count + cut["AHEAD"]) * of_panel,), x, a, c, y, z, x if bias is None else bias, flags, count, *sizes.values(),
        *x.stride(), *a.stride(), *_padded(c.stride(), 4), *_padded(y.stride(), 5), *((0, 0) if bias is None else bias.stride()),
        cut=cut, RING=cut["AHEAD"] + 2, BJ=block(sizes["j"], 16, MOST), BIR=block(sizes["i"] * sizes["r"], 16, MOST), WEIGHT=weight,
        BIAS=bias is not None, PRECISION=precision(x),
    )  # fmt: skip


def panels(x: Tensor, sizes: dict[str, int]) -> int:
    """How many there are."""
    return ceil_div(sizes["n"], _cut(x, sizes)["ROWS"])


def _cut(x: Tensor, sizes: dict[str, int]) -> Config:
    space = functools.partial(_space, tuple(sizes.items()))
    return tuning.cut("chain_panels", x, sizes, lambda: space()[0], space)


def _padded(strides: Sequence[int], count: int) -> tuple[int, ...]:
    return (*strides, *[0] * (count - len(strides)))
