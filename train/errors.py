"""What stops a run, as values a caller can catch. `python -m train` prints each as one line."""

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path


class TrainError(Exception):
    """Base of every error that training raises on purpose."""


class ConfigError(TrainError, ValueError):
    """A setting that is unknown, of the wrong type or out of range, or settings that contradict each other."""


class RunError(TrainError):
    """A run folder that cannot be used: already taken, in use, incomplete, or not what the checkpoint was made from."""


class CheckpointError(TrainError):
    """A checkpoint that cannot be written, found or read."""


class NonFiniteError(TrainError, ArithmeticError):
    """The loss or a gradient became infinite or NaN; the message says after which step, and what was saved."""


_TOO_LARGE = ("out of memory", "can't allocate memory", "not enough memory", "calculation overflowed", "multiplication overflowed")
"""How torch says that a tensor does not fit, in errors that have no type of their own."""


@contextlib.contextmanager
def memory() -> Iterator[None]:
    """Inside the block, a tensor that does not fit into memory is a RunError of one line."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        text = str(error)
        if not isinstance(error, MemoryError) and not any(words in text for words in _TOO_LARGE):
            raise
        reason = next(iter(text.strip().splitlines()), type(error).__name__)
        hint = "try a smaller batch, model.context or model.width"
        raise RunError(f"the run does not fit into memory: {reason}; {hint}") from error


class Stopped(SystemExit):
    """A run that a signal ended after it saved itself. Uncaught, it ends the process with 130 (Ctrl-C) or 143 (SIGTERM).

    Attributes:
        signal: the signal's number.
        run: the run's folder, for `train.resume`.
    """

    def __init__(self, signal_number: int, run: Path) -> None:
        super().__init__(128 + signal_number)
        self.signal = signal.Signals(signal_number)
        self.run = run
