"""cotengra's contraction trees as plans. (The planner's own search with cotengra is in tn/order.py.)"""

import re
from collections.abc import Hashable, Iterable
from typing import Any

import torch

from tn.bridge.paths import along
from tn.errors import KindError, PlanError
from tn.network import network
from tn.plan import Plan
from tn.spec import Spec, Term


def from_cotengra(tree: Any, *, grad: Iterable[str] = (), dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Plan:
    """A plan along a `cotengra.ContractionTree`; `tn.compile(plan)` is the Program that runs the whole tree.

    Args:
        tree: a complete tree without slices. grad: operands that need a gradient (t0, t1, …, in the tree's order).
        dtype, device: choose the machine table that the layouts are made for.

    Returns:
        A Plan whose operands are t0, t1, …. Axes keep their name where it is a word; others are called axis_0, axis_1, ….

    Raises:
        KindError: no tree. PlanError: a tree with slices, or an incomplete one.

    >>> import cotengra, torch, tn
    >>> tree = cotengra.array_contract_tree([("i", "j"), ("j", "k")], ("i", "k"), dict(i=2, j=3, k=4), optimize="greedy")
    >>> tn.compile(tn.from_cotengra(tree))(torch.ones(2, 3), torch.ones(3, 4)).shape
    torch.Size([2, 4])
    """
    if not hasattr(tree, "get_ssa_path"):
        raise KindError(f"got a {type(tree).__name__}, expected a cotengra.ContractionTree")
    if tree.sliced_inds:
        raise PlanError(f"the tree is sliced over {', '.join(map(str, tree.sliced_inds))}; plans have no slices: tree.unslice_all() first")
    if not tree.is_complete():
        raise PlanError("the tree is incomplete; contract all of its operands first")
    words = axis_words([*(index for term in tree.inputs for index in term), *tree.output])
    terms = [tuple((words[index],) for index in term) for term in (*tree.inputs, tree.output)]
    spec = Spec(tuple(Term(f"t{i}", dims) for i, dims in enumerate(terms[:-1])), (Term("y0", terms[-1]),))
    net = network(spec, {words[index]: int(size) for index, size in tree.size_dict.items() if index in words})
    pairs = tuple((left, right) for left, right in tree.get_ssa_path())
    return along(net, pairs, grad=grad, dtype=dtype, device=device)


def axis_words(indices: Iterable[Hashable]) -> dict[Hashable, str]:
    """An axis word for every index: its own name where that is one.

    >>> axis_words(["batch", 3, "k0,1"])
    {'batch': 'batch', 3: 'axis_0', 'k0,1': 'axis_1'}
    """
    found = dict.fromkeys(indices)
    own = {index for index in found if isinstance(index, str) and re.fullmatch(r"[A-Za-z_]\w*", index, re.ASCII)}
    free = (word for i in range(2 * len(found)) if (word := f"axis_{i}") not in own)
    return {index: index if index in own else next(free) for index in found}
