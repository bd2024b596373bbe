"""Contraction orders that somebody else found: paths read into pairs of SSA values, and plans along them."""

from collections.abc import Iterable, Mapping, Sequence

import torch

from tn.errors import PathError, PlanError
from tn.network import Network
from tn.order import Path
from tn.plan import Plan
from tn.planner import along as plans_along
from tn.planner import plan


def to_pairs(path: Iterable[Sequence[int]], count: int) -> Path:
    """Pairs of SSA values for a path as NumPy and opt_einsum write it: positions in the list of what is left, results at its end.

    Args:
        path: positions to contract; more than two are contracted from left to right, a single one moves to the end.
        count: number of operands.

    Raises:
        PathError: a position that does not exist, or operands left over.

    >>> to_pairs([(1, 2), (0, 1)], 3)
    ((1, 2), (0, 3))
    """
    left = list(range(count))
    pairs: list[tuple[int, int]] = []
    for step in path:
        if len(set(step)) < len(step) or not all(0 <= position < len(left) for position in step):
            raise PathError(f"path {path}: step {tuple(step)} is not possible with {len(left)} tensors left of {count}")
        taken = [left[position] for position in step]
        left = [value for value in left if value not in taken]
        result = taken[0]
        for other in taken[1:]:
            pairs.append((result, other))
            result = count + len(pairs) - 1
        left.append(result)
    if len(left) != 1:
        raise PathError(f"path {path} leaves {len(left)} tensors of {count} operands, expected one")
    return tuple(pairs)


def to_path(pairs: Path, count: int) -> list[tuple[int, int]]:
    """Pairs of SSA values as positions in the list of what is left.

    >>> to_path(((1, 2), (0, 3)), 3)
    [(1, 2), (0, 1)]
    """
    left = list(range(count))
    path = []
    for number, pair in enumerate(pairs):
        first, second = sorted(left.index(value) for value in pair)
        path.append((first, second))
        left = [value for value in left if value not in pair] + [count + number]
    return path


def along(
    network: Network,
    pairs: Path,
    *,
    grad: Iterable[str] = (),
    rows: int | None = None,
    sizes: Mapping[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Plan:
    """The plan that contracts in a given order; layouts are chosen as ever. Arguments as in `tn.plan`.

    Raises:
        PlanError: pairs for another number of operands.
    """
    count = len(network.spec.operands)
    if len(pairs) != count - 1:
        raise PlanError(f"an order of {len(pairs)} steps for {count} operands, expected {count - 1}")
    draft = plan(network, grad=grad, rows=rows, sizes=sizes, dtype=dtype, device=device, search="left_to_right")
    return plans_along(network, pairs, draft.sizes, draft.grad, draft.machine)
