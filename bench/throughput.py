"""python -m bench throughput: rates of forward, training step, prefill and decoding, beside the dense twin and a plain-torch GPT.

All three models take turns in one process, so a ratio compares the same minute of the same machine. Before any timing the dense twin
must have the plain model's loss, the planned layers the loss of pairwise einsum, and cached logits those of a whole pass.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from rich.table import Table
from torch import Tensor

import tn
import zoo
from bench import flops, models
from bench.models import Case
from bench.peers import TorchGPT
from bench.row import RESULTS, Row, append, wide_console
from bench.timing import Timing, interleaved

KINDS = ("forward", "training step", "prefill", "decode")
PEER = "plain torch"
# How far two fp32 computations of one loss may be apart, and two of the same logits as a fraction of the largest.
LOSS_TOLERANCE, LOGIT_TOLERANCE = 1e-5, 1e-4

Models = dict[str, zoo.GPT | TorchGPT]


def build(case: Case, device: torch.device) -> Models:
    """The model, its dense twin, and the plain-torch twin with the dense twin's weights; none of them has a zero output."""
    torch.manual_seed(0)
    model, dense = (zoo.GPT(c.config.override(zero_init=False), device=device) for c in (case, case.dense()))
    return {case.label: model, "dense twin": dense, PEER: TorchGPT.from_zoo(dense)}


def gate(named: Models, tokens: Tensor, targets: Tensor) -> list[str]:
    """What is wrong with the models, in words; an empty list means they may be timed."""
    model, dense, plain = named.values()
    wrong = []
    with torch.no_grad():
        ours, theirs = dense.loss(tokens, targets).item(), plain.loss(tokens, targets).item()
        if not abs(ours - theirs) <= LOSS_TOLERANCE:
            wrong.append(f"the dense twin's loss is {ours:.7f}, the plain-torch model's {theirs:.7f}")
        logits = {name: candidate(tokens) for name, candidate in named.items()}
        with tn.backend("einsum"):
            reference = model(tokens)
        pairs = [("the dense twin and plain torch", logits["dense twin"], logits[PEER])]
        pairs.append(("the planned layers and pairwise einsum", next(iter(logits.values())), reference))
        for name, candidate in named.items():
            cached = _decoder(candidate, tokens[:, :-1])(tokens[:, -1:])
            pairs.append((f"a whole pass and a cached one of {name}", logits[name][:, -1:], cached))
    for what, one, other in pairs:
        error = ((one - other).abs().max() / other.abs().max()).item()
        if not error <= LOGIT_TOLERANCE:
            wrong.append(f"{what} differ by {error:.1e} of the largest logit")
    return wrong


def _decoder(model: zoo.GPT | TorchGPT, prompt: Tensor) -> Callable[[Tensor], Tensor]:
    """A function that gives the logits after one more token each time, the prompt being cached."""
    if isinstance(model, TorchGPT):
        cache = model.new_cache(prompt.shape[0])
        model(prompt, cache)
        return lambda token: model(token, cache, prompt.shape[1])
    ours = model.new_cache(prompt.shape[0])
    model(prompt, ours)
    return lambda token: model(token, ours)


def work(kind: str, model: zoo.GPT | TorchGPT, tokens: Tensor, targets: Tensor) -> Callable[[], object]:
    """One unit of work as a function without arguments that leaves the model's cost as it was."""
    if kind == "training step":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)

        def step() -> None:
            optimizer.zero_grad(set_to_none=True)
            model.loss(tokens, targets).backward()
            optimizer.step()

        return step
    if kind == "forward":
        return torch.no_grad()(lambda: model(tokens))
    if kind == "prefill":
        return torch.no_grad()(lambda: _decoder(model, tokens))
    return torch.no_grad()(_decode(model, tokens))


def _decode(model: zoo.GPT | TorchGPT, tokens: Tensor) -> Callable[[], object]:
    """One more token after half a context; the cache is set back, so every call sees the same length."""
    half, token = tokens[:, : _half(tokens.shape[1])], tokens[:, :1]
    if isinstance(model, TorchGPT):
        with torch.no_grad():
            decode = _decoder(model, half)
        return lambda: decode(token)
    cache = model.new_cache(half.shape[0])
    with torch.no_grad():
        model(half, cache)
    length = cache.length

    def again() -> None:
        model(token, cache)
        cache.length = length

    return again


