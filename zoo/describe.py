"""A model as a table: every Network and every named pointwise node, with parameters, FLOPs and memory."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path

import torch

import tn
from zoo.errors import ConfigError
from zoo.gpt import GPT
from zoo.huggingface import read_config
from zoo.registry import config as preset
from zoo.registry import names
from zoo.saved import build


@dataclass(frozen=True)
class Row:
    """One node of the model, or the same node of several blocks.

    Args:
        path: module that runs it; blocks that are alike are folded into one row, as `blocks.0-11.mlp.fc_in`.
        kind: contraction, gather or pointwise.
        spec: of the contraction, or the name of the pointwise function.
        count: how many nodes the row stands for; the other numbers are of all of them together.
        parameters: trainable numbers, each counted once, where it is first used.
        flops: matmul FLOPs of one forward pass, 2 per multiply-add.
        pointwise_flops: other operations of one forward pass.
        activation_bytes: bytes of the results, and of the intermediates kept for the gradient.
    """

    path: str
    kind: str
    spec: str
    count: int
    parameters: int
    flops: int
    pointwise_flops: int
    activation_bytes: int


@dataclass(frozen=True)
class Description:
    """What `describe` found: rows in the order they run, and their totals. `print` shows it as a table.

    Args:
        title: the model and the size of the run.
        rows: every node of one forward pass.
        tokens: batch × sequence of that pass.
        parameter_bytes: memory of the parameters.
        cache_bytes: memory of a key-value cache for the same batch and sequence.
    """

    title: str
    rows: tuple[Row, ...]
    tokens: int
    parameter_bytes: int
    cache_bytes: int

    @property
    def parameters(self) -> int:
        """Trainable numbers of the model."""
        return sum(row.parameters for row in self.rows)

    @property
    def flops(self) -> int:
        """Matmul FLOPs of the forward pass: those of all contractions, attention's two included."""
        return sum(row.flops for row in self.rows)

    @property
    def pointwise_flops(self) -> int:
        """Operations of the forward pass outside contractions."""
        return sum(row.pointwise_flops for row in self.rows)

    @property
    def activation_bytes(self) -> int:
        """Bytes of all results and kept intermediates: what training holds if it recomputes nothing."""
        return sum(row.activation_bytes for row in self.rows)

    def __str__(self) -> str:
        header = ("node", "kind", "spec", "×", "parameters", "FLOPs", "%", "pointwise", "activations")
        body = [
            (
                row.path,
                row.kind,
                row.spec,
                str(row.count) if row.count > 1 else "",
                f"{row.parameters:,}" if row.parameters else "",
                _si(row.flops) if row.flops else "",
                f"{100 * row.flops / self.flops:.1f}" if row.flops and self.flops else "",
                _si(row.pointwise_flops) if row.pointwise_flops else "",
                _bytes(row.activation_bytes),
            )
            for row in self.rows
        ]
        total = (
            "total",
            "",
            "",
            str(sum(row.count for row in self.rows)),
            f"{self.parameters:,}",
            _si(self.flops),
            "100.0" if self.flops else "",
            _si(self.pointwise_flops),
            _bytes(self.activation_bytes),
        )
        tail = (
            f"per token: {_si(self.flops / self.tokens)} matmul FLOPs forward   "
            f"memory: parameters {_bytes(self.parameter_bytes)}, activations {_bytes(self.activation_bytes)}, "
            f"key-value cache {_bytes(self.cache_bytes)}"
        )
        return "\n".join([self.title, *_table([header, *body, total], text_columns=3), tail])


def describe(model: str | Path | GPT, *, batch: int = 1, sequence: int | None = None) -> Description:
    """Every Network and pointwise node of one forward pass, with parameters, FLOPs and memory.

    Nothing is computed and no memory is taken: the model is traced on the meta device.

    Args:
        model: a model, a name of `zoo.names()`, or a folder: one written by `zoo.save`, or a Hugging Face GPT-2.
        batch: sequences.
        sequence: tokens of each (default: the model's context).

    Returns:
        a Description: `print` it, or read `.rows`, `.parameters`, `.flops`, `.activation_bytes`. `.flops` counts what
        `torch.utils.flop_counter` counts when the contractions run as `tn.backend("einsum")` and attention as its two
        products (SDPA's math backend): causal masks save nothing in either.

    Raises:
        ConfigError: no such model, or a size that does not fit it.
        SavedModelError: the folder's `model.json` or `config.json` is missing or damaged.
    """
    title = type(model).__name__
    if not isinstance(model, GPT):
        title, model = str(model), _open(model)
    sequence = model.config.context if sequence is None else sequence
    for name, value in (("batch", batch), ("sequence", sequence)):
        if value < 1:
            raise ConfigError(f"{name}={value} must be at least 1")
    if sequence > model.config.context:
        raise ConfigError(f"sequence={sequence} is longer than the model's context of {model.config.context}")
    trace = tn.trace(model, torch.empty(batch, sequence, dtype=torch.int64, device="meta"))
    parameters = list(model.parameters())
    cache = model.new_cache(batch, sequence, device="meta")
    return Description(
        title=f"{title}: {batch} × {sequence} tokens, {parameters[0].dtype}".replace("torch.", ""),
        rows=_fold(_rows(model, trace)),
        tokens=batch * sequence,
        parameter_bytes=sum(parameter.nbytes for parameter in parameters),
        cache_bytes=cache.nbytes,
    )


