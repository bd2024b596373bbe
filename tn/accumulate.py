"""Gradient accumulation with cores merged once: what depends on weights alone is hoisted out of the micro-batches.

Inside the block a layer contracts its inputs with merged tensors, which are leaves of autograd: the gradients of all micro-batches gather
there. At the end they are pulled back through the merges into `.grad` of the cores, once.
"""

import contextlib
import functools
import math
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge, saved_tensors_hooks
from torch.optim.optimizer import Optimizer, register_optimizer_step_pre_hook

from tn import tracing
from tn.contraction import Contraction, current_backend, program
from tn.errors import OperatorError
from tn.merging import Held, Split, choose, merged_name
from tn.operators import transforming
from tn.plan import Plan
from tn.spec import ROWS

_SHARDED = ("DistributedDataParallel", "FullyShardedDataParallel", "FSDPModule")


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor


class _Gradient:
    """`.grad` of one core while gradients for it wait: whether somebody clears or changes it is seen here."""

    def __init__(self, name: str, core: Tensor) -> None:
        self.name, self.core = name, core
        self.ours = core.grad is None
        if self.ours:
            core.grad = torch.zeros_like(core)  # so that zero_grad() can be told from nothing at all
        self.cleared = False
        self._note()
        self.hook = core.register_post_accumulate_grad_hook(self._added)

    def _note(self) -> None:
        self.seen, self.version = self.core.grad, self.core.grad._version if self.core.grad is not None else 0

    def _added(self, core: Tensor) -> None:
        """Autograd added to it: the core is used elsewhere too."""
        self.ours = False
        self.cleared |= core.grad is not self.seen and not torch.is_grad_enabled()  # with create_graph autograd replaces it
        self._note()

    def check(self) -> bool:
        """Whether it was set to None (or another tensor) since; raises OperatorError where it was changed in place."""
        if self.cleared or self.core.grad is not self.seen:
            return True
        if self.seen is not None and self.seen._version != self.version:
            raise OperatorError(
                f"the gradient of core {self.name!r} was changed in place inside tn.accumulate, where it is not complete yet: "
                "clip after the block, and clear with zero_grad(set_to_none=True)"
            )
        return False

    def drop(self) -> None:
        """Stop watching; zeros that stand for nothing go."""
        self.hook.remove()
        if self.ours and self.core.grad is self.seen and self.seen is not None and self.seen._version == self.version:
            self.core.grad = None


class _Leaf:
    """One merged tensor: a leaf of autograd, and the product it was taken from."""

    def __init__(self, block: "_Block", names: tuple[str, ...], cores: list[Tensor], merge: Plan) -> None:
        self.block, self.names, self.cores = block, names, cores
        self.held, self.needs = Held(cores), [core.requires_grad for core in cores]
        first = cores[0]
        wide = torch.promote_types(first.dtype, torch.float32)
        # the merge is no part of the caller's forward pass: not of its gradient mode, its autocast, or an activation checkpoint around it
        with torch.enable_grad(), torch.autocast(first.device.type, enabled=False), saved_tensors_hooks(_as_it_is, _as_it_is):
            copies = [core.clone().to(wide) for core in cores]  # the pull-back uses the values of now, whatever happens to the cores
            self.made = program(merge, "planned")(*copies).to(first.dtype)
        self.tensor = self.made.detach().contiguous().requires_grad_(self.made.requires_grad)
        self.watched: list[_Gradient] = []
        if self.tensor.requires_grad:
            self.tensor.register_hook(functools.partial(_arriving, weakref.ref(self)))  # weak: no cycle keeps a merged tensor alive

    def fits(self, cores: list[Tensor]) -> bool:
        return self.held.same(cores) and [core.requires_grad for core in cores] == self.needs

    def watch(self) -> None:
        """Before a gradient is added to the leaf's: where none waits, or those that waited were cleared, start over."""
        with self.block.lock:
            if self.watched and not self.was_cleared():
                return
            self.unwatch()
            self.tensor.grad = None
            needed = [(name, core) for name, core, need in zip(self.names, self.cores, self.needs, strict=True) if need]
            self.watched = [_Gradient(name, core) for name, core in needed]

    def unwatch(self) -> None:
        for gradient in self.watched:
            gradient.drop()
        self.watched = []

    def was_cleared(self) -> bool:
        """Whether zero_grad() came after the last gradient: what waits belongs to the step before it."""
        cleared = {gradient.check() for gradient in self.watched}
        if len(cleared) > 1:
            kept = next(gradient.name for gradient in self.watched if not gradient.check())
            raise OperatorError(
                f"inside tn.accumulate the gradients of some cores of a merged tensor ({', '.join(self.names)}) were cleared, that of "
                f"{kept!r} was not: clear all of them, or none"
            )
        return cleared == {True}


def _arriving(reference: Callable[[], _Leaf | None], gradient: Tensor | None) -> None:
    """Autograd is about to add a gradient to a leaf's."""
    leaf = reference()
    if leaf is None or leaf.block.closed:
        raise OperatorError("this forward pass ran inside tn.accumulate, whose block has ended: run its backward pass inside it too")
    leaf.watch()


