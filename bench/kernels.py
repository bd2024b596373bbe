"""python -m bench kernels: each Triton kernel: correctness, what it takes from a GPU, and its time beside torch's.

First every kernel is compared with float64, forward and every gradient; without a GPU in Triton's interpreter, at small sizes. A kernel
that is wrong stops the bench. Then each is compiled for compute capability 9.0 at the size that matters, which needs no GPU, and the
assembler's account of it printed. Times, and fractions of the rates measured in the same minute, need a GPU; without one their columns
say so. At the end a GPT trains: dense, and BTT with torch's products and with kernels.
"""

import argparse
import itertools
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table
from torch import Tensor

import tn
from bench import kernel_training
from bench.models import Parser
from bench.row import RESULTS, Row, append, wide_console
from bench.timing import Timing, interleaved
from tn.errors import unknown
from tn.settings import interpreted, interpreting

if TYPE_CHECKING:
    from bench.kernel_cases import Case
    from tn_kernels.ahead import Resources

NOT_MEASURED = "not measured"
GPT = "GPT"
RESERVED = 90  # seconds kept for the training rows
CAPABILITY = 90
# Of the norm of a result or gradient, in units of round-off: sums are taken in fp32, what is left are a few roundings to the dtype, and in
# fp32 the sums themselves.
ROUNDINGS = 16

Run = Callable[[], object]


def gate(cases: "list[Case]", dtypes: tuple[torch.dtype, ...], device: str) -> list[str]:
    """What is wrong with the kernels at their small sizes, in words; an empty list means they may be timed."""
    wrong = []
    for case in cases:
        for dtype in dtypes:
            torch.manual_seed(0)
            operands = case.operands(case.small, dtype, device)
            operands = [operand.detach().requires_grad_(case.trained) for operand in operands]
            exact = [operand.detach().double().requires_grad_(case.trained) for operand in operands]
            for what, got, want in zip(("result", *case.small), _all(case.run, operands), _all(case.eager, exact), strict=False):
                error = ((got.double() - want).norm() / want.norm()).item()
                allowed = ROUNDINGS * torch.finfo(dtype).eps
                if not error <= allowed:
                    wrong.append(f"{case.kernel} ({case.name}) in {dtype}: {what} is off by {error:.1e} of its norm, allowed {allowed:.1e}")
    return wrong


def _all(run: Callable[..., Tensor], operands: list[Tensor]) -> list[Tensor]:
    """The result, and the gradients of all operands that take one, for a fixed cotangent."""
    value = run(*operands)
    if not value.requires_grad:
        return [value]
    cotangent = torch.linspace(-1, 1, value.numel(), device=value.device, dtype=torch.float64).reshape(value.shape).to(value.dtype)
    return [value.detach(), *torch.autograd.grad(value, operands, cotangent)]


def resources(case: "Case", dtype: torch.dtype = torch.bfloat16) -> "list[tuple[tuple[int, ...], dict[str, object], Resources]]":
    """(grid, blocks, what a program takes) of every launch of a forward and backward pass, compiled and not run."""
    from tn_kernels.ahead import compile_call  # late: loads the compiler
    from tn_kernels.launch import recording  # late: as above

    with recording() as calls:
        case.run(*case.operands(case.shapes, dtype, "meta"))
    found: dict[str, tuple[tuple[int, ...], dict[str, object], Resources]] = {}
    for call in calls:
        used = compile_call(call, CAPABILITY)
        found.setdefault(f"{used} {call.config}", (call.grid, dict(call.config.blocks), used))
    return list(found.values())


def rates() -> tuple[float, float]:
    """(FLOP/s of a large bf16 product, bytes/s of a large copy), on this device in this minute: the roofline."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    source = torch.empty(1 << 30, device="cuda", dtype=torch.uint8)
    target = torch.empty_like(source)
    times = interleaved({"product": lambda: a @ a, "copy": lambda: target.copy_(source)})
    return 2 * 8192**3 / times["product"].median, 2 * source.numel() / times["copy"].median


def passes(run: Callable[..., Tensor], operands: list[Tensor], trained: bool) -> dict[str, Run]:
    """Forward without gradients; and forward with every gradient, for kernels that train."""

    def forward() -> object:
        with torch.no_grad():
            return run(*operands)

    if not trained:
        return {"forward": forward}
    cotangent = torch.randn_like(forward())  # type: ignore[call-overload]

    def both() -> object:
        return torch.autograd.grad(run(*operands), operands, cotangent)

    return {"forward": forward, "forward + backward": both}


def captured(run: Run) -> Run:
    """A function that replays what one call launches, as a CUDA graph; the call itself where it cannot be captured."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError as error:
        print(f"not captured: {str(error).splitlines()[0]}", file=sys.stderr)
        return run
    return graph.replay


