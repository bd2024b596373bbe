"""Plans on disk, kept by the value of what was asked for: a process that asks again reads the plan instead of searching.

    FOLDER/plan-HASH.json     {"request": everything the plan depends on, "plan": the plan}
    FOLDER/table-NAME.json    a pinned store's machine tables, see PlanStore

Files are written aside and renamed into place, so that many processes can share a folder. What cannot be read, or answers another
request, is ignored with one warning.
"""

import functools
import hashlib
import json
import os
import re
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from types import TracebackType
from typing import Any

from tn import settings
from tn.errors import PlanError
from tn.machine import Machine

# what decides which plan is found
_PLANNER = ("cost", "frugal", "layout", "machine", "memory", "order", "pairing", "plan", "planner", "sharing", "slices", "forms")


class PlanStore:
    """A folder of plans; see `tn.plan_store`. Used as a context manager, it is in use until the block ends.

    Attributes:
        folder: made when the first plan is written.
        pinned: whether plans and machine tables stay as they were first stored, whatever the planner and the built-in tables have
            become since: as a training run wants. Otherwise both are part of what a plan is kept by.
        found, made: how many plans were read from the folder, and searched for.
    """

    def __init__(self, folder: str | PathLike[str], *, pinned: bool = False) -> None:
        if not isinstance(folder, str | PathLike) or not str(folder):
            raise PlanError(f"plan store folder is {folder!r}, expected the path of a folder")
        self.folder, self.pinned = Path(folder), pinned
        if self.folder.exists() and not self.folder.is_dir():
            raise PlanError(f"plan store {self.folder} is a file, expected a folder or a path where one can be made")
        self.found = self.made = 0
        self._plans: dict[str, Any] = {}
        self._tables: dict[str, Machine] = {}
        self._warned = False
        self._lock = threading.RLock()

    def recall(self, asked: Mapping[str, Any], make: Callable[..., Any], read: Callable[[str, Machine], Any]) -> Any:
        """The plan for a request: remembered, read, or made and written.

        Args:
            asked: everything the plan depends on, as keyword arguments of `make`; `table` is the machine table.
            read: (the plan's JSON, its table) → the plan; raises PlanError where it cannot.
        """
        with self._lock:
            asked = {**asked, "table": self.table(asked["table"])}
            request = self._request(asked)
            if request not in self._plans:
                self._plans[request] = self._read(request, asked, read) or self._make(request, asked, make)
            return self._plans[request]

    def _request(self, asked: Mapping[str, Any]) -> str:
        """Canonical JSON of what is asked for."""
        value = {name: _plain(part) for name, part in asked.items()}
        if not self.pinned:
            value["planner"] = _planner()
        return json.dumps(value, sort_keys=True, separators=(",", ":"))

    def _path(self, request: str) -> Path:
        return self.folder / f"plan-{hashlib.sha256(request.encode()).hexdigest()[:32]}.json"

    def _read(self, request: str, asked: Mapping[str, Any], read: Callable[[str, Machine], Any]) -> Any:
        path = self._path(request)
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(kept, dict) or kept.get("request") != json.loads(request):
                raise PlanError("it answers another request")
            found = read(json.dumps(kept.get("plan")), asked["table"])
            if (found.network, found.sizes, found.grad) != (asked["network"], asked["sizes"], asked["grad"]):
                raise PlanError("its plan is of another network")
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:  # ValueError: text that is no UTF-8 or no JSON, a PlanError
            self._warn(f"ignored {path}: {error}")
            return None
        self.found += 1
        return found

    def _make(self, request: str, asked: Mapping[str, Any], make: Callable[..., Any]) -> Any:
        plan = make(**asked)
        self.made += 1
        self._write(self._path(request), json.dumps({"request": json.loads(request), "plan": json.loads(plan.to_json())}, indent=1))
        return plan

    def table(self, table: Machine) -> Machine:
        """The table to plan with: of a pinned store the one of this name that it first saw."""
        if not self.pinned:
            return table
        kept = self._tables.get(table.name)
        if kept is None:
            path = self.folder / f"table-{re.sub(r'[^A-Za-z0-9.-]', '_', table.name)}.json"
            try:
                kept = Machine.from_json(path.read_text(encoding="utf-8"))
            except FileNotFoundError:
                kept = table
                self._write(path, table.to_json())
            except (OSError, ValueError) as error:
                self._warn(f"ignored {path}, the table built in is used: {error}")
                kept = table
            self._tables[table.name] = kept
        return kept

    def _write(self, path: Path, text: str) -> None:
        """Write a file whole or not at all; a folder that cannot be written costs a warning, not the plan."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            descriptor, aside = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self.folder)
            try:
                with open(descriptor, "w", encoding="utf-8") as file:
                    file.write(text)
                os.replace(aside, path)
            except BaseException:
                os.unlink(aside)
                raise
        except OSError as error:
            self._warn(f"cannot write {path}: {error}")

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"tn.plan_store: {what} (further problems with this folder are not reported)", UserWarning, stacklevel=2)

    def close(self) -> None:
        """Use the store that was in use before."""
        if self in _open:
            _open.remove(self)

    def __enter__(self) -> "PlanStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"PlanStore({str(self.folder)!r}{', pinned=True' if self.pinned else ''})"


_open: list[PlanStore] = []  # the last one is in use


def plan_store(folder: str | PathLike[str] | None = None, *, pinned: bool = False) -> PlanStore:
    """Keep plans on disk from now on, in every thread of this process; in a `with` statement until its end.

    Without it nothing is read or written, unless the environment names a folder in $TN_PLAN_STORE.

    Args:
        folder: None for `plans` in the cache folder ($XDG_CACHE_HOME/tn-layers or ~/.cache/tn-layers).
        pinned: keep plans and machine tables as they were first stored; see PlanStore.

    Raises:
        PlanError: the folder is a file, or no path.

    >>> import tempfile, tn
    >>> net = tn.network("x: ... i, a: i r, c: r o -> ... o", dict(i=6, r=2, o=4), cores=("a", "c"))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with tn.plan_store(folder) as first:
    ...         plan = tn.plan(net)
    ...     with tn.plan_store(folder) as second:
    ...         assert tn.plan(net) == plan
    >>> first.made, second.found
    (1, 1)
    """
    store = PlanStore(settings.cache_folder() / "plans" if folder is None else folder, pinned=pinned)
    _open.append(store)
    return store


def recall(asked: Mapping[str, Any], make: Callable[..., Any], read: Callable[[str, Machine], Any]) -> Any:
    """The plan for a request, through the store in use if there is one; see `PlanStore.recall`."""
    store = _open[-1] if _open else _from_environment()
    return make(**asked) if store is None else store.recall(asked, make, read)


@functools.cache
def _from_environment() -> PlanStore | None:
    folder = settings.plan_store()
    try:
        return None if folder is None else PlanStore(folder)
    except PlanError as error:
        raise PlanError(f"$TN_PLAN_STORE: {error}") from None


@functools.cache
def _planner() -> str:
    """A hash of the planner: its sources, and the version of the library it asks for orders."""
    sources = [(Path(__file__).parent / f"{name}.py").read_bytes() for name in _PLANNER]
    return hashlib.sha256(b"\0".join([*sources, version("cotengra").encode()])).hexdigest()[:16]


def _plain(part: Any) -> Any:
    """A part of a request as JSON data."""
    if isinstance(part, Machine):
        return {"name": part.name, "digest": part.digest}
    return json.loads(part.to_json()) if hasattr(part, "to_json") else json.loads(json.dumps(part))
