"""Structured layers as matrices: transposed, multiplied, and rewritten exactly in a family that contains theirs."""

import itertools
import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tn import structures
from tn.errors import StructureError
from tn.network import Network, network
from tn.structures.registry import axes_of

if TYPE_CHECKING:  # the layer's methods are in terms of this file
    from tn.linear import StructuredLinear


def transpose(layer: "StructuredLinear") -> "StructuredLinear":
    """A layer of the same family with the transposed matrix and no bias; its cores are copies.

    Raises:
        StructureError: where the family has no such member (a spec of your own may not be closed under transposition).
    """
    net = layer.network
    found = next(_renamings(net), None)
    if found is None:
        raise StructureError(f"the transpose of {layer.structure!r} is not of the same structure; use layer.to_dense().T")
    rename, source = found
    cores = {}
    for name in net.cores:
        have = [rename[axis] for axis in net.term(source[name]).axes]
        core = _unfolded(net, source[name], _values(layer)[source[name]])
        cores[name] = core.permute([have.index(axis) for axis in net.term(name).axes])
    return type(layer).from_cores(layer.structure, cores, in_features=layer.out_features, out_features=layer.in_features)


def _renamings(net: Network) -> Iterator[tuple[dict[str, str], dict[str, str]]]:
    """Ways to read the network backwards as its own spec: (axis → its new name, core → the core it comes from)."""
    ins, outs, ranks = axes_of(net)
    if len(ins) != len(outs):
        return
    ends = {**dict(zip(outs, ins, strict=True)), **dict(zip(ins, outs, strict=True))}
    wanted = {frozenset(net.term(name).axes): name for name in net.cores}
    for order in itertools.permutations(ranks):
        rename = {**ends, **dict(zip(ranks, order, strict=True))}
        source = {wanted.get(frozenset(rename[axis] for axis in net.term(name).axes)): name for name in net.cores}
        if len(source) == len(net.cores) and None not in source:
            yield rename, source  # type: ignore[misc]


def multiply(after: "StructuredLinear", before: "StructuredLinear") -> "StructuredLinear":
    """The layer x ↦ after(before(x)) without biases, in the family both have or in the narrower one; its cores are new.

    low_rank with anything is low_rank; dense with anything is dense; block_diagonal with equal blocks, kronecker and tt with equal factors
    between them stay what they are, ranks multiplied.

    Raises:
        StructureError: sizes that do not meet, or a product that is in no smaller family.
    """
    if after.in_features != before.out_features:
        raise StructureError(
            f"cannot multiply: the left layer takes {after.in_features} features, the right one gives {before.out_features}"
        )
    build = type(after).from_cores
    kinds = (after.structure, before.structure)
    left, right = _values(after), _values(before)
    dtypes, devices = ([getattr(next(layer.parameters()), name) for layer in (after, before)] for name in ("dtype", "device"))
    if dtypes[0] is not dtypes[1] or devices[0] != devices[1]:
        raise StructureError(f"cannot multiply: the left layer is {dtypes[0]} on {devices[0]}, the right one {dtypes[1]} on {devices[1]}")
    if "low_rank" in kinds:
        if before.structure == "low_rank" and (after.structure != "low_rank" or before.rank <= after.rank):
            return build("low_rank", {"first": right["first"], "second": right["second"] @ after.to_dense().detach().mT})
        return build("low_rank", {"first": before.to_dense().detach().mT @ left["first"], "second": left["second"]})
    if "dense" in kinds:
        return build("dense", {"weight": after.to_dense().detach() @ before.to_dense().detach()})
    sizes = {"in_features": before.in_features, "out_features": after.out_features}
    meets = after.structure == before.structure and after.factors and before.factors and after.factors[0] == before.factors[1]
    if meets and not after._pads[0]:
        if after.structure == "block_diagonal":
            return build("block_diagonal", {"weight": torch.bmm(right["weight"], left["weight"])}, **sizes)
        if after.structure == "kronecker":
            cores = {name: torch.einsum("rim,smo->rsio", right[name], left[name]).flatten(0, 1) for name in left}
            return build("kronecker", cores, **sizes)
        if after.structure == "tt":
            return build("tt", _joined(list(left), right, left), **sizes)
    if after.structure == before.structure and after.structure in ("block_diagonal", "kronecker", "tt"):
        raise StructureError(
            f"{kinds[0]} @ {kinds[1]} is one where the factors between them are the same, without padding: the left layer's "
            f"{after.factors[0]} of d_in and the right one's {before.factors[1]} of d_out; give factors="  # type: ignore[index]
        )
    raise StructureError(
        f"{kinds[0]} @ {kinds[1]} is in no smaller family; use torch.nn.Sequential(right, left), or tn.project of the dense product"
    )


