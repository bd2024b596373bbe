"""Times of several functions in one process, taken in turns, so that a slow minute of the machine hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Seconds of one call, in the order they were taken."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle sample."""
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        """A quarter of the samples lie below the first, a quarter above the second."""
        if len(self.samples) < 2:
            return self.samples[0], self.samples[0]
        low, _, high = statistics.quantiles(self.samples, n=4, method="inclusive")
        return low, high

    def faster_than(self, peer: "Timing") -> float:
        """The median of peer's time over this time, round by round: above 1, this one is faster."""
        return statistics.median(theirs / ours for ours, theirs in zip(self.samples, peer.samples, strict=True))


def interleaved(
    functions: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 7,
    warmup: int = 2,
    least_seconds: float = 0.02,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time functions in turns: every round runs each of them once, the order reversed from round to round.

    Args:
        functions: name → function without arguments. What it leaves behind must not make the next call slower.
        rounds: samples of each. warmup: calls before the first sample.
        least_seconds: a sample repeats a function until it lasts at least this long, and is the time of one call.
        clock: monotonic, in seconds.

    Returns:
        name → Timing, in the order given. On CUDA the device is waited for before every reading.

    Raises:
        ValueError: fewer than one round.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    _settle_allocator()
    repeats = {}
    for name, function in functions.items():
        for _ in range(warmup):
            function()
        repeats[name] = max(1, round(least_seconds / max(_sample(function, 1, clock), 1e-9)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for number in range(rounds):
        order = list(functions) if number % 2 == 0 else list(reversed(functions))
        for name in order:
            samples[name].append(_sample(functions[name], repeats[name], clock))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _settle_allocator() -> None:
    """Bring glibc's allocator where any training process soon is: once it has freed a block of just under 32 MB it keeps smaller ones,
    instead of handing each back to the system, which made times depend on what ran before."""
    torch.ones(31 << 18)


def _sample(function: Callable[[], object], repeats: int, clock: Callable[[], float]) -> float:
    _wait()
    begun = clock()
    for _ in range(repeats):
        function()
    _wait()
    return (clock() - begun) / repeats


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
