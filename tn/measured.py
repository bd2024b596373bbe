"""Operators timed against torch, part by part of some plans: the rows of a machine table by which plans choose."""

import functools
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor

from tn import operators, regions
from tn.errors import OperatorError
from tn.machine import Machine
from tn.network import Network, network
from tn.plan import Plan
from tn.planner import plan
from tn.program import OperatorProgram, Program
from tn.structures import get
from tn.structures.registry import Options

Clock = Callable[[Callable[[], object]], float]
WIDTHS, RANKS, ROWS_TIMED = (1024, 4096), (1, 4), (256, 2048)  # rows as layers plan for them, see tn.segments.ROW_RANGES


def common(table: Machine, dtype: torch.dtype, device: torch.device) -> Iterator[Plan]:
    """Plans of layers that are often used, for inference and training: two-core chains, low rank, bilinear layers, squared attention."""
    for net, rows in _networks():
        for grad in ((), net.names):
            yield plan(net, grad=grad, rows=rows, dtype=dtype, device=device, table=table)


def _networks() -> Iterator[tuple[Network, int | None]]:
    for rows in ROWS_TIMED:
        for width in WIDTHS:
            for rank in RANKS:
                yield get("btt").build(width, width, Options(rank=rank)).network, rows
            yield get("monarch").build(width, width, Options(blocks=32)).network, rows
            yield get("low_rank").build(width, width, Options(rank=64)).network, rows
        sizes = {"i": 1024, "j": 1024, "o": 4096}
        yield network("x: ... i, w: i o, x: ... j, v: j o -> ... o", sizes, cores=("w", "v")), rows
    heads = {"b": 4, "h": 16, "s": 1024, "t": 1024, "d": 64, "e": 64, "f": 64}
    yield network("q: b h s d, k: b h t d, q: b h s e, k: b h t e, v: b h t f -> b h s f", heads), None
    yield network("a: b m k, c: b k n -> m n", {"b": 64, "m": 64, "k": 2048, "n": 64}), None


def rows(plans: Iterable[Plan], clock: Clock, *, tune: bool = False) -> dict[str, tuple[float, float]]:
    """Time every operator that offers for a part of a plan: the whole program with it, and without any.

    Args:
        clock: seconds of a call. tune: first measure how each operator is best cut into blocks, and keep that on disk.

    Returns:
        case → (seconds with the operator, seconds of torch); see `Machine.operators`. What does not run has no row.
    """
    found: dict[str, tuple[float, float]] = {}
    for one in plans:
        for part, offer in regions.offered(one):
            key = regions.case(one, part, offer)
            if key in found:
                continue
            both, operands = (OperatorProgram(one, [(part, offer)], insists=True), Program(one)), _operands(one)
            try:
                if tune:
                    operators.tune(offer, regions.example(one, part))
                ours, theirs = (clock(_pass(run, operands, one)) for run in both)
            except OperatorError as error:
                regions.failed(part, offer.operator, f"does not run here: {error}")
                continue
            found[key] = (_rounded(ours), _rounded(theirs))
    return found


def _operands(plan: Plan) -> list[Tensor]:
    """Random operands of the sizes that a plan was made for, with gradients where it wants them."""
    made = []
    for name in plan.network.names:
        shape = [math.prod(plan.size[axis] for axis in dim) for dim in plan.network.term(name).dims]
        tensor = torch.randn(shape, dtype=plan.dtype, device=plan.device) / max(shape[0] if shape else 1, 1) ** 0.5
        made.append(tensor.requires_grad_(name in plan.grad))
    return made


def _pass(run: Program, operands: list[Tensor], plan: Plan) -> Callable[[], object]:
    """One forward pass; with the gradients that the plan wants, if any."""
    wanted = [operand for operand in operands if operand.requires_grad]
    if not wanted:
        return torch.no_grad()(functools.partial(run, *operands))
    made = run(*operands)
    cotangents = [torch.ones_like(result) for result in (made if isinstance(made, tuple) else (made,))]

    def both() -> object:
        return torch.autograd.grad(run(*operands), wanted, cotangents)

    return both


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.3g}")
