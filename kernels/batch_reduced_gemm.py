"""batch_reduced_gemm: C[m, n] = Σ_b Σ_k A[b, m, k] B[b, k, n]: a batch of matrix products that is summed.

It is the gradient of a core that is broadcast over a batch, and any contraction whose summed axes do not merge into one. Operands have any
strides. A program owns one block of C and a part of the sum: the pairs (b, k) in blocks of BK, in order. FOLD runs b and k as one index,
which pays when k is short. The parts are added afterwards in a fixed order, so results repeat bit by bit; or, when
`deterministic` is False, by atomic additions to one fp32 buffer, which saves the parts' memory.

Gradients are ordinary batched products with a broadcast operand, dA[b] = g B[b]ᵀ and dB[b] = A[b]ᵀ g, which torch runs.
"""

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
from tn_kernels import tuning
from tn_kernels.launch import DTYPES, Config, block, ceil_div, config, launch, precision
from tn_kernels.registration import Operator
from tn_kernels.views import Unfit, check_dtype, check_result, order_of, shape_of, view

PROGRAMS = 256  # about two for each multiprocessor of a large device: the sum is cut into parts until there are that many


@triton.jit
def _kernel(
    a_ptr, b_ptr, c_ptr, BATCH, M, N, K, split, s_ab, s_am, s_ak, s_bb, s_bk, s_bn, s_cp, s_cm,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, FOLD: tl.constexpr, ATOMIC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Steps [part · split, (part + 1) · split) of the sum; without FOLD a step is BK of one b's k, with FOLD it is BK of all (b, k)."""
    across = tl.cdiv(N, BN)
    o_m = tl.program_id(0) // across * BM + tl.arange(0, BM)
    o_n = tl.program_id(0) % across * BN + tl.arange(0, BN)
    m_m, m_n = (o_m < M)[:, None], (o_n < N)[None, :]
    part = tl.program_id(1)
    length = tl.cdiv(K, BK)
    steps = tl.cdiv(BATCH * K, BK) if FOLD else BATCH * length
    total = tl.zeros((BM, BN), tl.float32)
    for step in range(part * split, tl.minimum((part + 1) * split, steps)):
        if FOLD:
            o = step * BK + tl.arange(0, BK)
            o_b, o_k = (o // K).to(tl.int64), o % K
            m_k = o < BATCH * K
            p_a, p_b = o_b * s_ab + o_k.to(tl.int64) * s_ak, o_b * s_bb + o_k.to(tl.int64) * s_bk
        else:
            o_b, o_k = (step // length).to(tl.int64), step % length * BK + tl.arange(0, BK)
            m_k = o_k < K
            p_a, p_b = o_b * s_ab + o_k.to(tl.int64) * s_ak, o_b * s_bb + o_k.to(tl.int64) * s_bk
        b_a = tl.load(a_ptr + o_m[:, None] * s_am + p_a[None, :], mask=m_m & m_k[None, :], other=0.0)
        b_b = tl.load(b_ptr + p_b[:, None] + o_n[None, :] * s_bn, mask=m_k[:, None] & m_n, other=0.0)
        total = tl.dot(b_a, b_b, total, input_precision=PRECISION)
    p_c = c_ptr + part * s_cp + o_m[:, None] * s_cm + o_n[None, :]
    if ATOMIC:
        tl.atomic_add(p_c, total, mask=m_m & m_n)
    else:
        tl.store(p_c, total.to(c_ptr.dtype.element_ty), mask=m_m & m_n)


@functools.lru_cache(maxsize=1024)
def _space(m: int, n: int, k: int, width: int) -> tuple[Config, ...]:
    """Blocks whose accumulator fits."""
    found = []
    extents = ((m, (32, 64, 128)), (n, (32, 64, 128)), (k, (32, 64, 128)))
    for rows, columns, inner in itertools.product(*(sorted({block(size, 16, most) for most in mosts}) for size, mosts in extents)):
        for warps, stages in itertools.product((4, 8), (2, 3, 4)):
            if tuning.fits(rows * columns, stages * width * inner * (rows + columns)):
                found.append(config(BM=rows, BN=columns, BK=inner, warps=warps, stages=stages))
    return tuple(found)


def _sizes(a: Tensor, b: Tensor) -> dict[str, int]:
    if a.dim() != 3 or b.dim() != 3 or a.shape[0] != b.shape[0] or a.shape[2] != b.shape[1]:
        raise OperatorError(f"batch_reduced_gemm of a {tuple(a.shape)} and b {tuple(b.shape)}: expected (b m k) and (b k n)")
    if a.dtype != b.dtype:
        raise OperatorError(f"batch_reduced_gemm of {a.dtype} and {b.dtype}: expected one dtype")
    return dict(zip("bmkn", (*a.shape, b.shape[2]), strict=True))


def forward(a: Tensor, b: Tensor, deterministic: bool) -> Tensor:
    """The kernel: a (b, m, k), b (b, k, n) of any strides → (m, n), contiguous."""
    sizes = _sizes(a, b)
    batch, m, k, n = sizes.values()
    if not a.numel() or not b.numel():
        return a.new_zeros(m, n)
    fold = k < 32  # a block of k would be mostly padding
    width = a.element_size()

    def heuristic() -> Config:
        inner = block(batch * k if fold else k, 16, 64)
        return config(BM=block(m, 16, 64), BN=block(n, 16, 64), BK=inner, warps=4, stages=3)

    cut = tuning.cut("batch_reduced_gemm", a, sizes, heuristic, lambda: _space(m, n, batch * k if fold else k, width))
    blocks = ceil_div(m, cut["BM"]) * ceil_div(n, cut["BN"])
    steps = ceil_div(batch * k, cut["BK"]) if fold else batch * ceil_div(k, cut["BK"])
    split = ceil_div(steps, max(1, min(ceil_div(PROGRAMS, blocks), steps // 4)))
    parts = ceil_div(steps, split)
    atomic = parts > 1 and not deterministic
    if atomic:
        made = a.new_zeros(1, m, n, dtype=torch.float32)
    else:
        made = a.new_empty(parts, m, n, dtype=a.dtype if parts == 1 else torch.float32)
    s_part = 0 if atomic else made.stride(0)
    launch(
        _kernel, (blocks, parts), a, b, made, batch, m, n, k, split, *a.stride(), *b.stride(), s_part, made.stride(1),
        cut=cut, FOLD=fold, ATOMIC=atomic, PRECISION=precision(a),
    )  # fmt: skip
    return made[0].to(a.dtype) if made.shape[0] == 1 else made.sum(0).to(a.dtype)


def reference(a: Tensor, b: Tensor, deterministic: bool) -> Tensor:
    """The same as one torch matrix product over the merged summed axes."""
    batch, m, k, n = _sizes(a, b).values()
    return a.permute(1, 0, 2).reshape(m, batch * k) @ b.reshape(batch * k, n)


def shapes(a: Tensor, b: Tensor, deterministic: bool) -> Tensor:
    """The result without numbers."""
    return a.new_empty(a.shape[1], b.shape[2])


def backward(g: Tensor, inputs: list[Any], results: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """Gradients of a and b from g (m, n)."""
    a, b, _ = inputs
    everywhere = g.expand(a.shape[0], *g.shape)
    return [torch.bmm(everywhere, b.mT) if needs[0] else None, torch.bmm(a.mT, everywhere) if needs[1] else None]


_operator = Operator("batch_reduced_gemm", forward=forward, reference=reference, shapes=shapes, backward=backward)


def batch_reduced_gemm(a: Tensor, b: Tensor, *, deterministic: bool = True) -> Tensor:
    """C[m, n] = Σ_b Σ_k a[b, m, k] b[b, k, n].

    Args:
        a: (b, m, k). b: (b, k, n). Any strides, one dtype.
        deterministic: add the parts of the sum in a fixed order; otherwise by atomic additions, in less memory.

    Returns:
        (m, n). Raises OperatorError for shapes or dtypes that do not belong together.
    """
    return _operator(a, b, deterministic)


def ask(region: Region) -> Offer | Refusal:
    """Offers for a contraction of two tensors without a batch whose summed axes are one or two dimensions of both."""
    name = "batch_reduced_gemm"
    if region.what != "contraction" or len(region.operands) != 2:
        return Refusal(name, f"takes a contraction of two tensors, this is a {region.what} of {len(region.operands)}")
    size, (left, right) = region.size, region.operands
    on_left, on_right, on_out = set(left.axes), set(right.axes), set(region.out)
    try:
        check_dtype(region, DTYPES)
        alone = [axis for axis in size if size[axis] != 1 and (axis in on_left) + (axis in on_right) + (axis in on_out) != 2]
        if alone:
            raise Unfit(f"axes {' '.join(alone)} are on one tensor alone, or a batch of all three")
        summed = [axis for axis in left.axes if axis in on_right and axis not in on_out]
        layouts = [left, right, Layout.dense(region.out, size)]
        rows, columns = (order_of([axis for axis in region.out if axis in side], layouts, size) for side in (on_left, on_right - on_left))
        swap = not _in_order(rows, columns, region.out, size) and _in_order(columns, rows, region.out, size)
        if swap:  # C transposed is B transposed times A transposed
            left, right, rows, columns = right, left, columns, rows
        check_result(region, [rows, columns])
        outer, inner = _two(summed, [left, right], size)
        see_a, see_b = view(left, [outer, rows, inner], region), view(right, [outer, inner, columns], region)
        shape = shape_of(region)
    except Unfit as unfit:
        return Refusal(name, str(unfit))

    def run(one: Tensor, other: Tensor) -> Tensor:
        a, b = (other, one) if swap else (one, other)
        return batch_reduced_gemm(see_a(a), see_b(b)).reshape(shape)

    sizes = dict(zip("bmkn", (math.prod(size[axis] for axis in role) for role in (outer, rows, inner, columns)), strict=True))
    return Offer(name, run, tuning.case(name, sizes, region.dtype))


def _in_order(first: Sequence[str], second: Sequence[str], out: Sequence[str], size: dict[str, int]) -> bool:
    return [axis for axis in (*first, *second) if size[axis] != 1] == [axis for axis in out if size[axis] != 1]


def _two(summed: list[str], layouts: list[Layout], size: dict[str, int]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The summed axes as (outer, inner) dimensions. Raises Unfit when it takes more than two."""
    strides = dict(zip(layouts[0].axes, layouts[0].strides, strict=True))
    order = sorted(summed, key=lambda axis: -strides[axis])
    for place in range(len(order)):
        try:
            return order_of(order[:place], layouts, size), order_of(order[place:], layouts, size)
        except Unfit:
            continue
    if not order:
        raise Unfit("nothing is summed")
    raise Unfit(f"summed axes {' '.join(order)} are more than two dimensions of the operands")


register("batch_reduced_gemm", ask, tuning.tune)
