"""Evaluation with frozen weights: where one dense product is faster, the matrix is made once and kept."""

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from torch.optim.optimizer import register_optimizer_step_post_hook

from tn.contraction import Contraction
from tn.errors import OperatorError
from tn.linear import StructuredLinear
from tn.merging import Held
from tn.planner import plan
from tn.program import autocast
from tn.segments import ROW_RANGES
from tn.spec import ROWS

_MOST = max(planned for _, planned in ROW_RANGES)
# Small operators' time that a contraction takes for each step that is no plain product, beside what a table says: views, orders, a call
_CALLS = 5  # (measured on 131 layers, LOG.md, 2026-11-20)


class _Merged:
    """The matrix of a layer with one input, kept while its parameters and buffers stay as they are."""

    def __init__(self, layer: Contraction) -> None:
        self.layer, network = layer, layer.network
        dims = network.term(network.inputs[0]).dims[1:]
        shape = tuple(math.prod(network.sizes[axis] for axis in dim) for dim in dims)
        self.shape = (layer.in_features,) if isinstance(layer, StructuredLinear) else shape  # of a row; less than the network's if padded
        outs = math.prod(network.sizes[axis] for axis in network.output.axes if axis != ROWS)
        self.d_in, self.d_out = math.prod(self.shape), layer.out_features if isinstance(layer, StructuredLinear) else outs
        self.names = [name for name, _ in layer.named_parameters(recurse=False) if name != "bias"]
        self.buffers = [name for name, _ in layer.named_buffers(recurse=False)]
        self.held = Held()  # the tensors it was made of
        self.matrices: dict[torch.dtype, tuple[Tensor, torch.Size]] = {}  # dtype computed in → (out, in), shape of a row of the result
        self.wins: dict[tuple, bool] = {}

    def __call__(self, x: Tensor) -> Tensor | None:
        """The layer's result by one product, or None where the contraction is predicted to be faster or has to run."""
        layer, shape = self.layer, self.shape
        if layer.training or torch.is_grad_enabled() or torch._C._are_functorch_transforms_active() or x.shape[-len(shape) :] != shape:
            return None
        if torch._C._is_any_autocast_enabled():
            (x,) = autocast((x,))
        parameters, buffers = layer._parameters, layer._buffers
        stored: list[Tensor | None] = [parameters.get(name) for name in self.names]
        if self.buffers:
            stored += [buffers.get(name) for name in self.buffers]
        if not self.held.same(stored):
            tensors = [tensor for tensor in stored if tensor is not None and not tensor.is_inference()]
            if len(tensors) < len(stored):  # replaced by a parametrisation; without a version
                return None
            self.held, self.matrices = Held(tensors), {}
        bias, rows = parameters["bias"], x.numel() // self.d_in
        key = (x.dtype, x.device, rows.bit_length())
        wins = self.wins.get(key)
        if wins is None:
            wins = self.wins[key] = self._wins(x, min(1 << max(rows.bit_length() - 1, 0), _MOST))
        if not wins:
            return None
        found = self.matrices.get(x.dtype)
        if found is None:
            found = self.matrices[x.dtype] = self._merge(x.dtype)
        matrix, out = found
        if len(shape) == len(out) == 1:
            return linear(x, matrix, bias)
        result = linear(x.reshape(*x.shape[: x.dim() - len(shape)], self.d_in), matrix)
        result = result.reshape(*result.shape[:-1], *out)
        return result if bias is None else result + bias.to(result.dtype)

    def refresh(self) -> None:
        """Forget the matrix."""
        self.matrices = {}

    def _wins(self, x: Tensor, rows: int) -> bool:
        core = next(self.layer.parameters())
        if not x.is_floating_point() or (core.dtype is not x.dtype and not torch.is_autocast_enabled(x.device.type)):
            return False
        planned = next(planned for below, planned in ROW_RANGES if rows < below)
        runs = plan(self.layer.network, rows=planned, dtype=x.dtype, device=x.device)
        table, calls = runs.machine, sum(step.pairing.kind != "mm" for step in runs.steps)
        here = runs.at({ROWS: rows})
        dense = table.product(rows, self.d_out, self.d_in, "NT") + table.traffic(self.d_in * self.d_out * x.element_size())
        return dense < here.forward_seconds + (_CALLS * calls + 1) * table.element  # one more: the bias

    def _merge(self, dtype: torch.dtype) -> tuple[Tensor, torch.Size]:
        """What the layer makes of the identity, in at least fp32."""
        layer = self.layer
        core = next(layer.parameters())
        wide = torch.promote_types(core.dtype, torch.float32)
        state = {name: tensor.to(wide) if tensor.is_floating_point() else tensor for name, tensor in layer.state_dict().items()}
        if layer.bias is not None:
            state["bias"] = torch.zeros_like(state["bias"])
        eye = torch.eye(self.d_in, dtype=wide, device=core.device).reshape(self.d_in, *self.shape)
        layer._merged = None
        try:
            with torch.autocast(core.device.type, enabled=False):
                result = torch.func.functional_call(layer, state, (eye,))
        finally:
            layer._merged = self
        return result.flatten(1).mT.contiguous().to(dtype), result.shape[1:]


def _is_matrix(layer: Contraction) -> bool:
    """Whether the layer is a matrix applied to the rows of its one input."""
    network = layer.network
    roles = len(network.inputs) == 1 and bool(network.cores) and not network.consts and len(network.names) == len(network.spec.operands)
    if not roles or network.dynamic != (ROWS,) or len(network.parts) > 1 or getattr(layer, "experts", None) is not None:
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
        OperatorError: the model is in training mode, or no module.

    >>> import torch, tn
    >>> layer = tn.StructuredLinear(64, 64, structure="btt", rank=4).eval()
    >>> with torch.no_grad(), tn.frozen(layer):
    ...     layer(torch.ones(1, 64)).shape
    torch.Size([1, 64])
    """
    if not isinstance(model, nn.Module):
        raise OperatorError(f"tn.frozen takes a torch.nn.Module, got a {type(model).__name__}")
    if model.training:
        raise OperatorError("tn.frozen evaluates a model with frozen weights, this one is in training mode; call model.eval() first")
    layers = [module for module in model.modules() if isinstance(module, Contraction)]
    ours = [layer for layer in layers if layer._merged is None and _is_matrix(layer)]  # an outer block keeps its own
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
