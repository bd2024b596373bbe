"""Folders on disk that are whole or absent: built aside, made durable, then renamed; safe between processes.

A folder is complete when its manifest.json is there and every file it lists has the length it says. A reader never sees a
half-built one, because it has another name until it is complete. Processes that want the same folder at once take turns.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.data.documents import DataError

MANIFEST = "manifest.json"


def canonical(value: object) -> str:
    """Canonical JSON: equal text for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def folder_name(key: dict[str, object]) -> str:
    """The name of a key's folder: 32 hex digits."""
    return hashlib.sha256(canonical(key).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Contents:
    """What a complete folder of some kind has: these files, and these facts in its manifest."""

    files: frozenset[str]
    facts: frozenset[str]


def stored(
    parent: Path, key: dict[str, object], contents: Contents, build: Callable[[Path], dict[str, object]]
) -> tuple[Path, dict[str, Any], bool]:
    """The complete folder of a key, built when there is none.

    A damaged folder is moved aside (`….damaged-1`), with a line on stderr that names it; nothing is overwritten.

    Args:
        parent: where folders are kept.
        key: what decides the contents.
        contents: what there must be; a folder that lacks any of it is damaged.
        build: writes the files into the folder it is given and returns facts for the manifest.

    Returns:
        the folder, its manifest (facts, "key" and "files"), and whether it was there already.

    Raises:
        DataError: the disk is full or not writable; what was half built is removed. Whatever `build` raises.
    """
    folder = parent / folder_name(key)
    if folder.exists() and fault(folder, contents) is None:
        return folder, read_manifest(folder), True
    try:
        parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder) as alone:
            reused = _open_or_build(folder, key, contents, build, alone)
    except OSError as error:
        raise DataError(f"cache {folder} cannot be written: {error.strerror or error}") from error
    return folder, read_manifest(folder), reused


def fault(folder: Path, contents: Contents) -> str | None:
    """What is wrong with a folder, or None when it is complete."""
    try:
        manifest = read_manifest(folder)
        for what, wanted, found in (("file", contents.files, manifest["files"]), ("fact", contents.facts | {"key"}, manifest)):
            if lost := sorted(wanted - found.keys()):
                return f"{MANIFEST} lists no {what} {lost[0]!r}"
        for name, size in manifest["files"].items():
            path = folder / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != size:
                return f"{name} has {path.stat().st_size} bytes, not {size}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    return None


def read_manifest(folder: Path) -> dict[str, Any]:
    """A folder's manifest."""
    return json.loads((folder / MANIFEST).read_text())


def say(message: str) -> None:
    """A line for the person at the terminal."""
    print(message, file=sys.stderr)


def _open_or_build(
    folder: Path, key: dict[str, object], contents: Contents, build: Callable[[Path], dict[str, object]], alone: bool
) -> bool:
    """Build a folder unless it is complete; the caller holds its lock. Returns whether it was complete already."""
    if alone:
        for abandoned in folder.parent.glob(f".{folder.name}.*"):  # of a process that was killed
            shutil.rmtree(abandoned, ignore_errors=True)
    if folder.exists():
        wrong = fault(folder, contents)
        if wrong is None:
            return True
        say(f"cache {folder} is damaged: {wrong}. It is moved to {_move_aside(folder).name} and prepared again.")
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        facts = build(temporary)
        files = {path.name: path.stat().st_size for path in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps({**facts, "key": key, "files": files}, indent=1))
        for name in (*files, MANIFEST, "."):
            _sync(temporary / name)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError as error:  # only where locks do not work: another process was first
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY) or fault(folder, contents) is not None:
                raise
            return True
        _sync(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return False


def _move_aside(folder: Path) -> Path:
    """Give a damaged folder a name that is free."""
    count = 1
    while (aside := folder.with_name(f"{folder.name}.damaged-{count}")).exists():
        count += 1
    folder.rename(aside)
    return aside


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Hold a folder's lock; yields False where the file system has none. The system frees it when a process dies."""
    with open(folder.with_name(f"{folder.name}.lock"), "a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that prepares {folder}")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL):
                raise
            yield False
            return
        yield True


def _sync(path: Path) -> None:
    """Wait until a file or folder is on disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
