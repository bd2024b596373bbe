"""Ranks from singular values: how much of a matrix each rank keeps, and a budget of parameters spread over layers by it."""

import dataclasses
import heapq
import math
from collections.abc import Mapping

import torch
from torch import Tensor

from tn.errors import StructureError
from tn.projection_svd import as_tensor, unfolded
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
    rows, columns = built.d_out - weight.shape[0], built.d_in - weight.shape[1]
    padded = torch.nn.functional.pad(weight.to(torch.float64), (0, columns, 0, rows))
    values = torch.linalg.svdvals(unfolded(net, *as_tensor(net, padded))).square().sum(0)
    return values / padded.square().sum().clamp(min=torch.finfo(values.dtype).tiny)


def spread(structure: str, weights: Mapping[str, Tensor], options: Options, budget: float) -> dict[str, int]:
    """path → rank, so that all layers together have at most `budget` × the parameters of the matrices: the largest share of a matrix's
    squared norm that a parameter buys goes first.

    Args:
        weights: path → matrix (out, in). options: of every layer, without a rank. budget: a fraction above 0.

    Raises:
        StructureError: a family without singular values, a budget that rank 1 everywhere exceeds.
    """
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not 0 < budget < math.inf:
        raise StructureError(f"budget is {budget!r}, expected a positive fraction of the dense layers' parameters")
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