def timed(case: "Case", peak: float, bandwidth: float, given: argparse.Namespace, device: str = "cuda") -> list[Row]:
    """One row for each pass and each peer: the kernel's time, and how many times faster it is."""
    torch.manual_seed(0)
    operands = case.operands(case.shapes, torch.bfloat16, device)
    operands = [operand.detach().requires_grad_(case.trained) for operand in operands]
    rivals = {"torch": case.eager, **({} if given.quick else {"torch.compile": torch.compile(case.eager)}), **case.peers}
    runs = {"kernel": passes(case.run, operands, case.trained)}
    for name, rival in rivals.items():
        try:
            runs[name] = passes(rival, operands, case.trained)
            for once in runs[name].values():
                once()
        except RuntimeError as error:  # such as a path that stores every score and runs out of memory; a kernel that fails is an error
            runs.pop(name, None)
            print(f"{case.kernel}: {name} does not run: {str(error).splitlines()[0]}", file=sys.stderr)
    found = []
    for what in runs["kernel"]:
        factor = 1 if what == "forward" else 3
        flops, moved = factor * case.flops(case.shapes), factor * 2 * case.moved(case.shapes)
        work = {name: captured(both[what]) if given.graphs else both[what] for name, both in runs.items()}
        times = interleaved(work, rounds=3 if given.quick else given.rounds)
        best = max(flops / peak, moved / bandwidth)
        found += [_row(case, what, times["kernel"], name, times[name], flops, moved, best) for name in times if name != "kernel"]
    return found


def _row(case: "Case", what: str, time: Timing, peer: str, theirs: Timing, flops: int, moved: int, best: float) -> Row:
    low, high = time.quartiles
    settings = {
        "triton": version("triton"),
        "kernel": case.kernel,
        "shapes": {name: list(shape) for name, shape in case.shapes.items()},
        "dtype": "bfloat16",
    }
    return Row(
        bench="kernels",
        case=f"{case.kernel}: {case.name}",
        what=what,
        seconds=time.median,
        low=low,
        high=high,
        samples=len(time.samples),
        flops=flops,
        bytes=moved,
        ratio=time.faster_than(theirs),
        peer=peer,
        settings={**settings, "fraction of the measured roofline": best / time.median},
    )


def _resource_rows(case: "Case", used: "list[tuple[tuple[int, ...], dict[str, object], Resources]]") -> list[Row]:
    rows = []
    for grid, blocks, one in used:
        taken = {name: getattr(one, name) for name in ("registers", "stack", "shared", "warps", "programs", "instructions")}
        settings = {"triton": version("triton"), "grid": list(grid), "blocks": blocks, "dtype": "bfloat16", **taken}
        rows.append(Row(bench="kernels", case=f"{case.kernel}: {case.name}", what=f"{one.kernel}, sm_{CAPABILITY}", settings=settings))
    return rows


def _parser() -> Parser:
    parser = Parser(prog="python -m bench kernels", description=__doc__)
    parser.add_argument("--only", default="", help="only kernels whose name starts with this; the training rows are called GPT")
    parser.add_argument("--quick", action="store_true", help="fewer samples, one dtype, no compiled peers, a smaller GPT")
    parser.add_argument("--rounds", type=int, default=7, help="samples of each time (default: 7)")
    parser.add_argument("--seconds", type=float, default=500, help="start nothing new after this long, and say so (default: 500)")
    parser.add_argument("--gate", action="store_true", help="only compare with float64")
    parser.add_argument("--graphs", action="store_true", help="on a GPU: time replays of CUDA graphs, without the cost of launching")
    parser.add_argument("--tune", action="store_true", help="on a GPU: first measure every way to cut every kernel, and keep the fastest")
    parser.add_argument("--out", type=Path, default=RESULTS / "kernels.jsonl", help="file the rows are added to")
    return parser


