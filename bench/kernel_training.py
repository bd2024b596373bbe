"""The last rows of `python -m bench kernels`: training steps of a GPT, dense, and BTT with torch's products and with kernels.

Mixed precision as in training: fp32 parameters, bf16 autocast, fused AdamW, no compiler. All three take turns in one process.
"""

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn

import tn
import zoo
from bench import flops
from bench.models import Case
from bench.row import Row
from bench.timing import Timing, interleaved

MODEL = zoo.GPTConfig(vocab=50304, context=1024, layers=12, width=1024, heads=16, structure="btt", rank=1)
CASE = Case(config=MODEL, batch=16, sequence=1024)
QUICK = dataclasses.replace(CASE, config=MODEL.override(layers=4), batch=8)
NAMES = ("dense", "BTT unfused", "BTT fused")


def build(case: Case, device: torch.device | str) -> dict[str, zoo.GPT]:
    """The three models; the two with BTT layers have the same weights."""
    torch.manual_seed(0)
    dense, unfused, fused = (zoo.GPT(c.config.override(zero_init=False), device=device) for c in (case.dense(), case, case))
    fused.load_state_dict(unfused.state_dict())
    fuse(fused)
    return dict(zip(NAMES, (dense, unfused, fused), strict=True))


def fuse(model: nn.Module) -> None:
    """Let kernels run every structured layer, measured or not; dense ones stay with torch."""
    for module in model.modules():
        if isinstance(module, tn.StructuredLinear) and module.structure != "dense":
            module.backend = "triton"


def batch(case: Case, device: torch.device | str) -> tuple[Tensor, Tensor]:
    """Random tokens and targets."""
    generator = torch.Generator().manual_seed(0)
    tokens, targets = (torch.randint(0, case.config.vocab, (case.batch, case.sequence), generator=generator).to(device) for _ in range(2))
    return tokens, targets


def gate(models: dict[str, zoo.GPT], tokens: Tensor, targets: Tensor) -> list[str]:
    """What is wrong with the fused model, in words: its loss and its gradient beside those of the unfused one, in fp32."""
    found = []
    for name in NAMES[1:]:
        loss = models[name].loss(tokens, targets)
        gradients = torch.autograd.grad(loss, list(models[name].parameters()))
        found.append((loss.detach(), torch.cat([gradient.flatten().double() for gradient in gradients])))
    wrong = []
    # Of the norm: some gradients, such as that of a key's bias, are zero but for rounding. They pass through every layer above.
    for what, one, other, roundings in zip(("the loss", "the gradient"), *found, (8, 1024), strict=True):
        error, allowed = ((one - other).norm() / one.norm()).item(), roundings * torch.finfo(torch.float32).eps
        if not error <= allowed:
            wrong.append(f"{what} with kernels is off by {error:.1e} of that without, allowed {allowed:.1e}")
    return wrong


def _loss(model: zoo.GPT, tokens: Tensor, targets: Tensor, dtype: torch.dtype) -> Tensor:
    with torch.autocast(tokens.device.type, dtype, enabled=dtype is not torch.float32):
        return model.loss(tokens, targets)


def step(model: zoo.GPT, tokens: Tensor, targets: Tensor, dtype: torch.dtype) -> Callable[[], object]:
    """One training step as a function without arguments."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=tokens.is_cuda)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        _loss(model, tokens, targets, dtype).backward()
        optimizer.step()

    return run


def rows(
    case: Case, peak: float | None, rounds: int, device: torch.device | str = "cuda", dtype: torch.dtype = torch.bfloat16
) -> list[Row]:
    """One row a model: tokens/s, and MFU, the FLOPs of its own products over the measured rate of a large one.

    Args:
        peak: FLOP/s of a large bf16 product on this device; None where there is no GPU, and nothing is timed.
        dtype: of autocast; fp32 for none.

    Raises:
        RuntimeError: the fused model does not give the loss and gradients of the unfused one; nothing is timed then.
    """
    timings: dict[str, Timing] = {}
    if peak is not None:
        models, (tokens, targets) = build(case, device), batch(case, device)
        wrong = gate(models, tokens, targets)
        if wrong:
            raise RuntimeError("; ".join(wrong) + ": no numbers")
        work = {name: step(model, tokens, targets, dtype) for name, model in models.items()}
        timings = interleaved(work, rounds=rounds, least_seconds=0.2 if tokens.is_cuda else 0.0)
    costs = {"dense": flops.cost(case.dense()), "BTT unfused": flops.cost(case)}
    return [_row(case, name, costs.get(name, costs["BTT unfused"]), timings, peak) for name in NAMES]


def _row(case: Case, name: str, cost: flops.Cost, timings: dict[str, Timing], peak: float | None) -> Row:
    work, time = cost.forward + cost.backward, timings.get(name)
    settings = {**case.settings, "dtype": "bfloat16 autocast", "parameters": cost.parameters}
    row = Row(bench="kernels", case=f"GPT: {name}", what="training step", tokens=case.tokens, flops=work, bytes=cost.parameter_bytes)
    if time is None or peak is None:
        return dataclasses.replace(row, settings=settings)
    low, high = time.quartiles
    mfu = work / time.median / peak
    return dataclasses.replace(
        row, seconds=time.median, low=low, high=high, samples=len(time.samples), ratio=time.faster_than(timings["dense"]), peer="dense",
        settings={**settings, "MFU, of the measured product rate": mfu},
    )  # fmt: skip
