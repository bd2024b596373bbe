"""What a device can do: the rates that turn FLOPs and bytes into predicted seconds. A plan's costs are a pure function of this table."""

import bisect
import functools
import hashlib
import itertools
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from tn.documents import document
from tn.errors import PlanError

# Extents of m, n and k in the tables of products. Libraries have slow paths for few columns, so n has the most.
EXTENTS = ((1, 4, 16, 64, 256, 1024), (1, 2, 4, 8, 16, 64, 256, 1024), (1, 4, 16, 64, 256, 1024))
SHAPES = tuple(itertools.product(*EXTENTS))
READS = ("NN", "NT", "TN", "TT")  # how the two operands lie in memory: N has its last extent adjacent, T its first
_PAGE = 4096  # bytes
_COLD = 3.0  # times as long takes a run that is not in cache (two CPU cores: 0.6 and 2 ns)
FORMAT = 1  # of the JSON

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

    def product(self, m: int, n: int, k: int, reads: str = "NN") -> float:
        """Seconds of one product (m, k) × (k, n), operands in cache."""
        return _seconds(self, "mm", READS.index(reads), m, n, k)

    def item(self, m: int, n: int, k: int, reads: str = "NN", strided: bool = False) -> float:
        """Seconds of one item of a batch of such products; `strided`: written into a part of each of several rows."""
        return _seconds(self, "loop" if strided else "bmm", READS.index(reads), m, n, k)

    def traffic(self, size: int, new: bool = False) -> float:
        """Seconds that reading, or writing, a tensor of this many bytes takes besides the work; `new` memory is first touched."""
        seconds = max(size - self.near, 0) / self.far
        return seconds + size / self.fresh if new and size >= self.paged else seconds

    def reorder(self, size: int, runs: int, stride: int | None = None) -> float:
        """Seconds of copying a tensor of so many bytes into another order, in which so many runs of elements stay adjacent.

        Args:
            stride: bytes between elements that become neighbours, where every run is one element. Within a page they are moved in blocks.
        """
        seconds = 2 * size / self.copy + self.traffic(size) + self.traffic(size, new=True)
        blocked = 0.25 if stride is not None and stride < _PAGE else 1.0
        return seconds + runs * self.run * blocked * (_COLD if size > self.near else 1.0)

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
        value = {field.name: getattr(self, field.name) for field in fields(self)}
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
        try:
            return cls(**value)
        except TypeError as error:
            raise PlanError(f"machine table {value['name']!r} has other entries than this version reads: {error}") from None

    def __repr__(self) -> str:
        return f"Machine({self.name!r}, {self.source!r})"


@functools.lru_cache(maxsize=1 << 17)
def _seconds(table: Machine, kind: str, line: int, m: int, n: int, k: int) -> float:
    """A table read between its extents: the logarithm of the time is linear in the logarithm of each extent; beyond the last extent the
    time grows with it."""
    times = {"mm": table.mm, "bmm": table.bmm, "loop": table.loop}[kind][line]
    corners, beyond = [(0, 1.0)], 1.0
    for extent, marks in zip((m, n, k), EXTENTS, strict=True):
        beyond *= max(extent / marks[-1], 1.0)
        extent = min(max(extent, 1), marks[-1])
        low = min(bisect.bisect_right(marks, extent), len(marks) - 1) - 1
        part = math.log(extent / marks[low]) / math.log(marks[low + 1] / marks[low])
        ends = ((low, 1 - part), (low + 1, part))
        corners = [(at * len(marks) + end, weight * share) for at, weight in corners for end, share in ends if share]
    return beyond * math.exp(sum(weight * math.log(times[at]) for at, weight in corners))


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


@functools.cache
def machine(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """The built-in table for a device and dtype. On a CPU every dtype uses the fp32 rates, measured with two threads."""
    if torch.device(device).type != "cuda":
        return Machine.from_json((Path(__file__).parent / "machines" / "cpu.json").read_text(encoding="utf-8"))
    # Not measured by this project yet: the vendor's figures, reduced to what large products commonly reach.
    half = dtype in (torch.bfloat16, torch.float16)
    name, peak, small = ("h200-half", 7e14, 128) if half else ("h200", 5e13, 64)
    return roofline(name, peak=peak, small=small, bandwidth=4e12, launch=5e-6, source="vendor figures, not measured")
