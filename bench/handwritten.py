"""A two-core BTT layer written by hand, without copies and in tiles of rows: the yardstick for generated programs.

y_kl = Σ_ir second_kirl Σ_j first_ijrk x_ij. The intermediate is stored (i, rank·k, rows), so that both products are batched matrix
products of views; a tile of rows keeps it in cache, and the backward pass makes it again.
"""

import torch
from torch import Tensor


class TiledBTT(torch.autograd.Function):
    """apply(x (rows, i·j), first (i, j, r, k), second (k, i, r, l), tile) → (rows, k·l)."""

    @staticmethod
    def forward(ctx, x: Tensor, first: Tensor, second: Tensor, tile: int) -> Tensor:
        ctx.save_for_backward(x, first, second)
        ctx.tile = tile
        rows, (i, j, r, k), width = x.shape[0], first.shape, second.shape[3]
        a, c = first.reshape(i, j, r * k).mT, second.reshape(k, i * r, width)
        y, buffer = x.new_empty(rows, k, width), x.new_empty(i * r * k * min(tile, rows))
        for start in range(0, rows, tile):
            part = x[start : start + tile]
            n = part.shape[0]
            z = buffer[: i * r * k * n].view(i, r * k, n)
            torch.bmm(a, part.view(n, i, j).permute(1, 2, 0), out=z)
            torch.bmm(z.view(i * r, k, n).permute(1, 2, 0), c, out=y[start : start + n].permute(1, 0, 2))
        return y.view(rows, k * width)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, first, second = ctx.saved_tensors
        rows, (i, j, r, k), width = x.shape[0], first.shape, second.shape[3]
        a, c = first.reshape(i, j, r * k), second.reshape(k, i * r, width)
        size = i * r * k * min(ctx.tile, rows)
        dx, da, dc = torch.empty_like(x), torch.zeros_like(a), torch.zeros_like(c)
        made, above = x.new_empty(size), x.new_empty(size)
        for start in range(0, rows, ctx.tile):
            part, g = x[start : start + ctx.tile], gradient[start : start + ctx.tile]
            n = part.shape[0]
            part, g = part.view(n, i, j), g.reshape(n, k, width)
            z, dz = made[: i * r * k * n].view(i, r * k, n), above[: i * r * k * n].view(i * r, k, n)
            torch.bmm(a.mT, part.permute(1, 2, 0), out=z)
            torch.bmm(c, g.permute(1, 2, 0), out=dz.transpose(0, 1))
            dc.baddbmm_(z.view(i * r, k, n).transpose(0, 1), g.transpose(0, 1))
            dz = dz.view(i, r * k, n)
            torch.bmm(dz.mT, a.mT, out=dx[start : start + n].view(n, i, j).transpose(0, 1))
            da.baddbmm_(part.permute(1, 2, 0), dz.mT)
        return dx, da.view_as(first), dc.view_as(second), None
