"""Ranks from singular values: how much of a matrix each rank keeps, and a budget of parameters spread by it over layers or blocks."""

import dataclasses
import heapq
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tn.errors import StructureError
from tn.projection_svd import as_tensor, separable, unfolded
from tn.structures import Options, get
from tn.structures.registry import Built, axes_of


def kept(built: Built, weight: Tensor) -> Tensor:
    """What the best projection of a matrix (out, in) gains with each further rank: its share of the squared norm, (full rank,), descending.

    Raises:
        StructureError: a family that is no chain of two cores with one rank.
    """
    net = built.network
    if len(net.cores) != 2 or len(axes_of(net)[2]) != 1 or get(built.structure).gated:
        what = f"{built.structure} ({net.spec})"
        raise StructureError(
            f"a budget is spread over layers by singular values, for two cores with one rank; {what} is not so: give match="
        )
    return _shares(built, weight).sum(0)


def _shares(built: Built, weight: Tensor) -> Tensor:
    """(block, singular value): the squares, relative to the matrix's squared norm."""
    net = built.network
    rows, columns = built.d_out - weight.shape[0], built.d_in - weight.shape[1]
    padded = torch.nn.functional.pad(weight.to(torch.float64), (0, columns, 0, rows))
    values = torch.linalg.svdvals(unfolded(net, *as_tensor(net, padded))).square()
    return values / padded.square().sum().clamp(min=torch.finfo(values.dtype).tiny)


def spread_blocks(structure: str, weights: Mapping[str, Tensor], options: Options, budget: float) -> dict[str, Tensor]:
    """path → rank of every block (see `block_axes`), so that all layers together have at most `budget` × the parameters of the matrices
    that are not zero: of all singular values of all blocks, those that keep the largest share of a matrix's squared norm a parameter.

    Raises:
        StructureError: a family that is not made of blocks, a budget that is too small for one rank of one block in every layer.
    """
    check_budget(budget)
    family, left = get(structure), budget * sum(weight.numel() for weight in weights.values())
    gains, costs, found = [], [], {}
    for path, weight in weights.items():
        built = family.build(weight.shape[1], weight.shape[0], dataclasses.replace(options, rank=1))
        axes = block_axes(built, weight.shape)
        shares = _shares(built, weight)
        cost = built.parameters // len(shares)
        gains.append(shares.flatten() / cost)
        costs.append(torch.full((shares.numel(),), cost))
        first = shares[:, 0].argmax()  # every layer keeps its largest singular value
        gains[-1][first * shares.shape[1]] = math.inf
        found[path] = (shares.shape, [built.network.sizes[axis] for axis in axes])
    flat, price = torch.cat(gains), torch.cat(costs)
    order = flat.argsort(descending=True, stable=True)
    order = order[flat[order] > 0]
    taken = order[price[order].cumsum(0) <= left]
    if (flat[taken] == math.inf).sum() < len(weights):
        least = sum(int(cost[0]) for cost in costs) / sum(weight.numel() for weight in weights.values())
        raise StructureError(f"{structure} cannot do with {budget} of the dense parameters; one rank of one block takes {least:.3g}")
    chosen = torch.zeros(len(flat), dtype=torch.int64).index_fill(0, taken.cpu(), 1).split([len(gain) for gain in gains])
    return {path: one.reshape(shape).sum(1).reshape(sizes) for (path, (shape, sizes)), one in zip(found.items(), chosen, strict=True)}


def block_axes(built: Built, shape: Sequence[int]) -> tuple[str, ...]:
    """The axes that number the independent blocks of a family: those of input and output that both cores have.

    Args:
        shape: of the matrix (out, in).

    Raises:
        StructureError: a family that is no two cores of such blocks with one rank.
    """
    net = built.network
    ins, outs, ranks = axes_of(net)
    both = set(net.term(net.cores[0]).axes) & set(net.term(net.cores[-1]).axes)
    shared = [axis for axis in outs if axis in ins]  # last, as in `as_tensor`
    axes = tuple(axis for axis in (*outs, *ins) if axis in both and axis not in shared) + tuple(axis for axis in shared if axis in both)
    if len(net.cores) != 2 or len(ranks) != 1 or not axes or get(built.structure).gated:
        raise StructureError(f"block ranks are of two cores of independent blocks, such as btt, monarch; {built.structure} is {net.spec}")
    if (built.d_out, built.d_in) != tuple(shape) and not separable(net):
        raise StructureError(f"block ranks of {built.structure} need sizes without padding, {tuple(shape)} is padded; give factors")
    return axes


