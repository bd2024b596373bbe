"""The table a run starts with, the one it ends with, and the Result that the latter shows."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn

import tn
from train import folder, metrics
from train.config import RunConfig
from train.errors import RunError
from train.loop import Task


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a finished run measured; result.json holds the same. Losses are in nats per token, times in seconds."""

    run: Path
    steps: int
    tokens: int
    """Real tokens trained on."""
    seconds: float
    """Time in training steps, evaluations and checkpoints excluded."""
    train_loss: float
    """Mean over the last line of metrics.jsonl."""
    loss: float
    """On held-out text, at the end."""
    bits_per_byte: float
    """On held-out text, at the end; comparable between tokenizers."""
    best_loss: float
    step_seconds: float
    """Median over the lines of metrics.jsonl, the first left out."""
    tokens_per_second: float
    """Tokens of a step over `step_seconds`."""
    peak_memory_bytes: int
    """Of the process: resident set on a CPU, allocator on CUDA."""
    parameters: int
    flops_per_token: int
    """Matrix-product FLOPs of a forward pass; training costs about three times as much."""


def costs(model: nn.Module, config: RunConfig) -> dict[str, int]:
    """Return parameters, forward FLOPs per token, and an estimate of training memory in bytes by part; runs nothing."""
    tokens = torch.zeros(config.batch, config.model.context, dtype=torch.int64, device="meta")
    trace = tn.trace(model, tokens)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops_per_token": trace.flops // tokens.numel(),
        "weight_bytes": weights,
        "gradient_bytes": weights,
        "moment_bytes": 2 * weights,
        "activation_bytes": trace.bytes,
    }


def start(console: Console, task: Task, *, data: str, cost: Mapping[str, int]) -> None:
    """Print what will be trained, what it costs, and the rate of every parameter group."""
    config, shape = task.config, task.config.model
    parts = {"weights": "weight", "gradients": "gradient", "AdamW": "moment", "activations": "activation"}
    memory = {name: cost[f"{part}_bytes"] for name, part in parts.items()}
    tokens = config.tokens_per_step
    rows = {
        "model": f"{shape.structure}{f' rank {shape.rank}' if shape.rank else ''}, {shape.layers} layers of width {shape.width}, "
        f"{shape.heads} heads, context {shape.context}, vocabulary {shape.vocab}",
        "parameters": f"{cost['parameters']:,}",
        "FLOPs per token": f"{cost['flops_per_token']:,} forward, about {3 * cost['flops_per_token']:,} to train",
        "memory (estimate)": f"{size(sum(memory.values()))}: {', '.join(f'{name} {size(value)}' for name, value in memory.items())}",
        "data": data,
        "steps": f"{config.steps:,} of {tokens:,} tokens ({config.accumulate} × {config.batch} × {shape.context}): "
        f"{config.steps * tokens:,} tokens",
        "rate": f"{config.schedule}, {config.warmup_steps} steps of warm-up, peak {config.lr:g}"
        f"{f', tuned at width {config.base_width}' if config.base_width else ''}",
        "compute": f"{config.dtype} on {task.device}, {torch.get_num_threads()} CPU threads, seed {config.seed}",
        "run": str(task.run),
    }
    _print_rows(console, rows)
    console.print(group_table(task.optimizer.param_groups))


def group_table(groups: list[dict[str, Any]]) -> Table:
    """Return the table of parameter groups: which parameters, how many, multiplier, peak rate, weight decay."""
    table = Table(title="parameter groups", title_justify="left", pad_edge=False)
    table.add_column("parameters (* is every block)", overflow="fold")
    for heading in ("numbers", "multiplier", "peak rate", "weight decay"):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in groups:
        count = sum(parameter.numel() for parameter in group["params"])
        rates = (f"{group['multiplier']:.4g}", f"{group['peak_lr']:.3g}", f"{group['weight_decay']:g}")
        table.add_row(Text("\n".join(_patterns(group["names"]))), f"{count:,}", *rates)
    return table