def main(arguments: list[str]) -> int:
    """Check, compile, time, print and store, kernel by kernel; returns 0, or 1 when a kernel is wrong or does not run."""
    given = _parser().parse_args(arguments)
    if given.rounds < 1:
        raise ValueError(f"rounds is a count of at least 1, got {given.rounds}")
    from bench.kernel_cases import CASES  # late: loads the kernels and their compiler

    begun, names = time.monotonic(), [*sorted({case.kernel for case in CASES}), GPT]
    cases = [case for case in CASES if case.kernel.startswith(given.only)]
    if not cases and not GPT.startswith(given.only):
        raise ValueError(unknown("kernel", given.only, names))
    gpu = torch.cuda.is_available()
    if gpu or interpreting():
        halves = (torch.bfloat16,) if gpu and given.quick else (torch.float16, torch.bfloat16) if gpu else (torch.float16,)
        dtypes = halves if gpu and given.quick else (torch.float32, *halves)
        wrong = gate(cases, dtypes, "cuda" if gpu else "cpu")
        print("\n".join(wrong) or f"{len(cases)} cases agree with float64, forward and every gradient ({', '.join(map(str, dtypes))})")
        if wrong or given.gate or not gpu:
            return int(bool(wrong))
    elif cases:
        # Triton decides when it is imported whether it interprets, and this process has to compile: the interpreter gets its own.
        command = [sys.executable, "-m", "bench", "kernels", "--gate", "--only", given.only]
        code = subprocess.run(command, env=interpreted(), check=False).returncode
        if code or given.gate:
            return code
    return _report(cases, given, begun + given.seconds)


def _report(cases: "list[Case]", given: argparse.Namespace, deadline: float) -> int:
    """Measure case by case, each printed and stored as soon as it is there; the tables follow."""
    console, gpu, failed = wide_console(), torch.cuda.is_available(), 0
    peak, bandwidth = rates() if gpu else (None, None)
    title = "not measured, there is no GPU here"
    if peak is not None and bandwidth is not None:
        title = f"{torch.cuda.get_device_name()}, bf16; measured: {peak / 1e12:.0f} TFLOP/s, {bandwidth / 1e12:.2f} TB/s copied"
        print(title, flush=True)
    taken: dict[str, list[Row]] = {}
    times: list[Row] = []
    for case in cases:
        title_of = f"{case.kernel}: {case.name}"
        if gpu and time.monotonic() > deadline - RESERVED * GPT.startswith(given.only):
            print(f"{title_of}: {NOT_MEASURED}, out of time (--seconds {given.seconds:.0f})", flush=True)
            times += _untimed(case)
            continue
        try:
            taken[title_of] = [] if gpu and given.quick else _resource_rows(case, resources(case))
            if gpu and given.tune:
                _tune(case)
            rows = timed(case, peak, bandwidth, given) if peak and bandwidth else _untimed(case)
        except (tn.OperatorError, RuntimeError) as error:
            failed, rows = 1, _untimed(case)
            print(f"{title_of}: does not run: {error}", file=sys.stderr, flush=True)
        if gpu:
            print("\n".join(map(_line, rows)), flush=True)
        append([*taken.get(title_of, []), *(row for row in rows if row.seconds is not None)], given.out)
        times += rows
    if not (gpu and given.quick) and cases:
        console.print(_resource_table(taken))
    if cases:
        console.print(_time_table(f"times: {title}", times))
    if GPT.startswith(given.only):
        trained, problem = _trained(peak, given, deadline)
        append([row for row in trained if row.seconds is not None], given.out)
        console.print(_training_table(trained, title))
        failed |= problem
    console.print(f"rows: {given.out}", highlight=False)
    return failed


def _trained(peak: float | None, given: argparse.Namespace, deadline: float) -> tuple[list[Row], int]:
    """(the training rows, 1 if they could not be measured)."""
    case = kernel_training.QUICK if given.quick else kernel_training.CASE
    if peak is not None and time.monotonic() > deadline:
        print(f"{GPT}: {NOT_MEASURED}, out of time (--seconds {given.seconds:.0f})", flush=True)
        return kernel_training.rows(case, None, given.rounds), 0
    try:
        return kernel_training.rows(case, peak, 3 if given.quick else given.rounds), 0
    except (tn.OperatorError, RuntimeError) as error:
        print(f"{GPT}: does not run: {error}", file=sys.stderr, flush=True)
        return kernel_training.rows(case, None, given.rounds), 1


