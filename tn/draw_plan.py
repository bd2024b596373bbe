"""A picture of a Plan: the contraction tree from left to right, what each step costs, and how wide its tensors are."""

import math
from dataclasses import dataclass
from os import PathLike
from typing import Any

from tn.cost import volume
from tn.draw import check_path, saved
from tn.order import Axes
from tn.plan import Plan, Step
from tn.spec import ROWS

_INK, _PALE, _TILE = "#333333", "#8a8a8a", "#e8f3e4"
_COLOURS = {"input": "#9ecae1", "core": "#fdae6b", "const": "#d9d9d9", "step": "#ffffff"}
_COLUMN, _ROW = 4.3, 1.25  # inches from one step to the next, and from one tensor to the next
_WIDTH, _HEIGHT = 2.45, 0.82  # of a box
_WIDEST = 9.0  # points, of the line of the largest tensor
_LETTERS = 24  # of an edge's label in a line


@dataclass(frozen=True, slots=True)
class Box:
    """One value of a plan before it has a place on paper.

    Attributes:
        column, row: steps from the left, tensors from the top (between two where it has two operands).
        kind: "input", "core", "const" or "step". title, lines: its text. tiled: whether it runs once for each tile of rows.
    """

    column: int
    row: float
    kind: str
    title: str
    lines: tuple[str, ...]
    tiled: bool


def boxes(plan: Plan) -> list[Box]:
    """Every SSA value as a box: operands left, each step right of its operands, the rows so that no lines cross.

    >>> from tn import network, plan
    >>> [box.title for box in boxes(plan(network("x: ... i, a: i r, c: r o -> ... o", dict(i=64, r=2, o=64), cores=("a", "c")), rows=4096))]
    ['x', 'a', 'c', 'v3 = x · a', 'v4 = v3 · c']
    """
    net, count = plan.network, len(plan.leaves)
    names = [term.name for term in plan.terms] + [f"v{value}" for value in range(count, len(plan.orders))]
    made: dict[int, Box] = {}
    for place, value in enumerate(leaf for result in plan.results for leaf in _leaves(plan, result)):
        term = plan.terms[value]
        kind = "core" if term.name in net.cores else "const" if term.name in net.consts else "input"
        lines = ("gradient",) * (term.name in plan.grad) + (
            (f"copied, {plan.turning(value) * 1e6:,.0f} µs",) if value in plan.turned else ()
        )
        made[value] = Box(0, place, kind, term.name, lines, False)
    ran = {step.out for step in plan.steps}
    for step in plan.tree_steps:
        left, right = made[step.left], made[step.right]
        title = f"{names[step.out]} = {names[step.left]} · {names[step.right]}"
        column, row = max(left.column, right.column) + 1, (left.row + right.row) / 2
        tiled = plan.tile is not None and ROWS in plan.orders[step.out]
        lines = _costs(plan, step) if step.out in ran else (_shared(plan, step.out, names),)
        made[step.out] = Box(column, row, "step", title, lines, tiled)
    return [made[value] for value in range(len(plan.orders))]


def _leaves(plan: Plan, value: int) -> list[int]:
    """Operands below a value, from the top of the page down."""
    count = len(plan.leaves)
    if value < count:
        return [value]
    left, right = plan.path[value - count]
    upper, lower = sorted((_leaves(plan, left), _leaves(plan, right)), key=min)
    return upper + lower


def _shared(plan: Plan, value: int, names: list[str]) -> str:
    """Why a step of the tree does not run."""
    first = plan.first(value)
    return f"is {names[first]}: not computed again" if first != value else "not needed: its use is shared"


def _costs(plan: Plan, step: Step) -> tuple[str, ...]:
    """What a step runs as, and what it costs; gradient steps on a line of their own."""
    back = [other for other in plan.backward_steps if other.left == step.out]
    operator = step.pairing.kind + (" into a view" if step.pairing.out == "strided" else "")
    lines = [operator, _cost(plan, [step])]
    return (*lines, f"gradients {_cost(plan, back)}") if back else tuple(lines)


def _cost(plan: Plan, steps: list[Step]) -> str:
    flops = sum(plan.times(step) * step.pairing.flops for step in steps)
    seconds = sum(plan.times(step) * step.pairing.seconds for step in steps)
    copies = sum(step.pairing.copies for step in steps)
    return f"{_amount(flops)}FLOP, {seconds * 1e6:,.0f} µs" + (f", {copies} {'copy' if copies == 1 else 'copies'}" if copies else "")


def _amount(number: float) -> str:
    """A number with the prefix of thousands: 1.5e6 → "1.5 M"."""
    for prefix, size in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return f"{number:.0f} "


