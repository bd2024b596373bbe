"""Flag spellings of older training scripts that `python -m train gpt` accepts, in one table.

The names are those of compute-better-spent's train_gpt.py, which are also nanoGPT's where the two share a setting.
"""

from collections.abc import Mapping
from types import MappingProxyType

from train.errors import ConfigError

ALIASES: Mapping[str, str] = MappingProxyType(
    {
        "struct": "model.structure",
        "layers": "model.structured",
        "tt_rank": "model.rank",
        "d_model": "model.width",
        "n_embd": "model.width",
        "n_layer": "model.layers",
        "n_head": "model.heads",
        "d_head": "model.head_dim",
        "block_size": "model.context",
        "dropout": "model.dropout",
        "dataset": "data",
        "batch_size": "batch",
        "gradient_accumulation_steps": "accumulate",
        "max_iters": "steps",
        "warmup_iters": "warmup",
        "init_lr": "lr",
        "learning_rate": "lr",
        "scheduler": "schedule",
        "grad_clip": "clip",
        "base_d_model": "base_width",
        "eval_interval": "eval_every",
        "eval_iters": "eval_batches",
        "log_interval": "log_every",
        "out_dir": "out",
    }
)
"""Old flag → config key. Values are spelt as this project spells them."""

UNSUPPORTED: Mapping[str, str] = MappingProxyType(
    {
        "rank_frac": "give the rank itself with --model.rank",
        "scale_factor": "give the width itself with --model.width",
        "input_lr_mult": "rates follow from each core's sizes; the start table prints them",
        "beta1": "give both constants with --betas",
        "beta2": "give both constants with --betas",
        "min_lr": "give the last rate as a fraction of lr with --lr_floor",
        "wandb_log": "a run writes metrics.jsonl and curves.png",
        "wandb_project": "a run writes metrics.jsonl and curves.png",
    }
)
"""Old flag → what to do instead."""


def resolve(flag: str) -> str:
    """Return the config key that a flag's name stands for; a name that is no alias is returned as it is.

    Raises:
        ConfigError: a flag of the older scripts without a counterpart here; the message says what to do instead.
    """
    if flag in UNSUPPORTED:
        raise ConfigError(f"--{flag} is not available here: {UNSUPPORTED[flag]}")
    return ALIASES.get(flag, flag)
