"""Splitting a tensor into the cores of a network, one core after the other, by batched singular value decompositions.

With one core or two the result is the nearest there is in the Frobenius norm: block by block for Monarch and BTT, by van Loan and
Pitsianis for Kronecker products, TT-SVD for a train, and the same for any two-core spec. With more it is the quasi-optimal start that
alternating least squares improve.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tn.network import Network
from tn.structures.registry import axes_of

Axes = tuple[str, ...]


def as_tensor(net: Network, matrix: Tensor) -> tuple[Tensor, Axes]:
    """A matrix (out, in) with one dimension for each axis of the output and the input; of axes that both have, the diagonal."""
    ins, outs, _ = axes_of(net)
    tensor, axes = matrix.reshape([net.sizes[axis] for axis in (*outs, *ins)]), [*outs, *ins]
    for axis in outs:
        if axis in ins:
            first, second = (i for i, a in enumerate(axes) if a == axis)
            tensor = tensor.diagonal(dim1=first, dim2=second)
            axes = [a for a in axes if a != axis] + [axis]
    return tensor, tuple(axes)


def separable(net: Network) -> bool:
    """Whether padded rows and columns of the matrix are whole rows or columns of what is decomposed, so that zeros there cost nothing."""
    ins, outs, _ = axes_of(net)
    if len(net.cores) == 1:
        return True
    if len(net.cores) > 2:
        return False
    one, other = (set(net.term(name).axes) for name in net.cores)
    return all(not ((one - other) & set(side)) or not ((other - one) & set(side)) for side in (ins, outs))


def split(net: Network, tensor: Tensor, axes: Axes) -> dict[str, Tensor]:
    """Cores whose contraction is near a tensor with the given axes (see `as_tensor`).

    Returns:
        Core → tensor with one dimension for each of its axes. Exact where the ranks allow it.
    """
    found: dict[str, Tensor] = {}
    rest, have = tensor, axes
    for position, name in enumerate(net.cores[:-1]):
        mine = net.term(name).axes
        later = {axis for other in net.cores[position + 1 :] for axis in net.term(other).axes}
        bonds = tuple(axis for axis in mine if axis in later and axis not in have)
        batch = tuple(axis for axis in have if axis in mine and axis in later)
        left = tuple(axis for axis in have if axis in mine and axis not in later)
        right = tuple(axis for axis in have if axis not in mine)
        alone = [axis for axis in mine if axis not in later and axis not in have]  # a rank of this core only: one value of it is used
        core, rest = _halves(rest, have, (batch, left, right), [net.sizes[axis] for axis in bonds], last=position == len(net.cores) - 2)
        made = (*batch, *left, *bonds)
        for axis in alone:
            core = torch.nn.functional.pad(core[..., None], (0, net.sizes[axis] - 1))
            made = (*made, axis)
        found[name] = core.permute([made.index(axis) for axis in mine])
        have = (*batch, *bonds, *right)
    last = net.cores[-1]
    wanted = net.term(last).axes
    for axis in wanted:
        if axis not in have:
            rest, have = torch.nn.functional.pad(rest[..., None], (0, net.sizes[axis] - 1)), (*have, axis)
    found[last] = rest.permute([have.index(axis) for axis in wanted])
    return found


def unfolded(net: Network, tensor: Tensor, axes: Axes) -> Tensor:
    """(batch, left, right) of a tensor with the given axes: matrices whose largest singular values the two cores of a network keep."""
    first, second = (set(net.term(name).axes) for name in net.cores)
    groups = [[i for i, axis in enumerate(axes) if (axis in first, axis in second) == side] for side in ((True, True), (True, False))]
    right = [i for i, axis in enumerate(axes) if axis not in first]
    sizes = [math.prod(tensor.shape[i] for i in group) for group in (*groups, right)]
    return tensor.permute([*groups[0], *groups[1], *right]).reshape(sizes)


def _halves(tensor: Tensor, have: Axes, groups: Sequence[Axes], bonds: list[int], *, last: bool) -> tuple[Tensor, Tensor]:
    """(batch, left, bonds) and (batch, bonds, right) whose product over the bonds is nearest to the tensor."""
    batch, left, right = ([tensor.shape[have.index(axis)] for axis in group] for group in groups)
    order = [have.index(axis) for group in groups for axis in group]
    flat = tensor.permute(order).reshape(math.prod(batch), math.prod(left), math.prod(right))
    rank, most = math.prod(bonds), min(flat.shape[1:])
    u, s, v = torch.linalg.svd(flat, full_matrices=False)
    kept = min(rank, most)
    u, s, v = u[..., :kept], s[..., :kept, None], v[..., :kept, :]
    one, other = (u * s.mT.sqrt(), v * s.sqrt()) if last and len(bonds) else (u, v * s)
    if rank > kept:  # slots that least squares can take up: noise on one side, nothing on the other
        noise = torch.randn(*u.shape[:2], rank - kept, generator=torch.Generator().manual_seed(0), dtype=u.dtype).to(u.device)
        one = torch.cat([one, noise / u.shape[1] ** 0.5], dim=-1)
        other = torch.nn.functional.pad(other, (0, 0, 0, rank - kept))
    return one.reshape(*batch, *left, *bonds), other.reshape(*batch, *bonds, *right)
