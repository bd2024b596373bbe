"""A picture of a Network: tensors as discs, axes as lines, hyperaxes as dots, the result's axes as open ends."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from tn.documents import is_size
from tn.errors import KindError, OperatorError, SizeError, unknown
from tn.network import Network

_COLOURS = {"input": "#9ecae1", "core": "#fdae6b", "const": "#d9d9d9"}
_INK = "#333333"
_RADIUS = 0.17  # of a tensor, where a line between two of them is about 1 long
_LENGTHS = {"tensor": 1.0, "dot": 0.7, "end": 0.62}  # of a line from a tensor to each kind of node
_BEND = 0.18  # how far lines between the same two tensors are bent apart, as a part of their length


@dataclass(frozen=True, slots=True)
class Picture:
    """Nodes and lines of a network before they have places.

    Attributes:
        kinds: "tensor", "dot" (a hyperaxis) or "end" (an axis of the result) of each node. texts: the tensors' names.
        lines: (node, node, axis); a tensor joined to itself is a diagonal.
    """

    kinds: tuple[str, ...]
    texts: tuple[str, ...]
    lines: tuple[tuple[int, int, str], ...]


def picture(net: Network) -> Picture:
    """What there is to draw: an axis joins two tensors, or a tensor and an open end; on more of them it is a dot.

    >>> from tn import network
    >>> picture(network("x: b r, u: i r, v: o r -> b i o")).kinds
    ('tensor', 'tensor', 'tensor', 'end', 'dot', 'end', 'end')
    """
    kinds = ["tensor"] * len(net.spec.operands)
    texts = [term.name for term in net.spec.operands]
    lines: list[tuple[int, int, str]] = []
    results = [axis for term in net.spec.outputs for axis in term.axes]
    for axis in net.axes:
        holders = [i for i, term in enumerate(net.spec.operands) for _ in range(term.axes.count(axis))]
        for _ in range(results.count(axis)):
            holders.append(len(kinds))
            kinds.append("end")
            texts.append("")
        if len(holders) == 1 or len(holders) > 2:  # an axis of one tensor alone is summed there: it ends in a dot
            lines += [(holder, len(kinds), axis) for holder in holders]
            kinds.append("dot")
            texts.append("")
        else:
            lines.append((holders[0], holders[1], axis))
    return Picture(tuple(kinds), tuple(texts), tuple(lines))


def places(drawn: Picture) -> np.ndarray:
    """Coordinates (nodes, 2): distances on the page follow those along the lines, the first tensor lies left, the open ends right.

    Stress majorisation (Gansner, Koren, North 2004) from the spec's order, so the same network always looks the same.
    """
    count = len(drawn.kinds)
    wanted = np.full((count, count), np.inf)
    np.fill_diagonal(wanted, 0)
    for a, b, _ in drawn.lines:
        if a != b:
            other = drawn.kinds[a] if drawn.kinds[b] == "tensor" else drawn.kinds[b]
            wanted[a, b] = wanted[b, a] = _LENGTHS[other]
    for via in range(count):  # shortest ways
        wanted = np.minimum(wanted, wanted[:, via, None] + wanted[None, via])
    reached = wanted[np.isfinite(wanted)].max()
    wanted[~np.isfinite(wanted)] = reached + 1  # parts that nothing joins
    along = np.arange(count) / max(count - 1, 1)
    found = np.stack([along * count**0.5, 0.3 * np.sin(2.4 * np.arange(count))], axis=1)
    if count > 1:
        found = _relax(found, wanted)
    return _turn(found, drawn)


def draw(net: Network, path: str | PathLike[str] | None, sizes: Mapping[str, int] | None) -> Any:
    """See `tn.Network.draw`."""
    check_path(path)
    if sizes is not None and not isinstance(sizes, Mapping):
        raise KindError(f"sizes is a {type(sizes).__name__}, expected axis → size")
    from matplotlib.figure import Figure  # late: keeps `import tn` light
    from matplotlib.patches import Circle  # late: the same

    for axis, given in (sizes or {}).items():
        if axis not in net.axes:
            raise SizeError(unknown("axis", axis, net.axes))
        if not is_size(given):
            raise SizeError(f"axis {axis!r} has size {given!r}, expected an integer ≥ 0")
        if net.sizes.get(axis, given) != given:
            raise SizeError(f"axis {axis!r} has size {net.sizes[axis]} in the network, sizes says {given}")
    known = {**net.sizes, **(sizes or {})}
    drawn = picture(net)
    at = places(drawn)
    low, high = at.min(axis=0) - 0.5, at.max(axis=0) + 0.5
    width, height = np.maximum(high - low, 1.0) * 1.9
    figure = Figure(figsize=(max(width, 4.0), height + 0.9))
    axes = figure.add_axes((0, 0.45 / (height + 0.9), 1, height / (height + 0.9)))
    axes.set(xlim=(low[0], high[0]), ylim=(low[1], high[1]), aspect="equal")
    axes.axis("off")
    labelled = _labelled(drawn)
    for number, ((a, b, axis), bend) in enumerate(zip(drawn.lines, _bends(drawn), strict=True)):
        size = known.get(axis)
        label = "" if number not in labelled else axis if size is None else f"{axis} {size}"
        if drawn.kinds[a] == "end":
            a, b = b, a
        _line(axes, at[a], at[b], bend, label, 1.0 + 0.35 * math.log2(max(size or 2, 2)), drawn.kinds[b] == "end")
    for node, (kind, text) in enumerate(zip(drawn.kinds, drawn.texts, strict=True)):
        if kind == "dot":
            axes.add_patch(Circle(at[node], 0.035, color=_INK, zorder=3))
        elif kind == "tensor":
            axes.add_patch(Circle(at[node], _RADIUS, facecolor=_COLOURS[_role(net, text)], edgecolor=_INK, zorder=3))
            axes.text(at[node][0], at[node][1], text, ha="center", va="center", fontsize=min(11, 42 / max(len(text), 1)), zorder=4)
    figure.text(0.5, 0.02, _wrapped(str(net.spec), width), ha="center", va="bottom", fontsize=8, family="monospace", color=_INK)
    roles = [role for role in _COLOURS if any(_role(net, name) == role for name in net.names)]
    handles = [Circle((0, 0), 1, facecolor=_COLOURS[role], edgecolor=_INK, label=role) for role in roles]
    figure.legend(handles=handles, loc="upper right", fontsize=8, frameon=False, ncols=len(roles))
    return saved(figure, path)


def check_path(path: object) -> None:
    """Raise KindError for a path that is none, OperatorError for one where no file can be written."""
    if path is None:
        return
    if not isinstance(path, str | PathLike):
        raise KindError(f"path is a {type(path).__name__}, expected a file to write to, or None")
    if not str(path) or Path(path).is_dir():
        raise OperatorError(f"cannot draw to {str(path)!r}, expected a file such as 'plan.png'")
    if not Path(path).parent.is_dir():
        raise OperatorError(f"cannot draw to {str(path)!r}: there is no folder {str(Path(path).parent)!r}")


def saved(figure: Any, path: str | PathLike[str] | None) -> Any:
    """The figure, written to a file where one is named. Raises OperatorError for an ending that matplotlib has no format for."""
    if path is not None:
        ending, formats = Path(path).suffix.lstrip(".").lower(), figure.canvas.get_supported_filetypes()
        if ending and ending not in formats:
            raise OperatorError(f"cannot draw {str(path)!r}: {unknown('format', ending, formats)}")
        figure.savefig(path, dpi=150)
    return figure


def _relax(found: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Points whose distances are as near to the wanted ones as majorisation gets in a few hundred rounds."""
    weights = 1 / np.maximum(wanted, 1e-9) ** 2
    np.fill_diagonal(weights, 0)
    inverse = np.linalg.pinv(np.diag(weights.sum(axis=1)) - weights)
    for _ in range(300):
        apart = np.linalg.norm(found[:, None] - found[None], axis=-1)
        pull = -weights * wanted / np.maximum(apart, 1e-9)
        np.fill_diagonal(pull, 0)
        np.fill_diagonal(pull, -pull.sum(axis=1))
        found = inverse @ pull @ found
    return found


