"""What a device can do: the rates that turn FLOPs and bytes into predicted seconds. A plan's costs are a pure function of this table."""

import bisect
import functools
import hashlib
import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch

from tn.documents import document
from tn.errors import PlanError

# Extents of m, n and k in the tables of products. Libraries have slow paths for few columns, so n has the most.
EXTENTS = ((1, 4, 16, 64, 256, 1024), (1, 2, 4, 8, 16, 64, 256, 1024), (1, 4, 16, 64, 256, 1024))
SHAPES = tuple(itertools.product(*EXTENTS))
READS = ("NN", "NT", "TN", "TT")  # how the two operands lie in memory: N has its last extent adjacent, T its first
_BYTES = 4  # of an element
_LINE, _CACHE = 64, 1 << 20  # bytes that memory is read by, and of a core's cache
# Of `run`, what a copy takes for a run of several elements, and for one that was read with its neighbours, in cache still or not: medians
# over 220 random permutations on two cores.
_RUN, _KEPT, _GONE = 3.0, 0.5, 2.5
FORMAT = 1  # of the JSON

Array = np.ndarray
Table = tuple[tuple[float, ...], ...]  # one line for each of READS: seconds of every one of SHAPES


@dataclass(frozen=True, kw_only=True, eq=False)
class Machine:
    """Measured rates of one device at one dtype and number of threads.

    Attributes:
        mm: seconds of one product (m, k) × (k, n) with operands in cache, by READS and extents.
        bmm: seconds of one item of a batch of such products. loop: the same where the result of each item is strided, which runs as a
            loop of single products. call: seconds a batched call takes besides.
        copy: bytes/s of a copy in order, reads and writes counted. run: seconds more for each run of adjacent elements that a copy
            into another order moves.
        multiply: bytes/s of an elementwise product, reads and writes counted. element: seconds an operator on elements takes besides.
        view: seconds of making a view of a tensor.
        near: bytes of a tensor that are still in cache when a step reads it. far: bytes/s of reading or writing what is not.
        fresh: bytes/s of first touching new memory, which a tensor of `paged` bytes or more always is.
        tiles: whether working on a tile of rows at a time can pay.
        source: where the numbers come from.
        operators: case of an operator (`tn.operators.Offer.case`; with " trained" behind it, forward and gradients) → measured seconds
            of the operator and of the torch path. Empty where nothing was measured, and then no plan chooses an operator.
    """

    name: str
    mm: Table
    bmm: Table
    loop: Table
    call: float
    copy: float
    run: float
    multiply: float
    element: float
    view: float
    near: int
    far: float
    fresh: float
    paged: int
    tiles: bool
    source: str
    operators: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def product(self, m: int, n: int, k: int, reads: str = "NN") -> float:
        """Seconds of one product (m, k) × (k, n), operands in cache."""
        return _seconds(self, "mm", reads, m, n, k)

    def item(self, m: int, n: int, k: int, reads: str = "NN", strided: bool = False) -> float:
        """Seconds of one item of a batch of such products; `strided`: written into a part of each of several rows."""
        return _seconds(self, "loop" if strided else "bmm", reads, m, n, k)

    def fastest(self, m: Array, n: Array, k: Array) -> tuple[Array, Array]:
        """Seconds of many products, and of items of batches, whose operands lie in memory in the best way: no `product` is faster."""
        at, shares, beyond = np.zeros((1, len(m)), int), np.ones((1, len(m))), np.ones(len(m))
        for extents, marks in zip((m, n, k), EXTENTS, strict=True):
            places = np.interp(np.log(np.maximum(extents, 1)), np.log(marks), np.arange(len(marks)))
            low = np.minimum(places.astype(int), len(marks) - 2)
            part = places - low
            at = np.concatenate([at * len(marks) + low, at * len(marks) + low + 1])
            shares = np.concatenate([shares * (1 - part), shares * part])
            beyond = beyond * np.maximum(extents / marks[-1], 1.0)
        mm, bmm = beyond * np.exp(np.einsum("cn,cnt->tn", shares, self._least[at]))
        return mm, bmm

    @functools.cached_property
    def _logarithms(self) -> dict[tuple[str, str], list[float]]:
        """(table, reads) → the logarithms of its line."""
        tables = (("mm", self.mm), ("bmm", self.bmm), ("loop", self.loop))
        return {(kind, reads): [*map(math.log, line)] for kind, table in tables for reads, line in zip(READS, table, strict=True)}

    @functools.cached_property
    def _least(self) -> Array:
        """For each of SHAPES the logarithms of the least of the lines of `mm` and of `bmm`."""
        return np.log(np.min([self.mm, self.bmm], axis=1)).T.copy()

    def traffic(self, size: int, new: bool = False) -> float:
        """Seconds that reading, or writing, a tensor of this many bytes takes besides the work; `new` memory is first touched."""
        seconds = max(size - self.near, 0) / self.far
        return seconds + size / self.fresh if new and size >= self.paged else seconds

    def reorder(self, size: int, length: int = 1, apart: int = 1 << 10) -> float:
        """Seconds of copying a tensor of so many bytes into another order, in which runs of so many elements stay adjacent.

        Args:
            apart: elements between runs that were neighbours: how far the copy goes before it is back at the same line of memory.
        """
        runs = size // _BYTES // max(length, 1)
        kept = size <= _CACHE or apart // max(length, 1) * _LINE < _CACHE
        each = _RUN if length > 1 else _KEPT if kept else _GONE
        again = 0.0 if length == 1 or kept or length * _BYTES >= _LINE else _LINE / self.far
        seconds = self.element + 3 * self.view + 2 * size / self.copy + runs * (each * self.run + again)
        return seconds + self.traffic(size) + self.traffic(size, new=True)

    @functools.cached_property
    def digest(self) -> str:
        """A hash of every number, stored with plans."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Machine) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def to_json(self) -> str:
        """Canonical JSON; `Machine.from_json` reads it."""
        value = {one.name: getattr(self, one.name) for one in fields(self)}
        if not self.operators:
            del value["operators"]
        return json.dumps({"format": FORMAT, **value}, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> "Machine":
        """The table that `to_json` wrote. Raises PlanError for another format or tables of another size."""
        value = document(text, FORMAT, {"name": str, "mm": list, "bmm": list, "loop": list}, "machine table", PlanError)
        value.pop("format")
        for key in ("mm", "bmm", "loop"):
            value[key] = tuple(tuple(line) for line in value[key])
            if [len(line) for line in value[key]] != [len(SHAPES)] * len(READS):
                raise PlanError(f"machine table {value.get('name')!r}: {key} needs {len(READS)} lines of {len(SHAPES)} numbers")
        operators = value.get("operators", {})
        if not isinstance(operators, dict):
            raise PlanError(f"machine table {value.get('name')!r}: operators is {operators!r}, expected a row for each case")
        value["operators"] = {case: _row(value.get("name", ""), case, row) for case, row in operators.items()}
        try:
            return cls(**value)
        except TypeError as error:
            raise PlanError(f"machine table {value['name']!r} has other entries than this version reads: {error}") from None

    def __repr__(self) -> str:
        return f"Machine({self.name!r}, {self.source!r})"


def _row(table: object, case: str, row: object) -> tuple[float, float]:
    """Seconds of an operator and of torch. Raises PlanError unless both are positive numbers."""
    if not isinstance(row, list) or len(row) != 2 or not all(isinstance(value, int | float) and 0 < value < math.inf for value in row):
        raise PlanError(f"machine table {table!r}: {case!r} has {row!r}, expected seconds of the operator and of torch")
    return float(row[0]), float(row[1])


@functools.lru_cache(maxsize=1 << 17)
def _seconds(table: Machine, kind: str, reads: str, m: int, n: int, k: int) -> float:
    """A table read between its extents: the logarithm of the time is linear in the logarithm of each extent; beyond the last extent the
    time grows with it."""
    beyond, corners = _corners(m, n, k)
    logarithms = table._logarithms[kind, reads]
    total = 0.0
    for at, weight in corners:
        total += weight * logarithms[at]
    return beyond * math.exp(total)


@functools.lru_cache(maxsize=1 << 16)
def _corners(m: int, n: int, k: int) -> tuple[float, list[tuple[int, float]]]:
    """(how far beyond the last extents, the places in a line around these extents with the weight of each)."""
    corners, beyond = [(0, 1.0)], 1.0
    for extent, marks in zip((m, n, k), EXTENTS, strict=True):
        low, part, more = _place(extent, marks)
        beyond *= more
        first = [(at * len(marks) + low, weight * (1 - part)) for at, weight in corners] if part < 1 else []
        corners = [*first, *((at * len(marks) + low + 1, weight * part) for at, weight in corners)] if part else first
    return beyond, corners


@functools.lru_cache(maxsize=1 << 12)
def _place(extent: int, marks: tuple[int, ...]) -> tuple[int, float, float]:
    """(the mark below an extent, how far it lies towards the next one, how many times beyond the last)."""
    beyond = max(extent / marks[-1], 1.0)
    extent = min(max(extent, 1), marks[-1])
    low = min(bisect.bisect_right(marks, extent), len(marks) - 1) - 1
    return low, math.log(extent / marks[low]) / math.log(marks[low + 1] / marks[low]), beyond


def roofline(name: str, *, peak: float, small: int, bandwidth: float, launch: float, source: str) -> Machine:
    """A table from a few figures, for devices that were not measured: FLOP/s of a large product, the inner extent at which a product
    still reaches about half of it, bytes/s of memory, and seconds an operator takes to start."""

    def seconds(m: int, n: int, k: int) -> float:
        efficiency = math.prod(extent / (extent + small) for extent in (m, n, k))
        return 2 * m * n * k / (peak * max(efficiency, 1e-4))

    items = tuple(itertools.starmap(seconds, SHAPES))
    singles = tuple(launch + seconds for seconds in items)
    return Machine(
        name=name,
        mm=(singles,) * len(READS),
        bmm=(items,) * len(READS),
        loop=(singles,) * len(READS),
        call=launch,
        copy=bandwidth,
        run=4 / bandwidth,
        multiply=bandwidth,
        element=launch,
        view=1e-6,
        near=0,
        far=bandwidth,
        fresh=math.inf,
        paged=0,
        tiles=False,
        source=source,
    )


_in_use: dict[tuple[str, torch.dtype | None], Machine] = {}


def use_table(table: Machine | None, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> None:
    """Plan with a table in place of the built-in one, from now on and in this process; what is planned already stays.

    Args:
        table: such as `tn.calibrate` measured; None for the built-in one again.
        device, dtype: what it is for, by the kind of device; every dtype if None.

    Raises:
        PlanError: what is no table, or no dtype.
    """
    if table is not None and not isinstance(table, Machine):
        raise PlanError(f"a machine table is a tn.Machine, such as tn.calibrate() gives, got {table!r}")
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise PlanError(f"dtype is {dtype!r}, expected a torch.dtype")
    key = (torch.device(device).type, dtype)
    if table is None:
        _in_use.pop(key, None)
    else:
        _in_use[key] = table


def machine(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """The table for a device and dtype: the one in use (`use_table`), or the built-in one."""
    kind = torch.device(device).type
    return _in_use.get((kind, dtype)) or _in_use.get((kind, None)) or _built_in(kind, dtype)


@functools.cache
def _built_in(device: str, dtype: torch.dtype) -> Machine:
    """On a CPU every dtype uses the fp32 rates, measured with two threads."""
    if torch.device(device).type != "cuda":
        return Machine.from_json((Path(__file__).parent / "machines" / "cpu.json").read_text(encoding="utf-8"))
    # Not measured by this project yet: the vendor's figures, reduced to what large products commonly reach.
    half = dtype in (torch.bfloat16, torch.float16)
    name, peak, small = ("h200-half", 7e14, 128) if half else ("h200", 5e13, 64)
    return roofline(name, peak=peak, small=small, bandwidth=4e12, launch=5e-6, source="vendor figures, not measured")
