"""What stops a run, as values a caller can catch. `python -m train` prints each as one line."""

import signal
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
    """The loss or a gradient became infinite or NaN; the weights are those from before the update."""


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
