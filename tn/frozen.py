"""Evaluation with frozen weights: where one dense product is faster, the cores are merged once and the matrix is kept."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from tn.contraction import Contraction, program
from tn.errors import OperatorError
from tn.network import Network
from tn.plan import SEGMENTS, plan
from tn.spec import ROWS, Spec, Term

_CALLS = 4  # small operators' time that a contraction takes more than a product: checks, views, one call more


class _Merged:
    """The matrix of a layer with one input, kept while its cores stay as they are."""

    def __init__(self, layer: Contraction, network: Network) -> None:
        self.layer, self.network = layer, network
        self.d_in, self.d_out = (math.prod(network.sizes[axis] for axis in dim) for dim in network.output.dims)
        self.cores = [getattr(layer, name) for name in layer.network.cores]
        self.state: tuple = ()
        self.matrices: dict[torch.dtype, Tensor] = {}
        self.wins: dict[tuple, bool] = {}

    def __call__(self, x: Tensor, segment: int) -> Tensor | None:
        """The result by one product, or None where the contraction is predicted to be faster."""
        key = (x.dtype, x.device, segment)
        wins = self.wins.get(key)
        if wins is None:
            wins = self.wins[key] = self._wins(x, SEGMENTS[segment][1])
        if not wins:
            return None
        state = tuple([(core._version, core.data_ptr()) for core in self.cores])
        if state != self.state:
            self.state, self.matrices = state, {}
        matrix = self.matrices.get(x.dtype)
        if matrix is None:
            matrix = self.matrices[x.dtype] = self._merge(x.dtype)
        return nn.functional.linear(x.reshape(*x.shape[: x.dim() - self.tail], self.d_in), matrix)

    def refresh(self) -> None:
        """Forget the matrix."""
        self.matrices = {}

    @property
    def tail(self) -> int:
        """Stored dimensions of the input besides the leading ones."""
        return len(self.layer.network.term(self.layer.network.inputs[0]).dims) - 1

    def _wins(self, x: Tensor, rows: int) -> bool:
        contraction = plan(self.layer.network, rows=rows, dtype=x.dtype, device=x.device)
        table = contraction.machine
        dense = table.product(rows, self.d_out, self.d_in, "NT") + table.traffic(self.d_in * self.d_out * x.element_size())
        return dense < contraction.seconds + _CALLS * table.element

    def _merge(self, dtype: torch.dtype) -> Tensor:
        """(out, in), merged in at least fp32."""
        wide = torch.promote_types(self.cores[0].dtype, torch.float32)
        merge = program(plan(self.network, dtype=wide, device=self.cores[0].device), "planned")
        with torch.autocast(self.cores[0].device.type, enabled=False):
            return merge(*(core.detach().to(wide) for core in self.cores)).mT.contiguous().to(dtype)


def merged_network(network: Network) -> Network | None:
    """The cores contracted into a matrix (input axes, output axes), if the network is a matrix applied to its one input."""
    if len(network.inputs) != 1 or len(network.names) != len(network.spec.operands) or network.dynamic != (ROWS,):
        return None
    inputs, outputs = (tuple(axis for axis in term.axes if axis != ROWS) for term in (network.term(network.inputs[0]), network.output))
    if set(inputs) & set(outputs) or len(set(inputs)) < len(inputs) or not network.cores:
        return None
    cores = tuple(network.term(name) for name in network.cores)
    known = tuple((axis, size) for axis, size in network.known)
    return Network(Spec(cores, (Term("", (inputs, outputs)),)), known)


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
    before = [layer._merged for layer in layers]
    for layer in layers:
        network = merged_network(layer.network)
        layer._merged = _Merged(layer, network) if network is not None else None

    def forget(*_: object) -> None:
        for layer in layers:
            layer.refresh()

    hook = register_optimizer_step_post_hook(forget)  # a fused AdamW step does not count as a change of its parameters
    try:
        yield model
    finally:
        hook.remove()
        for layer, previous in zip(layers, before, strict=True):
            layer._merged = previous
