"""From a config to a finished run: check everything, make the parts meet, train, write the final model."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import tn
import zoo
from tn.machine import machine
from train import checkpoint, data, folder, optim, plot, recipes, report, sample
from train import config as configs
from train.config import RunConfig
from train.errors import CheckpointError, ConfigError, RunError, memory
from train.loop import Position, Task, Trainer
from train.metrics import mend, read
from train.report import Result
from train.signals import StopRequest

_FIXED = ("model.", "data", "tokenizer", "mode", "seed", "batch", "accumulate")
"""Keys that a run cannot change halfway: the result would be neither the old run nor a new one."""


def run(config: RunConfig, *, console: Console | None = None) -> Result:
    """Train a new run from a config.

    Args:
        config: see RunConfig; `out` decides the folder.
        console: where the tables and the progress bar go; default the standard output.

    Returns:
        What was measured; the same is in RUN/result.json.

    Raises:
        TrainError, tn.TnError: something is not usable. Settings, folder, structure and data are checked before any work.
        NonFiniteError: the loss or a gradient is not finite.
        Stopped: Ctrl-C or SIGTERM, after saving; uncaught it ends the process with 130 or 143.
    """
    console = console or Console()
    config = configs.check(config)
    device = _device(config)
    _try_model(config)
    source, tokenizer = data.source(config.data), _tokenizer(config)
    path = folder.choose(config)
    with _threads(config.threads), memory():
        corpus = data.prepare(source, tokenizer, cache_dir=config.cache_dir, progress=config.progress)
        config = _resolve(config, corpus.tokenizer)
        task = _assemble(config, path, corpus, device)
        cost = report.costs(task.model, config)
        task.run = folder.make(path, exact=config.out is not None)
        with folder.lock(task.run):
            folder.claim(task.run, configs.dump(config))
            _save_tokenizer(corpus.tokenizer, task.run)
            with tn.plan_store(task.run / folder.PLANS, pinned=True):
                return _train(task, cost, Position(), {}, corpus, console)


def resume(path: str | Path, *, threads: int | None = None, console: Console | None = None) -> Result:
    """Continue a run from its newest complete checkpoint; on a CPU the final weights are bit-equal to an unbroken run's.

    Args:
        path: the run's folder.
        threads: another number of CPU threads than the run's own; the result is then no longer bit-equal.
        console: as for `run`.

    Returns:
        As `run`; a run that is finished returns its result at once.

    Raises:
        RunError: no run there, another process is training it, or its data or fixed settings have changed.
        CheckpointError: its checkpoints are missing or unusable; each is named, nothing is changed.
    """
    console = console or Console()
    if threads is not None:
        configs.check_threads(threads)
    path = folder.find(Path(path))
    config = _saved_config(path)
    with folder.lock(path), _threads(threads or config.threads), memory(), tn.plan_store(path / folder.PLANS, pinned=True) as plans:
        found = checkpoint.find(path / folder.CHECKPOINTS)
        for broken, reason in found.broken:
            _say(console, f"ignored checkpoint {broken}: {reason}")
        newest = found.newest()
        if newest is None:
            return _begin_again(config, path, found, console)
        state = checkpoint.read_state(newest)
        position = _position(state, newest)
        if (path / folder.RESULT).exists() and state["step"] >= config.steps:
            result = _finished(path, newest, console)
            if result is not None:
                _say(console, f"{path} is finished: all {state['step']} steps are done")
                return result
        _check_logs(path, state["lengths"], console)
        _compare_config(console, path, state["config"], config)
        device = _device(config)
        _compare_surroundings(console, state, device)
        _compare_table(console, plans, device)
        corpus = _same_corpus(config, path, state["fingerprints"])
        task = _assemble(config, path, corpus, device)
        state, rng = checkpoint.load(newest, task.model, task.optimizer)
        rng.restore()
        _say(console, f"continuing {path} from step {state['step']} of {config.steps}")
        cost = report.costs(task.model, config)
        return _train(task, cost, position, state["lengths"], corpus, console)


def _finished(path: Path, newest: Path, console: Console) -> Result | None:
    """Return a finished run's result; None when its model or result is missing or damaged, and has to be written again."""
    try:
        zoo.load(path)
        return report.load(path)
    except (zoo.SavedModelError, RunError) as error:
        _warn(console, f"{error}: it is written again from {newest}")
        return None


def _check_logs(path: Path, lengths: dict[str, int], console: Console) -> None:
    """Refuse damaged metrics before any work, and warn of logs that have become shorter than the checkpoint says."""
    for name, length in lengths.items():
        size = mend(path / name, length)
        if size < length:
            _warn(console, f"{path / name} has {size} bytes instead of {length}: what was cut off stays lost, the run goes on")
    read(path / folder.METRICS, "train", lengths.get(folder.METRICS))


