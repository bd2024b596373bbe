"""Batches of token ids as a pure function of (seed, index), and a sweep that covers a validation set once.

Suffixes: B rows of a batch, S positions (context).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from tn.errors import unknown
from train.data.documents import DataError

IGNORED = -100  # the target of a position that is not a real token
_MODES = ("packed", "padded")
_CHUNK = 2**24  # tokens looked at in one go


@dataclass(frozen=True)
class Batch:
    """A batch.

    Attributes:
        inputs: (batch, context) int64.
        targets: (batch, context) int64, the token after each input; -100 where there is none.
        tokens: number of real targets.
        bytes: bytes of text the real targets stand for, or None when `token_bytes` was not given.
    """

    inputs: Tensor
    targets: Tensor
    tokens: int
    bytes: int | None = None


class _Rows:
    """Token ids cut into rows of at most context + 1 tokens; both modes, in corpus order.

    "packed": row n is tokens n·context + offset to (n + 1)·context + offset, both included, so that the last token of a row is the first
    of the next and every token but the first is a target once. "padded": row n is document n and its end-of-text.
    """

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger],
        *,
        context: int,
        mode: str,
        end_of_text: int | None,
        vocab: int | None,
        token_bytes: NDArray[np.int64] | None,
    ) -> None:
        if mode not in _MODES:
            raise DataError(unknown("mode", mode, _MODES))
        for name, value in (("context", context), ("vocab", 1 if vocab is None else vocab)):
            _positive(name, value)
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise DataError(f"tokens must be a flat array of integers, got {tokens.dtype} of shape {tokens.shape}")
        self.tokens, self.context, self.vocab = tokens, context, vocab
        self.token_bytes = None if token_bytes is None else torch.from_numpy(np.asarray(token_bytes, dtype=np.int64))
        self.documents = None
        if mode == "padded":
            if end_of_text is None:
                raise DataError("padded mode finds documents by their end-of-text token, and end_of_text is None: use mode 'packed'")
            self.documents = _documents(tokens, end_of_text)

    def batch(self, spans: list[tuple[int, int]]) -> Batch:
        """The batch whose rows are tokens[start:stop]; of rows longer than context + 1 the rest is left out."""
        inputs_BS = torch.zeros((len(spans), self.context), dtype=torch.int64)
        targets_BS = torch.full((len(spans), self.context), IGNORED, dtype=torch.int64)
        for row, (start, stop) in enumerate(spans):
            ids = torch.from_numpy(self.tokens[start : min(stop, start + self.context + 1)].astype(np.int64))
            inputs_BS[row, : len(ids) - 1] = ids[:-1]
            targets_BS[row, : len(ids) - 1] = ids[1:]
        self._check(inputs_BS, targets_BS)
        real = targets_BS[targets_BS != IGNORED]
        size = None if self.token_bytes is None else int(self.token_bytes[real].sum())
        return Batch(inputs_BS, targets_BS, len(real), size)

    def _check(self, inputs_BS: Tensor, targets_BS: Tensor) -> None:
        """Refuse a token that the model has no row for."""
        limit = len(self.token_bytes) if self.vocab is None and self.token_bytes is not None else self.vocab
        if limit is None or not inputs_BS.numel():
            return
        largest = max(int(inputs_BS.max()), int(targets_BS.max()))
        if largest >= limit:
            raise DataError(f"the data has token {largest}, but the model's vocabulary has only {limit} ids: use its own tokenizer")


class Batches:
    """Training batches: `batches[i]` for any i ≥ 0, the same for the same arguments and i, whatever was asked before.

    Rows are visited in a new random order each epoch, each row once; a batch may end one epoch and begin the next, and after the last
    batch of an epoch there is always another. So a run that resumes needs only its counter. In packed mode documents run on across
    rows, and each epoch's rows begin at another random token. In padded mode a row is one document, cut or padded to the context.

    Args:
        tokens: (tokens,) ids; documents joined, each followed by end-of-text.
        context: positions in a row.
        batch: rows in a batch.
        seed: whole number of 0 or more.
        mode: "packed" or "padded".
        end_of_text: the id between documents; padded mode needs it.
        vocab: ids the model knows; a batch that holds another is refused. Default: the length of `token_bytes`.
        token_bytes: bytes of text per id (`Tokenizer.token_bytes`), for `Batch.bytes`.

    Attributes:
        rows: rows in an epoch.

    Raises:
        DataError: fewer rows than a batch, or a bad argument; on indexing, a token outside the vocabulary.

    >>> batches = Batches(np.arange(9), context=2, batch=2, seed=0)
    >>> batches.rows, batches[0].inputs.shape
    (3, torch.Size([2, 2]))
    """

    __iter__ = None  # endless: index it

    def __init__(
        self,
        tokens: NDArray[np.unsignedinteger],
        *,
        context: int,
        batch: int,
        seed: int,
        mode: str = "packed",
        end_of_text: int | None = None,
        vocab: int | None = None,
        token_bytes: NDArray[np.int64] | None = None,
    ) -> None:
        _positive("batch", batch)
        if not isinstance(seed, int | np.integer) or seed < 0:
            raise DataError(f"seed must be a whole number of 0 or more, got {seed!r}")
        self._rows = _Rows(tokens, context=context, mode=mode, end_of_text=end_of_text, vocab=vocab, token_bytes=token_bytes)
        self._batch, self._seed = batch, seed
        if self._rows.documents is None:
            # One row fewer than would fit leaves every epoch at least `context` places to begin at.
            self.rows = max((len(tokens) - context) // context, int(len(tokens) > context))
            what = f"{len(tokens)} tokens make {self.rows} rows of context {context} + 1"
        else:
            self.rows = len(self._rows.documents)
            what = f"there are {self.rows} documents of 2 tokens or more"
        if self.rows < batch:
            raise DataError(f"too little data for a batch of {batch}: {what}; use a smaller batch or context, or more data")
        self._order = lru_cache(maxsize=2)(self._epoch_order)  # two, because a batch may touch two epochs

    def __getitem__(self, index: int) -> Batch:
        """Batch `index`.

        Raises:
            DataError: a negative or fractional index; a token outside the vocabulary.
        """
        if not isinstance(index, int | np.integer) or index < 0:
            raise DataError(f"the index of a batch must be a whole number of 0 or more, got {index!r}")
        places = range(index * self._batch, (index + 1) * self._batch)
        return self._rows.batch([self._span(place // self.rows, place % self.rows) for place in places])

    def epoch(self, index: int) -> float:
        """How many times the data has been seen before batch `index`."""
        return index * self._batch / self.rows

    def _span(self, epoch: int, place: int) -> tuple[int, int]:
        """Where the row at a place in an epoch's order begins and ends."""
        offset, order = self._order(epoch)
        row = int(order[place])
        if self._rows.documents is not None:
            start, stop = self._rows.documents[row]
            return int(start), int(stop)
        start = offset + row * self._rows.context
        return start, start + self._rows.context + 1

    def _epoch_order(self, epoch: int) -> tuple[int, NDArray[np.int64]]:
        """Where an epoch's packed rows begin, and the order of its rows."""
        random = np.random.Generator(np.random.PCG64(np.random.SeedSequence([self._seed, epoch])))
        slack = len(self._rows.tokens) - 1 - self.rows * self._rows.context
        offset = int(random.integers(slack + 1)) if self._rows.documents is None else 0
        return offset, random.permutation(self.rows)