def _line(row: Row) -> str:
    if row.seconds is None or row.ratio is None:
        return f"{row.case}: {row.what}: {NOT_MEASURED}"
    share = row.settings["fraction of the measured roofline"]
    return f"{row.case}: {row.what}: {row.seconds * 1e3:.3f} ms, {share:.0%} of the roofline, {row.ratio:.2f} times as fast as {row.peer}"


def _tune(case: "Case") -> None:
    from tn_kernels import tuning  # late: loads the compiler

    operands = [t.detach().requires_grad_(case.trained) for t in case.operands(case.shapes, torch.bfloat16, "cuda")]
    best = tuning.tune(lambda *given: _all(case.run, list(given)), operands)
    print("\n".join(f"{key}: {config}" for key, config in best.items()), flush=True)


def _untimed(case: "Case") -> list[Row]:
    """The rows without numbers, so that nobody takes their absence for an oversight."""
    rows = []
    for what, factor in (("forward", 1), ("forward + backward", 3)) if case.trained else (("forward", 1),):
        work = {"flops": factor * case.flops(case.shapes), "bytes": factor * 2 * case.moved(case.shapes)}
        peers = ("torch", "torch.compile", *case.peers)
        rows += [Row(bench="kernels", case=f"{case.kernel}: {case.name}", what=what, peer=peer, **work) for peer in peers]
    return rows


def _resource_table(taken: dict[str, list[Row]]) -> Table:
    table = Table(title=f"compiled for compute capability {CAPABILITY / 10}, bf16, not run", title_justify="left", pad_edge=False)
    for heading in ("kernel", "grid", "blocks", "warps", "registers", "stack", "shared", "per SM", "products"):
        table.add_column(heading, justify="left" if heading in ("kernel", "blocks", "products") else "right")
    for name, rows in taken.items():
        kernel, _, case = name.partition(": ")
        table.add_row(f"[bold]{kernel}[/]: {case}")
        for row in rows:
            one: dict[str, Any] = row.settings
            cut = " ".join(f"{block}{extent}" for block, extent in one["blocks"].items())
            numbers = (str(one["warps"]), str(one["registers"]), f"{one['stack']} B", f"{one['shared'] / 1024:.0f} KiB")
            name_of = row.what.partition(",")[0]
            table.add_row(f"  {name_of}", "×".join(map(str, one["grid"])), cut, *numbers, str(one["programs"]), one["instructions"])
    return table


def _training_table(rows: list[Row], title: str) -> Table:
    table = Table(title=f"GPT training step: {title}", title_justify="left", pad_edge=False)
    for heading in ("model", "parameters", "GFLOP", "median", "tokens/s", "MFU", "times faster than dense"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for row in rows:
        mfu = row.settings.get("MFU, of the measured product rate")
        numbers = [f"{row.seconds * 1e3:.1f} ms", f"{row.tokens_per_second:,.0f}"] if row.seconds else [NOT_MEASURED] * 2
        numbers += [f"{mfu:.1%}" if isinstance(mfu, float) else NOT_MEASURED, f"{row.ratio:.2f}" if row.ratio else NOT_MEASURED]
        table.add_row(row.case, f"{row.settings['parameters']:,}", f"{row.flops / 1e9:,.0f}", *numbers)
    return table


def _time_table(title: str, rows: list[Row]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for heading in ("kernel", "GFLOP", "MB", "median", "of the roofline", "times faster than"):
        table.add_column(heading, justify="left" if heading in ("kernel", "times faster than") else "right")
    for name, of_case in itertools.groupby(rows, lambda row: row.case):
        kernel, _, case = name.partition(": ")
        table.add_row(f"[bold]{kernel}[/]: {case}")
        for what, group in itertools.groupby(of_case, lambda row: row.what):
            same = list(group)
            first = same[0]
            ratios = "\n".join(f"{row.peer}: {f'{row.ratio:.2f}' if row.ratio else NOT_MEASURED}" for row in same)
            fraction = first.settings.get("fraction of the measured roofline")
            median = f"{first.seconds * 1e3:.3f} ms" if first.seconds else NOT_MEASURED
            share = f"{fraction:.0%}" if isinstance(fraction, float) else NOT_MEASURED
            table.add_row(f"  {what}", f"{first.flops / 1e9:,.1f}", f"{first.bytes / 1e6:,.0f}", median, share, ratios)
    return table
