"""What every tokenizer is: the base class, its error, and how one is kept in a file."""

import hashlib
import json
import os
import tempfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tn.errors import TnError

FORMAT = "tn-layers tokenizer"
VERSION = 1
FILE = "tokenizer.json"


class TokenizerError(TnError, ValueError):
    """A tokenizer's name, file, text or token that cannot be used; the message names it."""


class Tokenizer(ABC):
    """Text ↔ token ids.

    Attributes:
        name: how it was asked for, e.g. "bpe:4096".
        vocab: number of ids; every id is in range(vocab).
        end_of_text: the id that ends a document, or None when the tokenizer has none. `encode` never makes it: a text that
            spells it is encoded as ordinary text.
    """

    name: str
    vocab: int
    end_of_text: int | None

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[NDArray[np.int32]]:
        """Encode several texts; faster than one by one. Errors as `encode`."""

    @abstractmethod
    def decode_bytes(self, ids: ArrayLike) -> bytes:
        """The UTF-8 bytes of some tokens, which may begin or end inside a character. Errors as `decode`."""

    @property
    @abstractmethod
    def token_bytes(self) -> NDArray[np.int64]:
        """Bytes of text each token stands for, (vocab,) int64; 0 for special tokens. For bits per byte.

        Exact for byte-level tokenizers. For a tokenizer that normalises text (lower case, added spaces) it counts the
        token's own text.
        """

    @abstractmethod
    def _state(self) -> dict[str, object]:
        """Everything that decides what the tokenizer does, as JSON; its name is not part of it."""

    def encode(self, text: str) -> NDArray[np.int32]:
        """Token ids of a text, (tokens,) int32.

        Raises:
            TokenizerError: not a str, or it holds half of a surrogate pair, which no UTF-8 can.

        >>> import zoo
        >>> zoo.tokenizer("bytes").encode("né")
        array([110, 195, 169], dtype=int32)
        """
        return self.encode_batch([text])[0]

    def decode(self, ids: ArrayLike) -> str:
        """The text of some tokens; bytes that are not UTF-8 become U+FFFD, special tokens their names.

        Args:
            ids: integers, (tokens,).

        Raises:
            TokenizerError: an id outside range(vocab).

        >>> import zoo
        >>> zoo.tokenizer("bytes").decode([110, 195, 169])
        'né'
        """
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the tokenizer by value, in hex."""
        return _digest(self._state())

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write `directory/tokenizer.json`, whole or not at all, and return its path."""
        path = Path(directory) / FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        document = {
            "format": FORMAT,
            "version": VERSION,
            "name": self.name,
            "fingerprint": self.fingerprint,
            **self._state(),
        }
        _write_atomic(path, json.dumps(document, ensure_ascii=False, indent=0).encode())
        return path

    def _ids(self, ids: ArrayLike) -> list[int]:
        """Ids as checked Python ints."""
        array = np.asarray(ids)
        if array.size == 0:
            return []
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise TokenizerError(f"token ids must be a flat list of integers, got {array.dtype} of shape {array.shape}")
        for bad in array[(array < 0) | (array >= self.vocab)][:1]:
            raise TokenizerError(f"token {bad} is outside tokenizer {self.name!r}, which has ids 0 to {self.vocab - 1}")
        return array.tolist()

    def __repr__(self) -> str:
        return f"<Tokenizer {self.name!r}, vocab {self.vocab}, end_of_text {self.end_of_text}>"


def utf8(text: str) -> bytes:
    """A text's bytes, checked."""
    if not isinstance(text, str):
        raise TokenizerError(f"a text must be a str, got {type(text).__name__}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise TokenizerError(f"character {error.start} of a text is {text[error.start]!r}, half of a surrogate pair") from error


def json_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object."""
    try:
        document = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise TokenizerError(f"there is no {path}") from error
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict):
        raise TokenizerError(f"{path} must hold a JSON object, it holds a {type(document).__name__}")
    return document


def _digest(value: object) -> str:
    """sha256 of canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _write_atomic(path: Path, contents: bytes) -> None:
    """Replace a file by new contents that are on disk first."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
