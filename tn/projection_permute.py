"""Which inputs belong in one block: a search over orders of a matrix's columns for families that work block by block.

Like clustering by subspaces: with the blocks' subspaces held, every column goes where they keep most of it, each block taking as many
columns as it has places; with the columns held, the subspaces are those of the best projection. Repeated while the error falls.
"""

import torch
from torch import Tensor

from tn.errors import ProjectionError
from tn.structures.registry import Built

FAMILIES = ("block_diagonal", "btt", "btt_norm", "monarch")
_ROUNDS = 20


def search(weight: Tensor, built: Built) -> Tensor:
    """An order of the columns of a matrix (out, in), padded to the structure's sizes: position → column.

    Raises:
        ProjectionError: a family that is not made of blocks, or a Monarch in parallel parts.
    """
    if built.structure not in FAMILIES or built.network.sizes.get("m", 1) != 1 or len(built.network.cores) > 2:
        raise ProjectionError(f"permute is for two-core {', '.join(FAMILIES)} whose blocks all meet, got {built.network.spec}")
    assert built.factors is not None
    groups, places = built.factors[0][0], built.factors[0][-1]
    best = torch.arange(weight.shape[1], device=weight.device)
    kept = _energy(weight, built)
    leading = torch.linalg.svd(weight, full_matrices=False)[2][0]
    for start in (best, leading.argsort(stable=True)):
        order = start
        for _ in range(_ROUNDS):
            gains = _gains(weight, weight[:, order], built)
            order = _assigned(gains, groups, places)
            energy = _energy(weight[:, order], built)
            if energy <= kept * (1 + 1e-9):
                break
            best, kept = order, energy
    return best


def _blocks(weight: Tensor, built: Built) -> Tensor:
    """(output block, input block, row, column) of a matrix."""
    assert built.factors is not None
    ins, outs = built.factors
    return weight.reshape(outs[0], outs[-1], ins[0], ins[-1]).permute(0, 2, 1, 3)


def _energy(weight: Tensor, built: Built) -> float:
    """What the best projection keeps of the squared norm."""
    blocks = _blocks(weight, built)
    if built.structure == "block_diagonal":
        return float(blocks.diagonal().square().sum())
    assert isinstance(built.rank, int)
    return float(torch.linalg.svdvals(blocks)[..., : built.rank].square().sum())


def _gains(columns: Tensor, ordered: Tensor, built: Built) -> Tensor:
    """(column, input block): what of each column the block's subspaces, best for the columns it has now, would keep."""
    assert built.factors is not None
    groups, parts, rows = built.factors[0][0], built.factors[1][0], built.factors[1][-1]
    split = columns.reshape(parts, rows, -1)
    if built.structure == "block_diagonal":
        return split.square().sum(1).mT
    assert isinstance(built.rank, int)
    bases = torch.linalg.svd(_blocks(ordered, built), full_matrices=False)[0][..., : built.rank]  # (part, group, row, rank)
    gains = columns.new_zeros(columns.shape[1], groups)
    for group in range(groups):
        gains[:, group] = (bases[:, group].mT @ split).square().sum((0, 1))
    return gains


def _assigned(gains: Tensor, groups: int, places: int) -> Tensor:
    """Columns in the order of their blocks: the ones with most to lose choose first, among blocks that have places left."""
    top = gains.topk(min(2, groups), dim=1).values
    regret = top[:, 0] - top[:, -1]
    free = [places] * groups
    members: list[list[int]] = [[] for _ in range(groups)]
    wishes = gains.argsort(dim=1, descending=True).tolist()
    for column in regret.argsort(descending=True, stable=True).tolist():
        group = next(g for g in wishes[column] if free[g])
        free[group] -= 1
        members[group].append(column)
    return torch.tensor([column for group in members for column in sorted(group)], device=gains.device)
