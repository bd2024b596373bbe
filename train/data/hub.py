"""Text out of Hugging Face datasets, on the hub or on disk; the one file that imports `datasets`."""

import hashlib
import itertools
import json
import os
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl

from tn.errors import unknown
from train.data.documents import SPLITS, DataError, Source, Split, split_documents
from zoo.tokenizers import reachable

if TYPE_CHECKING:
    from datasets import IterableDataset

_OPTIONS = ("config", "documents", "revision", "split")
_LOADERS = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}
_PACKED = (".gz", ".zst", ".xz", ".bz2")
_VALIDATION = ("validation", "valid", "val", "dev")
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


class HubUnreachable(DataError):
    """A dataset of the hub was asked for and the hub does not answer."""


@dataclass(frozen=True)
class HuggingFaceSource(Source):
    """A dataset: "hf:NAME_OR_PATH", then options as "?config=C&split=S&revision=R&documents=N", then "#column".

    Anything that exists on disk is local: a parquet, json, jsonl, csv, tsv, txt or arrow file, a folder of them, or what
    `save_to_disk` wrote. Everything else is a name on the hub, which is streamed, never stored. Without a column it is "text", or
    the only column of strings. A split called validation (valid, val, dev) is the validation side; without one, and when `split` is
    given, documents are split by hash (`split_documents`). The fingerprint is the hash of local files, or the hub's commit.

    Attributes:
        name: the spec.
        path: the hub name or the path.
        config: the dataset's configuration.
        split_name: the split to take; default "train", or the only one.
        revision: a commit, branch or tag of the hub.
        limit: the most documents to take from each split.
        column: the column of text.
    """

    name: str
    path: str
    config: str | None = None
    split_name: str | None = None
    revision: str | None = None
    limit: int | None = None
    column: str | None = None

    @classmethod
    def parse(cls, name: str, rest: str) -> "HuggingFaceSource":
        """The source of a spec whose part after "hf:" is `rest`.

        Raises:
            DataError: an unknown option, a bad number, or something that is neither a path nor a name.
        """
        if Path(rest).expanduser().exists():
            return cls(name, str(Path(rest).expanduser()))
        rest, _, column = rest.partition("#")
        path, _, query = rest.partition("?")
        options = dict(parse_qsl(query, keep_blank_values=True))
        for option in options:
            if option not in _OPTIONS:
                raise DataError(f"data source {name!r}: {unknown('option', option, _OPTIONS)}")
        limit = options.get("documents")
        if limit is not None and not (limit.isascii() and limit.isdigit() and int(limit) > 0):
            raise DataError(f"data source {name!r}: documents must be a whole number of 1 or more, got {limit!r}")
        local = Path(path).expanduser()
        if not local.exists() and (not _HUB_NAME.fullmatch(path) or _loader(path)):
            raise DataError(f"data source {name!r}: {path} does not exist, and is not the name of a dataset on the hub")
        return cls(
            name,
            str(local) if local.exists() else path,
            config=options.get("config"),
            split_name=options.get("split"),
            revision=options.get("revision"),
            limit=None if limit is None else int(limit),
            column=column or None,
        )

    @property
    def note(self) -> str:  # type: ignore[override]
        return f"local dataset {self.path}" if self._local else f"streamed from the hub at revision {self._commit[:12]}"

    def fingerprint(self) -> str:
        value = [self._contents if self._local else [self.path, self._commit], self.config, self.split_name, self.limit, self.column]
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    def split(self) -> Iterator[tuple[Split, str]]:
        train, val = self._splits
        if val is None:
            yield from split_documents(self._texts(train))
            return
        for side, rows in zip(SPLITS, (train, val), strict=True):
            for text in self._texts(rows):
                yield side, text

    @property
    def _local(self) -> bool:
        return os.path.exists(self.path)

    @cached_property
    def _contents(self) -> list[str]:
        """sha256 of each local file, in order of paths."""
        root = Path(self.path)
        files = [root] if root.is_file() else sorted(path for path in root.rglob("*") if path.is_file() and not path.name.startswith("."))
        digests = []
        for path in files:
            with open(path, "rb") as file:
                digests.append(hashlib.file_digest(file, "sha256").hexdigest())
        return digests

    @cached_property
    def _commit(self) -> str:
        """The hub's commit for the revision; asks the hub, and fails within seconds when it does not answer."""
        if self.revision and re.fullmatch("[0-9a-f]{40}", self.revision):
            return self.revision
        from huggingface_hub import HfApi, constants, errors  # late: only hub names need it

        endpoint = constants.ENDPOINT
        if constants.HF_HUB_OFFLINE:
            raise HubUnreachable(self._offline("HF_HUB_OFFLINE is set"))
        if not reachable(endpoint):
            raise HubUnreachable(self._offline(f"{endpoint} does not answer"))
        try:
            commit = HfApi().dataset_info(self.path, revision=self.revision, timeout=10).sha
        except (errors.HTTPError, OSError, ValueError) as error:  # HTTPError: of the client's network library
            raise DataError(f"data source {self.name!r}: the hub says: {_line(error)}") from error
        return commit or "unknown"

    def _offline(self, reason: str) -> str:
        return (
            f"data source {self.name!r}: there is no local {self.path}, and the Hugging Face hub cannot be reached ({reason}); "
            "give a local folder or file as 'hf:PATH', or 'stdlib'"
        )

    @cached_property
    def _splits(self) -> tuple["IterableDataset", "IterableDataset | None"]:
        """The rows to train on, and those to validate on where the dataset says which."""
        found = self._load()
        if self.split_name is not None:
            if self.split_name not in found:
                raise DataError(f"data source {self.name!r}: {unknown('split', self.split_name, found)}")
            return found[self.split_name], None
        if "train" not in found and len(found) > 1:
            raise DataError(f"data source {self.name!r} has splits {', '.join(sorted(found))}: choose one with '?split=…'")
        train = found["train"] if "train" in found else next(iter(found.values()))
        return train, next((found[name] for name in _VALIDATION if name in found and found[name] is not train), None)

    def _load(self) -> dict[str, "IterableDataset"]:
        """Every split, as a stream."""
        commit = None if self._local else self._commit  # first: it fails fast without a network
        loader = self._file_loader() if os.path.isfile(self.path) else None
        import datasets  # late: two seconds to import

        try:
            if not self._local:
                found = datasets.load_dataset(self.path, self.config, revision=commit, streaming=True)
            elif loader is not None:
                found = datasets.load_dataset(loader, data_files=[self.path], streaming=True, **self._separator())
            elif any(os.path.exists(os.path.join(self.path, file)) for file in ("state.json", "dataset_dict.json")):
                found = datasets.load_from_disk(self.path)
            else:
                found = datasets.load_dataset(self.path, self.config, streaming=True)
        except StopIteration as error:  # what the json loader says of an empty file
            raise DataError(f"data source {self.name!r} has no rows") from error
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"data source {self.name!r} cannot be opened: {_line(error)}") from error
        return dict(found) if isinstance(found, dict) else {"train": found}

    def _file_loader(self) -> str:
        loader = _loader(self.path)
        if loader is None:
            raise DataError(f"data source {self.name!r}: {unknown('kind of file', Path(self.path).suffix, _LOADERS)}")
        return loader

    def _separator(self) -> dict[str, str]:
        return {"sep": "\t"} if ".tsv" in Path(self.path).suffixes else {}

    def _texts(self, rows: "IterableDataset") -> Iterator[str]:
        """The text of each row; rows without text are left out."""
        import datasets  # late, and loaded already

        try:
            column = self._column(rows)
            for row in itertools.islice(rows.select_columns([column]), self.limit):
                text = row[column]
                if text is None:
                    continue
                if not isinstance(text, str):
                    raise DataError(f"data source {self.name!r}: column {column!r} holds {type(text).__name__}, not text")
                yield text
        except (OSError, RuntimeError, UnicodeError, datasets.exceptions.DatasetsError) as error:
            raise DataError(f"data source {self.name!r} cannot be read: {_line(error)}") from error
        except ValueError as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"data source {self.name!r} cannot be read: {_line(error)}") from error

    def _column(self, rows: "IterableDataset") -> str:
        """The column of text."""
        first = next(iter(rows), None)
        if first is None:
            raise DataError(f"data source {self.name!r} has no rows")
        if self.column is not None:
            if self.column not in first:
                raise DataError(f"data source {self.name!r}: {unknown('column', self.column, first)}")
            return self.column
        texts = [name for name, value in first.items() if isinstance(value, str)]
        if "text" in first or len(texts) == 1:
            return "text" if "text" in first else texts[0]
        listed = ", ".join(sorted(first))
        raise DataError(f"data source {self.name!r}: which column is the text? Write '{self.name}#column'. Its columns: {listed}")


def _loader(path: str) -> str | None:
    """The `datasets` loader for a file name."""
    suffixes = [suffix for suffix in Path(path).suffixes if suffix not in _PACKED]
    return _LOADERS.get(suffixes[-1]) if suffixes else None


def _line(error: Exception) -> str:
    """An error in one line that is not too long."""
    return textwrap.shorten(str(error), 300) or type(error).__name__