def _patterns(names: list[str]) -> list[str]:
    """Shorten parameter names: blocks are a star, siblings share a line: blocks.*.attention.{query,key}.first."""
    siblings: dict[tuple[str, str], dict[str, None]] = {}
    for name in names:
        path, _, core = re.sub(r"\.\d+\.", ".*.", name).rpartition(".")
        outer, _, layer = path.rpartition(".")
        siblings.setdefault((outer, core), {})[layer] = None
    short = []
    for (outer, core), layers in siblings.items():
        middle = next(iter(layers)) if len(layers) == 1 else f"{{{','.join(layers)}}}"
        short.append(".".join(part for part in (outer, middle, core) if part))
    return short


def finish(run: Path, *, position: Mapping[str, Any], cost: Mapping[str, int], device: torch.device) -> Result:
    """Gather the result of a run from its metrics, and write result.json, whole.

    Raises:
        RunError: metrics.jsonl is damaged, or its lines are lost.
    """
    lines, held_out = metrics.read(run / folder.METRICS, "train"), metrics.read(run / folder.METRICS, "eval")
    if not lines or not held_out:
        lost = f"{run / folder.METRICS} has lost the lines it is made of"
        raise RunError(f"the final model is written to {run}, but no {folder.RESULT}: {lost}")
    steady = lines[1:] or lines
    step_seconds = median(line["step_seconds"] for line in steady)
    memory = metrics.peak_memory(device)
    result = Result(
        run=run,
        steps=position["step"],
        tokens=position["tokens"],
        seconds=position["seconds"],
        train_loss=lines[-1]["loss"],
        loss=held_out[-1]["loss"],
        bits_per_byte=held_out[-1]["bits_per_byte"],
        best_loss=position["best_loss"],
        step_seconds=step_seconds,
        tokens_per_second=median(line["tokens_per_second"] for line in steady),
        peak_memory_bytes=memory.get("peak_cuda_bytes", max(memory["peak_rss_bytes"], *(line["peak_rss_bytes"] for line in lines))),
        parameters=cost["parameters"],
        flops_per_token=cost["flops_per_token"],
    )
    temporary = run / f".{folder.RESULT}"
    temporary.write_text(json.dumps(asdict(result) | {"run": str(run)}, indent=1), encoding="utf-8")
    os.replace(temporary, run / folder.RESULT)
    return result


def load(run: Path) -> Result:
    """Return the result that `finish` wrote into a run's folder.

    Raises:
        RunError: result.json is damaged; the message names it.
    """
    path = run / folder.RESULT
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} is damaged: {error}") from error
    wanted = {field.name for field in fields(Result)}
    if not isinstance(values, dict) or values.keys() != wanted:
        different = sorted(wanted ^ values.keys()) if isinstance(values, dict) else sorted(wanted)
        raise RunError(f"{path} is damaged: missing or unknown {', '.join(different)}")
    for name in wanted - {"run"}:
        if not isinstance(values[name], int | float):
            raise RunError(f"{path} is damaged: {name} is {values[name]!r}, not a number")
    return Result(**values | {"run": run})


def end(console: Console, result: Result) -> None:
    """Print the result and where things are."""
    rows = {
        "held-out loss": f"{result.loss:.4f} nats per token, {result.bits_per_byte:.4f} bits per byte (best loss {result.best_loss:.4f})",
        "training loss": f"{result.train_loss:.4f} nats per token",
        "speed": f"{result.tokens_per_second:,.0f} tokens/s, {1000 * result.step_seconds:.1f} ms per step (median)",
        "trained": f"{result.steps:,} steps, {result.tokens:,} tokens, {result.seconds:.1f} s in steps",
        "peak memory": size(result.peak_memory_bytes),
        "parameters": f"{result.parameters:,}",
        "FLOPs per token": f"{result.flops_per_token:,} forward",
        "run": f"{result.run} (curves.png, samples.txt, metrics.jsonl, model.safetensors)",
    }
    _print_rows(console, rows)


def _print_rows(console: Console, rows: Mapping[str, str]) -> None:
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows.items():
        table.add_row(Text(name, style="bold"), Text(value))
    console.print(table)


def size(count: float) -> str:
    """Return bytes as text: 1536 → '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
