"""What plans say about memory is what their programs do: bytes kept for the gradients, and the most alive at once."""

import dataclasses
import re

import pytest
import torch

import tn
from tests.unit.memory_tracker import Tracker, kept_bytes, measured
from tests.unit.random_layers import operands_for, random_grad, random_layer
from tn.order import every


def tt_matrix(cores: int, mode: int, rank: int) -> tn.Network:
    """A square tensor-train matrix of size mode ** cores."""
    ins, outs = [f"i{k}" for k in range(cores)], [f"o{k}" for k in range(cores)]
    ranks = ["", *(f"r{k}" for k in range(1, cores)), ""]
    terms = [f"g{k}: {ranks[k]} {ins[k]} {outs[k]} {ranks[k + 1]}" for k in range(cores)]
    sizes = {**dict.fromkeys(ins + outs, mode), **dict.fromkeys(ranks[1:-1], rank)}
    spec = f"x: ... ({' '.join(ins)}), {', '.join(terms)} -> ... ({' '.join(outs)})"
    return tn.network(spec, sizes, cores=[f"g{k}" for k in range(cores)])


NETWORKS = {
    "btt": tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=8, j=8, r=4, k=8, l=8), cores=("a", "c")),
    "tt": tt_matrix(3, 4, 3),
    "attention": tn.network(
        "q: b h s d, k: b h t d, v: b h t e, w: h e o -> b s o", dict(b=2, h=4, d=8, e=8, o=16, s=32, t=24), cores=("w",)
    ),
    "used twice": tn.network("x: ... i, a: i r, a: j r, y: ... j -> ... r", dict(i=16, j=16, r=8), cores=("a",)),
    "elementwise": tn.network("x: b i, y: b i, z: i o -> b o", dict(b=64, i=16, o=8)),
}


def test_the_tracker_sees_every_allocation_and_death():
    x = torch.ones(100)
    with Tracker() as tracker:
        a = x + 1
        b = a * 2
        del a
        c = b.view(10, 10).sum(0)
    assert tracker.peak() == 800  # a and b; then b and c
    assert tracker.peak(b) == 400 and tracker.peak(b, c) == 400


def test_kept_bytes_are_those_of_the_tape():
    x, w = torch.ones(10, 4, requires_grad=True), torch.ones(4, 4, requires_grad=True)
    with kept_bytes([x, w]) as kept:
        ((x @ w) @ w).sum()
    assert kept() == 160


@pytest.mark.parametrize("goal", ["time", "flops", "saved", "peak"])
@pytest.mark.parametrize("name", NETWORKS)
def test_predicted_memory_is_what_runs(name, goal):
    net = NETWORKS[name]
    for rows in (50, 300) if "..." in net.axes else (None,):
        for grad in (net.names, net.names[1:], net.names[:1], ()):
            plan = tn.plan(net, grad=grad, goal=goal, rows=rows)
            saved, peak = measured(tn.compile(plan), operands_for(plan))
            assert saved == plan.saved_bytes
            assert peak == plan.peak_bytes if tn.compile(plan).fast else peak <= plan.peak_bytes


@pytest.mark.parametrize("seed", range(12))
def test_predicted_memory_of_random_layers_is_what_runs(seed):
    net = random_layer(seed)
    for goal in ("saved", "peak"):
        plan = tn.plan(net, grad=random_grad(seed, net), goal=goal)
        assert measured(tn.compile(plan), operands_for(plan)) == (plan.saved_bytes, plan.peak_bytes)


@pytest.mark.parametrize("path", every(4))
def test_predicted_memory_is_what_runs_for_every_tree(path):
    from tn.bridge.paths import along

    plan = dataclasses.replace(along(NETWORKS["tt"], path, grad=("x", "g1"), rows=70), goal="saved")
    assert measured(tn.compile(plan), operands_for(plan)) == (plan.saved_bytes, plan.peak_bytes)
    if 0 not in plan.turned:  # rows that are copied at once are in no tiles
        tiled = dataclasses.replace(plan, tile=16, cotangent=())
        assert measured(tn.compile(tiled), operands_for(tiled)) == (tiled.saved_bytes, tiled.peak_bytes)


@pytest.mark.parametrize(
    "net",
    [
        tn.network("x: ... i, a: i r, c: r j, y: ... k, a: k s, c: s l -> ... j l", dict(i=6, r=3, j=5, k=6, s=3, l=5)),
        tn.network("x: ... i j k, w: i r, w: j s, w: k t -> ... r s t", dict(i=6, j=6, k=6, r=5, s=5, t=5)),
        tn.network("x: ... i j, w: i r, w: j s, w: k r, z: k m -> ... s m", dict(i=6, j=6, k=6, r=5, s=5, m=4)),
    ],
    ids=["a product twice", "three times", "with rows and without"],
)
def test_predicted_memory_is_what_runs_for_tensors_used_again(net):
    for grad in (net.names, net.names[1:2]):
        for goal in ("time", "saved", "peak"):
            plan = tn.plan(net, grad=grad, goal=goal, rows=300)
            for tile in {plan.tile, 16}:
                tiled = dataclasses.replace(plan, tile=tile)
                assert measured(tn.compile(tiled), operands_for(tiled)) == (tiled.saved_bytes, tiled.peak_bytes)


