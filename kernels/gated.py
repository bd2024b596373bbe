"""gated: h = f(x W) ∘ (x V), two products of one input and what joins them, in one pass; f none: the bilinear layer.

    u[n, e] = Σ_d x[n, d] W[d, e]      v[n, e] = Σ_d x[n, d] V[d, e]      h = f(u) v

A program makes one block of h: it reads x once for both products, keeps u and v in registers, and writes neither. f is one of
`pointwise.ACTIVATIONS`: silu gives SwiGLU, gelu GEGLU, none the bilinear layer of Pearce et al. (arXiv:2410.08417).

Gradients make u and v again, in one kernel that writes du = g ∘ v ∘ f'(u) and dv = g ∘ f(u); what remains are plain matrix products,
dx = du Wᵀ + dv Vᵀ, dW = xᵀ du, dV = xᵀ dv, which torch runs.
"""

import functools
import itertools
import math
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
from tn_kernels.views import Unfit, check_dtype, check_result, order_of, shape_of, view


@triton.jit
def _both(
    x_ptr, w_ptr, v_ptr, o_n, o_e, N, D, E, s_xn, s_xd, s_wd, s_we, s_vd, s_ve,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of u and of v, in fp32."""
    u, v = tl.zeros((BN, BE), tl.float32), tl.zeros((BN, BE), tl.float32)
    m_n, m_e = (o_n < N)[:, None], (o_e < E)[None, :]
    for d in range(0, D, BD):
        o_d = d + tl.arange(0, BD)
        b_x = tl.load(x_ptr + o_n[:, None] * s_xn + o_d[None, :] * s_xd, mask=m_n & (o_d < D)[None, :], other=0.0)
        m_d = (o_d < D)[:, None] & m_e
        b_w = tl.load(w_ptr + o_d[:, None] * s_wd + o_e[None, :] * s_we, mask=m_d, other=0.0)
        u = tl.dot(b_x, b_w, u, input_precision=PRECISION)
        b_v = tl.load(v_ptr + o_d[:, None] * s_vd + o_e[None, :] * s_ve, mask=m_d, other=0.0)
        v = tl.dot(b_x, b_v, v, input_precision=PRECISION)
    return u, v


@triton.jit
def _forward_kernel(
    x_ptr, w_ptr, v_ptr, h_ptr, N, D, E, s_xn, s_xd, s_wd, s_we, s_vd, s_ve,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # Blocks of one group of rows are neighbours in the grid: x is read from L2.
    blocks = tl.cdiv(E, BE)
    o_n = (tl.program_id(0) // blocks).to(tl.int64) * BN + tl.arange(0, BN)
    o_e = tl.program_id(0) % blocks * BE + tl.arange(0, BE)
    u, v = _both(x_ptr, w_ptr, v_ptr, o_n, o_e, N, D, E, s_xn, s_xd, s_wd, s_we, s_vd, s_ve, BN, BD, BE, PRECISION)
    h = activate(u, KIND) * v
    tl.store(h_ptr + o_n[:, None] * E + o_e[None, :], h.to(h_ptr.dtype.element_ty), mask=(o_n < N)[:, None] & (o_e < E)[None, :])


@triton.jit
def _backward_kernel(
    x_ptr, w_ptr, v_ptr, g_ptr, du_ptr, dv_ptr, N, D, E, s_xn, s_xd, s_wd, s_we, s_vd, s_ve, s_gn, s_ge,
    BN: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr, KIND: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(E, BE)
    o_n = (tl.program_id(0) // blocks).to(tl.int64) * BN + tl.arange(0, BN)
    o_e = tl.program_id(0) % blocks * BE + tl.arange(0, BE)
    mask = (o_n < N)[:, None] & (o_e < E)[None, :]
    u, v = _both(x_ptr, w_ptr, v_ptr, o_n, o_e, N, D, E, s_xn, s_xd, s_wd, s_we, s_vd, s_ve, BN, BD, BE, PRECISION)
    g = tl.load(g_ptr + o_n[:, None] * s_gn + o_e[None, :] * s_ge, mask=mask, other=0.0).to(tl.float32)
    offsets = o_n[:, None] * E + o_e[None, :]
    tl.store(du_ptr + offsets, (g * v * slope(u, KIND)).to(du_ptr.dtype.element_ty), mask=mask)
    tl.store(dv_ptr + offsets, (g * activate(u, KIND)).to(dv_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=1024)
def _space(n: int, d: int, e: int, width: int) -> tuple[Config, ...]:
    """Blocks whose two accumulators fit."""
    extents = ((n, (32, 64, 128)), (e, (32, 64, 128)), (d, (32, 64)))
    found = []
    for rows, columns, inner in itertools.product(*(sorted({block(size, 16, most) for most in mosts}) for size, mosts in extents)):
        for warps, stages in itertools.product((4, 8), (2, 3, 4)):
            if tuning.fits(2 * rows * columns, stages * width * inner * (rows + 2 * columns)):
                found.append(config(BN=rows, BD=inner, BE=columns, warps=warps, stages=stages))
    return tuple(found)


def _cut(x: Tensor, e: int) -> Config:
    (n, d), width = x.shape, x.element_size()

    def heuristic() -> Config:
        rows, inner = (128, 64) if width == 2 else (64, 32)
        return config(BN=block(n, 16, rows), BD=block(d, 16, inner), BE=block(e, 16, 64), warps=8, stages=3)

    return tuning.cut("gated", x, {"n": n, "d": d, "e": e}, heuristic, lambda: _space(n, d, e, width))


def _check(x: Tensor, w: Tensor, v: Tensor, activation: str) -> None:
    if x.dim() != 2 or w.dim() != 2 or w.shape != v.shape or x.shape[1] != w.shape[0]:
        raise OperatorError(f"gated of x {tuple(x.shape)}, w {tuple(w.shape)}, v {tuple(v.shape)}: expected (n d), (d e), (d e)")
    if not x.dtype == w.dtype == v.dtype:
        raise OperatorError(f"gated of {x.dtype}, {w.dtype} and {v.dtype}: expected one dtype")
    check_activation(activation)


def forward(x: Tensor, w: Tensor, v: Tensor, activation: str) -> Tensor:
    """The kernel: x (n, d), w (d, e), v (d, e) of any strides → (n, e), contiguous."""
    _check(x, w, v, activation)
    (n, d), e = x.shape, w.shape[1]
    h = x.new_empty(n, e)
    if h.numel():
        cut = _cut(x, e)
        launch(
            _forward_kernel, (ceil_div(n, cut["BN"]) * ceil_div(e, cut["BE"]),), x, w, v, h, n, d, e, *x.stride(), *w.stride(), *v.stride(),
            cut=cut, KIND=activation, PRECISION=precision(x),
        )  # fmt: skip
    return h


def reference(x: Tensor, w: Tensor, v: Tensor, activation: str) -> Tensor:
    """The same in torch."""
    _check(x, w, v, activation)
    return ACTIVATIONS[activation](x @ w) * (x @ v)


def shapes(x: Tensor, w: Tensor, v: Tensor, activation: str) -> Tensor:
    """The result without numbers."""
    return x.new_empty(x.shape[0], w.shape[1])


def backward(g: Tensor, inputs: list[Any], results: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """Gradients of x, w, v from g (n, e)."""
    x, w, v, activation = inputs
    (n, d), e = x.shape, w.shape[1]
    du, dv = x.new_empty(n, e), x.new_empty(n, e)
    if du.numel():
        cut = _cut(x, e)
        launch(
            _backward_kernel, (ceil_div(n, cut["BN"]) * ceil_div(e, cut["BE"]),), x, w, v, g, du, dv, n, d, e,
            *x.stride(), *w.stride(), *v.stride(), *g.stride(), cut=cut, KIND=activation, PRECISION=precision(x),
        )  # fmt: skip
    return [
        torch.addmm(du @ w.mT, dv, v.mT) if needs[0] else None,
        x.mT @ du if needs[1] else None,
        x.mT @ dv if needs[2] else None,
    ]


_operator = Operator("gated", forward=forward, reference=reference, shapes=shapes, backward=backward)


def gated(x: Tensor, w: Tensor, v: Tensor, activation: str = "none") -> Tensor:
    """h = f(x W) ∘ (x V).

    Args:
        x: (n, d). w, v: (d, e). Any strides, one dtype.
        activation: one of `pointwise.ACTIVATIONS`; "none" is the bilinear layer.

    Returns:
        (n, e). Raises OperatorError for shapes or dtypes that do not belong together, or an unknown activation.
    """
    return _operator(x, w, v, activation)


def ask(region: Region) -> Offer | Refusal:
    """Offers for a "gated" region: operands x (n d), w (d e), v (d e), option activation."""
    if region.what != "gated" or len(region.operands) != 3:
        return Refusal("gated", f"takes a gated product of x, w and v, this is a {region.what} of {len(region.operands)}")
    x, w, v = (set(layout.axes) for layout in region.operands)
    size, activation = region.size, str(region.option.get("activation", "none"))
    try:
        check_dtype(region, DTYPES)
        check_activation(activation)
        if w != v or x - w != set(region.out) - w or not w - x <= set(region.out):
            raise Unfit("x has rows and the contracted axes, w and v the contracted and the kept axes, the result rows and kept axes")
        layouts = [*region.operands, Layout.dense(region.out, size)]
        roles = [order_of([axis for axis in size if axis in role], layouts, size) for role in (x - w, x & w, w - x)]
        check_result(region, [roles[0], roles[2]])
        see_x = view(region.operands[0], roles[:2], region)
        see_w, see_v = (view(layout, roles[1:], region) for layout in region.operands[1:])
        shape = shape_of(region)
    except (Unfit, OperatorError) as unfit:
        return Refusal("gated", str(unfit))

    def run(x: Tensor, w: Tensor, v: Tensor) -> Tensor:
        return gated(see_x(x), see_w(w), see_v(v), activation).reshape(shape)

    sizes = dict(zip("nde", (math.prod(size[axis] for axis in role) for role in roles), strict=True))
    return Offer("gated", run, tuning.case("gated", sizes, region.dtype))


register("gated", ask, tuning.tune)
