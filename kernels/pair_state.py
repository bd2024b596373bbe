"""pair_write and pair_read: the state of attention in linear time, and each the other's gradient.

    write: U[p, a, b, c] = Σ_t x[p, t, a] y[p, t, b] z[p, t, c]
    read:  o[p, t, c] = Σ_ab x[p, t, a] y[p, t, b] S[p, a, b, c]

With keys as x and y and values as z, U is Σ_t k⊗k⊗v; queries read it. The products x⊗y, a·b numbers a token, are made column by column of
x in registers and never stored: o = Σ_a (x[:, a] ∘ y) S[a]. Exchanging axes of U and S gives every gradient as another read or write:

    of write, with U' the gradient: dx = read(y, z, U'[b, c, a]), dy = read(x, z, U'[a, c, b]), dz = read(x, y, U')
    of read, with g: dS = write(x, y, g), dx = read(y, g, S[b, c, a]), dy = read(x, g, S[a, c, b])
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tn.operators import OperatorError
from tn_kernels import tuning
from tn_kernels.launch import Config, block, ceil_div, config, launch, precision
from tn_kernels.registration import Operator

MOST_WIDTH = 256


@triton.jit
def _write_kernel(
    x_ptr, y_ptr, z_ptr, u_ptr, T, A, B, C, s_xp, s_xt, s_xa, s_yp, s_yt, s_yb, s_zp, s_zt, s_zc, s_up, s_ua, s_ub,
    BT: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """U[p, a] for one p and one a, over all t."""
    i_p, i_a = (tl.program_id(0) // A).to(tl.int64), tl.program_id(0) % A
    o_b, o_c = tl.arange(0, BB), tl.arange(0, BC)
    p_x = x_ptr + i_p * s_xp + i_a * s_xa
    p_y, p_z = y_ptr + i_p * s_yp + o_b[None, :] * s_yb, z_ptr + i_p * s_zp + o_c[None, :] * s_zc
    total = tl.zeros((BB, BC), tl.float32)
    for t in range(0, T, BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < T
        b_x = tl.load(p_x + o_t * s_xt, mask=m_t, other=0.0).to(tl.float32)
        b_y = tl.load(p_y + o_t[:, None] * s_yt, mask=m_t[:, None] & (o_b < B)[None, :], other=0.0).to(tl.float32)
        b_z = tl.load(p_z + o_t[:, None] * s_zt, mask=m_t[:, None] & (o_c < C)[None, :], other=0.0)
        b_xy = (b_x[:, None] * b_y).to(b_z.dtype)
        total = tl.dot(tl.trans(b_xy), b_z, total, input_precision=PRECISION)
    p_u = u_ptr + i_p * s_up + i_a * s_ua + o_b[:, None] * s_ub + o_c[None, :]
    tl.store(p_u, total.to(u_ptr.dtype.element_ty), mask=(o_b < B)[:, None] & (o_c < C)[None, :])


@triton.jit
def _read_kernel(
    x_ptr, y_ptr, s_ptr, o_ptr, T, A, B, C, s_xp, s_xt, s_xa, s_yp, s_yt, s_yb, s_sp, s_sa, s_sb, s_sc, s_op, s_ot,
    BT: tl.constexpr, BB: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o[p, t] for one p and a block of t, over all a."""
    blocks = tl.cdiv(T, BT)
    i_p, o_t = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks * BT + tl.arange(0, BT)
    o_b, o_c = tl.arange(0, BB), tl.arange(0, BC)
    m_t, m_s = o_t < T, (o_b < B)[:, None] & (o_c < C)[None, :]
    p_x, p_s = x_ptr + i_p * s_xp + o_t * s_xt, s_ptr + i_p * s_sp + o_b[:, None] * s_sb + o_c[None, :] * s_sc
    p_y = y_ptr + i_p * s_yp + o_t[:, None] * s_yt + o_b[None, :] * s_yb
    b_y = tl.load(p_y, mask=m_t[:, None] & (o_b < B)[None, :], other=0.0).to(tl.float32)
    total = tl.zeros((BT, BC), tl.float32)
    for a in range(A):
        b_x = tl.load(p_x + a * s_xa, mask=m_t, other=0.0).to(tl.float32)
        b_s = tl.load(p_s + a * s_sa, mask=m_s, other=0.0)
        total = tl.dot((b_x[:, None] * b_y).to(b_s.dtype), b_s, total, input_precision=PRECISION)
    p_o = o_ptr + i_p * s_op + o_t[:, None] * s_ot + o_c[None, :]
    tl.store(p_o, total.to(o_ptr.dtype.element_ty), mask=m_t[:, None] & (o_c < C)[None, :])


def _cut(kernel: str, t: int, tensor: Tensor, widths: tuple[int, int, int]) -> Config:
    problem = dict(zip("tabc", (t, *widths), strict=True))
    space = [config(BT=block(t, 16, most), warps=warps, stages=stages) for most in (32, 64, 128) for warps in (4, 8) for stages in (2, 3)]
    return tuning.cut(kernel, tensor, problem, lambda: config(BT=block(t, 16, 64), warps=4, stages=2), lambda: space)