OUTPUTS = {
    "block tensor trains": "x: ... (i j), a: i j r k, c: k i r l, e: i j s m, f: m i s n -> y: ... (k l), z: ... (m n)",
    "a latent and its maps": "x: ... i, d: i r, u: r k, v: r l -> c: ... r, y: ... k, z: ... l",
    "a quadratic form and its root": "x: ... i, d: i r, x: ... j, d: j s, w: r s k, v: r l -> y: ... k, z: ... l",
    "an operand": "x: ... i, w: i k -> y: ... k, again: ... i",
    "equal": "x: ... i, w: i k -> y: ... k, again: ... k, more: ... k",
    "no rows": "x: i j, a: i r, b: r k, c: r l -> y: j k, z: j l, u: j r",
}
OUTPUT_SIZES = dict(i=12, j=12, r=6, s=6, k=8, l=9, m=4, n=11)


def of_outputs(name: str) -> tn.Network:
    words = set(re.findall(r"\w+", OUTPUTS[name]))
    return tn.network(OUTPUTS[name], {axis: size for axis, size in OUTPUT_SIZES.items() if axis in words})


@pytest.mark.parametrize("name", OUTPUTS)
def test_predicted_memory_of_several_outputs_is_what_runs(name):
    net = of_outputs(name)
    for rows in (50, 300) if "..." in net.axes else (None,):
        for grad in (net.names, net.names[1:], net.names[:1], ()):
            plans = {goal: tn.plan(net, grad=grad, goal=goal, rows=rows) for goal in ("time", "saved", "peak")}
            usable = all(value >= len(plans["time"].leaves) for value in plans["time"].results) and rows == 300
            for plan in (*plans.values(), *(dataclasses.replace(plan, tile=128) for plan in plans.values() if usable)):
                saved, peak = measured(tn.compile(plan), operands_for(plan))
                assert saved == plan.saved_bytes
                assert peak == plan.peak_bytes if tn.compile(plan).fast else peak <= plan.peak_bytes
            for goal, measure in dict(saved="saved_bytes", peak="peak_bytes").items():
                assert getattr(plans[goal], measure) == min(getattr(plan, measure) for plan in plans.values())


def test_memory_counts_the_size_of_an_element():
    plans = [tn.plan(NETWORKS["btt"], grad=("x", "a", "c"), goal="peak", rows=50, dtype=dtype) for dtype in (torch.float32, torch.float64)]
    assert plans[1].peak_bytes == 2 * plans[0].peak_bytes > 0
    assert measured(tn.compile(plans[1]), operands_for(plans[1], torch.float64)) == (plans[1].saved_bytes, plans[1].peak_bytes)


def test_each_goal_is_at_least_as_good_at_what_it_is_for():
    net = tt_matrix(4, 4, 8)
    plans = {goal: tn.plan(net, grad=net.cores, goal=goal, rows=100) for goal in ("time", "flops", "saved", "peak")}
    for goal, measure in dict(saved="saved_bytes", peak="peak_bytes").items():
        assert getattr(plans[goal], measure) == min(getattr(plan, measure) for plan in plans.values())
    assert "MB kept for the gradients, at most" in str(plans["peak"])


def test_goals_beyond_the_operands_that_are_enumerated():
    net = tt_matrix(6, 2, 4)
    plan = tn.plan(net, grad=net.names, goal="saved", rows=20)
    assert plan.saved_bytes <= tn.plan(net, grad=net.names, goal="flops", rows=20).saved_bytes
    assert measured(tn.compile(plan), operands_for(plan)) == (plan.saved_bytes, plan.peak_bytes)


def test_a_gradient_that_was_not_planned_makes_again_what_was_not_kept():
    net = NETWORKS["btt"]
    run = tn.compile(dataclasses.replace(tn.plan(net, rows=50, grad=()), goal="saved"))
    operands = [operand.detach().requires_grad_() for operand in operands_for(run.plan, torch.float64)]
    want = torch.autograd.grad(run.plain(*operands).square().sum(), operands)
    got = torch.autograd.grad(run(*operands).square().sum(), operands)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("cores", "mode", "rank", "rows", "needs_x", "goal", "share"),
    [
        (4, 6, 16, 1024, False, "time", 1 / 500),
        (4, 6, 16, 1024, True, "time", 1 / 10),
        (4, 6, 16, 1024, True, "saved", 1 / 10),
        (3, 16, 32, 32, True, "saved", 0.35),
    ],
)
def test_tt_matrices_keep_a_fraction_of_the_tape_of_torch_einsum(cores, mode, rank, rows, needs_x, goal, share):
    net = tt_matrix(cores, mode, rank)
    plan = tn.plan(net, grad=net.names if needs_x else net.cores, goal=goal, rows=rows)
    operands = operands_for(plan)
    with kept_bytes(operands) as kept:
        tn.compile(plan)(*operands)
        ours = kept()
    letters = dict(zip(net.axes, "zabcdefghijklmnopqrstuvwxy", strict=False))
    terms = ["".join(letters[axis] for axis in term.axes) for term in (*net.spec.operands, net.output)]
    given = [operands[0].view(rows, *[mode] * cores), *operands[1:]]
    with kept_bytes(operands) as kept:
        torch.einsum(f"{','.join(terms[:-1])}->{terms[-1]}", *given)
        theirs = kept()
    assert ours == plan.saved_bytes <= share * theirs
