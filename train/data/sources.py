"""Where text comes from: the Python standard library, files and folders, Hugging Face datasets, nanoGPT token files."""

import hashlib
import json
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from tn.errors import unknown
from train.data.documents import SPLITS, VAL_SHARE, DataError, Source, Split, split_documents
from train.data.hub import HuggingFaceSource

_PIECE = 8 * 2**20  # a file with more bytes is read as several documents
_NOT_STDLIB = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})
_NAMES = ("bin:PATH", "hf:NAME_OR_PATH", "stdlib", "text:PATH")


def source_names() -> tuple[str, ...]:
    """The forms of spec that `source` takes."""
    return _NAMES


def source(spec: str) -> Source:
    """The corpus of a spec.

    Args:
        spec: "stdlib" (the sources of this Python's standard library, without tests and installed packages) | "text:PATH" (a file,
            or every UTF-8 file of a folder) | "hf:NAME_OR_PATH" (a dataset of the Hugging Face hub, streamed, or a local parquet,
            json, csv or text file or folder; see HuggingFaceSource for its options) | "bin:PATH" (a folder with nanoGPT's
            train.bin and val.bin).

    Raises:
        DataError: an unknown form, a missing path, or a folder with no text in it.

    >>> source("stdlib").name
    'stdlib'
    """
    kind, _, rest = spec.partition(":")
    if spec == "stdlib":
        root = Path(sysconfig.get_path("stdlib"))
        return FileSource(spec, root, tuple(_walk(root, skip=_NOT_STDLIB, suffix=".py")))
    if kind in ("text", "hf", "bin") and not rest:
        raise DataError(f"data source {spec!r} needs a path: '{kind}:PATH'")
    if kind == "text":
        return _text(spec, Path(rest).expanduser())
    if kind == "hf":
        return HuggingFaceSource.parse(spec, rest)
    if kind == "bin":
        return BinSource(spec, Path(rest).expanduser())
    if Path(spec).expanduser().exists():
        raise DataError(f"unknown data source {spec!r}: for a file or folder of text, write 'text:{spec}'. One of: {', '.join(_NAMES)}")
    raise DataError(unknown("data source", spec, _NAMES))


class _File(NamedTuple):
    path: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class FileSource(Source):
    """Text files, a document each, in order of their paths; files that are not UTF-8 text are left out and counted.

    A file larger than 8 MiB is several documents, cut at line ends. A corpus of one file is split after 95 % of its bytes,
    any other by documents (`split_documents`).

    Attributes:
        name: the spec.
        root: the folder (or the file) that was asked for.
        paths: candidates, sorted.
    """

    name: str
    root: Path
    paths: tuple[Path, ...]

    @cached_property
    def _files(self) -> tuple[_File, ...]:
        found = tuple(file for path in self.paths if (file := _examine(path)) is not None)
        if not found:
            what = "holds no UTF-8 text" if self.root.is_dir() else "is empty or not UTF-8 text"
            raise DataError(f"data source {self.name!r}: {self.root} {what}")
        return found

    @property
    def note(self) -> str:  # type: ignore[override]
        skipped = len(self.paths) - len(self._files)
        return f"{len(self._files)} files" + (f", {skipped} left out (empty or not UTF-8 text)" if skipped else "")

    @property
    def size(self) -> int:  # type: ignore[override]
        return sum(file.size for file in self._files)

    def fingerprint(self) -> str:
        return hashlib.sha256(json.dumps([file.sha256 for file in self._files]).encode()).hexdigest()

    def split(self) -> Iterator[tuple[Split, str]]:
        if len(self._files) > 1:
            yield from split_documents(text for file in self._files for text in self._read(file.path, 0, file.size))
            return
        (file,) = self._files
        border = _border(file.path, file.size)
        for side, start, stop in zip(SPLITS, (0, border), (border, file.size), strict=True):
            for text in self._read(file.path, start, stop):
                yield side, text

    def _read(self, path: Path, start: int, stop: int) -> Iterator[str]:
        try:
            yield from _pieces(path, start, stop)
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"data source {self.name!r}: {path} changed while it was read: {error}") from error


