"""Corpora as values: a name, one pass over documents already split into training and validation, and a hash of the contents."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import Literal

from tn.errors import TnError, unknown

Split = Literal["train", "val"]
SPLITS: tuple[Split, Split] = ("train", "val")
VAL_SHARE = 0.05


class DataError(TnError, ValueError):
    """Data that cannot be used: unknown, missing, empty, damaged or out of range; the message names it."""


class Source(ABC):
    """A corpus.

    Attributes:
        name: the spec it was made from, e.g. "text:books".
        note: what was found, for people; e.g. "734 files".
        size: bytes of text, or None when that is not known beforehand.
    """

    name: str
    note: str
    size: int | None = None

    @abstractmethod
    def split(self) -> Iterator[tuple[Split, str]]:
        """All documents, each with its side, in one pass and always in the same order. No document is empty."""

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 (hex) of the contents: equal for equal documents in equal order, wherever they are stored."""

    def documents(self, split: Split) -> Iterator[str]:
        """The documents of one side.

        Raises:
            DataError: the split is neither "train" nor "val"; or a document cannot be read.
        """
        if split not in SPLITS:
            raise DataError(unknown("split", split, SPLITS))
        return (text for side, text in self.split() if side == split)


def split_documents(documents: Iterable[str]) -> Iterator[tuple[Split, str]]:
    """Put each document on a side by the hash of its text, so that equal documents are on one side: about 5 % are "val".

    Both sides get something from any corpus of two characters or more: when all documents fall on one side, the one whose
    hash is nearest the border changes over (it is held back for that), and a lone document is cut after 95 % of it.

    >>> [side for side, text in split_documents(["a b c", "d e f"])]
    ['train', 'val']
    """
    kept: tuple[float, str] | None = None
    first: Split | None = None
    count = 0
    both = False
    for text in filter(None, documents):
        place = _place(text)
        side: Split = "val" if place < VAL_SHARE else "train"
        count += 1
        if both:
            yield side, text
        elif first is None or kept is None:
            first, kept = side, (place, text)
        elif side != first:
            both = True
            yield first, kept[1]
            yield side, text
        else:
            released = (place, text)
            if abs(place - VAL_SHARE) < abs(kept[0] - VAL_SHARE):
                released, kept = kept, released
            yield first, released[1]
    if both or kept is None:
        return
    if count == 1:
        yield from zip(SPLITS, _cut(kept[1]), strict=True)
    else:
        yield "val" if first == "train" else "train", kept[1]


def _place(text: str) -> float:
    """Where a text's hash falls in [0, 1)."""
    return int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:8]) / 2**64


def _cut(text: str) -> tuple[str, str]:
    """The first 95 % of a text, to the end of a line where there is one, and the rest."""
    if len(text) < 2:
        raise DataError(f"a corpus of one character, {text!r}, cannot be split into training and validation text")
    at = min(max(int(len(text) * (1 - VAL_SHARE)), 1), len(text) - 1)
    line = text.find("\n", at - 1) + 1
    at = line if 0 < line < len(text) else at
    return text[:at], text[at:]