class _Product(torch.autograd.Function):
    """x Wᵀ for a leaf W whose gradient Gᵀx is added to W.grad by the product itself, without a tensor of its own."""

    @staticmethod
    def forward(ctx, leaf: _Leaf, x: Tensor, weight: Tensor) -> Tensor:
        ctx.leaf = leaf
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor | None, ...]:
        leaf, (x, weight) = ctx.leaf, ctx.saved_tensors
        _, to_x, to_weight = ctx.needs_input_grad
        below = gradient @ weight if to_x else None
        if not to_weight:
            return None, below, None
        rows, inputs = gradient.reshape(-1, gradient.shape[-1]), x.reshape(-1, x.shape[-1])
        # with create_graph, or where the gradient of something else was asked for, autograd decides what becomes of it
        if torch.is_grad_enabled() or not torch._C._will_engine_execute_node(get_gradient_edge(weight).node):
            return None, below, rows.mT @ inputs
        _arriving(lambda: leaf, None)
        with leaf.block.lock:
            if leaf.tensor.grad is None:
                leaf.tensor.grad = rows.mT @ inputs
            else:
                leaf.tensor.grad.addmm_(rows.mT, inputs)
        return None, below, None


class _Hoisted:
    """Runs one layer inside the block."""

    def __init__(self, block: "_Block", layer: Contraction) -> None:
        self.block, self.layer = block, layer
        self.splits: dict[tuple, tuple[Split, Callable[..., Tensor]] | None] = {}
        self.leaves: dict[tuple[str, ...], _Leaf] = {}
        first = layer.network.term(layer.network.names[0])  # the input, where one matrix is all that is left
        self.shape = tuple(math.prod(layer.network.sizes.get(axis, 0) for axis in dim) for dim in first.dims if dim != (ROWS,))

    def __call__(self, stored: list[Tensor], kind: torch.dtype, grads: tuple[bool, ...], segment: int) -> Tensor | None:
        """The result with merged cores, or None where merging is not predicted to pay or cannot be done here.

        Args:
            stored: the operands as they are kept. kind: the dtype to compute in. grads: which need a gradient.
            segment: which range of sizes the call is in.
        """
        key = (kind, stored[0].device, grads, segment)
        if key not in self.splits:
            self.splits[key] = self._choose(key)
        found = self.splits[key]
        if found is None or transforming() or tracing.recording() or (current_backend() or self.layer.backend) != "planned":
            return None
        parts, run = found
        tensors = dict(zip(self.layer.network.names, stored, strict=True))
        leaves: dict[str, _Leaf] = {}
        for group, merge in zip(parts.groups, parts.merges, strict=True):
            cores = [tensors[core] for core in group]
            if any(not core.is_leaf or core.is_inference() or core.dtype is not cores[0].dtype for core in cores):
                return None  # made by a parametrisation or functional_call, or without a version that could be noticed
            leaves[merged_name(self.layer.network, group)] = self._leaf(group, cores, merge)
        names = parts.rest.network.names
        operands = [leaves[name].tensor if name in leaves else tensors[name] for name in names]
        x, weight = operands[0], operands[1]
        if not parts.matrix or not (x.dtype is weight.dtype is kind):
            return run(*operands)
        lead = x.dim() - len(self.shape)
        if lead < 0 or tuple(x.shape[lead:]) != self.shape:
            return None  # the layer refuses it in its own words
        return self.layer._shaped(_Product.apply(leaves[names[1]], x.reshape(*x.shape[:lead], weight.shape[1]), weight))

    def _choose(self, key: tuple) -> tuple[Split, Callable[..., Tensor]] | None:
        kind, device, grads, segment = key
        names = self.layer.network.names
        grad = tuple(name for name, need in zip(names, grads, strict=True) if need)
        sizes = tuple(self.layer._cells.sizes(segment).items())
        found = choose(self.layer.network, grad, sizes, self.block.batches, kind, device)
        return None if found is None else (found, program(found.rest, "planned"))

    def _leaf(self, group: tuple[str, ...], cores: list[Tensor], merge: Plan) -> _Leaf:
        leaf = self.leaves.get(group)
        if leaf is None or not leaf.fits(cores):
            with self.block.lock:
                leaf = self.leaves.get(group)
                if leaf is None or not leaf.fits(cores):
                    leaf = self.leaves[group] = _Leaf(self.block, group, cores, merge)
                    self.block.leaves.append(leaf)
        return leaf

    def refresh(self) -> None:
        """Merge again at the next call, after a write through `.data`."""
        self.leaves = {}


