"""The libraries that contract a whole network in one call, as peers: torch.einsum, opt_einsum and cotengra expressions."""

import math
import string
from collections.abc import Callable

import cotengra
import opt_einsum
import torch
from torch import Tensor

import tn

LIBRARIES = ("torch.einsum", "opt_einsum", "cotengra")


def einsum_peers(network: tn.Network, rows: int) -> dict[str, Callable[..., Tensor]]:
    """name → function of the network's operands as it stores them, planned beforehand where the library can."""
    sizes = {**network.sizes, "...": rows}
    equation = letters(network)
    shapes = [tuple(sizes[axis] for axis in term.axes) for term in network.spec.operands]
    width = math.prod(sizes[axis] for axis in network.output.axes[1:])
    planned = opt_einsum.contract_expression(equation, *shapes)
    searched = cotengra.einsum_expression(equation, *shapes)

    def on_axes(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *operands: run(*(t.reshape(shape) for t, shape in zip(operands, shapes, strict=True))).reshape(rows, width)

    calls = {"torch.einsum": lambda *t: torch.einsum(equation, *t), "opt_einsum": planned, "cotengra": searched}
    return {name: on_axes(call) for name, call in calls.items()}


def order_cost(network: tn.Network, rows: int) -> tuple[int, int]:
    """(FLOPs, elements read and written by its steps) of the order that opt_einsum finds to have the fewest FLOPs."""
    sizes = {**network.sizes, "...": rows}
    shapes = [tuple(sizes[axis] for axis in term.axes) for term in network.spec.operands]
    _, info = opt_einsum.contract_path(letters(network), *shapes, shapes=True, optimize="optimal")
    extent = info.size_dict
    terms = [term for step in info.contraction_list for part in step[2].split("->") for term in part.split(",")]
    return int(info.opt_cost), sum(math.prod(extent[letter] for letter in term) for term in terms)


def letters(network: tn.Network) -> str:
    """The network as an einsum equation over unflattened axes, `...` as one axis."""
    names = dict(zip(network.axes, string.ascii_letters, strict=False))
    terms = ["".join(names[axis] for axis in term.axes) for term in (*network.spec.operands, network.output)]
    return f"{','.join(terms[:-1])}->{terms[-1]}"


def optimal(network: tn.Network, rows: int) -> Callable[..., Tensor]:
    """opt_einsum's expression of the order with the fewest FLOPs, of operands as the network stores them."""
    sizes = {**network.sizes, "...": rows}
    shapes = [tuple(sizes[axis] for axis in term.axes) for term in network.spec.operands]
    planned = opt_einsum.contract_expression(letters(network), *shapes, optimize="optimal")
    width = math.prod(sizes[axis] for axis in network.output.axes[1:])
    return lambda *operands: planned(*(t.reshape(shape) for t, shape in zip(operands, shapes, strict=True))).reshape(rows, width)


def random_network(count: int, seed: int) -> tn.Network:
    """A random graph of so many operands, three axes each, all sizes fixed."""
    inputs, output, _, sizes = cotengra.utils.rand_equation(count, 3, n_out=2, d_min=2, d_max=12, seed=seed)
    words = {letter: f"x{number}" for number, letter in enumerate(sizes)}
    terms = [" ".join(words[letter] for letter in term) for term in (*inputs, output)]
    operands = ", ".join(f"t{number}: {term}" for number, term in enumerate(terms[:-1]))
    return tn.network(f"{operands} -> {terms[-1]}", {words[letter]: int(size) for letter, size in sizes.items()})