def _check(name: str, one: Tensor, two: Tensor, third: Tensor, fits: bool) -> None:
    shapes = [tuple(tensor.shape) for tensor in (one, two, third)]
    if not fits:
        expected = "(p t a), (p t b), (p t c)" if name == "pair_write" else "(p t a), (p t b), (p a b c)"
        raise OperatorError(f"{name} of {shapes[0]}, {shapes[1]}, {shapes[2]}: expected {expected}")
    if not one.dtype == two.dtype == third.dtype:
        raise OperatorError(f"{name} of {one.dtype}, {two.dtype} and {third.dtype}: expected one dtype")
    if max(*shapes[1][2:], *shapes[2][-1:]) > MOST_WIDTH:
        raise OperatorError(f"{name} of {shapes[0]}, {shapes[1]}, {shapes[2]}: widths b and c up to {MOST_WIDTH}")


def _check_write(x: Tensor, y: Tensor, z: Tensor) -> None:
    _check("pair_write", x, y, z, x.dim() == y.dim() == z.dim() == 3 and x.shape[:2] == y.shape[:2] == z.shape[:2])


def _check_read(x: Tensor, y: Tensor, s: Tensor) -> None:
    fits = x.dim() == y.dim() == 3 and s.dim() == 4 and x.shape[:2] == y.shape[:2]
    _check("pair_read", x, y, s, fits and s.shape[:3] == (x.shape[0], x.shape[2], y.shape[2]))


def write_forward(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The kernel: x (p, t, a), y (p, t, b), z (p, t, c) of any strides → (p, a, b, c), contiguous."""
    _check_write(x, y, z)
    (p, t, a), b, c = x.shape, y.shape[2], z.shape[2]
    u = x.new_empty(p, a, b, c)
    if u.numel():
        cut = _cut("pair_write", t, x, (a, b, c))
        launch(
            _write_kernel, (p * a,), x, y, z, u, t, a, b, c, *x.stride(), *y.stride(), *z.stride(), *u.stride()[:3],
            cut=cut, BB=block(b, 16, MOST_WIDTH), BC=block(c, 16, MOST_WIDTH), PRECISION=precision(x),
        )  # fmt: skip
    return u


def write_reference(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The same in torch, with x⊗y in memory."""
    _check_write(x, y, z)
    return torch.einsum("ptab,ptc->pabc", x[..., :, None] * y[..., None, :], z).contiguous()


def write_shapes(x: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """The result without numbers."""
    return x.new_empty(x.shape[0], x.shape[2], y.shape[2], z.shape[2])


def read_forward(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The kernel: x (p, t, a), y (p, t, b), s (p, a, b, c) of any strides → (p, t, c), contiguous."""
    _check_read(x, y, s)
    (p, t, a), b, c = x.shape, y.shape[2], s.shape[3]
    o = x.new_empty(p, t, c)
    if o.numel():
        cut = _cut("pair_read", t, x, (a, b, c))
        launch(
            _read_kernel, (p * ceil_div(t, cut["BT"]),), x, y, s, o, t, a, b, c, *x.stride(), *y.stride(), *s.stride(), *o.stride()[:2],
            cut=cut, BB=block(b, 16, MOST_WIDTH), BC=block(c, 16, MOST_WIDTH), PRECISION=precision(x),
        )  # fmt: skip
    return o


def read_reference(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The same in torch, with x⊗y in memory."""
    _check_read(x, y, s)
    return torch.einsum("ptab,pabc->ptc", x[..., :, None] * y[..., None, :], s).contiguous()


def read_shapes(x: Tensor, y: Tensor, s: Tensor) -> Tensor:
    """The result without numbers."""
    return x.new_empty(*x.shape[:2], s.shape[3])


def _write_backward(g: Tensor, inputs: list[Any], results: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    x, y, z = inputs
    return [
        read_forward(y, z, g.permute(0, 2, 3, 1)) if needs[0] else None,
        read_forward(x, z, g.permute(0, 1, 3, 2)) if needs[1] else None,
        read_forward(x, y, g) if needs[2] else None,
    ]


def _read_backward(g: Tensor, inputs: list[Any], results: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    x, y, s = inputs
    return [
        read_forward(y, g, s.permute(0, 2, 3, 1)) if needs[0] else None,
        read_forward(x, g, s.permute(0, 1, 3, 2)) if needs[1] else None,
        write_forward(x, y, g) if needs[2] else None,
    ]


pair_write = Operator("pair_write", forward=write_forward, reference=write_reference, shapes=write_shapes, backward=_write_backward)
pair_read = Operator("pair_read", forward=read_forward, reference=read_reference, shapes=read_shapes, backward=_read_backward)
