"""Alternating least squares for the cores of any network: each core in turn is solved for exactly, the others held.

The distance is ‖W − A‖, or ‖(W − A) L‖ with a whitening matrix L (L Lᵀ the Gram matrix of the inputs). A step is a proximal one,
damped towards the core's last value, so that it is defined where the others leave directions free and never makes the distance larger.
"""

import math
import string
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from tn.errors import ProjectionError
from tn.network import Network
from tn.projection_svd import as_tensor
from tn.structures.registry import axes_of

Axes = tuple[str, ...]
Operand = tuple[Tensor, Axes]

_DAMPING = 1e-9  # of the mean eigenvalue: enough to make the normal equations definite in float64
_DIRECT = 1024  # unknowns a core may couple before conjugate gradients take over from factorisation
_CG_STEPS = 10
_AHEAD = 0.5  # how far beyond its last result, in units of its last change, the second sweep starts
_WHITE = "white axis"  # no axis word has a space


def einsum(operands: Sequence[Operand], output: Axes) -> Tensor:
    """One contraction of tensors with named dimensions, in an order that torch chooses."""
    axes = dict.fromkeys(axis for _, names in operands for axis in names)
    if len(axes) > len(string.ascii_letters):
        raise ProjectionError(f"a projection contracts at most {len(string.ascii_letters)} axes at once, this structure has {len(axes)}")
    letter = dict(zip(axes, string.ascii_letters, strict=False))
    terms = ["".join(letter[axis] for axis in names) for _, names in operands]
    return torch.einsum(f"{','.join(terms)}->{''.join(letter[axis] for axis in output)}", *(tensor for tensor, _ in operands))


