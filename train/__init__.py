"""Training: data, optimiser, loop, checkpoints and recipes. From the shell: `python -m train --help`."""

from train import recipes
from train.config import RunConfig
from train.errors import CheckpointError, ConfigError, NonFiniteError, RunError, Stopped, TrainError
from train.launch import resume, run
from train.plot import plot_runs
from train.report import Result

__all__ = [
    "CheckpointError",
    "ConfigError",
    "NonFiniteError",
    "Result",
    "RunConfig",
    "RunError",
    "Stopped",
    "TrainError",
    "plot_runs",
    "recipes",
    "resume",
    "run",
]