def _position(state: dict[str, Any], path: Path) -> Position:
    """Return where a checkpoint's run is; every part of its state that a resume reads is checked here."""
    kinds = {"position": dict, "lengths": dict, "fingerprints": dict, "config": dict, "software": dict, "rng": dict}
    for name, kind in (kinds | {"step": int, "threads": int, "device": str}).items():
        if not isinstance(state.get(name), kind):
            raise CheckpointError(f"checkpoint {path} is damaged: state.json has no usable {name!r}")
    if {"corpus", "tokenizer"} - state["fingerprints"].keys() or not all(isinstance(length, int) for length in state["lengths"].values()):
        raise CheckpointError(f"checkpoint {path} is damaged: state.json has no usable 'fingerprints' or 'lengths'")
    try:
        return Position.from_dict(state["position"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"checkpoint {path} is damaged: the position in state.json is not usable: {error}") from error


def _begin_again(config: RunConfig, path: Path, found: checkpoint.Found, console: Console) -> Result:
    """Start a run that was stopped before its first checkpoint: from the same seed, so nothing is lost."""
    done = read(path / folder.METRICS, "train")
    if done or any(broken.name.startswith("step-") for broken, _ in found.broken):
        reasons = "; ".join(f"{broken.name}: {reason}" for broken, reason in found.broken) or "there are none"
        raise CheckpointError(f"no usable checkpoint in {path / folder.CHECKPOINTS} ({reasons}); nothing was changed")
    _say(console, f"{path} has no checkpoint yet: starting at step 0")
    corpus = data.prepare(data.source(config.data), _tokenizer(config), cache_dir=config.cache_dir, progress=config.progress)
    task = _assemble(config, path, corpus, _device(config))
    _save_tokenizer(corpus.tokenizer, path)
    (path / folder.METRICS).unlink(missing_ok=True)
    (path / folder.SAMPLES).unlink(missing_ok=True)
    return _train(task, report.costs(task.model, config), Position(), {}, corpus, console)


def _train(task: Task, cost: dict[str, int], position: Position, lengths: dict[str, int], corpus: data.Corpus, console: Console) -> Result:
    """Run the loop between the two tables, then write the final model, the curves and the result."""
    report.start(console, task, data=str(corpus.summary), cost=cost)
    with StopRequest() as stop:
        try:
            Trainer(task, position, lengths, stop, console).run()
        finally:
            _draw(task, console)
        try:
            zoo.save(task.model, task.run, tokenizer=corpus.tokenizer)
            result = report.finish(task.run, position=dataclasses.asdict(position), cost=cost, device=task.device)
        except (OSError, zoo.SavedModelError) as error:
            message = f"cannot write the final model to {task.run}: {error}"
            raise RunError(f"{message}; continue with: python -m train resume {task.run}") from error
    report.end(console, result)
    return result


def _save_tokenizer(tokenizer: zoo.Tokenizer, path: Path) -> None:
    try:
        tokenizer.save(path)
    except OSError as error:
        message = f"cannot write the tokenizer to {path}: {error}"
        raise RunError(f"{message}; continue with: python -m train resume {path}") from error


def _draw(task: Task, console: Console) -> None:
    """Write curves.png, however the run ended; a full disk or a damaged metrics.jsonl must not hide why it ended."""
    try:
        if read(task.run / folder.METRICS, "eval"):
            plot.plot_runs({task.config.model.structure: task.run}, task.run / "curves.png")
    except (OSError, RunError) as error:
        _warn(console, f"cannot write {task.run / 'curves.png'}: {error}")


def _assemble(config: RunConfig, path: Path, corpus: data.Corpus, device: torch.device) -> Task:
    """Make model, optimiser and batches of a config whose vocabulary is settled."""
    if corpus.tokenizer.vocab > config.model.vocab:
        raise ConfigError(
            f"tokenizer {corpus.tokenizer.name} has {corpus.tokenizer.vocab} tokens, the model's vocabulary only {config.model.vocab}: "
            "leave model.vocab out, or make it larger"
        )
    torch.manual_seed(config.seed)
    model = zoo.GPT(config.model, device=device)
    rows: dict[str, Any] = {
        "context": config.model.context,
        "batch": config.batch,
        "mode": config.mode,
        "vocab": config.model.vocab,
        "end_of_text": corpus.tokenizer.end_of_text,
        "token_bytes": corpus.tokenizer.token_bytes,
    }
    held_out = partial(data.sweep, corpus.val, batches=config.eval_batches, **rows)
    held_out()  # checks its arguments now, not at the first evaluation
    return Task(
        config=config,
        run=path,
        model=model,
        optimizer=optim.adamw(model, config),
        train=data.Batches(corpus.train, seed=config.seed, **rows),
        held_out=held_out,
        tokenizer=corpus.tokenizer,
        prompt=sample.prompt(config, corpus),
        device=device,
        fingerprints={"corpus": corpus.fingerprint, "tokenizer": corpus.tokenizer.fingerprint},
    )


def _resolve(config: RunConfig, tokenizer: zoo.Tokenizer) -> RunConfig:
    """Fill in what depends on the tokenizer and on this machine, so that the saved config says everything."""
    if config.fit_vocab:
        config = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab=-(-tokenizer.vocab // 64) * 64), fit_vocab=False)
    return dataclasses.replace(config, threads=torch.get_num_threads())


def _tokenizer(config: RunConfig) -> str | zoo.Tokenizer:
    """Return the tokenizer itself, so that a wrong name is refused before the corpus is read; a BPE is trained on it, so its name."""
    return config.tokenizer if config.tokenizer.startswith("bpe:") else zoo.tokenizer(config.tokenizer)


def _try_model(config: RunConfig) -> None:
    """Build the model without memory: structures, ranks and sizes are refused here, before any work."""
    with memory():
        zoo.GPT(config.model, device="meta")


def _device(config: RunConfig) -> torch.device:
    """Return the device that a config names.

    Raises:
        ConfigError: not a device, or not one that this machine has.
    """
    if config.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(config.device)
    except RuntimeError as error:
        raise ConfigError(f"device should be auto, cpu, cuda or cuda:N; got {config.device!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device should be auto, cpu, cuda or cuda:N; got {config.device!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {config.device}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


@contextlib.contextmanager
def _threads(number: int | None) -> Iterator[None]:
    """Use this many CPU threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _saved_config(path: Path) -> RunConfig:
    """Read a run's config.yaml; its recipe fills in what an older version did not write."""
    values = configs.read(path / folder.CONFIG)
    base = recipes.recipe(values.get("recipe", "gpt"))
    return dataclasses.replace(configs.check(configs.merge(base, values)), out=str(path))


def _compare_config(console: Console, path: Path, then: dict[str, Any], now: RunConfig) -> None:
    """Name every setting of config.yaml that was edited since the checkpoint; refuse those that would make another run."""
    before, after = _flat(then), _flat(json.loads(json.dumps(configs.to_dict(now))))
    changed = {key: (before.get(key), after.get(key)) for key in before | after if before.get(key) != after.get(key) and key != "out"}
    for key, (old, new) in changed.items():
        if key.startswith(_FIXED):
            edited = f"{path / folder.CONFIG} now says {key}: {new}, the checkpoint was made with {old}"
            raise RunError(f"{edited}; put it back, or start a new run")
        _warn(console, f"{key} was {old} when the checkpoint was made and is {new} now: the run will differ from an unbroken one")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Turn nested settings into dotted ones."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def _compare_surroundings(console: Console, state: dict[str, Any], device: torch.device) -> None:
    """Warn about every version, the thread count and the device that differ from the checkpoint's."""
    now = checkpoint.software() | {"CPU threads": torch.get_num_threads(), "device": str(device)}
    then = state["software"] | {"CPU threads": state["threads"], "device": state["device"]}
    for name, value in now.items():
        if then.get(name) != value:
            _warn(console, f"{name} was {then.get(name)} when the checkpoint was made and is {value} now: the result will not be bit-equal")


def _compare_table(console: Console, plans: tn.PlanStore, device: torch.device) -> None:
    """Say that a run keeps its plans where this version of the library would plan with other rates."""
    now = machine(device)
    then = plans.table(now)
    if then != now:
        changed = f"machine table {now.name} was {then.digest} when the run began and is {now.digest} now"
        _say(console, f"{changed}: the run keeps its own and its plans")


def _same_corpus(config: RunConfig, path: Path, fingerprints: dict[str, str]) -> data.Corpus:
    """Prepare a run's data again, with the tokenizer it saved; refuse to continue on other data than it began with."""
    saved = zoo.load_tokenizer(path) if (path / "tokenizer.json").exists() else _tokenizer(config)
    corpus = data.prepare(data.source(config.data), saved, cache_dir=config.cache_dir, progress=config.progress)
    for what, now in (("corpus", corpus.fingerprint), ("tokenizer", corpus.tokenizer.fingerprint)):
        then = fingerprints[what]
        if then != now:
            raise RunError(
                f"the {what} of {config.data!r} is not the one {path} was trained on (hash {now[:12]}, the checkpoint has {then[:12]}): "
                "restore the data, or start a new run"
            )
    return corpus


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def _warn(console: Console, text: str) -> None:
    console.print(f"WARNING: {text}", style="bold yellow", highlight=False, markup=False, soft_wrap=True)
