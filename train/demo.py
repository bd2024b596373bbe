"""python -m train demo: a BTT GPT and its dense twin on the same batches, each trained in a process of its own, then compared.

Whatever the demo shows was measured in that demo: it reads the two run folders and nothing else.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console
from rich.table import Table

import zoo
from tn.errors import unknown
from train import folder, plot, report
from train.errors import ConfigError, RunError
from train.report import Result

SETTINGS = "demo.json"
PICTURE = "demo.png"
SAMPLE_TOKENS = 120


@dataclass(frozen=True, kw_only=True)
class Demo:
    """The settings both runs share, and the rank of the BTT one. The default takes a few minutes on two CPU cores."""

    steps: int = 300
    width: int = 512
    layers: int = 4
    heads: int = 8
    context: int = 256
    batch: int = 4
    rank: int = 1
    lr: float = 7e-4
    data: str = "stdlib"
    tokenizer: str = "bpe:4096"
    seed: int = 0
    threads: int | None = None

    @property
    def runs(self) -> tuple[tuple[str, str, int | None], ...]:
        """(folder, structure, rank) of each run, in the order they are trained."""
        return ("btt", "btt", self.rank), ("dense", "dense", None)

    def model(self, structure: str, rank: int | None) -> zoo.GPTConfig:
        """The shape of one of the two models; the vocabulary is settled by the tokenizer later."""
        return zoo.GPTConfig(layers=self.layers, width=self.width, heads=self.heads, context=self.context, structure=structure, rank=rank)

    def command(self, structure: str, rank: int | None, out: Path) -> list[str]:
        """The arguments of `python -m train` that train one of the two models: what a user would type."""
        flags = {
            "model.structure": structure,
            "model.rank": rank,
            "model.layers": self.layers,
            "model.width": self.width,
            "model.heads": self.heads,
            "model.context": self.context,
            "data": self.data,
            "tokenizer": self.tokenizer,
            "steps": self.steps,
            "batch": self.batch,
            "lr": self.lr,
            "seed": self.seed,
            "threads": self.threads,
            "out": out,
        }
        return ["gpt", *(word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value)))]


def main(arguments: list[str]) -> int:
    """Run the demo.

    Args:
        arguments: the words after `python -m train demo`. Naming the --out of an interrupted demo continues it, with its settings.

    Returns:
        0, or the exit status of the process that failed or was interrupted.

    Raises:
        ConfigError, RunError: settings or a folder that cannot be used, before any work.
    """
    given, out = _parse(arguments)
    demo = _settle(given, out)
    console = Console()
    for _, structure, rank in demo.runs:
        zoo.GPT(demo.model(structure, rank), device="meta")  # refuses what cannot be built, before any work
    out = _claim(demo, out)
    begun = time.monotonic()
    console.print(f"A BTT GPT and its dense twin, {demo.steps} steps each on {demo.data}, into {out}", highlight=False)
    status = _child(["prepare", demo.data, "--tokenizer", demo.tokenizer])  # on its own, so that no model's peak memory has it
    if status:
        return _stopped(console, "preparing the data", status, out)
    for name, structure, rank in demo.runs:
        run = out / name
        if (run / folder.RESULT).exists():
            console.print(f"\n{run} is finished already", highlight=False)
            continue
        words = ["resume", str(run)] if (run / folder.CONFIG).exists() else demo.command(structure, rank, run)
        console.print(f"\n[bold]python -m train {' '.join(words)}[/bold]", highlight=False)
        status = _child(words)
        if status:
            return _stopped(console, f"the {name} run", status, out)
    _show(console, demo, out)
    console.print(f"Whole demo: {time.monotonic() - begun:.0f} s. Everything is in {out}", highlight=False)
    return 0


def table(demo: Demo, results: dict[str, Result]) -> Table:
    """The two runs side by side, and their ratio, from what they measured."""
    btt, dense = results["btt"], results["dense"]
    view = Table(
        title=f"\n{demo.steps} steps of {demo.batch * demo.context} tokens on the same batches", title_justify="left", pad_edge=False
    )
    for heading in ("", f"BTT rank {demo.rank}", "dense", "BTT : dense"):
        view.add_column(heading, justify="right" if heading else "left")

    def add(name: str, ours: float, theirs: float, form: str, scale: float = 1.0, note: str = "") -> None:
        view.add_row(name, format(ours * scale, form), format(theirs * scale, form), f"{ours / theirs:.2f}{note}" if theirs else "")

    add("parameters (M)", btt.parameters, dense.parameters, ".2f", 1e-6)
    add("FLOPs per token, forward (M)", btt.flops_per_token, dense.flops_per_token, ".2f", 1e-6)
    add("time per step (ms)", btt.step_seconds, dense.step_seconds, ".1f", 1e3)
    add("tokens per second", btt.tokens_per_second, dense.tokens_per_second, ",.0f")
    add("peak memory (MB)", btt.peak_memory_bytes, dense.peak_memory_bytes, ",.0f", 1e-6)
    add("held-out loss (nats/token)", btt.loss, dense.loss, ".3f")
    add("held-out bits per byte", btt.bits_per_byte, dense.bits_per_byte, ".3f")
    add("training seconds", btt.seconds, dense.seconds, ".1f")
    return view


def _show(console: Console, demo: Demo, out: Path) -> None:
    """The table, the plan of one layer, a sample, and where the picture is."""
    results = {name: report.load(out / name) for name, _, _ in demo.runs}
    console.print(table(demo, results))
    model = zoo.load(out / "btt")
    console.print("\n[bold]How one layer runs[/bold] (blocks.0.mlp.fc_in, forward and gradients; chosen by the planner)", highlight=False)
    console.print(str(model.blocks[0].mlp.fc_in.plan(rows=demo.batch * demo.context)), highlight=False, markup=False, soft_wrap=True)
    console.print("\n[bold]What the BTT model writes[/bold]", highlight=False)
    console.print("".join(_sample(model, out / "btt", demo.context)), highlight=False, markup=False)
    labels = {f"BTT rank {demo.rank}": out / "btt", "dense": out / "dense"}
    picture = plot.plot_runs(labels, out / PICTURE)
    console.print(f"\nCurves of both, against steps and against seconds: {picture}", highlight=False, soft_wrap=True)


def _sample(model: zoo.GPT, run: Path, context: int) -> Iterator[str]:
    tokenizer = zoo.load_tokenizer(run)
    prompt = "def"
    yield prompt
    yield from zoo.stream_text(
        model, tokenizer, prompt, length=min(SAMPLE_TOKENS, context - len(tokenizer.encode(prompt))), temperature=0.8, top_p=0.95, seed=0
    )


def _settle(given: dict[str, Any], out: Path | None) -> Demo:
    """The demo's settings: of the demo in `out` if there is one, else the defaults; flags on top.

    Raises:
        RunError: `out` holds a demo of other settings than the flags give.
    """
    if out is None or not (out / SETTINGS).exists():
        return Demo(**given)
    try:
        saved = Demo(**json.loads((out / SETTINGS).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise RunError(f"cannot read {out / SETTINGS}: {error}; give another --out") from error
    for name, value in given.items():
        if getattr(saved, name) != value:
            raise RunError(f"{out} holds a demo with {name} {getattr(saved, name)}, not {value}; leave the flag out, or give another --out")
    return saved


def _claim(demo: Demo, out: Path | None) -> Path:
    """Make the demo's folder, unless it is one already.

    Raises:
        RunError: the folder holds something else, or cannot be written.
    """
    if out is None:
        out = folder.make(Path("runs") / f"demo-{time.strftime('%Y%m%d-%H%M%S')}", exact=False)
    settings = out / SETTINGS
    if settings.exists():
        return out
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out} is not empty and holds no demo; give another --out")
    try:
        out.mkdir(parents=True, exist_ok=True)
        temporary = settings.with_name(f".{SETTINGS}")
        temporary.write_text(json.dumps(asdict(demo), indent=1), encoding="utf-8")
        temporary.replace(settings)
    except OSError as error:
        raise RunError(f"cannot write {settings}: {error.strerror}") from error
    return out


def _child(words: list[str]) -> int:
    """Run `python -m train` with these words in a process of its own; an interrupt is passed on, and waited for.

    Returns:
        Its exit status; 128 + the signal's number if a signal ended it.
    """
    # A group of its own: the terminal's Ctrl-C reaches only this process, which passes it on exactly once.
    child = subprocess.Popen([sys.executable, "-m", "train", *words], process_group=0)

    def forward(number: int, _: FrameType | None) -> None:
        child.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        status = child.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 - status if status < 0 else status


def _stopped(console: Console, what: str, status: int, out: Path) -> int:
    interrupted = status in (128 + signal.SIGINT, 128 + signal.SIGTERM, 128 + signal.SIGKILL)
    words = f"was ended by {signal.Signals(status - 128).name}" if interrupted else f"failed (exit status {status}, its message is above)"
    console.print(f"\n{what} {words}. To continue where it stopped: python -m train demo --out {out}", highlight=False, soft_wrap=True)
    return status


def _parse(arguments: list[str]) -> tuple[dict[str, Any], Path | None]:
    """The settings that flags give, and the folder."""
    parser = argparse.ArgumentParser(prog="python -m train demo", description=__doc__, exit_on_error=False)
    default = Demo()
    for name, kind, text in (
        ("steps", int, "optimiser steps of each run"),
        ("width", int, "width of both models"),
        ("layers", int, "blocks of both models"),
        ("heads", int, "attention heads of both models"),
        ("context", int, "tokens of a training window"),
        ("batch", int, "windows in a step"),
        ("rank", int, "rank of the BTT layers"),
        ("lr", float, "peak learning rate, before the structure-aware multipliers"),
        ("data", str, "stdlib, text:PATH, hf:NAME_OR_PATH or bin:DIR"),
        ("tokenizer", str, "bytes, bpe:N, gpt2 or hf:PATH"),
        ("seed", int, "of weights, batches and samples"),
        ("threads", int, "CPU threads; without it, torch's own choice"),
    ):
        value = getattr(default, name)
        parser.add_argument(f"--{name}", type=kind, help=text + (f" (default {value})" if value is not None else ""))
    parser.add_argument("--out", type=Path, help="folder of the demo (default runs/demo-TIME); that of an interrupted demo continues it")
    try:
        options, rest = parser.parse_known_args(arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(f"python -m train demo: {error}") from error
    if rest:
        flags = [f"--{name}" for name in (*vars(options), "help")]
        raise ConfigError(unknown("flag", rest[0].partition("=")[0], flags))
    given = {name: value for name, value in vars(options).items() if value is not None}
    out = given.pop("out", None)
    for name in ("steps", "width", "layers", "heads", "context", "batch", "rank", "threads"):
        if given.get(name, 1) < 1:
            raise ConfigError(f"--{name} must be at least 1; got {given[name]}")
    return given, out
