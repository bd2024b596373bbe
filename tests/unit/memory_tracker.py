"""What a program really allocates: every storage made by an operator, from birth to death."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Tracker(TorchDispatchMode):
    """Records the bytes of every new storage, and when it dies."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[tuple[int, int]] = []  # (a number for the storage, bytes: negative when it dies)
        self.known: dict[int, int] = {}  # address of a live storage → its number
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in {*before, *self.known}:
                self._born(tensor.untyped_storage())
        return result

    def _born(self, storage) -> None:
        number, size, address = self.count, storage.nbytes(), storage._cdata
        self.count += 1
        self.known[address] = number
        self.events.append((number, size))
        weakref.finalize(storage, self._dead, address, number, size)

    def _dead(self, address: int, number: int, size: int) -> None:
        if self.known.get(address) == number:
            del self.known[address]
        self.events.append((number, -size))

    def number(self, tensor: Tensor) -> int | None:
        return self.known.get(tensor.untyped_storage()._cdata)

    def peak(self, *excluded: Tensor | None) -> int:
        """The most bytes alive at once, the storages of some tensors left out."""
        out = {self.number(tensor) for tensor in excluded if tensor is not None}
        now = most = 0
        for number, size in self.events:
            if number not in out:
                now += size
                most = max(most, now)
        return most


@contextmanager
def kept_bytes(operands: list[Tensor]) -> Iterator[Callable[..., int]]:
    """Counts the bytes of tensors that autograd saves, operands and the results it is asked about aside, each storage once."""
    own = {operand.untyped_storage().data_ptr() for operand in operands}
    found: dict[int, int] = {}
    alive: list[Tensor] = []  # so that no address is used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            found[storage.data_ptr()] = storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    def total(*results: Tensor) -> int:
        apart = {result.untyped_storage().data_ptr() for result in results}
        return sum(size for address, size in found.items() if address not in apart)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield total


def measured(run: Callable[..., Any], operands: list[Tensor]) -> tuple[int, int]:
    """(bytes kept for the gradients, the most alive in forward and backward), results and gradients left out."""
    wanted = [operand for operand in operands if operand.requires_grad]
    with kept_bytes(operands) as kept:
        results = _all(run(*operands))
        saved = kept(*results) if wanted else 0
    cotangents = [torch.randn(result.shape, dtype=result.dtype) for result in results if result.requires_grad]
    del results
    with Tracker() as tracker:
        results = _all(run(*operands))
        made = torch.autograd.grad([result for result in results if result.requires_grad], wanted, cotangents) if wanted else ()
    return saved, tracker.peak(*results, *made)


def _all(results: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return results if isinstance(results, tuple) else (results,)
