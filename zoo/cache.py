"""Keys and values of the tokens already seen, so that generation computes only the new ones."""

from __future__ import annotations

import torch
from torch import Tensor

from zoo.errors import CacheError


class KVCache:
    """Preallocated keys and values of every layer: two tensors (layers, batch, heads, length, head_dim).

    A forward pass writes each layer's new keys and values with `append` and ends with one `advance`;
    a pass that fails before its `advance` leaves the cache as it was. The cache is for inference: gradients
    do not flow through it.

    Args:
        layers, batch, heads, length, head_dim: sizes; `length` is the most tokens it can hold.
        device, dtype: of the two tensors.
    """

    def __init__(
        self,
        *,
        layers: int,
        batch: int,
        heads: int,
        length: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        shape = (layers, batch, heads, length, head_dim)
        self.keys_LBHSD = torch.zeros(shape, device=device, dtype=dtype)
        self.values_LBHSD = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    @property
    def capacity(self) -> int:
        """The most tokens the cache can hold."""
        return self.keys_LBHSD.shape[3]

    @property
    def nbytes(self) -> int:
        """Bytes of both tensors."""
        return self.keys_LBHSD.nbytes + self.values_LBHSD.nbytes

    def append(self, layer: int, k_BHSD: Tensor, v_BHSD: Tensor) -> tuple[Tensor, Tensor]:
        """Write a layer's new keys and values after the ones held, and return all of them as views.

        Args:
            layer: index of the layer.
            k_BHSD, v_BHSD: (batch, heads, new, head_dim); cast to the cache's dtype.

        Returns:
            keys and values (batch, heads, held + new, head_dim), in the dtype of `k_BHSD`.

        Raises:
            CacheError: no room, another batch, or gradients are being recorded.
        """
        if torch.is_grad_enabled() and (k_BHSD.requires_grad or v_BHSD.requires_grad):
            raise CacheError("a key-value cache is for inference: call the model under torch.no_grad()")
        batch, new = k_BHSD.shape[0], k_BHSD.shape[2]
        if batch != self.keys_LBHSD.shape[1]:
            raise CacheError(f"the cache holds {self.keys_LBHSD.shape[1]} sequences, and the call has {batch}")
        end = self.length + new
        if end > self.capacity:
            raise CacheError(f"the cache holds at most {self.capacity} tokens; {self.length} + {new} do not fit")
        self.keys_LBHSD[layer, :, :, self.length : end] = k_BHSD
        self.values_LBHSD[layer, :, :, self.length : end] = v_BHSD
        keys, values = self.keys_LBHSD[layer, :, :, :end], self.values_LBHSD[layer, :, :, :end]
        return keys.to(k_BHSD.dtype), values.to(v_BHSD.dtype)

    def advance(self, new: int) -> None:
        """Count `new` more tokens as held, after every layer has appended theirs."""
        self.length += new

    def clear(self) -> None:
        """Forget every token; the memory stays allocated."""
        self.length = 0
