"""A run: what it writes, how it accumulates and clips, when it stops."""

import io
import json
import math

import pytest
import torch
from rich.console import Console

import train
import zoo
from tests.train import runs
from train import config as configs
from train import data, folder, loop, metrics, optim
from train.__main__ import main


@pytest.fixture
def finished(tmp_path):
    """A finished run, what it returned and what it printed."""
    console = runs.quiet()
    result = train.run(runs.config(tmp_path, model={"structure": "btt", "rank": 2}), console=console)
    return tmp_path / "run", result, console.file.getvalue()


def test_a_run_leaves_everything_behind(finished):
    run, result, _ = finished
    names = {path.name for path in run.iterdir() if not path.name.startswith(".")}
    assert names == {
        *("config.yaml", "metrics.jsonl", "samples.txt", "curves.png", "checkpoints", "plans", "result.json"),
        *("model.json", "model.safetensors", "tokenizer.json"),
    }
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted((run / "checkpoints").iterdir())] == ["step-000008", "step-000012"]
    assert result.steps == 12
    assert result.tokens == 12 * 2 * 16
    assert json.loads((run / "result.json").read_text())["loss"] == result.loss


def test_the_final_model_is_the_trained_one(finished):
    run, result, _ = finished
    model = zoo.load(run)
    saved = configs.load(run / "config.yaml", train.recipes.gpt())
    corpus = data.prepare(saved.data, "bytes", cache_dir=saved.cache_dir, progress=False)
    held_out = data.sweep(corpus.val, context=16, batch=2, batches=2, token_bytes=corpus.tokenizer.token_bytes)
    loss, bits = loop.evaluate(model, held_out, dtype="float32")
    assert loss == pytest.approx(result.loss, abs=1e-6)
    assert bits == pytest.approx(result.bits_per_byte, abs=1e-6)
    assert zoo.load_tokenizer(run).vocab == 257


def test_the_vocabulary_follows_the_tokenizer(finished):
    run, _, _ = finished
    saved = configs.load(run / "config.yaml", train.recipes.gpt())
    assert (saved.model.vocab, saved.fit_vocab, saved.threads) == (320, False, 1)


def test_the_start_table_shows_cost_and_every_rate(finished):
    _, result, shown = finished
    assert f"{result.parameters:,}" in shown
    assert f"{result.flops_per_token:,} forward" in shown
    assert "memory (estimate)" in shown
    model = zoo.GPT(zoo.GPTConfig(vocab=320, structure="btt", rank=2, **runs.SHAPE), device="meta")
    groups = optim.adamw(model, train.RunConfig(model=model.config, lr=2e-3)).param_groups
    assert len({group["multiplier"] for group in groups}) > 2
    for group in groups:
        row = f"{group['multiplier']:.4g}", f"{group['peak_lr']:.3g}"
        assert any(all(part in line for part in row) for line in shown.splitlines()), row
    for core in ("attention.{query,key,value,out}.first", "mlp.fc_out.first", "{token_table,position_table,norm}.weight"):
        assert core in shown


def test_metrics_have_every_step_once_with_all_its_parts(finished):
    run, result, _ = finished
    lines = metrics.read(run / "metrics.jsonl", "train")
    assert [line["step"] for line in lines] == list(range(1, 13))
    for line in lines:
        assert 0 < line["loss"] < 7
        assert line["bits_per_byte"] == pytest.approx(line["loss"] / math.log(2))
        assert line["gradient_norm"] > 0
        assert 0 < line["update_ratio"] < 1
        assert line["peak_rss_bytes"] > 2**20
        parts = [line[f"{part}_seconds"] for part in metrics.PARTS]
        assert min(parts) > 0
        assert line["step_seconds"] == pytest.approx(sum(parts))
        assert line["tokens_per_second"] == pytest.approx(2 * 16 / line["step_seconds"])
    assert [line["step"] for line in metrics.read(run / "metrics.jsonl", "eval")] == [0, 6, 12]
    assert lines[-1]["seconds"] == pytest.approx(result.seconds)
    assert lines[0]["lr"] == pytest.approx(2e-3)


def test_samples_are_text_of_the_first_and_last_step(finished):
    run, _, _ = finished
    shown = (run / "samples.txt").read_text()
    assert "--- step 0\n" in shown
    assert "--- step 12\n" in shown


