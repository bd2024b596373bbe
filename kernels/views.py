"""Fitting a region's tensors to a kernel's roles: axes that play one role become one dimension with one stride, without a copy."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from tn.operators import Layout, Region


class Unfit(ValueError):
    """Why a region cannot be seen as a kernel wants it; becomes the reason of a Refusal."""


@dataclass(frozen=True, slots=True)
class View:
    """How an operand is seen by a kernel: one dimension for each role, in the kernel's order.

    Attributes:
        order: dimensions of the operand, grouped by role. shape: sizes of the roles, 1 where the operand lacks one.
        full: sizes of the roles, so that a missing one is broadcast. In both, -1 where a call decides.
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]
    full: tuple[int, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        """The tensor with one dimension for each role; a view whenever the region told its strides."""
        return tensor.permute(self.order).reshape(self.shape).expand(self.full)


def order_of(axes: Sequence[str], layouts: Sequence[Layout], sizes: Mapping[str, int]) -> tuple[str, ...]:
    """An order of the axes of one role in which they are one dimension of every tensor that has them.

    Raises:
        Unfit: naming the axes and the tensor in which they are none.
    """
    wide = [axis for axis in axes if sizes[axis] != 1]
    having = [(place, layout) for place, layout in enumerate(layouts) if any(axis in layout.axes for axis in wide)]
    if not having:
        return tuple(axes)
    strides = dict(zip(having[0][1].axes, having[0][1].strides, strict=True))
    missing = [axis for axis in wide if axis not in strides]
    if missing:
        raise Unfit(f"axes {' '.join(wide)} play one role, but operand {having[0][0]} lacks {' '.join(missing)}")
    wide.sort(key=lambda axis: -strides[axis])
    for place, layout in having:
        if stride_of(wide, layout, sizes) is None:
            strides_there = f"(strides {layout.strides} of {' '.join(layout.axes)})"
            raise Unfit(f"axes {' '.join(wide)} are not one dimension of operand {place} {strides_there}")
    return (*(axis for axis in axes if sizes[axis] == 1), *wide)


def stride_of(axes: Sequence[str], layout: Layout, sizes: Mapping[str, int]) -> int | None:
    """The one stride of adjacent axes, first slowest; None when they have none."""
    strides = dict(zip(layout.axes, layout.strides, strict=True))
    if any(axis not in strides for axis in axes):
        return None
    for outer, inner in itertools.pairwise(axes):
        if strides[outer] != strides[inner] * sizes[inner]:
            return None
    return strides[axes[-1]] if axes else 0


def view(layout: Layout, roles: Sequence[Sequence[str]], region: Region) -> View:
    """How an operand is seen with these roles, each an order of axes.

    Raises:
        Unfit: the operand is broadcast along an axis whose size only a call tells, or has two of those.
    """
    full = tuple(map(region.extent, roles))
    present = [tuple(axis for axis in role if axis in layout.axes) for role in roles]
    shape = tuple(map(region.extent, present))
    if shape.count(-1) != full.count(-1):
        raise Unfit(f"an operand is broadcast along one of {' '.join(region.dynamic)}, whose size is known at a call only")
    if shape.count(-1) > 1:
        raise Unfit(f"axes {' '.join(region.dynamic)} are dynamic; one at most on a tensor")
    order = [axis for role in present for axis in role]
    order += [axis for axis in layout.axes if axis not in order]  # of size one, with no role
    return View(tuple(map(layout.axes.index, order)), shape, full)


def shape_of(region: Region) -> tuple[int, ...]:
    """Shape of the result, -1 where a call decides. Raises Unfit where it does so twice."""
    shape = tuple(region.extent((axis,)) for axis in region.out)
    if shape.count(-1) > 1:
        raise Unfit(f"axes {' '.join(region.dynamic)} are dynamic; one at most on a tensor")
    return shape


def check_result(region: Region, roles: Sequence[Sequence[str]]) -> None:
    """Raise Unfit unless the kernel's result, its roles in memory order, is the result the region wants."""
    size = region.size
    made = [axis for role in roles for axis in role if size[axis] != 1]
    wanted = [axis for axis in region.out if size[axis] != 1]
    if made != wanted:
        raise Unfit(f"the result is wanted in the order {' '.join(wanted)}, the kernel writes {' '.join(made)}")


def check_dtype(region: Region, dtypes: Sequence[object]) -> None:
    """Raise Unfit for a dtype that kernels do not compute in."""
    if region.dtype not in dtypes:
        raise Unfit(f"dtype {_name(region.dtype)}; it computes in {', '.join(map(_name, dtypes))}")


def _name(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")