class _Block:
    """What the layers of one block share."""

    def __init__(self, model: nn.Module, batches: int) -> None:
        self.batches, self.closed = batches, False
        self.lock = threading.RLock()
        self.leaves: list[_Leaf] = []  # those of values of cores that have changed since too
        self.layers = [layer for layer in model.modules() if isinstance(layer, Contraction) and layer._hoisted is None and _can(layer)]

    def pull(self) -> None:
        """Add what waits to `.grad` of the cores."""
        leaves = [leaf for leaf in self.leaves if leaf.watched and not leaf.was_cleared()]
        if any(leaf.tensor.grad is not None and leaf.tensor.grad.requires_grad for leaf in leaves):
            raise OperatorError(
                "inside tn.accumulate, backward(create_graph=True) leaves gradients that cannot be pulled back with their graph"
            )
        for leaf in self.leaves:
            for gradient in leaf.watched:
                gradient.hook.remove()
        self.closed = True
        pairs = [(leaf.made, leaf.tensor.grad) for leaf in leaves if leaf.tensor.grad is not None]
        if pairs:
            made, gradients = zip(*pairs, strict=True)
            needed = [core for leaf in leaves for core, need in zip(leaf.cores, leaf.needs, strict=True) if need]
            frozen = [core for core in needed if not core.requires_grad]  # since then: what was gathered before counts
            for core in frozen:
                core.requires_grad_(True)
            try:
                torch.autograd.backward(made, gradients)
            finally:
                for core in frozen:
                    core.requires_grad_(False)

    def close(self) -> None:
        """Let go of the layers and of what still waits."""
        self.closed = True
        for layer in self.layers:
            layer._hoisted = None
        for leaf in self.leaves:
            leaf.unwatch()
        self.leaves = []


def _can(layer: Contraction) -> bool:
    """Whether there is something to merge: two cores or more, no tensor used twice, one result."""
    net = layer.network
    return len(net.cores) > 1 and len(net.names) == len(net.spec.operands) and len(net.spec.outputs) == 1


def _refuse_sharded(model: nn.Module) -> None:
    for path, module in model.named_modules():
        kinds = [kind.__name__ for kind in type(module).__mro__ if kind.__name__ in _SHARDED]
        kinds += ["DTensor" for parameter in module.parameters(recurse=False) if type(parameter.data).__name__ == "DTensor"]
        if kinds:
            raise OperatorError(
                f"tn.accumulate cannot be used with {kinds[0]} (module {path or type(module).__name__!r}): it reduces the gradients of "
                "cores during backward, here they come after it; accumulate with no_sync() instead"
            )


def _refuse_step(model: nn.Module) -> Callable[..., None]:
    def hook(optimizer: Optimizer, *_: Any) -> None:
        ours = {id(parameter) for parameter in model.parameters()}
        if any(id(parameter) in ours for group in optimizer.param_groups for parameter in group["params"]):
            raise OperatorError(
                "optimizer.step() inside tn.accumulate: the gradients of merged cores come at its end; step after the block"
            )

    return hook


@contextlib.contextmanager
def accumulate(model: nn.Module, *, batches: int = 8) -> Iterator[nn.Module]:
    """Run micro-batches with cores merged once, wherever that is predicted to be faster. At the end `.grad` is as after the plain loop.

    Inside, layers contract their inputs with merged cores. The end of the block adds the gathered gradients to `.grad` of the cores, so
    clip and step after it. An exception drops what is gathered. `zero_grad()` inside starts anew, for the cores as for everything else.
    A core that changes is merged again; what was gathered before counts for its old values, as in the plain loop. Writes through `.data`
    are not noticed: call `layer.refresh()`. Hooks on cores run once, at the end. Calls without gradients, compiled layers and transforms
    of `torch.func` run as without the block. Inside another block on the same layers nothing happens until that one ends.

    `torch.autograd.grad` and `backward(inputs=…)` for cores find nothing inside: they are not in the graph of the loss.

    Args:
        model: any module with contractions in it. batches: how many micro-batches are expected; decides what is worth merging.

    Memory: the merged tensors and their gradients, until the end.

    Raises:
        OperatorError: DDP, FSDP; inside, `optimizer.step()` on the model's parameters, a gradient of a core changed in place, gradients
        with a graph of their own; after the block, the backward pass of a forward pass inside it.

    >>> import torch, tn
    >>> layer = tn.StructuredLinear(64, 64, structure="tt", rank=8)
    >>> with tn.accumulate(layer, batches=4):
    ...     for x in torch.randn(4, 16, 64):
    ...         layer(x).square().mean().backward()
    >>> layer.first.grad.shape
    torch.Size([8, 8, 8])
    """
    if isinstance(batches, bool) or not isinstance(batches, int) or batches < 1:
        raise OperatorError(f"batches is {batches!r}, expected an integer ≥ 1")
    if not isinstance(model, nn.Module):
        raise OperatorError(f"tn.accumulate takes a torch.nn.Module, got a {type(model).__name__}")
    _refuse_sharded(model)
    block = _Block(model, batches)
    hook = register_optimizer_step_pre_hook(_refuse_step(model))
    try:
        for layer in block.layers:
            layer._hoisted = _Hoisted(block, layer)
        yield model
        block.pull()
    finally:
        hook.remove()
        block.close()
