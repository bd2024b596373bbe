"""The training loop: steps, evaluations, samples and checkpoints, in an order that a resumed run repeats exactly."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

import zoo
from train import checkpoint, folder, optim, sample, schedule
from train.config import RunConfig, to_dict
from train.data import Batch, Batches
from train.errors import CheckpointError, NonFiniteError, Stopped
from train.metrics import Bar, Clock, Log, Window, bits_per_byte, peak_memory
from train.signals import StopRequest


@dataclass
class Position:
    """Where a run is. Everything that a checkpoint must bring back besides tensors and random states."""

    step: int = 0
    """Updates done."""
    tokens: int = 0
    seconds: float = 0.0
    best_loss: float = math.inf
    evaluated: int = -1
    """Step of the last evaluation, so that a resumed run neither skips nor repeats one."""
    sampled: int = -1
    window: Window = field(default_factory=Window)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Position":
        """Return the position that `to_dict` turned into JSON data."""
        best = math.inf if values["best_loss"] is None else values["best_loss"]
        return cls(**values | {"best_loss": best, "window": Window(**values["window"])})

    def to_dict(self) -> dict[str, Any]:
        """Return the position as JSON data, in which an infinite loss is null."""
        return asdict(self) | {"best_loss": self.best_loss if math.isfinite(self.best_loss) else None}


@dataclass
class Task:
    """What the loop works on; made by `train.launch`."""

    config: RunConfig
    run: Path
    model: zoo.GPT
    optimizer: torch.optim.AdamW
    train: Batches
    held_out: Callable[[], Iterable[Batch]]
    """Gives the batches of an evaluation, the same ones every time."""
    tokenizer: zoo.Tokenizer
    prompt: str
    device: torch.device
    fingerprints: dict[str, str]
    """Of the corpus and of the tokenizer; a checkpoint keeps them."""


def gradients(model: zoo.GPT, batches: Sequence[Batch], *, dtype: str, clock: Clock) -> Tensor:
    """Add the gradient of the mean loss over all real tokens of several batches to the parameters.

    Args:
        batches: every real token counts equally, whichever batch it is in.
        dtype: "float32" or "bfloat16" (autocast).

    Returns:
        That mean loss, 0-d, in nats per token, without gradient.
    """
    device = next(model.parameters()).device
    total = sum(batch.tokens for batch in batches)
    mean = torch.zeros((), device=device)
    for batch in batches:
        inputs, targets = batch.inputs.to(device, non_blocking=True), batch.targets.to(device, non_blocking=True)
        clock.mark("data")
        with optim.autocast(device, dtype):
            loss = model.loss(inputs, targets)
        share = loss * (batch.tokens / total) if len(batches) > 1 else loss
        clock.mark("forward")
        share.backward()
        mean += share.detach()
        clock.mark("backward")
    return mean


@torch.no_grad()
def evaluate(model: zoo.GPT, batches: Iterable[Batch], *, dtype: str, stop: StopRequest | None = None) -> tuple[float, float] | None:
    """Return the loss over all real tokens in nats per token and in bits per byte; None when asked to stop meanwhile.

    The model's mode is kept, and nothing random happens.
    """
    device, training = next(model.parameters()).device, model.training
    nats, tokens, size = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    model.eval()
    try:
        with optim.tf32(False):
            for batch in batches:
                if stop is not None and stop.signal is not None:
                    return None
                with optim.autocast(device, dtype):
                    loss = model.loss(batch.inputs.to(device), batch.targets.to(device))
                nats += loss.double() * batch.tokens
                tokens, size = tokens + batch.tokens, size + (batch.bytes or 0)
    finally:
        model.train(training)
    return float(nats) / max(1, tokens), bits_per_byte(float(nats), size)


class Trainer:
    """Runs a Task from a Position to its last step.

    At every step the order is: evaluate, sample, save, stop if asked, update, log. What is done at a step is decided by
    the step and the position alone, so a run that was killed does the same again from its last checkpoint.
    """

    def __init__(self, task: Task, position: Position, lengths: dict[str, int], stop: StopRequest, console: Console) -> None:
        self.task, self.position, self.stop = task, position, stop
        self.metrics = Log(task.run / folder.METRICS, lengths.get(folder.METRICS, 0))
        self.samples = Log(task.run / folder.SAMPLES, lengths.get(folder.SAMPLES, 0))
        self.bar = Bar(console, task.config.steps, position.step, enabled=task.config.progress)
        self._parameters = list(task.model.parameters())
        self._clock = Clock(task.device)
        self._saved = position.step if lengths else -1

    def run(self) -> None:
        """Train to the last step.

        Raises:
            NonFiniteError: before an update, and then the run is saved; or the held-out loss after one, and then it is not.
            Stopped: a signal asked for it; the run is saved.
            CheckpointError, RunError: the disk is full or refuses.
        """
        config, position = self.task.config, self.position
        self.task.model.train()
        try:
            with optim.tf32(config.tf32):
                while True:
                    self._between_steps()
                    if position.step >= config.steps:
                        return
                    self._step()
        finally:
            self.bar.close()
            self.metrics.close()
            self.samples.close()

    def _between_steps(self) -> None:
        config, position = self.task.config, self.position
        if self._due(config.eval_every) and position.evaluated != position.step:
            self._evaluate()
        if self.stop.signal is None and config.sample_every and self._due(config.sample_every) and position.sampled != position.step:
            self._sample()
        if self._due(config.checkpoint_every) or self.stop.signal is not None:
            self._save()
        if self.stop.signal is not None and position.step < config.steps:
            self.bar.close()
            stopped = Stopped(self.stop.signal, self.task.run)
            self.bar.say(f"stopped by {stopped.signal.name} after step {position.step}, saved in {self.task.run}")
            self.bar.say(f"continue with: python -m train resume {self.task.run}")
            raise stopped

    def _due(self, every: int) -> bool:
        return self.position.step % every == 0 or self.position.step == self.task.config.steps

    def _step(self) -> None:
        config, position, optimizer, clock = self.task.config, self.position, self.task.optimizer, self._clock
        before = checkpoint.Rng.now() if config.model.dropout else None
        clock.start()
        first = position.step * config.accumulate
        batches = [self.task.train[index] for index in range(first, first + config.accumulate)]
        tokens, size = sum(batch.tokens for batch in batches), sum(batch.bytes or 0 for batch in batches)
        optimizer.zero_grad(set_to_none=True)
        loss_0 = gradients(self.task.model, batches, dtype=config.dtype, clock=clock)
        norm_0 = optim.gradient_norm(self._parameters)
        loss, norm = torch.stack((loss_0, norm_0.to(loss_0))).tolist()  # the step's only wait for the device
        if not (math.isfinite(loss) and math.isfinite(norm)):
            self._refuse(loss, norm, first, before)
        optim.clip(self._parameters, config.clip, norm)
        factor = schedule.factor(config, position.step)
        optim.set_rates(optimizer, factor)
        optimizer.step()
        clock.mark("optimizer")
        seconds = clock.read()
        position.step += 1
        position.tokens += tokens
        position.seconds += sum(seconds.values())
        position.window.add(loss, tokens, size, seconds)
        self.bar.advance(position.step)
        if self._due(config.log_every):
            self._log(config.lr * factor, norm)

    def _log(self, rate: float, norm: float) -> None:
        position, line = self.position, self.position.window.line()
        values = {
            "step": position.step,
            **line,
            "lr": rate,
            "gradient_norm": norm,
            "update_ratio": optim.update_ratio(self.task.optimizer),
            "tokens": position.tokens,
            "seconds": position.seconds,
            **peak_memory(self.task.device),
        }
        self.metrics.record("train", values)
        self.bar.show(position.step, line, rate)
        position.window = Window()

    def _refuse(self, loss: float, norm: float, first: int, before: checkpoint.Rng | None) -> None:
        """Save the run as it was before this step, and say what was not finite."""
        config, position = self.task.config, self.position
        self.task.optimizer.zero_grad(set_to_none=True)
        if before is not None:
            before.restore()
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the loss is {loss:.4f} but the gradient norm is {norm}"
        where = f"batch {first}" if config.accumulate == 1 else f"batches {first} to {first + config.accumulate - 1}"
        self._save()
        raise NonFiniteError(
            f"step {position.step + 1} ({where}) was stopped before its update: {what}; the weights after step {position.step} "
            f"are saved in {self.task.run / folder.CHECKPOINTS}; try a lower lr, a smaller clip or float32"
        )

    def _evaluate(self) -> None:
        config, position = self.task.config, self.position
        found = evaluate(self.task.model, self.task.held_out(), dtype=config.dtype, stop=self.stop)
        if found is None:
            return
        loss, bits = found
        position.evaluated = position.step
        if math.isfinite(loss):
            position.best_loss = min(position.best_loss, loss)
        values = {"step": position.step, "loss": loss, "bits_per_byte": bits, "tokens": position.tokens, "seconds": position.seconds}
        self.metrics.record("eval", values)
        if not math.isfinite(loss):
            raise self._diverged(f"the held-out loss is {loss}")
        self.bar.say(f"step {position.step}: held-out loss {loss:.4f} nats per token, {bits:.4f} bits per byte")

    def _sample(self) -> None:
        config, position = self.task.config, self.position
        try:
            text = sample.text(self.task.model, self.task.tokenizer, self.task.prompt, length=config.sample_length, seed=config.seed)
        except zoo.GenerateError as error:  # its settings were checked before the first step: the logits are not finite
            raise self._diverged(f"no text can be sampled: {error}") from error
        self.samples.write(f"--- step {position.step}\n{text}\n")
        position.sampled = position.step

    def _diverged(self, what: str) -> NonFiniteError:
        """Say which step the run stopped after and what is left of it; weights that cannot be used are not saved."""
        self.bar.close()
        newest = checkpoint.find(self.task.run / folder.CHECKPOINTS).newest()
        left = f"the newest checkpoint is {newest}" if newest else "there is no earlier checkpoint"
        hint = "try a lower lr, a longer warmup or float32"
        return NonFiniteError(f"stopped after step {self.position.step}: {what}; these weights were not saved, {left}; {hint}")

    def _save(self) -> None:
        position, task = self.position, self.task
        if self._saved == position.step:
            return
        state = {
            "position": position.to_dict(),
            "lengths": {log.path.name: log.sync() for log in (self.metrics, self.samples)},
            "threads": torch.get_num_threads(),
            "device": str(task.device),
            "fingerprints": task.fingerprints,
            "config": to_dict(task.config),
        }
        try:
            rng, keep = checkpoint.Rng.now(), task.config.keep
            checkpoint.save(task.run / folder.CHECKPOINTS, position.step, task.model, task.optimizer, state, rng=rng, keep=keep)
        except CheckpointError as error:
            self.bar.close()
            raise CheckpointError(f"{error}; free some space, then continue with: python -m train resume {task.run}") from error
        self._saved = position.step
