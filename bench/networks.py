"""Random networks that look like layers: an input with one or two batch axes, and cores. Drawn from a seed, none picked by hand."""

import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import tn
from bench.libraries import order_cost

COUNT = 200
EXTENT = (4, 256)
SECONDS = (2e-4, 5e-2)  # of the order with the fewest FLOPs, at the rates below
_FLOPS, _BYTES = 5e10, 5e9  # a second, of two CPU cores


@dataclass(frozen=True)
class RandomLayer:
    """A network whose first operand is the input `x`, every other one a core, and the rows it is run with."""

    number: int
    network: tn.Network
    rows: int

    @property
    def name(self) -> str:
        """The number in the sequence and how many operands."""
        return f"random {self.number}, {len(self.network.names)} operands"


def random_layers(count: int = COUNT, seed: int = 0) -> Iterator[RandomLayer]:
    """The first networks of a seed's sequence that take about 0.2 to 50 ms forward: opt_einsum's order of the fewest FLOPs counts,
    at 50 GFLOP/s and 5 GB/s for every value it makes or reads."""
    found = 0
    for number in itertools.count():
        layer = _draw(random.Random(f"{seed}/{number}"), found)
        if any(len(term.axes) < 2 for term in layer.network.spec.operands):
            continue
        flops, elements = order_cost(layer.network, layer.rows)
        if SECONDS[0] <= flops / _FLOPS + 4 * elements / _BYTES <= SECONDS[1]:
            yield layer
            found += 1
            if found == count:
                return


def _draw(rng: random.Random, number: int) -> RandomLayer:
    """Cores on a random tree of rank axes, now and then with one more; every axis of the input and of the output on one core, seldom on
    two or, kept as a batch of the product, on both sides. In half of the networks a second batch axis, in some of those on a core too."""
    cores: list[list[str]] = [[] for _ in range(rng.randint(2, 5))]
    edges = [(i, rng.randrange(i)) for i in range(1, len(cores))]
    if rng.random() < 0.2:
        edges.append(tuple(rng.sample(range(len(cores)), 2)))
    for name, edge in enumerate(edges):
        for core in edge:
            cores[core].append(f"r{name}")
    ins, outs = ([f"{letter}{i}" for i in range(rng.randint(1, 3))] for letter in "io")
    for axis in (*ins, *outs):
        for core in rng.sample(range(len(cores)), 2 if rng.random() < 0.1 else 1):
            cores[core].append(axis)
    outs += [axis for axis in ins if rng.random() < 0.1]
    batch = ["t"] if rng.random() < 0.5 else []
    if batch and rng.random() < 0.3:
        rng.choice(cores).append("t")
    for axes in cores:
        rng.shuffle(axes)
    sizes = {axis: _extent(rng) for axis in dict.fromkeys(axis for axes in ([*batch, *ins, *outs], *cores) for axis in axes)}
    names = [f"w{i}" for i in range(len(cores))]
    terms = ", ".join(f"{name}: {' '.join(axes)}" for name, axes in zip(names, cores, strict=True))
    spec = f"x: ... ({' '.join([*batch, *ins])}), {terms} -> ... ({' '.join([*batch, *outs])})"
    return RandomLayer(number, tn.network(spec, sizes, cores=names), _extent(rng))


def _extent(rng: random.Random) -> int:
    low, high = map(math.log, EXTENT)
    return round(math.exp(rng.uniform(low, high)))
