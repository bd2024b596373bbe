"""What a device can do: the rates that turn FLOPs and bytes into predicted seconds. A plan's costs are a pure function of this table."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """Rates of one device at one dtype.

    Attributes:
        peak: FLOP/s of a large matrix product. small: inner extent at which a product still reaches about half of `peak`.
        copy: bytes/s of a contiguous copy, reads and writes counted. permute: bytes/s of a copy that reorders axes.
        launch: seconds a call of one operator takes before it computes. item: seconds per batch item when a product writes
        into a strided output, which torch runs as a loop of matrix products.
        cache: bytes of intermediates worth keeping close; larger ones are made and used tile by tile of rows. 0 where that does not pay.
        source: where the numbers come from.
    """

    name: str
    peak: float
    small: int
    copy: float
    permute: float
    launch: float
    item: float
    cache: int
    source: str

    def product(self, batch: int, m: int, n: int, k: int) -> float:
        """Seconds of `batch` matrix products (m, k) × (k, n)."""
        efficiency = 1.0
        for extent in (m, n, k):
            efficiency *= extent / (extent + self.small)
        return 2 * batch * m * n * k / (self.peak * max(efficiency, 1e-4))

    @property
    def digest(self) -> str:
        """A hash of every number, stored with plans."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:16]


# Two cores of an AVX-512 server CPU, torch 2.13, MKL, fp32. `peak` is what `python -m bench throughput` shows for dense layers (two
# threads). The bandwidths were measured with one thread on such a machine. `small`, `launch` and `item` are estimates, and `cache`
# comes from a sweep of tiles (LOG.md): no step's predicted time has been compared with its measured one yet.
GENERIC_CPU = Machine(
    name="generic-cpu",
    peak=1.9e11,
    small=24,
    copy=3.0e10,
    permute=8.0e9,
    launch=4e-6,
    item=2e-6,
    cache=4 << 20,
    source="2 cores AVX-512, torch 2.13, fp32",
)
# Not measured by this project yet: the vendor's figures, reduced to what large products commonly reach.
H200 = Machine(
    name="h200", peak=5e13, small=64, copy=4.0e12, permute=2.0e12, launch=5e-6, item=5e-6, cache=0, source="vendor figures, not measured"
)


def machine(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Machine:
    """The built-in table for a device and dtype.

    Rates of tensor-core dtypes on CUDA are scaled from fp32 by the vendor's ratio; on a CPU every dtype uses the fp32 rates.
    """
    if torch.device(device).type != "cuda":
        return GENERIC_CPU
    if dtype in (torch.bfloat16, torch.float16):
        return dataclasses.replace(H200, name="h200-half", peak=7e14, small=128)
    return H200
