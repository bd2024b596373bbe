"""A result that can be read in a year: what was measured, where, with which versions, and against what."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from bench.timing import Timing

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True, kw_only=True)
class Row:
    """One number with everything needed to interpret it; a line of bench/results/*.jsonl.

    Attributes:
        bench, case, what: the report, the model, and what it did ("forward", "training step", …).
        seconds, low, high: median and quartiles; None where nothing was timed. samples: how many were taken.
        tokens: that one sample worked on.
        flops: matrix-product FLOPs of that work. bytes: of parameters, or what `what` says. peak_bytes: of the process.
        ratio: of the peer's time to this one's, measured in the same process (above 1 is faster). peer: which case that is.
        settings: the model's fields and the sizes.
    """

    bench: str
    case: str
    what: str
    seconds: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    tokens: int = 0
    flops: int = 0
    bytes: int = 0
    peak_bytes: int | None = None
    ratio: float | None = None
    peer: str = ""
    settings: dict[str, object] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens of one sample over its median time."""
        return self.tokens / self.seconds if self.seconds else None


def beside(
    case: str,
    what: str,
    times: Mapping[str, Timing],
    peer: str,
    *,
    tokens: int = 0,
    flops: int = 0,
    settings: Mapping[str, object] | None = None,
) -> Row:
    """A row of the execution bench: "tn" beside a peer that was timed in turns with it."""
    ours = times["tn"]
    (low, high), ratio, samples = ours.quartiles, ours.faster_than(times[peer]), len(ours.samples)
    return Row(
        bench="execution",
        case=case,
        what=what,
        seconds=ours.median,
        low=low,
        high=high,
        samples=samples,
        tokens=tokens,
        flops=flops,
        ratio=ratio,
        peer=peer,
        settings=dict(settings or {}),
    )


def append(rows: list[Row], path: Path) -> None:
    """Add rows to a file, each with the machine, the versions, the commit and the time. The file's folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    around = surroundings()
    with path.open("a", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps({**asdict(row), "tokens_per_second": row.tokens_per_second, **around}) + "\n")


def surroundings() -> dict[str, object]:
    """What a measurement depends on besides the code: time, commit, machine, versions, threads."""
    cuda = torch.cuda.is_available()
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "commit": commit(),
        "device": torch.cuda.get_device_name() if cuda else _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda},
    }


def commit() -> str:
    """The commit of the source, with "+changes" when files differ from it; "unknown" outside git."""
    here = Path(__file__).parent
    try:
        name, changes = (
            subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()
            for words in (["rev-parse", "--short=12", "HEAD"], ["status", "--porcelain"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return name + ("+changes" if changes else "")


def wide_console() -> Console:
    """The terminal; where the output goes to a file, wide enough that no column is folded."""
    console = Console()
    return console if console.is_terminal else Console(width=150)


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