class Fit:
    """Cores being fitted to one matrix.

    Args:
        net: of the structure. matrix: (d_out, d_in). known: False where the matrix is padding, which is filled with what the cores make of
            it; None: all known. white: (d_in, d_in) or None.
    """

    def __init__(self, net: Network, matrix: Tensor, known: Tensor | None, white: Tensor | None) -> None:
        self.net = net
        self.plain, self.axes = as_tensor(net, matrix)
        self.known = None if known is None else as_tensor(net, known)[0]
        self.fixed: list[Operand] = []
        self.open = self.axes
        self.rest: Tensor | float = 0.0
        self.gram: Operand | None = None  # white · whiteᵀ
        if white is not None:
            ins, outs, _ = axes_of(net)
            self.open = (*(axis for axis in self.axes if axis in outs), _WHITE)
            self.fixed = [(white.reshape(*(net.sizes[axis] for axis in ins), -1), (*ins, _WHITE))]
            self.smooth = tuple(axis if axis in outs else axis + "'" for axis in self.axes)  # of a matrix times the Gram matrix
            twin = (self.fixed[0][0], tuple(axis if axis in outs or axis == _WHITE else axis + "'" for axis in self.fixed[0][1]))
            axes = (*ins, *(axis + "'" for axis in ins if axis not in outs))
            self.gram = einsum([*self.fixed, twin], axes), axes
            unreachable = matrix.clone()  # elements that are zero in every member; whitened, they mix with the others
            as_tensor(net, unreachable)[0].zero_()
            rows = (unreachable @ white).reshape(*(net.sizes[axis] for axis in outs), -1)
            self.rest = rows.permute([(*outs, _WHITE).index(axis) for axis in self.open])
        self.target = self._whitened(self.plain)

    def _whitened(self, tensor: Tensor) -> Tensor:
        return einsum([(tensor, self.axes), *self.fixed], self.open) + self.rest if self.fixed else tensor

    def value(self, cores: Mapping[str, Tensor]) -> Tensor:
        """What the cores contract to, before whitening."""
        return einsum([(cores[name], self.net.term(name).axes) for name in self.net.cores], self.axes)

    def distance(self, cores: Mapping[str, Tensor]) -> float:
        """Squared distance from the target, padding left out."""
        off = self.plain - self.value(cores)
        if self.known is not None:
            off = off * self.known
        return float(self._whitened(off).square().sum())

    def fill(self, cores: Mapping[str, Tensor]) -> None:
        """Take the cores' own values where the target is padding: the distance to what is known can then only fall."""
        if self.known is not None:
            self.target = self._whitened(torch.where(self.known, self.plain, self.value(cores)))

    def solve(self, cores: dict[str, Tensor], name: str) -> Tensor:
        """The best value of one core, the others held."""
        mine = self.net.term(name).axes
        others = [(cores[other], self.net.term(other).axes) for other in self.net.cores if other != name] + self.fixed
        if not others:  # a core alone is the target itself
            return self.target.permute([self.open.index(axis) for axis in mine])
        elsewhere = {axis for _, axes in others for axis in axes}
        free = tuple(axis for axis in mine if axis not in self.open)  # summed: the unknowns that the equations couple
        batch = tuple(axis for axis in mine if axis in self.open and axis in elsewhere)
        columns = tuple(axis for axis in mine if axis in self.open and axis not in elsewhere)
        right = einsum([(self.target, self.open), *others], (*batch, *free, *columns))
        shape, count = right.shape, math.prod(self.net.sizes[axis] for axis in free)
        lead = shape[: len(batch)]
        right = right.reshape(*lead, count, -1)
        made = (*batch, *free, *columns)
        old = cores[name].permute([mine.index(axis) for axis in made]).reshape(right.shape)
        if count <= _DIRECT:
            twins = [(tensor, tuple(axis if axis in self.open else axis + "'" for axis in axes)) for tensor, axes in others]
            normal = einsum([*others, *twins], (*batch, *free, *(axis + "'" for axis in free))).reshape(*lead, count, count)
            new = _damped(normal, right, old)
        else:
            new = self._conjugate(others, made, shape, right, old)
        return new.reshape(shape).permute([made.index(axis) for axis in mine])

    def _conjugate(self, others: list[Operand], made: Axes, shape: torch.Size, right: Tensor, old: Tensor) -> Tensor:
        """A few conjugate-gradient steps on the normal equations from the old value; each one brings the distance down."""

        cores = [operand for operand in others if operand[1][-1] != _WHITE]

        def apply(core: Tensor) -> Tensor:
            whole = einsum([(core.reshape(shape), made), *cores], self.axes)
            if self.gram is not None:
                whole = einsum([(whole, self.axes), self.gram], self.smooth)
            return einsum([(whole, self.axes), *cores], made).reshape(core.shape)

        x = old.clone()
        residual = right - apply(x)
        direction, size = residual.clone(), residual.square().sum()
        for _ in range(_CG_STEPS):
            if size <= 1e-24 * right.square().sum():
                break
            image = apply(direction)
            step = size / (direction * image).sum().clamp(min=torch.finfo(x.dtype).tiny)
            x = x + step * direction
            residual = residual - step * image
            size, before = residual.square().sum(), size
            direction = residual + size / before * direction
        return x

    def improve(self, cores: dict[str, Tensor], sweeps: int) -> dict[str, Tensor]:
        """Cores after at most so many sweeps, fewer once ten of them change the squared distance by less than 1e-5 of itself.

        Each sweep starts beyond the last one's result, in the direction it went; one that ends farther away is done again from where the
        last one ended (Nesterov acceleration with restarts of alternating least squares, arXiv:1810.05846).
        """
        before, ahead, now = cores, _AHEAD, self.distance(cores)
        floor = 1e-28 * float(self._whitened(self.plain).square().sum())
        marks = [now]
        for _ in range(sweeps):
            beyond = {name: core + ahead * (core - before[name]) for name, core in cores.items()}
            found, distance = self._swept(beyond)
            if distance > now:
                found, distance = self._swept(cores)
                ahead, before = ahead / 2, found  # the next sweep starts where this one ends
            else:
                ahead, before = min(1.2 * ahead, 0.99), cores
            if distance >= now:
                return cores
            cores, now = found, distance
            marks.append(now)
            if now <= floor or (len(marks) > 10 and marks[-11] - now < 1e-5 * marks[-11]):
                break
        return cores

    def _swept(self, cores: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Every core solved for once, and the squared distance then."""
        found = dict(cores)
        for name in self.net.cores:
            self.fill(found)
            found[name] = self.solve(found, name)
        return found, self.distance(found)


def _damped(normal: Tensor, right: Tensor, old: Tensor) -> Tensor:
    """Solve normal · x = right, damped towards the old value."""
    scale = normal.diagonal(dim1=-2, dim2=-1).mean(-1).clamp(min=torch.finfo(normal.dtype).tiny)
    damping = _DAMPING * scale[..., None, None]
    eye = torch.eye(normal.shape[-1], dtype=normal.dtype, device=normal.device)
    factor, failed = torch.linalg.cholesky_ex(normal + damping * eye)
    if failed.any():  # not definite to working precision: more damping, still a step down
        factor = torch.linalg.cholesky(normal + 1e4 * damping * eye)
        damping = 1e4 * damping
    return torch.cholesky_solve(right + damping * old, factor)
