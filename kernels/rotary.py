"""rotary: pairs of numbers turned by an angle that belongs to their position (RoFormer, arXiv:2104.09864), halves paired as in LLaMA.

    y[s, i] = x[s, i] cos[s, i] − x[s, i + R] sin[s, i]        y[s, i + R] = x[s, i + R] cos[s, i] + x[s, i] sin[s, i]        i < R

and what lies behind 2 R stays. The gradient turns back: the same with −sin.

Queries and keys are turned by this kernel of their own and not inside attention: there every key would be turned again for each block of
queries (T / 128 times), and on its way from memory to the tensor cores it would have to pass through registers. One pass more over q and k
moves 4 T D numbers a head, where a causal pattern takes 2 T² D multiply-adds: derived for T = 4096 and D = 64 in bf16, about a tenth of the
time of the forward pass.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from tn.operators import OperatorError
from tn_kernels import tuning
from tn_kernels.launch import block, ceil_div, config, launch
from tn_kernels.registration import Operator

MOST_WIDTH = 256


@triton.jit
def _kernel(
    x_ptr, c_ptr, s_ptr, y_ptr, turn, H, S, D, R, s_xb, s_xh, s_xs, s_xd, s_cs, s_cr, s_ss, s_sr,
    BS: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """A block of positions of one head; y is contiguous. turn: 1 or −1."""
    blocks = tl.cdiv(S, BS)
    i_b, i_h = (tl.program_id(0) // blocks // H).to(tl.int64), (tl.program_id(0) // blocks % H).to(tl.int64)
    o_s, o_d = tl.program_id(0) % blocks * BS + tl.arange(0, BS), tl.arange(0, BD)
    inside = o_d < 2 * R
    o_r = tl.where(o_d < R, o_d, o_d - R)
    partner = tl.where(o_d < R, o_d + R, o_d - R)
    m_s = (o_s < S)[:, None]
    m_r = m_s & inside[None, :]
    p_x = x_ptr + i_b * s_xb + i_h * s_xh + o_s[:, None] * s_xs
    b_x = tl.load(p_x + o_d[None, :] * s_xd, mask=m_s & (o_d < D)[None, :], other=0.0).to(tl.float32)
    b_p = tl.load(p_x + partner[None, :] * s_xd, mask=m_r, other=0.0).to(tl.float32)
    b_c = tl.load(c_ptr + o_s[:, None] * s_cs + o_r[None, :] * s_cr, mask=m_r, other=1.0).to(tl.float32)
    b_s = tl.load(s_ptr + o_s[:, None] * s_ss + o_r[None, :] * s_sr, mask=m_r, other=0.0).to(tl.float32)
    y = b_x * b_c + b_p * b_s * tl.where(o_d < R, -turn, turn)[None, :]
    p_y = y_ptr + ((i_b * H + i_h) * S + o_s)[:, None] * D + o_d[None, :]
    tl.store(p_y, y.to(y_ptr.dtype.element_ty), mask=m_s & (o_d < D)[None, :])


def check_tables(cos: Tensor, sin: Tensor, positions: int, width: int) -> None:
    """Raise OperatorError unless cos and sin are (at least `positions`, at most half the width)."""
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] < positions or 2 * cos.shape[1] > width:
        raise OperatorError(
            f"rotary tables cos {tuple(cos.shape)} and sin {tuple(sin.shape)}: expected two of (at least {positions} positions, "
            f"at most {width // 2})"
        )
    if not cos.is_floating_point() or cos.dtype is not sin.dtype:
        raise OperatorError(f"rotary tables of {cos.dtype} and {sin.dtype}: expected one floating dtype")


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    if x.dim() != 4 or x.shape[3] > MOST_WIDTH:
        raise OperatorError(f"rotary of {tuple(x.shape)}: expected (b h s d), d at most {MOST_WIDTH}")
    check_tables(cos, sin, x.shape[2], x.shape[3])


def forward(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The kernel: x (b, h, s, d) of any strides, cos, sin (s, r) → (b, h, s, d), contiguous."""
    _check(x, cos, sin)
    y = x.new_empty(x.shape)
    if y.numel():
        b, h, s, d = x.shape
        space = [config(BS=block(s, 16, most), warps=warps, stages=1) for most in (16, 32, 64, 128) for warps in (4, 8)]
        cut = tuning.cut("rotary", x, {"s": s, "d": d}, lambda: config(BS=block(s, 16, 32), warps=4, stages=1), lambda: space)
        launch(
            _kernel, (b * h * ceil_div(s, cut["BS"]),), x, cos, sin, y, -1.0 if inverse else 1.0, h, s, d, cos.shape[1],
            *x.stride(), *cos.stride(), *sin.stride(), cut=cut, BD=block(d, 16, MOST_WIDTH),
        )  # fmt: skip
    return y


def reference(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The same in torch."""
    _check(x, cos, sin)
    s, r = x.shape[2], cos.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = cos[:s].to(wide), sin[:s].to(wide)
    sin = -sin if inverse else sin
    one, two, rest = (part.to(wide) for part in x.split([r, r, x.shape[3] - 2 * r], dim=-1))
    return torch.cat([one * cos - two * sin, two * cos + one * sin, rest], dim=-1).to(x.dtype)


def shapes(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """The result without numbers."""
    return x.new_empty(x.shape)


def backward(g: Tensor, inputs: list[Any], results: list[Tensor], needs: list[bool]) -> list[Tensor | None]:
    """The gradient of x, turned back; those of the tables, which nobody trains, in torch."""
    x, cos, sin, inverse = inputs
    tables: list[Tensor | None] = [None, None]
    if needs[1] or needs[2]:
        r, s = cos.shape[1], x.shape[2]
        (x_1, x_2), (g_1, g_2) = ((t[..., :r].float(), t[..., r : 2 * r].float()) for t in (x, g))
        for place, (table, made) in enumerate(((cos, g_1 * x_1 + g_2 * x_2), (sin, (g_2 * x_1 - g_1 * x_2) * (-1 if inverse else 1)))):
            if needs[1 + place]:
                tables[place] = torch.nn.functional.pad(made.sum((0, 1)), (0, 0, 0, table.shape[0] - s)).to(table.dtype)
    return [forward(g, cos, sin, not inverse) if needs[0] else None, *tables]


_operator = Operator("rotary", forward=forward, reference=reference, shapes=shapes, backward=backward)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, *, inverse: bool = False) -> Tensor:
    """x turned position by position.

    Args:
        x: (b, heads, positions, d). cos, sin: (at least as many positions, r), of the angles, 2 r at most d; what lies behind stays.
        inverse: turn back.

    Returns:
        (b, heads, positions, d). Raises OperatorError for shapes or dtypes that do not belong together.
    """
    return _operator(x, cos, sin, inverse)
