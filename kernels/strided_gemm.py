"""strided_gemm: Y[h, m, n] = f(s · Σ_k A[h, m, k] B[h, k, n] + bias[h, n]) ∘ other[h, m, n], every group of axes strided as it lies.

h is up to two axes, m, n and k up to three each, so that a contraction of two tensors needs no copy whatever the order of their axes and of
the result's. An index inside a group becomes an offset by division and remainder; a group of one axis costs neither. f is one of
`pointwise.ACTIVATIONS`; bias, f, the scale s and `other` are applied in fp32 before the result is rounded and written once.

Gradients are strided products of the same kind: with p the product before bias and f, made again where f or `other` needs it, and
d = g ∘ other ∘ f'(s p + bias): dA = s d Bᵀ, dB = s Aᵀ d, dbias = Σ d, dother = g ∘ f(s p + bias).
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
from tn_kernels.pointwise import ACTIVATIONS, activate, check_activation, slope
from tn_kernels.registration import Operator
from tn_kernels.views import Unfit, check_dtype, shape_of, stride_of, view

GROUP = 8  # blocks of rows whose programs are neighbours, so that they share blocks of B in L2


@triton.jit
def _three(o, S2, S3, s_1, s_2, s_3):
    """The offset of an index into a group of three axes, first slowest."""
    o_12 = o // S3
    return ((o_12 // S2) * s_1 + (o_12 % S2) * s_2 + (o % S3) * s_3).to(tl.int64)


@triton.jit
def _kernel(
    a_ptr, b_ptr, y_ptr, bias_ptr, other_ptr, scale, M, N, K, H2, M2, M3, N2, N3, K2, K3,
    s_ah1, s_ah2, s_am1, s_am2, s_am3, s_ak1, s_ak2, s_ak3,
    s_bh1, s_bh2, s_bk1, s_bk2, s_bk3, s_bn1, s_bn2, s_bn3,
    s_yh1, s_yh2, s_ym1, s_ym2, s_ym3, s_yn1, s_yn2, s_yn3,
    s_oh1, s_oh2, s_om1, s_om2, s_om3, s_on1, s_on2, s_on3,
    s_vh1, s_vh2, s_vn1, s_vn2, s_vn3,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUPED: tl.constexpr,
    KIND: tl.constexpr, SLOPE: tl.constexpr, BIAS: tl.constexpr, OTHER: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    down, across = tl.cdiv(M, BM), tl.cdiv(N, BN)
    i_h, i_tile = tl.program_id(0) // (down * across), tl.program_id(0) % (down * across)
    first = i_tile // (GROUPED * across) * GROUPED
    height = tl.minimum(down - first, GROUPED)
    o_m = (first + i_tile % (GROUPED * across) % height) * BM + tl.arange(0, BM)
    o_n = i_tile % (GROUPED * across) // height * BN + tl.arange(0, BN)
    i_1, i_2 = (i_h // H2).to(tl.int64), (i_h % H2).to(tl.int64)
    m_m, m_n = (o_m < M)[:, None], (o_n < N)[None, :]
    p_a = a_ptr + i_1 * s_ah1 + i_2 * s_ah2 + _three(o_m, M2, M3, s_am1, s_am2, s_am3)[:, None]
    p_b = b_ptr + i_1 * s_bh1 + i_2 * s_bh2 + _three(o_n, N2, N3, s_bn1, s_bn2, s_bn3)[None, :]
    total = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        o_k = k + tl.arange(0, BK)
        b_a = tl.load(p_a + _three(o_k, K2, K3, s_ak1, s_ak2, s_ak3)[None, :], mask=m_m & (o_k < K)[None, :], other=0.0)
        b_b = tl.load(p_b + _three(o_k, K2, K3, s_bk1, s_bk2, s_bk3)[:, None], mask=(o_k < K)[:, None] & m_n, other=0.0)
        total = tl.dot(b_a, b_b, total, input_precision=PRECISION)
    total = total * scale
    if BIAS:
        b_v = tl.load(bias_ptr + i_1 * s_vh1 + i_2 * s_vh2 + _three(o_n, N2, N3, s_vn1, s_vn2, s_vn3), mask=o_n < N, other=0.0)
        total += b_v.to(tl.float32)[None, :]
    total = slope(total, KIND) if SLOPE else activate(total, KIND)
    o_rows, o_columns = _three(o_m, M2, M3, s_om1, s_om2, s_om3), _three(o_n, N2, N3, s_on1, s_on2, s_on3)
    if OTHER:
        p_o = other_ptr + i_1 * s_oh1 + i_2 * s_oh2 + o_rows[:, None] + o_columns[None, :]
        total *= tl.load(p_o, mask=m_m & m_n, other=0.0).to(tl.float32)
    p_y = y_ptr + i_1 * s_yh1 + i_2 * s_yh2
    p_y += _three(o_m, M2, M3, s_ym1, s_ym2, s_ym3)[:, None] + _three(o_n, N2, N3, s_yn1, s_yn2, s_yn3)[None, :]
    tl.store(p_y, total.to(y_ptr.dtype.element_ty), mask=m_m & m_n)


@functools.lru_cache(maxsize=1024)
def _space(m: int, n: int, k: int, width: int) -> tuple[Config, ...]:
    """Blocks whose accumulator fits."""
    found = []
    extents = ((m, (32, 64, 128)), (n, (32, 64, 128, 256)), (k, (32, 64)))
    for rows, columns, inner in itertools.product(*(sorted({block(size, 16, most) for most in mosts}) for size, mosts in extents)):
        for warps, stages in itertools.product((4, 8), (2, 3, 4)):
            if tuning.fits(rows * columns, stages * width * inner * (rows + columns)):
                found.append(config(BM=rows, BN=columns, BK=inner, warps=warps, stages=stages))
    return tuple(found)


def _shape(a: Tensor, b: Tensor, bias: Tensor | None, other: Tensor | None) -> tuple[int, ...]:
    """Sizes of the result's eight dimensions. Raises OperatorError when the operands do not belong together."""
    if a.dim() != 8 or b.dim() != 8 or a.shape[:2] != b.shape[:2] or a.shape[5:] != b.shape[2:5]:
        raise OperatorError(f"strided_gemm of a {tuple(a.shape)} and b {tuple(b.shape)}: expected (h h m m m k k k) and (h h k k k n n n)")
    shape = (*a.shape[:5], *b.shape[5:])
    for name, tensor, wanted in (("bias", bias, (*shape[:2], *shape[5:])), ("other", other, shape)):
        if tensor is not None and tuple(tensor.shape) != wanted:
            raise OperatorError(f"strided_gemm with {name} {tuple(tensor.shape)}: expected {wanted}")
    found = {tensor.dtype for tensor in (a, b, bias, other) if tensor is not None}
    if len(found) > 1:
        raise OperatorError(f"strided_gemm of {' and '.join(sorted(map(str, found)))}: expected one dtype")
    return shape