@dataclass(frozen=True)
class BinSource(Source):
    """nanoGPT's train.bin and val.bin: little-endian uint16 token ids, documents already joined.

    Attributes:
        name: the spec.
        folder: where both files are.
    """

    name: str
    folder: Path
    note: str = "token ids, ready made"

    def __post_init__(self) -> None:
        for split in SPLITS:
            path = self.folder / f"{split}.bin"
            if not path.is_file():
                raise DataError(f"data source {self.name!r}: there is no {path}; nanoGPT's folders hold train.bin and val.bin")
            size = path.stat().st_size
            if size == 0 or size % 2:
                raise DataError(f"data source {self.name!r}: {path} has {size} bytes, uint16 tokens need a positive even number")

    def tokens(self, split: Split) -> np.memmap:
        """Token ids of one side, (tokens,) uint16, mapped from disk."""
        return np.memmap(self.folder / f"{split}.bin", dtype="<u2", mode="r")

    def split(self) -> Iterator[tuple[Split, str]]:
        raise DataError(f"data source {self.name!r} holds token ids, no text: name the tokenizer that made them, e.g. 'gpt2'")

    @cached_property
    def _sha256(self) -> str:
        digest = hashlib.sha256()
        for split in SPLITS:
            with open(self.folder / f"{split}.bin", "rb") as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        return self._sha256


def _text(spec: str, path: Path) -> FileSource:
    """The source of a file or a folder."""
    if path.is_file():
        return FileSource(spec, path, (path,))
    if not path.is_dir():
        raise DataError(f"data source {spec!r}: {path} does not exist")
    return FileSource(spec, path, tuple(_walk(path)))


def _walk(root: Path, *, skip: frozenset[str] = frozenset(), suffix: str = "") -> list[Path]:
    """Files below a folder, sorted by path; hidden ones, and folders named in `skip`, are left out."""
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in files if not name.startswith(".") and name.endswith(suffix)]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).parts)


def _examine(path: Path) -> _File | None:
    """A file's size and hash, or None when it is empty, unreadable or not text (UTF-8 without NUL)."""
    digest = hashlib.sha256()
    size = 0
    try:
        for text in _pieces(path, 0, path.stat().st_size):
            if "\0" in text:
                return None
            raw = text.encode()
            digest.update(raw)
            size += len(raw)
    except (OSError, UnicodeDecodeError):
        return None
    return _File(path, size, digest.hexdigest()) if size else None


def _pieces(path: Path, start: int, stop: int) -> Iterator[str]:
    """The text of bytes start to stop, in pieces of at most `_PIECE` bytes that end lines where they can."""
    with open(path, "rb") as file:
        file.seek(start)
        while start < stop:
            raw = file.read(min(_PIECE, stop - start))
            if not raw:
                raise OSError(f"it ends at byte {start}, not {stop}")
            if start + len(raw) < stop:
                raw = raw[: _last_break(raw)]
                file.seek(start + len(raw))
            start += len(raw)
            yield raw.decode("utf-8")


def _last_break(raw: bytes) -> int:
    """Where to cut bytes: after the last line end, else before the last character, which may be incomplete."""
    line = raw.rfind(b"\n") + 1
    if line:
        return line
    at = len(raw) - 1
    while at > 1 and raw[at] & 0xC0 == 0x80:
        at -= 1
    return max(at, 1)


def _border(path: Path, size: int) -> int:
    """The byte where validation text begins in a lone file: after 95 %, at a line's start where there is one, else a character's."""
    at = int(size * (1 - VAL_SHARE))
    with open(path, "rb") as file:
        file.seek(at)
        line = file.readline(_PIECE)
        if line.endswith(b"\n") and at + len(line) < size:
            return at + len(line)
    continuation = 0
    while continuation < len(line) and line[continuation] & 0xC0 == 0x80:
        continuation += 1
    return at + continuation
