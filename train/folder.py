"""A run's folder: its name, who may write to it, and the rule that one run never touches another."""

import fcntl
import os
import tempfile
import time
from pathlib import Path
from typing import BinaryIO

from tn.errors import unknown
from train.config import RunConfig
from train.errors import RunError

CONFIG, METRICS, SAMPLES, RESULT, CHECKPOINTS = "config.yaml", "metrics.jsonl", "samples.txt", "result.json", "checkpoints"
PLANS = "plans"  # what the run's contractions were planned as, and the machine table they were planned with; see tn.plan_store
_OURS = (CONFIG, METRICS, RESULT, CHECKPOINTS, PLANS, "model.json", "model.safetensors")


def choose(config: RunConfig) -> Path:
    """Return the folder a new run will use: `out`, or runs/RECIPE-TIME. Nothing is made yet.

    Raises:
        RunError: the folder holds a run already, or cannot be written.
    """
    path = Path(config.out) if config.out is not None else Path("runs") / f"{config.recipe}-{time.strftime('%Y%m%d-%H%M%S')}"
    if config.out is not None:
        refuse_taken(path)
    _check_writable(path)
    return path


def make(path: Path, *, exact: bool) -> Path:
    """Make a new run's folder and return it; unless it must have exactly this name, one that exists already is left alone for path-2, …

    Raises:
        RunError: the disk refuses.
    """
    candidate, count = path, 1
    while True:
        try:
            candidate.mkdir(parents=True, exist_ok=exact)
        except FileExistsError:
            count += 1
            candidate = path.with_name(f"{path.name}-{count}")
        except OSError as error:
            raise RunError(f"cannot make the run's folder {candidate}: {error}") from error
        else:
            return candidate


def refuse_taken(path: Path) -> None:
    """Raise RunError when the folder holds anything of a run."""
    if path.exists() and not path.is_dir():
        raise RunError(f"--out {path} is a file; give a folder")
    if any((path / name).exists() for name in _OURS):
        raise RunError(_taken(path))


def _taken(path: Path) -> str:
    return f"{path} already holds a run: continue it with `python -m train resume {path}`, or give another --out"


def _check_writable(path: Path) -> None:
    """Raise RunError when nothing can be written where the folder is or will be."""
    existing = path
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise RunError(f"cannot write to {existing}, where the run's folder {path} should be: {error.strerror}") from error


def claim(path: Path, config_text: str) -> None:
    """Make the folder this run's by writing its config.yaml, whole, unless there is one already.

    Raises:
        RunError: another run was faster, or the disk refuses.
    """
    temporary = path / f".{CONFIG}-{os.getpid()}"
    try:
        temporary.write_text(config_text, encoding="utf-8")
        try:
            os.link(temporary, path / CONFIG)  # fails when the name exists, unlike a rename
        finally:
            temporary.unlink()
    except FileExistsError as error:
        raise RunError(_taken(path)) from error
    except OSError as error:
        raise RunError(f"cannot write {path / CONFIG}: {error}") from error


def find(path: Path) -> Path:
    """Return the folder of an existing run.

    Raises:
        RunError: no run there; the nearest one beside it is named.
    """
    if (path / CONFIG).is_file():
        return path
    if path.is_dir():
        raise RunError(f"{path} holds no run: it has no {CONFIG}")
    beside = [str(other.parent) for other in path.parent.glob(f"*/{CONFIG}")]
    raise RunError(unknown("run", str(path), beside) if beside else f"no run at {path}")


def lock(path: Path) -> BinaryIO:
    """Return an open file that keeps other processes out of this run until it is closed or this process ends, however it ends.

    Raises:
        RunError: another process is training this run.
    """
    file = open(path / ".lock", "ab")  # noqa: SIM115 held as long as the run is
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise RunError(f"another process is training {path}") from error
    return file