def masked(built: Built, cores: Mapping[str, Tensor], ranks: Tensor) -> dict[str, Tensor]:
    """Cores, as stored, in which what lies beyond each block's rank is zero on both sides: then it stays zero in training too."""
    net, axes = built.network, block_axes(built, (built.d_out, built.d_in))
    rank = axes_of(net)[2][0]
    kept, have = torch.arange(net.sizes[rank]) < ranks[..., None], (*axes, rank)
    found = {}
    for name, core in cores.items():
        mine = net.term(name).axes
        order = [have.index(axis) for axis in mine if axis in have]
        sizes = [net.sizes[axis] if axis in have else 1 for axis in mine]
        mask = kept.permute(order).reshape(sizes).to(core.device)
        found[name] = torch.where(mask, core.reshape([net.sizes[axis] for axis in mine]), 0).reshape(core.shape)
    return found


def check_ranks(built: Built, shape: Sequence[int], ranks: object) -> Tensor:
    """The rank of every block as a tensor. Raises StructureError unless these are ranks that the blocks can have."""
    sizes = tuple(built.network.sizes[axis] for axis in block_axes(built, shape))
    most = get(built.structure).full_ranks(built.factors)[0] if built.factors else 1
    if not isinstance(ranks, Tensor) or ranks.is_floating_point() or ranks.dtype is torch.bool or tuple(ranks.shape) != sizes:
        got = f"{ranks.dtype} of shape {tuple(ranks.shape)}" if isinstance(ranks, Tensor) else repr(ranks)
        raise StructureError(f"block_ranks is {got}, expected True or integers of shape {sizes}, one for each block")
    if int(ranks.min()) < 0 or not 1 <= int(ranks.max()) <= most:
        raise StructureError(f"block_ranks are from {int(ranks.min())} to {int(ranks.max())}, expected 0 to {most}, not all zero")
    return ranks.cpu()


def check_budget(budget: object) -> None:
    """Raise StructureError unless this is a fraction."""
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
        raise StructureError(f"budget is {budget!r}, expected a positive fraction of the dense layers' parameters")


def spread(structure: str, weights: Mapping[str, Tensor], options: Options, budget: float) -> dict[str, int]:
    """path → rank, so that all layers together have at most `budget` × the parameters of the matrices: the largest share of a matrix's
    squared norm that a parameter buys goes first.

    Args:
        weights: path → matrix (out, in). options: of every layer, without a rank. budget: a fraction above 0.

    Raises:
        StructureError: a family without singular values, a budget that rank 1 everywhere exceeds.
    """
    check_budget(budget)
    family, total = get(structure), sum(weight.numel() for weight in weights.values())
    ranks, costs, gains, queue = dict.fromkeys(weights, 1), {}, {}, []
    for path, weight in weights.items():
        built = family.build(weight.shape[1], weight.shape[0], dataclasses.replace(options, rank=1))
        costs[path], gains[path] = built.parameters, kept(built, weight).tolist()
        queue.extend([(-gains[path][1] / costs[path], path)] if len(gains[path]) > 1 else [])
    left = budget * total - sum(costs.values())
    if left < 0:
        least = sum(costs.values()) / total
        raise StructureError(f"{structure} cannot do with {budget} of the dense layers' parameters; rank 1 everywhere takes {least:.3g}")
    heapq.heapify(queue)
    while queue:
        gain, path = heapq.heappop(queue)
        if gain == 0 or costs[path] > left:
            continue
        left -= costs[path]
        ranks[path] += 1
        if ranks[path] < len(gains[path]):
            heapq.heappush(queue, (-gains[path][ranks[path]] / costs[path], path))
    return ranks