def _result(a: Tensor, shape: Sequence[int], order: Sequence[int]) -> Tensor:
    """Fresh memory for the result, its dimensions in memory in this order."""
    if sorted(order) != list(range(8)):
        raise OperatorError(f"order {list(order)}: expected a permutation of the result's eight dimensions")
    memory = a.new_empty([shape[place] for place in order])
    return memory.permute([list(order).index(place) for place in range(8)])


def forward(a: Tensor, b: Tensor, bias: Tensor | None, other: Tensor | None, scale: float, activation: str, order: Sequence[int]) -> Tensor:
    """The kernel: a (h h m m m k k k), b (h h k k k n n n), bias (h h n n n), other like the result → (h h m m m n n n)."""
    return _run(a, b, bias, other, scale, activation, order)


NATURAL = tuple(range(8))


def _run(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    scale: float = 1.0,
    activation: str = "none",
    order: Sequence[int] = NATURAL,
    slope: bool = False,
) -> Tensor:
    """`slope` puts the derivative of the activation where the activation stands."""
    shape = _shape(a, b, bias, other)
    check_activation(activation)
    y = _result(a, shape, order)
    if not y.numel():
        return y
    h, m, n, k = (math.prod(sizes) for sizes in (shape[:2], shape[2:5], shape[5:], a.shape[5:]))
    width = a.element_size()

    def heuristic() -> Config:
        rows, columns = block(m, 16, 128), block(n, 16, 128)
        return config(BM=rows, BN=columns, BK=block(k, 16, 128 // width), warps=8 if rows * columns > 1 << 13 else 4, stages=3)

    cut = tuning.cut("strided_gemm", a, {"h": h, "m": m, "n": n, "k": k}, heuristic, lambda: _space(m, n, k, width))
    s_other = y.stride() if other is None else other.stride()
    s_bias = (0, 0, 0, 0, 0) if bias is None else bias.stride()
    grid = (h * ceil_div(m, cut["BM"]) * ceil_div(n, cut["BN"]),)
    launch(
        _kernel, grid, a, b, y, a if bias is None else bias, a if other is None else other,
        float(scale), m, n, k, shape[1], *shape[3:5], *shape[6:], *a.shape[6:], *a.stride(), *b.stride(), *y.stride(), *s_other, *s_bias,
        cut=cut, GROUPED=GROUP, KIND=activation, SLOPE=slope, BIAS=bias is not None, OTHER=other is not None, PRECISION=precision(a),
    )  # fmt: skip
    return y


def reference(
    a: Tensor, b: Tensor, bias: Tensor | None, other: Tensor | None, scale: float, activation: str, order: Sequence[int]
) -> Tensor:
    """The same in torch."""
    shape = _shape(a, b, bias, other)
    check_activation(activation)
    (h, m, n, k) = (math.prod(sizes) for sizes in (shape[:2], shape[2:5], shape[5:], a.shape[5:]))
    y = (scale * torch.bmm(a.reshape(h, m, k), b.reshape(h, k, n))).reshape(shape)
    y = ACTIVATIONS[activation](y if bias is None else y + bias[:, :, None, None, None])
    y = y if other is None else y * other
    order = list(order)
    return y.permute(order).contiguous().permute([order.index(place) for place in range(8)])


def shapes(a: Tensor, b: Tensor, bias: Tensor | None, other: Tensor | None, scale: float, activation: str, order: Sequence[int]) -> Tensor:
    """The result without numbers."""
    return _result(a, _shape(a, b, bias, other), order)


def backward(g: Tensor, inputs: list[Any], results: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """Gradients of the operands that are tensors, from g like the result."""
    a, b, bias, other, scale, activation, _ = inputs
    need = iter(needs)
    need_a, need_b = next(need), next(need)
    need_bias, need_other = bias is not None and next(need), other is not None and next(need)
    d = g if other is None else g * other
    if activation != "none":
        d = _run(a, b, bias, d, scale, activation, slope=True)
    made: list[Tensor | None] = [
        _run(d, b.permute(0, 1, 5, 6, 7, 2, 3, 4), scale=scale) if need_a else None,
        _run(a.permute(0, 1, 5, 6, 7, 2, 3, 4), d, scale=scale) if need_b else None,
    ]
    if bias is not None:
        made.append(d.float().sum((2, 3, 4)).to(g.dtype) if need_bias else None)
    if other is not None:
        made.append(_run(a, b, bias, g, scale, activation) if need_other else None)
    return made


_operator = Operator("strided_gemm", forward=forward, reference=reference, shapes=shapes, backward=backward)


def strided_gemm(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    other: Tensor | None = None,
    scale: float = 1.0,
    activation: str = "none",
    order: Sequence[int] = NATURAL,
) -> Tensor:
    """f(scale · Σ_k a b + bias) ∘ other, in groups of axes: h of two, m, n and k of three each; missing ones have size 1.

    Args:
        a: (h, h, m, m, m, k, k, k). b: (h, h, k, k, k, n, n, n). Any strides, 0 among them; one dtype for all operands.
        bias: (h, h, n, n, n), or (n, n, n) for every h. other: like the result.
        activation: one of `pointwise.ACTIVATIONS`.
        order: dimensions of the result in memory, slowest first.

    Returns:
        (h, h, m, m, m, n, n, n). Raises OperatorError for operands that do not belong together.
    """
    if bias is not None and bias.dim() == 3:
        bias = bias.expand(*a.shape[:2], *bias.shape)
    return _operator(a, b, bias, other, scale, activation, list(order))


def ask(region: Region) -> Offer | Refusal:
    """Offers for a contraction of two tensors whose groups merge into few enough axes.

    Options: bias, other (True when such an operand follows the two), scale, activation.
    """
    name, option, size = "strided_gemm", region.option, region.size
    extra = [key for key in ("bias", "other") if option.get(key)]
    if region.what != "contraction" or len(region.operands) != 2 + len(extra):
        return Refusal(name, f"takes a contraction of two tensors, this is a {region.what} of {len(region.operands)}")
    left, right, *rest = region.operands
    along = {axis for axis in rest[0].axes if size[axis] != 1} if option.get("bias") else set()
    swap = bool(along & set(left.axes) - set(right.axes))  # a bias goes along columns: A B transposed is B transposed times A transposed
    left, right = (right, left) if swap else (left, right)
    on_left, on_right, on_out = set(left.axes), set(right.axes), set(region.out)
    try:
        check_dtype(region, DTYPES)
        if along - on_right:
            raise Unfit(f"a bias along {' '.join(sorted(along))}, which are on both sides of the product")
        check_activation(str(option.get("activation", "none")))
        wide = [axis for axis in size if size[axis] != 1]
        alone = [axis for axis in wide if (axis in on_left) + (axis in on_right) + (axis in on_out) < 2]
        if alone:
            raise Unfit(f"axes {' '.join(alone)} are on one tensor alone")
        result = Layout.dense(region.out, size)
        members = (on_left & on_right & on_out, (on_left - on_right) & on_out, (on_right - on_left) & on_out, (on_left & on_right) - on_out)
        groups = [
            _group([axis for axis in wide if axis in member], [result, left, right, *rest], size, limit)
            for member, limit in zip(members, (2, 3, 3, 3), strict=True)
        ]
        batch, rows, columns, summed = groups
        roles = [*batch, *rows, *columns]
        see_a, see_b = view(left, [*batch, *rows, *summed], region), view(right, [*batch, *summed, *columns], region)
        sees = {key: view(layout, [*batch, *columns] if key == "bias" else roles, region) for key, layout in zip(extra, rest, strict=True)}
        shape = shape_of(region)
    except (Unfit, OperatorError) as unfit:
        return Refusal(name, str(unfit))
    place = {axis: at for at, axis in enumerate(region.out)}
    order = sorted(range(8), key=lambda role: place[roles[role][0]] if roles[role] else -1)
    back = sorted((axis for axis in region.out if size[axis] != 1), key=lambda axis: place[axis])
    assert back == [axis for role in order for axis in roles[role]]
    scale, activation = float(option.get("scale", 1.0)), str(option.get("activation", "none"))

    def run(one: Tensor, two: Tensor, *more: Tensor) -> Tensor:
        a, b = (two, one) if swap else (one, two)
        given = {key: see(tensor) for (key, see), tensor in zip(sees.items(), more, strict=True)}
        y = strided_gemm(see_a(a), see_b(b), scale=scale, activation=activation, order=order, **given)
        return y.permute(order).reshape(shape)

    sizes = {role: math.prod(size[axis] for part in group for axis in part) for role, group in zip("hmnk", groups, strict=True)}
    return Offer(name, run, tuning.case(name, sizes, region.dtype))


def _group(axes: list[str], layouts: Sequence[Layout], size: dict[str, int], limit: int) -> list[tuple[str, ...]]:
    """The axes as `limit` dimensions, padded with empty ones: neighbours merge where they are one dimension of every tensor that has them.

    The first tensor that has them gives the order, so that a group's fastest index is fast in memory. Raises Unfit when it takes more.
    """
    having = [layout for layout in layouts if set(axes) & set(layout.axes)]
    if not axes:
        return [()] * limit
    strides = dict(zip(having[0].axes, having[0].strides, strict=True))
    parts: list[tuple[str, ...]] = []
    for axis in sorted(axes, key=lambda axis: -strides.get(axis, 0)):
        if parts and all(stride_of((*parts[-1], axis), layout, size) is not None for layout in having):
            parts[-1] = (*parts[-1], axis)
        else:
            parts.append((axis,))
    if len(parts) > limit:
        raise Unfit(f"axes {' '.join(axes)} are {len(parts)} dimensions, at most {limit} are merged")
    return parts + [()] * (limit - len(parts))


register("strided_gemm", ask, tuning.tune)