def draw(plan: Plan, path: str | PathLike[str] | None) -> Any:
    """See `tn.Plan.draw`."""
    check_path(path)
    from matplotlib.figure import Figure  # late: keeps `import tn` light
    from matplotlib.patches import FancyBboxPatch, Patch  # late: the same

    made = boxes(plan)
    columns, rows = max(box.column for box in made), max(len(plan.leaves), 2)
    width, height = columns * _COLUMN + _WIDTH + 3.2, rows * _ROW + 1.6
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")

    def place(value: int) -> tuple[float, float]:
        box = made[value]
        return 0.25 + _WIDTH / 2 + box.column * _COLUMN, height - 1.1 - _ROW * (box.row + 0.5)

    largest = max(_bytes(plan, order) for order in plan.orders)
    for step in plan.tree_steps:
        for value, lift in zip(sorted((step.left, step.right), key=lambda value: made[value].row), (0.14, -0.14), strict=True):
            _edge(axes, place(value), place(step.out), lift, plan, plan.orders[value], largest)
    for result in plan.results:
        x, y = place(result)
        _edge(axes, (x, y), (x + _WIDTH / 2 + 2.6, y), 0.0, plan, plan.orders[result], largest)
    for value, box in enumerate(made):
        x, y = place(value)
        corner = (x - _WIDTH / 2, y - _HEIGHT / 2)
        colour = _TILE if box.tiled else _COLOURS[box.kind]
        axes.add_patch(FancyBboxPatch(corner, _WIDTH, _HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.08", fc=colour, ec=_INK, zorder=3))
        text = "\n".join(box.lines)
        top = y + (0.07 * len(box.lines) + 0.04 if text else 0.0)
        axes.text(x, top, box.title, ha="center", va="center", fontsize=9, weight="bold", zorder=4)
        axes.text(x, top - 0.11, text, ha="center", va="top", fontsize=7, color=_INK, zorder=4, linespacing=1.25)
    for line, text in enumerate(_heading(plan)):
        axes.text(0.25, height - 0.28 - 0.24 * line, text, ha="left", va="center", fontsize=9 if line == 0 else 8, color=_INK)
    kinds = [kind for kind in ("input", "core", "const") if any(box.kind == kind for box in made)]
    handles = [Patch(fc=_COLOURS[kind], ec=_INK, label=kind) for kind in kinds]
    handles.append(Patch(fc=_COLOURS["step"], ec=_INK, label="step"))
    if plan.tile is not None:
        handles.append(Patch(fc=_TILE, ec=_INK, label=f"step, {plan.tile} rows at a time"))
    figure.legend(handles=handles, loc="lower left", fontsize=8, frameon=False, ncols=len(handles))
    return saved(figure, path)


def _heading(plan: Plan) -> tuple[str, ...]:
    sizes = ", ".join(f"{'rows' if axis == ROWS else axis} {plan.size[axis]}" for axis in plan.network.axes)
    work = f"forward {_amount(plan.flops)}FLOP, {plan.forward_seconds * 1e6:,.0f} µs predicted"
    if plan.grad:
        work += f"; gradients of {', '.join(plan.grad)}: {_amount(plan.backward_flops)}FLOP, {plan.backward_seconds * 1e6:,.0f} µs"
    return str(plan.network.spec), sizes, f"{work}; goal {plan.goal}, table {plan.machine.name}; wider lines are larger tensors"


def _bytes(plan: Plan, order: Axes) -> int:
    return 4 * volume(order, plan.size)


def _edge(axes: Any, start: tuple[float, float], stop: tuple[float, float], lift: float, plan: Plan, order: Axes, largest: int) -> None:
    """A tensor on its way to the step that takes it, with its axes in memory order above the line."""
    size = _bytes(plan, order)
    line = max(_WIDEST * math.sqrt(size / largest) if largest else 1.0, 0.6)
    begin, end, goal = start[0] + _WIDTH / 2, stop[0] - (_WIDTH / 2 if lift else 0.0), stop[1] + lift
    turn = end - 0.35 if lift else end  # level up to here, so that labels lie beside the tensor they belong to
    axes.plot([begin, turn, end], [start[1], start[1], goal], color=_PALE, linewidth=line, solid_capstyle="butt", zorder=1)
    words = [f"{'rows' if axis == ROWS else axis} {plan.size[axis]}" for axis in order] or ["a number"]
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > _LETTERS and lines[-1]:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + word
    amount = f"{size / 1e6:,.2f} MB" if size >= 1e4 else f"{size:,} bytes"
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.85}
    x, gap = begin + 0.1, 0.06 + line / 144
    axes.text(x, start[1] + gap, "\n".join(lines), ha="left", va="bottom", fontsize=7.5, color=_INK, bbox=box, zorder=2)
    axes.text(x, start[1] - gap, amount, ha="left", va="top", fontsize=7, color=_PALE, bbox=box, zorder=2)
