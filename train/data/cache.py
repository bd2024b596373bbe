"""From a corpus and a tokenizer to token ids mapped from disk, prepared once.

The cache is a folder of folders named by value (`train/data/store.py`): `tokenizers/KEY/tokenizer.json` for trained BPEs, and
`tokens/KEY/{train.bin, val.bin, tokenizer.json, manifest.json}` for token ids. Deleting any of it is safe.
"""

import contextlib
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from tn.settings import cache_folder
from train.data.documents import SPLITS, DataError, Source, Split
from train.data.hub import HubUnreachable
from train.data.sources import BinSource, source
from train.data.store import Contents, fault, read_manifest, say, stored
from zoo.tokenizers import Tokenizer, bpe_size, load_tokenizer, tokenizer

_FORMAT = 1  # a change to how documents are split, joined or stored raises it
_SAMPLE = 64 * 2**20  # characters of training text that a BPE is trained on
_GROUP = 4 * 2**20  # characters encoded in one call
_CHUNK = 2**24  # tokens looked at in one go
_TOKENIZER = Contents(frozenset({"tokenizer.json"}), frozenset({"data"}))
_TOKENS = Contents(
    frozenset({"train.bin", "val.bin", "tokenizer.json"}),
    frozenset({"data", "note", "tokenizer", "dtype", "documents", "tokens", "bytes"}),
)


@dataclass(frozen=True)
class Summary:
    """What was prepared. `print` shows a table; `to_dict` gives JSON values.

    Attributes:
        data, note: the source's spec, and what was found.
        corpus: hash of the documents.
        tokenizer, vocab: its name and number of ids.
        documents: documents on each side, or None where only token ids are known.
        tokens: token ids on each side, end-of-text included.
        bytes: bytes of text on each side.
        folder: where the ids are.
        reused: whether they had been prepared before.
    """

    data: str
    note: str
    corpus: str
    tokenizer: str
    vocab: int
    documents: dict[Split, int] | None
    tokens: dict[Split, int]
    bytes: dict[Split, int]
    folder: str
    reused: bool

    @property
    def bytes_per_token(self) -> float:
        """Bytes of text a token stands for, over both sides."""
        return sum(self.bytes.values()) / sum(self.tokens.values())

    def to_dict(self) -> dict[str, object]:
        """JSON values."""
        return dataclasses.asdict(self)

    def __str__(self) -> str:
        documents = self.documents or dict.fromkeys(SPLITS)
        rows = [("data", f"{self.data} ({self.note})"), ("corpus", self.corpus[:16])]
        rows.append(("tokenizer", f"{self.tokenizer}, {self.vocab:,} ids, {self.bytes_per_token:.2f} bytes/token"))
        for split in SPLITS:
            count = "" if documents[split] is None else f", {documents[split]:,} documents"
            rows.append((split, f"{self.tokens[split]:,} tokens, {self.bytes[split]:,} bytes{count}"))
        rows.append(("cache", f"{self.folder} ({'found' if self.reused else 'made now'})"))
        return "\n".join(f"{name:<10} {value}" for name, value in rows)


@dataclass(frozen=True)
class Corpus:
    """Token ids ready for training.

    Attributes:
        train, val: (tokens,) uint16, or uint32 for vocabularies over 65536; read-only, mapped from disk.
        tokenizer: what made them.
        fingerprint: the corpus hash; a resumed run must see the same.
        summary: what was prepared.
    """

    train: np.memmap
    val: np.memmap
    tokenizer: Tokenizer
    fingerprint: str
    summary: Summary


def default_cache_dir() -> Path:
    """$XDG_CACHE_HOME/tn-layers, or ~/.cache/tn-layers."""
    return cache_folder()


