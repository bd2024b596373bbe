"""What a run says about itself: metrics.jsonl, one JSON object per line, and the progress bar."""

import contextlib
import json
import math
import os
import resource
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from train.errors import RunError

PARTS = ("data", "forward", "backward", "optimizer")
"""The parts of a step's time, in order."""

_NUMBERS = {
    "train": ("step", "seconds", "loss", "step_seconds", "tokens_per_second", "peak_rss_bytes"),
    "eval": ("step", "seconds", "loss", "bits_per_byte"),
}
"""What is read of a line of metrics.jsonl, by its kind."""
_MAY_BE_NULL = ("loss", "bits_per_byte")


@dataclass
class Window:
    """Sums since the last line of metrics.jsonl. Plain numbers: a checkpoint keeps them, so that no step is lost or counted twice."""

    nats: float = 0.0
    tokens: int = 0
    bytes: int = 0
    steps: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def add(self, loss: float, tokens: int, size: int, seconds: dict[str, float]) -> None:
        """Add one step: its mean loss over `tokens` real tokens that stand for `size` bytes, and its time by part."""
        self.nats += loss * tokens
        self.tokens += tokens
        self.bytes += size
        self.steps += 1
        for part, value in seconds.items():
            self.seconds[part] += value

    def line(self) -> dict[str, float]:
        """Return the window's means as metrics: nats per token, bits per byte, rates and times per step in seconds."""
        total = sum(self.seconds.values())
        return {
            "loss": self.nats / max(1, self.tokens),
            "bits_per_byte": bits_per_byte(self.nats, self.bytes),
            "tokens_per_second": self.tokens / total if total else 0.0,
            "step_seconds": total / max(1, self.steps),
            **{f"{part}_seconds": value / max(1, self.steps) for part, value in self.seconds.items()},
        }


def bits_per_byte(nats: float, size: int) -> float:
    """Return the total loss `nats` over text of `size` bytes in bits per byte: comparable between tokenizers."""
    return nats / math.log(2) / size if size else math.nan


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return peak memory in bytes: the process's resident set, and the allocator's on a CUDA device."""
    unit = 1 if sys.platform == "darwin" else 1024
    memory = {"peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        memory["peak_cuda_bytes"] = torch.cuda.max_memory_allocated(device)
    return memory


class Clock:
    """Times the parts of a step. On CUDA it records events, which are read after the work is done: nothing waits for it."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []

    def start(self) -> None:
        """Begin a step."""
        self._marks = [("", self._now())]

    def mark(self, part: str) -> None:
        """Say that the time since the last mark belonged to `part`."""
        self._marks.append((part, self._now()))

    def read(self) -> dict[str, float]:
        """Return seconds by part for the step since `start`."""
        if self._cuda:
            self._marks[-1][1].synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            seconds[part] += before.elapsed_time(after) / 1000 if self._cuda else after - before
        return seconds

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


class Log:
    """A text file that is only ever added to, whose length a checkpoint remembers.

    Args:
        path: the file; made when it does not exist.
        length: cut the file to this many bytes first (resuming: what came after the checkpoint will be written again).
    """

    def __init__(self, path: Path, length: int = 0) -> None:
        self.path = path
        self._file = open(path, "ab")  # noqa: SIM115 open as long as the run is
        if self._file.tell() > length:
            self._file.truncate(length)
            self._file.seek(0, os.SEEK_END)

    def write(self, text: str) -> None:
        """Add text at once.

        Raises:
            RunError: the disk is full or refuses.
        """
        try:
            self._file.write(text.encode())
            self._file.flush()
        except OSError as error:
            raise self._unwritable(error) from error

    def record(self, kind: str, values: dict[str, Any]) -> None:
        """Add one JSON line: {"kind": kind, …}; NaN and infinities become null, which JSON has."""
        clean = {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in values.items()}
        self.write(json.dumps({"kind": kind, **clean}) + "\n")

    def sync(self) -> int:
        """Wait until everything is on the disk; return the file's length in bytes.

        Raises:
            RunError: the disk is full or refuses.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise self._unwritable(error) from error
        return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(OSError):  # only what `write` has refused by name can be left to write
            self._file.close()

    def _unwritable(self, error: OSError) -> RunError:
        hint = f"free some space, then continue with: python -m train resume {self.path.parent}"
        return RunError(f"cannot write {self.path}: {error}; {hint}")


def mend(path: Path, length: int) -> int:
    """Return how many of the `length` bytes that a log should have are there; of a shorter one an unfinished last line is cut off."""
    size = path.stat().st_size if path.exists() else 0
    if size >= length:
        return length
    if size:
        whole = path.read_bytes().rpartition(b"\n")
        os.truncate(path, len(whole[0]) + len(whole[1]))
    return size


def read(path: Path, kind: str, length: int | None = None) -> list[dict[str, Any]]:
    """Return the lines of one kind ("train" or "eval") of a metrics.jsonl, or of its first `length` bytes.

    An unfinished last line is left out.

    Raises:
        RunError: a line is damaged; the message has its number.
    """
    lines = path.read_bytes()[:length].split(b"\n")[:-1] if path.exists() else []
    records = [_record(line, f"line {number} of {path}") for number, line in enumerate(lines, 1)]
    return [record for record in records if record["kind"] == kind]


def _record(line: bytes, where: str) -> dict[str, Any]:
    """Return a line as a record that has the numbers its kind needs."""
    try:
        record = json.loads(line)
    except ValueError as error:  # bytes that are not UTF-8 too
        raise RunError(f"{where} is damaged: {error}; repair it or delete that line") from error
    kind = record.get("kind") if isinstance(record, dict) else None
    if not isinstance(kind, str) or kind not in _NUMBERS:
        raise RunError(f"{where} is damaged: it is no record of kind {' or '.join(_NUMBERS)}; repair it or delete that line")
    for name in _NUMBERS[kind]:
        value = record.get(name)
        if not isinstance(value, int | float) and not (name in _MAY_BE_NULL and name in record and value is None):
            raise RunError(f"{where} is damaged: {name} is {value!r}, not a number; repair it or delete that line")
    return record


class Bar:
    """Live progress: loss, rate, tokens/s and time left. Not a terminal: a plain line at most every five seconds."""

    def __init__(self, console: Console, total: int, done: int, *, enabled: bool) -> None:
        self._console, self._total, self._start = console, total, done
        self._began = self._spoke = time.monotonic()
        self._enabled = enabled
        self._progress: Progress | None = None
        if enabled and console.is_terminal:
            shown = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"))
            clock = (TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
            self._progress = Progress(*shown, *clock, console=console, refresh_per_second=2)
            self._task = self._progress.add_task("step", total=total, completed=done, text="")
            self._progress.start()

    def advance(self, step: int) -> None:
        """Show that `step` updates are done."""
        if self._progress is not None:
            self._progress.update(self._task, completed=step)

    def show(self, step: int, line: dict[str, float], rate: float) -> None:
        """Show the newest metrics line and the base learning rate."""
        text = f"loss {line['loss']:.3f}  lr {rate:.2e}  {line['tokens_per_second']:,.0f} tok/s"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, text=text)
        elif self._enabled and (step == self._total or time.monotonic() - self._spoke >= 5):
            self._spoke = time.monotonic()
            left = (self._spoke - self._began) / max(1, step - self._start) * (self._total - step)
            self._console.print(f"step {step}/{self._total}  {text}  ETA {left:.0f} s", highlight=False)

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self._console.print(text, highlight=False, markup=False, soft_wrap=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._progress is not None:
            self._progress.stop()
