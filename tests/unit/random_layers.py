"""Random networks like those of layers: an input with one or two batch axes, the rest cores, joined in a chain or by shared axes."""

import math
import random

import torch
from torch import Tensor

import tn


def random_layer(seed: int, most: int = 16) -> tn.Network:
    """One input and two to four cores; every axis has a size from 2 to `most`, and batch axes up to four times that."""
    draw = random.Random(seed)
    count, names = draw.randint(2, 4), iter("abcdefghijklmnopqr")
    batch = [next(names) for _ in range(draw.randint(1, 2))]
    open_axes = [next(names) for _ in range(draw.randint(1, 3))]
    terms, made = [batch + open_axes], []
    for core in range(count):
        taken = draw.sample(open_axes, draw.randint(1, len(open_axes)))
        shared = [axis for axis in made if axis not in taken and draw.random() < 0.3]
        new = [next(names) for _ in range(draw.randint(1, 2))]
        axes = taken + shared + new
        draw.shuffle(axes)
        terms.append(axes)
        open_axes = [axis for axis in open_axes if axis not in taken] + new
        made += new
        if core == count - 1:
            break
    out = batch + [axis for axis in made if axis in open_axes or draw.random() < 0.3]
    out += [axis for axis in open_axes if axis not in out]
    draw.shuffle(out)
    sizes = {axis: draw.randint(2, 4 * most if axis in batch else most) for axis in dict.fromkeys(axis for term in terms for axis in term)}
    spec = ", ".join(f"{'x' if i == 0 else f'core{i}'}: {' '.join(axes)}" for i, axes in enumerate(terms)) + " -> " + " ".join(out)
    return tn.network(spec, sizes, cores=[f"core{i}" for i in range(1, len(terms))])


def random_grad(seed: int, net: tn.Network) -> tuple[str, ...]:
    """Which tensors need a gradient: each with probability 0.7."""
    draw = random.Random(seed)
    return tuple(name for name in net.names if draw.random() < 0.7)


def operands_for(plan: tn.Plan, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    """Standard normal operands of the sizes of a plan."""
    source = torch.Generator().manual_seed(seed)
    made = []
    for name in plan.network.names:
        shape = [math.prod(plan.size[axis] for axis in dim) for dim in plan.network.term(name).dims]
        made.append(torch.randn(shape, dtype=dtype, generator=source).requires_grad_(name in plan.grad))
    return made
