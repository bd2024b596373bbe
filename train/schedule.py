"""Learning-rate schedules as factors of each group's own rate."""

import math

from train.config import RunConfig


def factor(config: RunConfig, step: int) -> float:
    """Return the factor on every group's rate for the update that turns `step` updates into `step + 1`.

    Linear warm-up reaches 1 on the last warm-up step; the cosine then falls to `lr_floor` on the last step of the run.

    >>> from train.recipes import gpt
    >>> import dataclasses
    >>> config = dataclasses.replace(gpt(), steps=10, warmup=2, lr_floor=0.1)
    >>> [round(factor(config, step), 3) for step in (0, 1, 2, 9)]
    [0.5, 1.0, 0.966, 0.1]
    """
    warmup = config.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    if config.schedule == "constant":
        return 1.0
    done = min(1.0, (step + 1 - warmup) / max(1, config.steps - warmup))
    return config.lr_floor + (1 - config.lr_floor) * 0.5 * (1 + math.cos(math.pi * done))