def _turn(found: np.ndarray, drawn: Picture) -> np.ndarray:
    """The longest direction level, the first tensor left of the open ends."""
    found = found - found.mean(axis=0)
    _, _, directions = np.linalg.svd(found, full_matrices=True)
    found = found @ directions.T
    ends = [node for node, kind in enumerate(drawn.kinds) if kind == "end"] or [len(drawn.kinds) - 1]
    signs = np.where(found[0] > found[ends].mean(axis=0), -1.0, 1.0)
    return found * np.array([signs[0], -signs[1]])


def _bends(drawn: Picture) -> list[float]:
    """How far each line is bent aside, so that lines between the same two tensors do not lie on each other."""
    pairs = [frozenset(line[:2]) for line in drawn.lines]
    ranks = [pairs[:i].count(pair) for i, pair in enumerate(pairs)]
    bends = [rank - (pairs.count(pair) - 1) / 2 for rank, pair in zip(ranks, pairs, strict=True)]
    return [bend if line[0] <= line[1] else -bend for bend, line in zip(bends, drawn.lines, strict=True)]


def _labelled(drawn: Picture) -> set[int]:
    """The lines that carry their axis's name: those to open ends, else the first of each axis."""
    axes = [axis for _, _, axis in drawn.lines]
    ends = {number for number, (a, b, _) in enumerate(drawn.lines) if "end" in (drawn.kinds[a], drawn.kinds[b])}
    named = {axes[number] for number in ends}
    return ends | {axes.index(axis) for axis in axes if axis not in named}


def _line(axes: Any, start: np.ndarray, stop: np.ndarray, bend: float, label: str, width: float, is_end: bool) -> None:
    """One axis: a line, bent or straight; a loop where both ends are one tensor."""
    if np.array_equal(start, stop):
        turn = np.linspace(0, 2 * math.pi, 40)
        centre = start + np.array([0.0, _RADIUS * 1.25])
        points = centre + 0.6 * _RADIUS * np.stack([np.sin(turn), np.cos(turn)], axis=1)
        middle = centre + np.array([0.0, _RADIUS])
    else:
        across = np.array([start[1] - stop[1], stop[0] - start[0]])
        middle = (start + stop) / 2 + 2 * _BEND * bend * across
        t = np.linspace(0, 1, 30)[:, None]
        points = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * stop
        middle = points[-1] + 0.13 * (stop - start) / np.linalg.norm(stop - start) if is_end else points[15]
    axes.plot(points[:, 0], points[:, 1], color=_INK, linewidth=width, solid_capstyle="round", zorder=1)
    if label:
        box = {"facecolor": "white", "edgecolor": "none", "pad": 1.0}
        axes.text(*middle, label, ha="center", va="center", fontsize=9, color=_INK, bbox=box, zorder=2)


def _role(net: Network, name: str) -> str:
    return "core" if name in net.cores else "const" if name in net.consts else "input"


def _wrapped(text: str, width: float) -> str:
    """The spec in lines that fit under the picture, broken at commas."""
    limit, lines = max(int(width * 14), 40), [""]
    for part in text.replace(", ", ",\0").split("\0"):
        if len(lines[-1]) + len(part) > limit and lines[-1]:
            lines.append("")
        lines[-1] += (" " if lines[-1] else "") + part
    return "\n".join(lines)
