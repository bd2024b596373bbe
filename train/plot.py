"""curves.png: loss against steps and against training seconds, for one run or several laid over each other."""

from collections.abc import Mapping
from pathlib import Path

from train import metrics
from train.errors import RunError


def plot_runs(runs: Mapping[str, str | Path], out: str | Path) -> Path:
    """Draw the loss of several runs into one PNG: training as a line, held-out text as points, in nats per token.

    Args:
        runs: label → run folder (holding metrics.jsonl).
        out: the PNG to write.

    Returns:
        The PNG's path.

    Raises:
        RunError: a folder without metrics.
    """
    from matplotlib.figure import Figure  # heavy; needed once, at the end of a run

    figure = Figure(figsize=(11, 4.2), dpi=120, layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for number, (label, folder) in enumerate(runs.items()):
        path = Path(folder) / "metrics.jsonl"
        train, held_out = metrics.read(path, "train"), metrics.read(path, "eval")
        if not train and not held_out:
            raise RunError(f"nothing to draw: {path} has no metrics")
        for axis, key in zip(axes, ("step", "seconds"), strict=True):
            axis.plot(*_points(train, key), color=f"C{number}", linewidth=1.2, label=f"{label}: training")
            axis.plot(*_points(held_out, key), "o--", color=f"C{number}", markersize=4, linewidth=0.8, label=f"{label}: held-out")
    axes[0].set_xlabel("optimiser steps")
    axes[1].set_xlabel("training seconds")
    axes[0].set_ylabel("loss (nats per token)")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    out = Path(out)
    temporary = out.with_name(f".{out.name}")
    figure.savefig(temporary, format="png")
    temporary.replace(out)
    return out


def _points(records: list[dict], key: str) -> tuple[list[float], list[float]]:
    """Return x and y of the records that have a loss."""
    kept = [record for record in records if record["loss"] is not None]
    return [record[key] for record in kept], [record["loss"] for record in kept]