def test_a_line_is_the_mean_over_its_steps(tmp_path):
    train.run(runs.config(tmp_path, out=str(tmp_path / "each")), console=runs.quiet())
    train.run(runs.config(tmp_path, out=str(tmp_path / "fifth"), log_every=5), console=runs.quiet())
    each = metrics.read(tmp_path / "each" / "metrics.jsonl", "train")
    fifth = metrics.read(tmp_path / "fifth" / "metrics.jsonl", "train")
    assert [line["step"] for line in fifth] == [5, 10, 12]
    for line, steps in zip(fifth, (each[:5], each[5:10], each[10:]), strict=True):
        assert line["loss"] == pytest.approx(sum(step["loss"] for step in steps) / len(steps))


def _batch(rows, *, padded=0):
    inputs = torch.randint(257, (rows, 16))
    targets = torch.randint(257, (rows, 16))
    if padded:
        targets[:, -padded:] = -100
    return data.Batch(inputs, targets, int((targets >= 0).sum()))


def _tensors(batch):
    return batch.inputs, batch.targets


def _gradients(model, batches):
    clock = metrics.Clock(torch.device("cpu"))
    clock.start()
    model.zero_grad()
    loss = loop.gradients(model, batches, dtype="float32", clock=clock)
    return loss, [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("padded", [(0, 0), (3, 12)], ids=["full", "padded"])
def test_two_small_batches_equal_one_large_one(padded):
    torch.manual_seed(0)
    model = zoo.GPT(zoo.GPTConfig(vocab=320, structure="btt", zero_init=False, **runs.SHAPE))
    first, second = _batch(2, padded=padded[0]), _batch(2, padded=padded[1])
    both = data.Batch(*(torch.cat(pair) for pair in zip(*map(_tensors, (first, second)), strict=True)), first.tokens + second.tokens)
    loss_2, small = _gradients(model, [first, second])
    loss_1, large = _gradients(model, [both])
    torch.testing.assert_close(loss_2, loss_1, atol=1e-6, rtol=1e-6)
    for a, b in zip(small, large, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


def test_a_run_with_accumulation_takes_the_same_steps(tmp_path):
    for name, settings in {"large": {"batch": 4}, "small": {"batch": 2, "accumulate": 2}}.items():
        train.run(runs.config(tmp_path, out=str(tmp_path / name), eval_every=100, **settings), console=runs.quiet())
    large, small = (metrics.read(tmp_path / name / "metrics.jsonl", "train") for name in ("large", "small"))
    assert [line["loss"] for line in small] == pytest.approx([line["loss"] for line in large], abs=1e-5)
    assert [line["tokens"] for line in small] == [line["tokens"] for line in large]


def test_clipping_bounds_the_global_norm():
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape)) for shape in ((3, 4), (5,))]
    for parameter in parameters:
        parameter.grad = 10 * torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters]
    norm = float(optim.gradient_norm(parameters))
    assert norm == pytest.approx(math.sqrt(sum(float(grad.square().sum()) for grad in before)))
    for largest in (0.0, 2 * norm):
        optim.clip(parameters, largest, norm)
        assert all(torch.equal(parameter.grad, grad) for parameter, grad in zip(parameters, before, strict=True))
    optim.clip(parameters, 1.0, norm)
    assert float(optim.gradient_norm(parameters)) == pytest.approx(1.0, rel=1e-4)
    for parameter, grad in zip(parameters, before, strict=True):
        torch.testing.assert_close(parameter.grad, grad / norm, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_loss_or_gradient_that_is_not_finite_stops_before_the_update(tmp_path, monkeypatch, where):
    config = runs.config(tmp_path, steps=6, eval_every=100, sample_every=0, model={"dropout": 0.1})
    train.run(config, console=runs.quiet())  # the unbroken run
    loss, calls = zoo.GPT.loss, []

    def broken(self, tokens, targets):
        value = loss(self, tokens, targets)
        if self.training:
            calls.append(None)
            if len(calls) == 6:
                return value * math.inf if where == "loss" else value + (self.norm.weight.sum() * 0).sqrt()
        return value

    other = runs.config(tmp_path, steps=6, eval_every=100, sample_every=0, model={"dropout": 0.1}, out=str(tmp_path / "broken"))
    monkeypatch.setattr(zoo.GPT, "loss", broken)
    with pytest.raises(train.NonFiniteError, match=r"step 6 \(batch 5\) was stopped before its update: the loss is ") as caught:
        train.run(other, console=runs.quiet())
    assert str(tmp_path / "broken" / "checkpoints") in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "broken" / "checkpoints").iterdir()) == ["step-000004", "step-000005"]
    assert not (tmp_path / "broken" / "model.safetensors").exists()
    monkeypatch.undo()
    train.resume(tmp_path / "broken", console=runs.quiet())
    assert runs.same_weights(tmp_path / "run", tmp_path / "broken")


