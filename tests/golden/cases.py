"""The plans of zoo models with the reference table, as text: what runs, in which order and layout, and what it is predicted to cost."""

from collections.abc import Iterator
from pathlib import Path

import tn
import zoo
from tn.machine import machine
from tn.plan import Plan

FOLDER = Path(__file__).parent
MODELS = ("gpt-tiny", "gpt2-small")
STRUCTURES = ("btt", "tt", "monarch", "low_rank")
RUNS = (("training, 2048 rows", 2048, True), ("generating, 1 row", 1, False))


def layers(model: str, structure: str) -> dict[tn.Network, str]:
    """Each network of a model's layers with the first module that has it."""
    found: dict[tn.Network, str] = {}
    for name, module in zoo.create(model, structure=structure, device="meta").named_modules():
        if isinstance(module, tn.Contraction) and len(module.network.cores) > 1:
            found.setdefault(module.network, name)
    return found


def render(plan: Plan) -> str:
    """A plan in lines that change only where it does; times in two digits."""
    names = [term.name for term in plan.terms]
    names += [f"v{value}" for value in range(len(names), len(plan.orders))]
    lines = []
    for step in plan.steps:
        lines.append(_line(plan, step, f"{names[step.out]} = {names[step.left]} · {names[step.right]}"))
    for step in plan.backward_steps:
        lines.append(_line(plan, step, f"d{names[step.out]} = d{names[step.left]} · {names[step.right]}"))
    tile = "all rows at once" if plan.tile is None else f"{plan.tile} rows at a time"
    total = f"{plan.flops + plan.backward_flops} FLOP, {plan.copies} copies, {plan.seconds * 1e6:.2g} µs"
    return "\n".join([*lines, f"    {tile}: {total}"])


def _line(plan: Plan, step, title: str) -> str:
    p = step.pairing
    written = {"native": "", "strided": " into a view", "copy": " and copied"}[p.out]
    copied = [word for word, copy in (("left", p.copy_left), ("right", p.copy_right)) if copy]
    layout = " ".join(plan.orders[step.out])
    return f"    {title}: {p.kind}{written}{' of copies of ' + ' and '.join(copied) if copied else ''} → {layout}"


def texts() -> Iterator[tuple[Path, str]]:
    """(file, what it should hold) of every model and structure."""
    for model in MODELS:
        for structure in STRUCTURES:
            lines = [f"{model} with {structure}, table {machine().name} {machine().digest}; rewrite with: python -m tests.golden"]
            for network, name in layers(model, structure).items():
                lines += ["", f"{name}: {network.spec}", f"  {', '.join(f'{axis}={size}' for axis, size in network.known)}"]
                for title, rows, grad in RUNS:
                    plan = tn.plan(network, grad=network.names if grad else (), rows=rows, table=machine())
                    lines += [f"  {title}", render(plan)]
            yield FOLDER / f"{model}-{structure}.txt", "\n".join(lines) + "\n"
