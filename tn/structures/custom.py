"""A family of your own, from a spec alone."""

import functools
import math
from collections.abc import Callable

from tn.checks import positive
from tn.errors import StructureError
from tn.network import network
from tn.spec import ROWS
from tn.structures.factors import even, padded
from tn.structures.registry import Factors, Rank, Structure, axes_of, register

# attributes that tn.StructuredLinear makes beside its cores
RESERVED = frozenset({"active", "backend", "bias", "built", "clamp", "experts", "factors", "gains", "gate", "guidance", "in_features",
    "init", "network", "out_features", "permutation", "rank", "shadow", "std", "structure", "training", "zero_init"})  # fmt: skip


def register_structure(
    name: str,
    spec: str,
    *,
    rank: Rank = 1,
    factors: Callable[[int, int], Factors] | None = None,
    full: Callable[[Factors], Rank] | None = None,
    summary: str = "",
) -> None:
    """Make a spec of your own a structure: for `tn.StructuredLinear`, restructuring, projection, rates and starts.

    Args:
        name: how users will call it. spec: with the input `x`; every other operand is a core, applied in the order written; axes on neither
            the input nor the output are ranks.
        rank: the default, of every rank axis or one for each.
        factors: (d_in, d_out) → sizes of the input's axes and of the output's, slowest first, each making at least the size asked for; the
            most even split if None, padded where there is no reasonable one.
        full: factors → the rank from which nothing is gained; if None, the input's or the output's size, whichever is smaller.
        summary: one line for tables.

    Raises:
        StructureError: a taken name, no input `x`, an input or output with more than its rows and one dimension, axes on no core.
        SpecError: see `tn.network`.

    As in

        spec = "x: ... (a b), u: a p, v: b q, core: p q s t, w: s k, z: t l -> ... (k l)"
        tn.register_structure("tucker", spec, rank=3)
        layer = tn.StructuredLinear(64, 36, structure="tucker", rank=5)    # factors ((8, 8), (6, 6))
    """
    if not isinstance(name, str) or not name:
        raise StructureError(f"name is {name!r}, expected a word")
    if not isinstance(spec, str):
        raise StructureError(f"spec is {spec!r}, expected text such as 'x: ... i, a: i r, b: r o -> ... o'")
    for what, function in (("factors", factors), ("full", full)):
        if function is not None and not callable(function):
            raise StructureError(f"{what} is {function!r}, expected a function or None")
    if not all(map(positive, rank if isinstance(rank, tuple) else (rank,))):
        raise StructureError(f"rank is {rank!r}, expected an integer ≥ 1, or one for each rank axis")
    net = network(spec)
    if "x" not in net.names or len(net.names) < 2:
        raise StructureError(f"a structure's spec has an input 'x' and at least one core, got the tensors {', '.join(net.names)}")
    for term in (net.term("x"), net.output):
        if len(term.dims) != 2 or term.dims[0] != (ROWS,):
            raise StructureError(f"a structure maps '... (axes)' to '... (axes)', got {term.pattern!r} in {spec!r}")
    taken = [core for core in net.names if core in RESERVED]
    if taken:
        raise StructureError(f"core name {taken[0]!r} is taken by an attribute of tn.StructuredLinear; choose another word")
    ins, outs, ranks = axes_of(net)
    if isinstance(rank, tuple) and len(rank) != len(ranks):
        raise StructureError(f"rank is {rank}, expected one for each of the rank axes {', '.join(ranks)}")
    on_cores = {axis for core in net.names if core != "x" for axis in net.term(core).axes}
    missing = [axis for axis in (*ins, *outs) if axis not in on_cores]
    if missing:
        raise StructureError(f"axis {missing[0]!r} of {spec!r} is on no core")
    if factors is None and set(ins) & set(outs):
        raise StructureError(f"axis {sorted(set(ins) & set(outs))[0]!r} is shared by input and output; say how it is sized with factors=")
    split = factors or functools.partial(_even, len(ins), len(outs))
    register(
        Structure(
            name=name,
            summary=summary or str(net.spec),
            spec=lambda _: spec,
            factors=lambda d_in, d_out, _: split(d_in, d_out),
            rank=(lambda _, options: rank) if ranks else None,
            full=full or _narrower,
            takes=("rank", "factors") if ranks else ("factors",),
        )
    )


def _even(ins: int, outs: int, d_in: int, d_out: int) -> Factors:
    return even(padded(d_in, ins), ins)[::-1], even(padded(d_out, outs), outs)


def _narrower(factors: Factors) -> int:
    return min(math.prod(factors[0]), math.prod(factors[1]))