def test_bfloat16_trains_and_keeps_float32_weights(tmp_path):
    result = train.run(runs.config(tmp_path, dtype="bfloat16", steps=30), console=runs.quiet())
    assert result.loss < 5.0
    assert {parameter.dtype for parameter in zoo.load(tmp_path / "run").parameters()} == {torch.float32}


def test_padded_mode_counts_real_tokens_only(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    for number in range(30):
        runs.write_text(folder / f"{number}.txt", seed=number, lines=1)
    result = train.run(runs.config(tmp_path, mode="padded", data=f"text:{folder}", model={"context": 256}), console=runs.quiet())
    assert result.tokens < 12 * 2 * 256
    assert result.tokens == metrics.read(tmp_path / "run" / "metrics.jsonl", "train")[-1]["tokens"]


def test_a_second_run_never_touches_the_first(tmp_path, finished, capsys):
    run, _, _ = finished
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    again = runs.config(tmp_path, steps=3)
    with pytest.raises(train.RunError, match="already holds a run: continue it with `python -m train resume "):
        train.run(again, console=runs.quiet())
    assert main(["gpt", *runs.flags(again)]) == 1
    assert "already holds a run" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()} == before


def test_default_folders_do_not_collide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = [train.run(runs.config(tmp_path, out=None, steps=1, sample_every=0), console=runs.quiet()) for _ in range(2)]
    assert results[0].run != results[1].run
    assert all(result.run.name.startswith("gpt-") and (tmp_path / result.run / "result.json").exists() for result in results)


def test_a_saved_config_starts_an_equal_run(tmp_path, finished, capsys):
    run, _, _ = finished
    assert main(["gpt", "--config", str(run / "config.yaml"), "--out", str(tmp_path / "again")]) == 0
    assert runs.same_weights(run, tmp_path / "again")
    assert "held-out loss" in capsys.readouterr().out


def test_a_tokenizer_larger_than_the_vocabulary_is_refused_first(tmp_path, capsys):
    small = runs.config(tmp_path)
    assert main(["gpt", *runs.flags(small), "--model.vocab", "256"]) == 2
    assert "tokenizer bytes has 257 tokens, the model's vocabulary only 256" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_folder_that_cannot_be_written_is_refused_first(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(train.RunError, match=r"is a file"):
        train.run(runs.config(tmp_path, out=str(tmp_path / "file")), console=runs.quiet())
    with pytest.raises(train.RunError, match="cannot write"):
        train.run(runs.config(tmp_path, out=str(tmp_path / "file" / "run")), console=runs.quiet())


def test_curves_of_several_runs(tmp_path, finished):
    run, _, _ = finished
    out = train.plot_runs({"one": run, "the same": run}, tmp_path / "both.png")
    assert out.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(train.RunError, match="has no metrics"):
        train.plot_runs({"none": tmp_path}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_default_name_that_is_taken_gets_a_number(tmp_path):
    wanted = tmp_path / "runs" / "gpt-1"
    assert [folder.make(wanted, exact=False).name for _ in range(3)] == ["gpt-1", "gpt-1-2", "gpt-1-3"]
    assert folder.make(wanted, exact=True) == wanted


def test_a_terminal_gets_a_live_bar():
    """Where the output is no terminal, `progress=True` prints plain lines."""
    line = {"loss": 1.5, "tokens_per_second": 1234.0}
    for terminal in (True, False):
        console = Console(file=io.StringIO(), force_terminal=terminal, width=120)
        bar = metrics.Bar(console, 10, 0, enabled=True)
        for step in range(1, 11):
            bar.advance(step)
            bar.show(step, line, 1e-3)
        bar.close()
        shown = console.file.getvalue()
        assert "loss 1.500  lr 1.00e-03  1,234 tok/s" in shown
        assert ("\x1b[" in shown) == terminal
        assert "10/10" in shown
        assert "ETA" in shown