def prepare(
    data: str | Source,
    tokenizer: str | Tokenizer,
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> Corpus:
    """Token ids of a corpus: from the cache, or made and kept there.

    Documents are encoded one by one and joined in order, each followed by end-of-text where the tokenizer has one. Two processes
    that prepare the same thing take turns; an interrupted one leaves nothing that counts; a damaged cache is moved aside and named.
    When a hub name cannot be looked up, the newest cache made from that name and tokenizer is used, and named.

    Args:
        data: a spec (`source`) or a Source.
        tokenizer: a name (`zoo.tokenizer`; "bpe:N" is trained on at most the first 64 Mi characters of the training side) or a Tokenizer.
        cache_dir: default `default_cache_dir()`.
        progress: show a bar when stderr is a terminal.

    Raises:
        DataError: unknown, missing or empty data, no network, a full disk; ids of a .bin file outside the tokenizer's.
        TokenizerError: see `zoo.tokenizer`.
    """
    origin = data if isinstance(data, Source) else source(data)
    root = default_cache_dir() if cache_dir is None else Path(cache_dir).expanduser()
    if isinstance(origin, BinSource):
        return _ready_made(origin, tokenizer, progress)
    if isinstance(tokenizer, str) and tokenizer.startswith("bpe:"):
        bpe_size(tokenizer)  # a bad N is refused before the corpus is read
    try:
        corpus = origin.fingerprint()
    except HubUnreachable as error:
        return _prepared_earlier(root, origin.name, tokenizer, error)
    coder = tokenizer if isinstance(tokenizer, Tokenizer) else _tokenizer(tokenizer, origin, corpus, root, progress)
    key = {"format": _FORMAT, "source": corpus, "tokenizer": coder.fingerprint}

    def build(folder: Path) -> dict[str, object]:
        facts = {"data": origin.name, "note": origin.note, "tokenizer": coder.name, **_write_tokens(origin, coder, folder, progress)}
        coder.save(folder)
        return facts

    folder, manifest, reused = stored(root / "tokens", key, _TOKENS, build)
    facts = {**manifest, "data": origin.name, "note": origin.note}  # the same contents may have been prepared under another name
    return _corpus(folder, facts, coder, reused)


def prepare_main(
    data: str = "stdlib",
    tokenizer: str = "bpe:4096",
    *,
    cache_dir: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> None:
    """`python -m train prepare`: `prepare`, then print its summary. Errors as `prepare`."""
    print(prepare(data, tokenizer, cache_dir=cache_dir, progress=progress).summary)


def _tokenizer(name: str, origin: Source, corpus: str, root: Path, progress: bool) -> Tokenizer:
    """The tokenizer of a name; a BPE is trained on the corpus once and kept."""
    if not name.startswith("bpe:"):
        return tokenizer(name)
    size = bpe_size(name)

    def build(folder: Path) -> dict[str, object]:
        with _bar(progress, f"training bpe:{size}", None) as advance:
            tokenizer(f"bpe:{size}", documents=lambda: _sample(origin.documents("train"), advance)).save(folder)
        return {"data": origin.name}

    key = {"format": _FORMAT, "source": corpus, "bpe": size, "sample": _SAMPLE}
    folder, _, _ = stored(root / "tokenizers", key, _TOKENIZER, build)
    return load_tokenizer(folder)


def _sample(documents: Iterable[str], advance: Callable[[int], None]) -> Iterator[str]:
    """The first documents, up to `_SAMPLE` characters."""
    left = _SAMPLE
    for text in documents:
        yield text[:left]
        advance(len(text))
        left -= len(text)
        if left <= 0:
            return


def _write_tokens(origin: Source, coder: Tokenizer, folder: Path, progress: bool) -> dict[str, object]:
    """Write train.bin and val.bin; returns facts for the manifest."""
    dtype = np.dtype("<u2") if coder.vocab <= 2**16 else np.dtype("<u4")
    ending = np.array([] if coder.end_of_text is None else [coder.end_of_text], dtype=dtype).tobytes()
    documents, tokens, size = dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0), dict.fromkeys(SPLITS, 0)
    with open(folder / "train.bin", "wb") as train, open(folder / "val.bin", "wb") as val:
        files = {"train": train, "val": val}
        with _bar(progress, f"tokenising {origin.name}", origin.size) as advance:
            for group in _groups(origin.split()):
                for (side, text), ids in zip(group, coder.encode_batch([text for _, text in group]), strict=True):
                    written = files[side].write(ids.astype(dtype).tobytes() + ending)
                    documents[side] += 1
                    tokens[side] += written // dtype.itemsize
                    size[side] += (read := len(text.encode()))
                    advance(read)
    for side in SPLITS:
        if tokens[side] == 0:
            raise DataError(f"data source {origin.name!r} is too small: it has no text for {side!r}")
    return {"dtype": dtype.str, "documents": documents, "tokens": tokens, "bytes": size}


def _groups(documents: Iterable[tuple[Split, str]]) -> Iterator[list[tuple[Split, str]]]:
    """Documents in groups of about `_GROUP` characters."""
    group, size = [], 0
    for side, text in documents:
        group.append((side, text))
        size += len(text)
        if size >= _GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group


def _corpus(folder: Path, facts: dict[str, Any], coder: Tokenizer, reused: bool) -> Corpus:
    """Open a complete folder."""
    train, val = (np.memmap(folder / f"{side}.bin", dtype=facts["dtype"], mode="r") for side in SPLITS)
    corpus = facts["key"]["source"]
    counts = {name: facts[name] for name in ("data", "note", "documents", "tokens", "bytes")}
    summary = Summary(**counts, corpus=corpus, tokenizer=coder.name, vocab=coder.vocab, folder=str(folder), reused=reused)
    return Corpus(train, val, coder, corpus, summary)


def _prepared_earlier(root: Path, name: str, wanted: str | Tokenizer, error: HubUnreachable) -> Corpus:
    """The newest complete cache made from a hub name and a tokenizer, while the hub does not answer."""
    manifests = sorted((root / "tokens").glob("[0-9a-f]*/manifest.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for folder in (path.parent for path in manifests):
        if fault(folder, _TOKENS) is not None:
            continue
        facts = read_manifest(folder)
        same = facts["tokenizer"] == wanted if isinstance(wanted, str) else facts["key"]["tokenizer"] == wanted.fingerprint
        if facts["data"] == name and same:
            say(f"{error}: using {folder}, prepared earlier ({facts['note']})")
            return _corpus(folder, facts, load_tokenizer(folder), reused=True)
    raise error


def _ready_made(origin: BinSource, wanted: str | Tokenizer, progress: bool) -> Corpus:
    """The token ids of nanoGPT's files, checked against the tokenizer that is said to have made them."""
    if isinstance(wanted, str) and wanted.startswith("bpe:"):
        made = "name the tokenizer that made them, e.g. 'gpt2'"
        raise DataError(f"data source {origin.name!r} holds token ids, so no {wanted!r} can be trained on it: {made}")
    coder = wanted if isinstance(wanted, Tokenizer) else tokenizer(wanted)
    found = {side: origin.tokens(side) for side in SPLITS}
    size = {}
    with _bar(progress, f"reading {origin.name}", sum(ids.nbytes for ids in found.values())) as advance:
        for side, ids in found.items():
            counts = np.zeros(2**16, dtype=np.int64)
            for start in range(0, len(ids), _CHUNK):
                counts += np.bincount(ids[start : start + _CHUNK], minlength=2**16)
                advance(ids[start : start + _CHUNK].nbytes)
            largest = int(counts.nonzero()[0].max())
            if largest >= coder.vocab:
                has = f"tokenizer {coder.name!r} has only {coder.vocab} ids"
                raise DataError(f"data source {origin.name!r}: {side}.bin has token {largest}, but {has}")
            size[side] = int(counts[: coder.vocab] @ coder.token_bytes[: 2**16])
    corpus = origin.fingerprint()
    tokens = {side: len(ids) for side, ids in found.items()}
    summary = Summary(origin.name, origin.note, corpus, coder.name, coder.vocab, None, tokens, size, str(origin.folder), reused=True)
    return Corpus(found["train"], found["val"], coder, corpus, summary)


@contextlib.contextmanager
def _bar(progress: bool, title: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """A progress bar of bytes on stderr, silent when it is not a terminal; yields the function that advances it."""
    hidden = not (progress and sys.stderr.isatty())
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(title, total=total)
        yield functools.partial(bar.advance, task)
