"""python -m bench flops: matrix-product FLOPs and bytes per token of a model as planned, as written, and of its dense twin.

Nothing is computed and no memory is taken: models are traced on the meta device.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

import tn
import zoo
from bench import models
from bench.models import Case
from bench.peers import TorchGPT
from bench.row import RESULTS, Row, append, wide_console


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Totals of one pass over a batch: FLOPs forward (attention's two products among them), and of all gradients; bytes of
    parameters and of kept activations."""

    forward: int
    attention: int
    backward: int
    parameters: int
    parameter_bytes: int
    activation_bytes: int


def cost(case: Case, *, search: str = "auto") -> Cost:
    """What one forward and backward pass costs.

    Args:
        case: model and size.
        search: "auto" as the planner does it; "left_to_right" contracts every layer in the order its spec is written, as pairwise
            torch.einsum would. Activations are those of the planned model either way.
    """
    model = zoo.GPT(case.config, device="meta")
    trace = tn.trace(model, torch.empty(case.batch, case.sequence, dtype=torch.int64, device="meta"))
    networks = {name: module.network for name, module in model.named_modules() if isinstance(module, tn.Contraction)}
    forward = attention = backward = 0
    for node in trace.nodes:
        network = networks.get(node.path)
        if network is None:  # attention's products, or no product: the gradients are two of each
            forward, attention, backward = forward + node.flops, attention + node.flops, backward + 2 * node.flops
            continue
        sizes = dict(node.sizes)
        plan = tn.plan(network, grad=network.names, sizes={axis: sizes[axis] for axis in network.dynamic}, search=search)
        forward, backward = forward + plan.flops_at(plan.size), backward + plan.backward_flops
    parameters = list(model.parameters())
    return Cost(
        forward=forward,
        attention=attention,
        backward=backward,
        parameters=sum(p.numel() for p in parameters),
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        activation_bytes=trace.bytes,
    )


def counted(case: Case) -> int:
    """Forward FLOPs of the plain-torch dense twin, as torch's own counter sees them: the independent check of `cost`."""
    model = TorchGPT(case.config).to("meta")
    tokens = torch.empty(case.batch, case.sequence, dtype=torch.int64, device="meta")
    with torch.no_grad(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens)
    return counter.get_total_flops()


def rows(case: Case) -> list[Row]:
    """The model as planned and as written, and its dense twin.

    Raises:
        RuntimeError: the FLOPs of the dense twin differ from what torch counts; then no number here can be trusted.
    """
    costs = {
        f"{case.label}, planned": cost(case),
        f"{case.label}, as written": cost(case, search="left_to_right"),
        "dense twin": cost(case.dense()),
    }
    expected = counted(case)
    if costs["dense twin"].forward != expected:
        raise RuntimeError(f"the dense twin has {costs['dense twin'].forward} FLOPs, torch counts {expected}: no table")
    return [
        Row(
            bench="flops",
            case=name,
            what=what,
            tokens=case.tokens,
            flops=value.forward if what == "forward" else value.forward + value.backward,
            bytes=value.parameter_bytes + (value.activation_bytes if what == "training step" else 0),
            settings={**case.settings, "parameters": value.parameters, "activation_bytes": value.activation_bytes},
        )
        for name, value in costs.items()
        for what in ("forward", "training step")
    ]


def main(arguments: list[str]) -> int:
    """The command: prints the table and adds its rows to bench/results/flops.jsonl."""
    parser = models.Parser(prog="python -m bench flops", description=__doc__, epilog=models.EPILOG)
    models.add_arguments(parser)
    parser.add_argument("--out", type=Path, default=RESULTS / "flops.jsonl", help="file the rows are added to")
    options, rest = parser.parse_known_args(arguments)
    case = models.case(options, rest)
    found = rows(case)
    wide_console().print(table(case, found))
    append(found, options.out)
    print(f"rows: {options.out}")
    return 0


def table(case: Case, found: list[Row]) -> Table:
    """The rows as a table: per token, ratios to the dense twin."""
    c = case.config
    title = f"GPT, {c.layers} layers of width {c.width}, vocabulary {c.vocab}, {case.batch} × {case.sequence} tokens"
    view = Table(title=f"{title}: matrix-product FLOPs per token", title_justify="left", pad_edge=False)
    view.add_column("model")
    for heading in ("parameters", "weights", "activations", "forward", "less than dense", "training", "less than dense"):
        view.add_column(heading, justify="right")
    forward, training = (found[-2].flops, found[-1].flops)
    for one, both in zip(found[::2], found[1::2], strict=True):
        view.add_row(
            one.case,
            f"{one.settings['parameters']:,}",
            f"{one.bytes / 1e6:.1f} MB",
            f"{(both.bytes - one.bytes) / 1e6:.1f} MB",
            f"{one.flops / case.tokens / 1e6:.2f} M",
            f"{forward / one.flops:.2f}×",
            f"{both.flops / case.tokens / 1e6:.2f} M",
            f"{training / both.flops:.2f}×",
        )
    return view