def _joined(names: list[str], right: Mapping[str, Tensor], left: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cores of a product of trains: contracted over the axis in the middle, the ranks side by side."""
    found = {}
    for name in names:
        a, b = right[name], left[name]  # (rank before?) in out (rank after?)
        if name == names[0]:
            a, b = a[None], b[None]
        if name == names[-1]:
            a, b = a[..., None], b[..., None]
        core = torch.einsum("aimb,cmod->aciobd", a, b).flatten(4).flatten(0, 1)
        core = core[0] if name == names[0] else core
        found[name] = core[..., 0] if name == names[-1] else core
    return found


def convert(layer: "StructuredLinear", structure: str) -> "StructuredLinear":
    """The same matrix and bias as a layer of a family that contains this one, itself or by way of others, exactly.

    Raises:
        StructureError: a family that does not contain this one: `tn.project` finds the nearest member instead.
    """
    structures.get(structure)
    build = type(layer).from_cores
    if structure == "dense":
        return build("dense", {"weight": layer.to_dense().detach()}, bias=layer.bias)
    sizes = {"in_features": layer.in_features, "out_features": layer.out_features}
    if structure == layer.structure:
        return build(structure, _values(layer), bias=layer.bias, **sizes)
    ways = _containments(layer.structure)
    if structure not in ways:
        raise StructureError(
            f"{structure} does not contain every {layer.structure} matrix; what does: {', '.join(['dense', *ways])}. "
            f"tn.project gives the nearest {structure}"
        )
    for name in ways[structure]:
        cores = structures.get(name).contains[layer.structure](layer.built, _values(layer))
        layer = build(name, cores, bias=layer.bias, **sizes)
    return layer


def _containments(structure: str) -> dict[str, tuple[str, ...]]:
    """family that contains a structure → the families to convert to, one after the other, fewest first."""
    ways: dict[str, tuple[str, ...]] = {structure: ()}
    queue = [structure]
    for found in queue:
        for name in structures.names():
            if found in structures.get(name).contains and name not in ways:
                ways[name] = (*ways[found], name)
                queue.append(name)
    del ways[structure]
    return ways


def sizes_of(structure: str, cores: Mapping[str, Tensor]) -> Network:
    """The network of a family with the axis sizes that the shapes of the cores say. Raises StructureError, SizeError."""
    spec = structures.get(structure).spec(len(cores))
    draft = network(spec)
    wanted = [name for name in draft.names if name != "x"]
    if sorted(wanted) != sorted(cores):
        raise StructureError(f"{structure} has the cores {', '.join(wanted)}, got {', '.join(cores)}")
    alone = network(f"{', '.join(str(draft.term(name)) for name in wanted)} -> ")
    sizes = alone.bind([cores[name].shape for name in alone.names])
    return network(spec, sizes, cores=wanted)


def _values(layer: "StructuredLinear") -> dict[str, Tensor]:
    """The cores, what a clamp makes of them included."""
    if layer.experts is not None:
        raise StructureError(f"{layer.structure} is no linear map: which experts it applies depends on the input")
    if layer.permutation is not None:
        raise StructureError("a layer with permuted inputs is not in the family of its cores; use layer.to_dense()")
    values = {name: getattr(layer, name).detach() for name in layer.network.cores}
    if layer.clamp:
        first = layer.network.cores[0]
        values[first] = values[first] * layer._gain().detach()
    return values


def _unfolded(net: Network, name: str, core: Tensor) -> Tensor:
    return core.reshape([net.sizes[axis] for axis in net.term(name).axes])


def features(net: Network) -> tuple[int, int]:
    """(d_in, d_out) of a network with known sizes."""
    ins, outs, _ = axes_of(net)
    return math.prod(net.sizes[axis] for axis in ins), math.prod(net.sizes[axis] for axis in outs)