def _half(sequence: int) -> int:
    return max(1, sequence // 2)


def rows(case: Case, *, rounds: int, memory: bool = True) -> list[Row]:
    """Time every kind of work for every model.

    Raises:
        RuntimeError: a correctness check is red; nothing is timed then.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = build(case, device)
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, case.config.vocab, (case.batch, case.sequence), generator=generator).to(device) for _ in range(2))
    wrong = gate(named, tokens, targets)
    if wrong:
        raise RuntimeError("; ".join(wrong) + ": no numbers")
    costs = {case.label: flops.cost(case), "dense twin": flops.cost(case.dense())}
    costs[PEER] = costs["dense twin"]
    peaks = {name: peak(case, name) if memory else None for name in named}
    found = []
    for kind in KINDS:
        for model in named.values():
            model.train(kind == "training step")
        timings = interleaved({name: work(kind, model, tokens, targets) for name, model in named.items()}, rounds=rounds)
        found += [_row(case, name, kind, timing, timings[PEER], costs[name], peaks[name]) for name, timing in timings.items()]
    return found


def _flops(kind: str, case: Case, cost: flops.Cost) -> int:
    """Matrix-product FLOPs of one unit of work; decoding attends to the half context it continues, not to a whole one."""
    if kind == "decode":
        keys = _half(case.sequence) + 1
        return ((cost.forward - cost.attention) * case.batch + cost.attention * case.batch * keys // case.sequence) // case.tokens
    return cost.forward + (cost.backward if kind == "training step" else 0)


def _row(case: Case, name: str, kind: str, timing: Timing, peer: Timing, cost: flops.Cost, peak_bytes: int | None) -> Row:
    low, high = timing.quartiles
    return Row(
        bench="throughput",
        case=name,
        what=kind,
        seconds=timing.median,
        low=low,
        high=high,
        samples=len(timing.samples),
        tokens=case.batch if kind == "decode" else case.tokens,
        flops=_flops(kind, case, cost),
        bytes=cost.parameter_bytes,
        peak_bytes=peak_bytes if kind == "training step" else None,
        ratio=timing.faster_than(peer),
        peer=PEER,
        settings=case.settings,
    )


def peak(case: Case, name: str) -> int:
    """Peak memory in bytes of one training step of one model, in a process of its own (allocator on CUDA, resident set on a CPU)."""
    size = {"batch": case.batch, "sequence": case.sequence, "threads": torch.get_num_threads()}
    request = json.dumps({"config": case.config.to_dict(), "name": name, **size})
    done = subprocess.run([sys.executable, "-m", "bench.memory", request], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {name} failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return int(done.stdout.strip().splitlines()[-1])


def main(arguments: list[str]) -> int:
    """The command: prints the table and adds its rows to bench/results/throughput.jsonl."""
    parser = models.Parser(prog="python -m bench throughput", description=__doc__, epilog=models.EPILOG)
    models.add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=7, help="samples of every number (default 7)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--no-memory", action="store_true", help="do not measure peak memory (one more process per model)")
    parser.add_argument("--out", type=Path, default=RESULTS / "throughput.jsonl", help="file the rows are added to")
    options, rest = parser.parse_known_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    case = models.case(options, rest)
    found = rows(case, rounds=options.rounds, memory=not options.no_memory)
    wide_console().print(table(case, found))
    append(found, options.out)
    print(f"rows: {options.out}")
    return 0


def table(case: Case, found: list[Row]) -> Table:
    """The rows as a table; ratios above 1 are faster than plain torch in the same process."""
    c = case.config
    title = f"GPT, {c.layers} layers of width {c.width}, vocabulary {c.vocab}, {case.batch} × {case.sequence} tokens"
    view = Table(title=f"{title}, {torch.get_num_threads()} threads", title_justify="left", pad_edge=False)
    for heading in ("work", "model"):
        view.add_column(heading)
    for heading in ("median", "quartiles", "tokens/s", "GFLOP/s", f"× {PEER}", "peak memory"):
        view.add_column(heading, justify="right")
    for row in found:
        if row.seconds is None or row.low is None or row.high is None or not row.tokens_per_second:
            continue
        view.add_row(
            row.what,
            row.case,
            f"{1e3 * row.seconds:.2f} ms",
            f"{1e3 * row.low:.2f}–{1e3 * row.high:.2f}",
            f"{row.tokens_per_second:,.0f}",
            f"{row.flops / row.seconds / 1e9:.1f}",
            f"{row.ratio:.2f}",
            f"{row.peak_bytes / 1e6:,.0f} MB" if row.peak_bytes else "",
            end_section=row.case == PEER,
        )
    return view