def _open(name: str | Path) -> GPT:
    if isinstance(name, str) and name in names():
        return GPT(preset(name), device="meta")
    folder = Path(name)
    if (folder / "config.json").is_file() and not (folder / "model.json").is_file():
        return GPT(read_config(folder), device="meta")
    if folder.is_dir():
        return build(folder, device="meta")
    raise ConfigError(tn.errors.unknown("model", str(name), names()) + ", or a folder with a model")


def _rows(model: GPT, trace: tn.Trace) -> list[Row]:
    """A row per node; a parameter counts at the node whose module owns it, once."""
    left = {id(parameter): parameter.numel() for parameter in model.parameters()}
    rows = []
    for node in trace.nodes:
        own = model.get_submodule(node.path).parameters(recurse=False)
        rows.append(
            Row(
                path=node.path or "(model)",
                kind=node.kind,
                spec=node.what,
                count=1,
                parameters=sum(left.pop(id(parameter), 0) for parameter in own),
                flops=node.flops,
                pointwise_flops=node.pointwise,
                activation_bytes=node.bytes,
            )
        )
    if left:
        rows.append(Row("(not run)", "", "", 1, sum(left.values()), 0, 0, 0))
    return rows


_INDEX = re.compile(r"^(.*?\.)(\d+)(\..*|)$")


def _fold(rows: list[Row]) -> tuple[Row, ...]:
    """Join nodes that are alike but for the block they are in; the first one's place in the order is kept."""
    folded: dict[tuple[object, ...], list[tuple[int, Row]]] = {}
    seen: dict[tuple[int, object], int] = {}
    for row in rows:
        match = _INDEX.match(row.path)
        index = int(match[2]) if match else -1
        pattern = f"{match[1]}*{match[3]}" if match else row.path
        alike = (pattern, *dataclasses.astuple(dataclasses.replace(row, path="")))
        # Two equal nodes of one block (its two residual additions) stay two rows.
        nth = seen[index, alike] = seen.get((index, alike), -1) + 1
        folded.setdefault((alike, nth), []).append((index, row))
    return tuple(_join(group) for group in folded.values())


def _join(group: list[tuple[int, Row]]) -> Row:
    indices, rows = [index for index, _ in group], [row for _, row in group]
    first = rows[0]
    if len(rows) == 1:
        return first
    return dataclasses.replace(
        first,
        path=_INDEX.sub(lambda match: f"{match[1]}{_ranges(indices)}{match[3]}", first.path),
        count=len(rows),
        parameters=sum(row.parameters for row in rows),
        flops=sum(row.flops for row in rows),
        pointwise_flops=sum(row.pointwise_flops for row in rows),
        activation_bytes=sum(row.activation_bytes for row in rows),
    )


def _ranges(indices: list[int]) -> str:
    """[0, 1, 2, 5] → "0-2,5"."""
    runs: list[list[int]] = []
    for index in sorted(indices):
        if runs and index == runs[-1][1] + 1:
            runs[-1][1] = index
        else:
            runs.append([index, index])
    return ",".join(str(low) if low == high else f"{low}-{high}" for low, high in runs)


def _table(rows: list[tuple[str, ...]], *, text_columns: int) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(width) if column < text_columns else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    rule = "─" * max(map(len, lines))
    return [rule, lines[0], rule, *lines[1:-1], rule, lines[-1], rule]


def _si(value: float) -> str:
    for factor, unit in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f}"


def _bytes(value: int) -> str:
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if value >= 1024**power:
            return f"{value / 1024**power:.1f} {unit}"
    return f"{value} B"
