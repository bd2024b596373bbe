"""Evaluation with frozen weights: where one dense product is faster, the matrix is made once and kept."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tn.contraction import Contraction, program
from tn.errors import OperatorError
from tn.merging import Held
from tn.network import Network
from tn.plan import plan
from tn.spec import ROWS

_CALLS = 4  # small operators' time that a contraction takes more than a product: checks, views, one call more


class _Merged:
    """The matrix of a layer with one input, kept while its cores stay as they are."""

    def __init__(self, layer: Contraction) -> None:
        self.layer, network = layer, layer.network
        self.place = network.names.index(network.inputs[0])
        self.shape = [math.prod(network.sizes[axis] for axis in dim) for dim in network.term(network.inputs[0]).dims[1:]]
        self.d_in, self.d_out = math.prod(self.shape), math.prod(network.sizes[axis] for axis in network.output.axes if axis != ROWS)
        self.held = Held()  # the cores it was made of
        self.matrices: dict[torch.dtype, Tensor] = {}
        self.wins: dict[tuple, bool] = {}

    def __call__(self, stored: list[Tensor], operands: list[Tensor], segment: int) -> Tensor | None:
        """The result by one product, or None where the contraction is predicted to be faster.

        Args:
            stored: the operands as they are kept. operands: in the dtype to compute in. segment: which range of rows the call is in.
        """
        x, place = operands[self.place], self.place
        key = (x.dtype, x.device, segment)
        wins = self.wins.get(key)
        if wins is None:
            wins = self.wins[key] = self._wins(x, self.layer._cells.sizes(segment)[ROWS])
        cores = [tensor for i, tensor in enumerate(stored) if i != place]
        if not wins or any(core.is_inference() or operand.dtype is not x.dtype for core, operand in zip(stored, operands, strict=True)):
            return None
        if not self.held.same(cores):
            self.held, self.matrices = Held(cores), {}
        matrix = self.matrices.get(x.dtype)
        if matrix is None:
            matrix = self.matrices[x.dtype] = self._merge(cores, x.dtype)
        return nn.functional.linear(x.reshape(*x.shape[: x.dim() - len(self.shape)], self.d_in), matrix)

    def refresh(self) -> None:
        """Forget the matrix."""
        self.matrices = {}

    def _wins(self, x: Tensor, rows: int) -> bool:
        contraction = plan(self.layer.network, rows=rows, dtype=x.dtype, device=x.device)
        table = contraction.machine
        dense = table.product(rows, self.d_out, self.d_in, "NT") + table.traffic(self.d_in * self.d_out * x.element_size())
        return x.is_floating_point() and dense < contraction.seconds + _CALLS * table.element

    def _merge(self, cores: list[Tensor], dtype: torch.dtype) -> Tensor:
        """(out, in): the contraction of the identity, in at least fp32."""
        first = cores[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        run = program(plan(self.layer.network, rows=self.d_in, dtype=wide, device=first.device), "planned")
        operands = [core.detach().to(wide) for core in cores]
        operands.insert(self.place, torch.eye(self.d_in, dtype=wide, device=first.device).reshape(self.d_in, *self.shape))
        with torch.autocast(first.device.type, enabled=False):
            return run(*operands).reshape(self.d_in, self.d_out).mT.contiguous().to(dtype)


def _is_matrix(network: Network) -> bool:
    """Whether the network is a matrix applied to the rows of its one input."""
    roles = len(network.inputs) == 1 and bool(network.cores) and not network.consts and len(network.names) == len(network.spec.operands)
    if not roles or network.dynamic != (ROWS,) or len(network.parts) > 1:
        return False
    return all(ROWS in term.axes for term in (network.term(network.inputs[0]), network.output))


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[nn.Module]:
    """Evaluate a model whose weights stay as they are: contractions run as one dense product wherever that is predicted to be faster.

    The merged matrices are kept inside the block only. A changed core (`load_state_dict`, an assignment, an operation in place) is noticed
    by its version counter or address and merged again, and so is a step of any torch optimiser. Writes through `.data` cannot be noticed:
    call `layer.refresh()` after them. Calls with gradients enabled, or in training mode, run as if there were no block.

    Args:
        model: in evaluation mode.

    Raises:
        OperatorError: the model is in training mode.

    >>> import torch, tn
    >>> layer = tn.StructuredLinear(64, 64, structure="btt", rank=4).eval()
    >>> with torch.no_grad(), tn.frozen(layer):
    ...     layer(torch.ones(1, 64)).shape
    torch.Size([1, 64])
    """
    if model.training:
        raise OperatorError("tn.frozen evaluates a model with frozen weights, this one is in training mode; call model.eval() first")
    layers = [module for module in model.modules() if isinstance(module, Contraction)]
    ours = [layer for layer in layers if layer._merged is None and _is_matrix(layer.network)]  # an outer block keeps its own
    for layer in ours:
        layer._merged = _Merged(layer)

    def forget(*_: object) -> None:
        for layer in layers:
            layer.refresh()

    hook = register_optimizer_step_post_hook(forget)  # a fused AdamW step does not count as a change of its parameters
    try:
        yield model
    finally:
        hook.remove()
        for layer in ours:
            layer._merged = None
