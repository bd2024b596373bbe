"""What a model runs, as Networks joined by named pointwise nodes: recorded on the meta device, without memory or arithmetic."""

import contextvars
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Node:
    """One operation of a model.

    Attributes:
        path: the module that ran it. kind: "contraction", "gather" or "pointwise". what: the spec, or the name of a pointwise operation.
        sizes: (axis, size) pairs. flops: of matrix products, 2 a multiply-add. pointwise: of everything else, approximate.
        parameters: elements it owns or reads. bytes: size of its result and of the intermediates it keeps for the gradient.
    """

    path: str
    kind: str
    what: str
    sizes: tuple[tuple[str, int], ...]
    flops: int
    pointwise: int
    parameters: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Trace:
    """The nodes of one forward pass in order. `str(trace)` is a table."""

    nodes: tuple[Node, ...]

    @property
    def flops(self) -> int:
        """FLOPs of the matrix products of one forward pass."""
        return sum(node.flops for node in self.nodes)

    @property
    def pointwise(self) -> int:
        """Approximate FLOPs of everything that is not a matrix product."""
        return sum(node.pointwise for node in self.nodes)

    @property
    def bytes(self) -> int:
        """Bytes of all results and kept intermediates: what training holds until the backward pass, before any recomputation."""
        return sum(node.bytes for node in self.nodes)

    def __str__(self) -> str:
        lines = [f"{'where':<34}{'kind':<13}{'MFLOP':>10}{'pointwise':>11}{'params':>12}{'MB':>9}  what"]
        for n in self.nodes:
            counts = f"{n.flops / 1e6:>10.3f}{n.pointwise / 1e6:>11.3f}{n.parameters:>12,}{n.bytes / 1e6:>9.2f}"
            lines.append(f"{n.path:<34}{n.kind:<13}{counts}  {n.what}")
        lines.append(f"{'total':<47}{self.flops / 1e6:>10.3f}{self.pointwise / 1e6:>11.3f}{'':>12}{self.bytes / 1e6:>9.2f}")
        return "\n".join(lines)


class _Recorder:
    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.path: list[str] = []


_active: contextvars.ContextVar[_Recorder | None] = contextvars.ContextVar("tn.trace", default=None)


def recording() -> bool:
    """Whether a trace is being taken in this thread; operations ask before they describe themselves."""
    return not torch.compiler.is_compiling() and _active.get() is not None


def record(
    kind: str,
    what: str,
    *,
    sizes: Mapping[str, int],
    result: Tensor | tuple[Tensor, ...],
    flops: int = 0,
    pointwise: int = 0,
    parameters: int = 0,
    kept: int = 0,
) -> None:
    """Add a node to the trace being taken; `kept` counts the elements saved besides the result."""
    recorder = _active.get()
    if recorder is None:
        raise RuntimeError("no trace is being taken; ask recording() first")
    path = recorder.path[-1] if recorder.path else ""
    results = (result,) if isinstance(result, Tensor) else result
    size = (sum(tensor.numel() for tensor in results) + kept) * results[0].element_size()
    recorder.nodes.append(Node(path, kind, what, tuple(sizes.items()), flops, pointwise, parameters, size))


def trace(model: nn.Module, *inputs: object, grad: bool | None = None) -> Trace:
    """Run a model on the meta device and list every contraction and pointwise operation built from tn.

    Args:
        model: any module; parameters stay where they are. inputs: tensors are replaced by their meta twins.
        grad: plan as for training (True) or for inference (False), which may merge cores; as `model.training` says if None.

    Returns:
        A Trace. Operations that are not tn's do not appear in it.
    """
    meta = {name: tensor.to("meta") for name, tensor in model.named_buffers()}
    for name, parameter in model.named_parameters():
        meta[name] = parameter.detach().to("meta").requires_grad_(parameter.requires_grad)
    arguments = [value.to("meta") if isinstance(value, Tensor) else value for value in inputs]
    recorder = _Recorder()
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(lambda *_, name=name: recorder.path.append(name)))
        handles.append(module.register_forward_hook(lambda *_: recorder.path.pop() and None, always_call=True))
    token = _active.set(recorder)
    try:
        with torch.set_grad_enabled(model.training if grad is None else grad):
            torch.func.functional_call(model, meta, tuple(arguments))
    finally:
        _active.reset(token)
        for handle in handles:
            handle.remove()
    return Trace(tuple(recorder.nodes))