def sweep(
    tokens: NDArray[np.unsignedinteger],
    *,
    context: int,
    batch: int,
    mode: str = "packed",
    end_of_text: int | None = None,
    vocab: int | None = None,
    token_bytes: NDArray[np.int64] | None = None,
    batches: int | None = None,
) -> Iterator[Batch]:
    """Batches for evaluation: every row once, in order, always the same; the last may have fewer rows.

    In packed mode every token but the first is a target exactly once; the last row is padded.

    Args:
        batches: at most so many batches, of rows spread evenly over the data. The other arguments: see Batches.

    Raises:
        DataError: no data, or a bad argument.

    >>> [batch.targets.tolist() for batch in sweep(np.arange(6), context=2, batch=2)]
    [[[1, 2], [3, 4]], [[5, -100]]]
    """
    _positive("batch", batch)
    rows = _Rows(tokens, context=context, mode=mode, end_of_text=end_of_text, vocab=vocab, token_bytes=token_bytes)
    if rows.documents is not None:
        spans = rows.documents
    else:
        starts = np.arange(0, max(len(tokens) - 1, 0), context)
        spans = np.stack([starts, np.minimum(starts + context + 1, len(tokens))], axis=1)
    if len(spans) == 0:
        raise DataError(f"there is nothing to evaluate on: {len(tokens)} tokens make no row in {mode} mode")
    if batches is not None:
        _positive("batches", batches)
        kept = min(batches * batch, len(spans))
        spans = spans[np.arange(kept) * len(spans) // kept]
    return (rows.batch([(int(start), int(stop)) for start, stop in spans[at : at + batch]]) for at in range(0, len(spans), batch))


def _documents(tokens: NDArray[np.unsignedinteger], end_of_text: int) -> NDArray[np.int64]:
    """Start and stop of each document, its end-of-text included, (documents, 2); those with no target are left out."""
    chunks = range(0, len(tokens), _CHUNK)
    ends = [np.flatnonzero(tokens[start : start + _CHUNK] == end_of_text) + start + 1 for start in chunks]
    stops = np.concatenate([*ends, np.array([len(tokens)])]).astype(np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), stops[:-1]])
    return np.stack([starts, stops], axis=1)[stops - starts >= 2]


def _positive(name: str, value: object) -> None:
    """Refuse anything but a whole number of 1 or more."""
    if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
        raise DataError(f"{name} must be a whole number of 1 or more, got {value!r}")
