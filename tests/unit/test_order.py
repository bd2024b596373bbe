"""The search for trees: every tree once, the least bound first, what layouts teach, and nothing better among all trees."""

import dataclasses
import itertools
import random

import numpy as np
import pytest

import tn
from tn.layout import Job, choose, price
from tn.machine import READS, machine
from tn.order import Task, Trees, bound, flops, search, steps_of
from tn.plan import leaf_axes

CHAIN = (("a", "b"), ("b", "c"), ("c", "d"), ("d", "e"))
SIZES = dict(a=3, b=50, c=4, d=60, e=5)


def task_of(seed: int, count: int = 5) -> Task:
    """A random task: operands of two to four of eight axes, some of them kept."""
    rng = random.Random(seed)
    inputs = tuple(tuple(rng.sample("abcdefgh", rng.randint(2, 4))) for _ in range(count))
    used = sorted({axis for term in inputs for axis in term})
    output = tuple(axis for axis in used if rng.random() < 0.3)
    kept = tuple(tuple(a for a in term if a in output or sum(a in other for other in inputs) > 1) for term in inputs)
    return Task(kept, output, {axis: rng.randint(1, 12) for axis in used}, tuple(rng.random() < 0.5 for _ in inputs), flops)


def every_tree(trees: Trees) -> list:
    return list(itertools.islice(trees, 10_000))


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_tree_is_given_once(count):
    trees = every_tree(search(task_of(1, count)))
    assert len(trees) == len(set(trees)) == {2: 1, 3: 3, 4: 15, 5: 105}[count]
    for path in trees:
        assert sorted(v for pair in path for v in pair) == list(range(2 * count - 2))


@pytest.mark.parametrize("seed", range(5))
def test_the_least_bound_comes_first_and_the_ranking_is_sorted(seed):
    task = task_of(seed)
    trees = search(task)
    ranked = [(cost, path) for cost, path in trees._pool.ranked({})]
    costs = [cost for cost, _ in ranked]
    assert costs == sorted(costs) and trees.least == costs[0]
    assert all(cost == pytest.approx(bound(path, task)) for cost, path in ranked)


def test_what_a_layout_costs_is_charged_to_the_trees_that_share_the_step():
    task = Task(CHAIN, ("a", "e"), SIZES, (False,) * 4, flops)
    trees = search(task)
    (least, first), *_ = trees._pool.ranked({})
    trees.learn(first, (1e9, 1e9, 1e9))
    charged = {path: cost for cost, path in trees._pool.ranked(trees._learnt)}
    assert charged[first] == least + 3e9 == max(charged.values())
    made = [frozenset(out) for _, _, out in steps_of(first, CHAIN, ("a", "e"))]
    for path, cost in charged.items():  # the chain has no two ways to make the same tensor from the same two sets in another tree
        shared = sum(frozenset(out) in made for _, _, out in steps_of(path, CHAIN, ("a", "e")))
        assert cost - bound(path, task) <= 1e9 * shared


@pytest.mark.parametrize("seed", range(40))
def test_with_goal_flops_no_tree_has_fewer(seed):
    task = task_of(seed, 4)
    least = min(bound(path, task) for path in every_tree(search(task)))
    operands = ", ".join(f"t{i}: {' '.join(term) or '1'}" for i, term in enumerate(task.inputs))
    net = tn.network(
        f"{operands} -> {' '.join(task.output) or '1'}", {a: s for a, s in task.sizes.items() if any(a in t for t in task.inputs)}
    )
    if leaf_axes(net) != task.inputs:
        pytest.skip("an axis of one operand alone")
    plan = tn.plan(net, grad=[f"t{i}" for i, need in enumerate(task.grads) if need], goal="flops")
    assert plan.flops + plan.backward_flops == least


def test_bounds_are_bounds():
    for seed in range(6):
        task = task_of(seed, 4)
        job = Job.of(task.inputs, task.output, {a: s * 8 for a, s in task.sizes.items()}, task.grads, machine())
        for path in search(job.task):
            layout = choose(path, job)
            least = bound(path, job.task)
            assert layout.seconds >= 0.95 * least
            assert layout.seconds == pytest.approx(least + sum(layout.excess))


def test_many_operands_are_searched_reproducibly():
    rng = random.Random(0)
    count = 12
    inputs = tuple((f"x{i}", f"x{i + 1}", f"y{i % 5}") for i in range(count))
    sizes = {axis: rng.randint(2, 9) for term in inputs for axis in term}
    task = Task(inputs, ("x0", f"x{count}"), sizes, (True,) * count, flops)
    one, two = (every_tree(search(task, seed=3)) for _ in range(2))
    assert one == two and len(one) > 1
    assert bound(one[0], task) <= min(bound(path, task) for path in search(task, method="cotengra"))


TT = tn.network("x: ... (a b), g: a i r, h: r b j -> ... (i j)", dict(a=16, b=24, i=24, j=32, r=8), cores=("g", "h"))


@pytest.mark.parametrize("tile", [None, 128])
def test_what_a_layout_costs_is_what_its_plan_predicts(tile):
    plan = tn.plan(TT, grad=TT.names, rows=1024)
    job = Job.of(plan.leaves, TT.output.axes, plan.size, (True,) * 3, machine())
    job = job.tiled(tile) if tile else job
    for path in search(job.task):
        layout = choose(path, job)
        made = dataclasses.replace(plan, path=path, orders=layout.orders, tile=tile)
        assert layout.seconds + sum(made._streaming) == pytest.approx(made.seconds)
        assert price(path, layout.orders, job) == pytest.approx(layout.seconds)


@pytest.mark.parametrize(
    ("spec", "sizes", "rows", "gflop"),  # layers in which a plan that ignores that x needs no gradient costs 5.77 and 7.65 GFLOP
    [
        ("x: ... (a b c), g: a i r, h: r b j s, w: s c k -> ... (i j k)", dict.fromkeys("abcijk", 16) | dict.fromkeys("rs", 32), 32, 5.10),
        (
            "x: ... (a b c d), g: a i r, h: r b j s, v: s c k t, w: t d l -> ... (i j k l)",
            dict.fromkeys("abcdijkl", 6) | dict.fromkeys("rst", 16),
            1024,
            7.05,
        ),
    ],
)
def test_a_frozen_input_changes_the_tree_of_fewest_flops(spec, sizes, rows, gflop):
    network = tn.network(spec, sizes)
    cores = [name for name in network.names if name != "x"]
    plan = tn.plan(network, grad=cores, rows=rows, goal="flops")
    assert (plan.flops + plan.backward_flops) / 1e9 == pytest.approx(gflop, abs=0.01)
    plain = tn.plan(network, rows=rows, goal="flops")
    unweighted = dataclasses.replace(plain, grad=plan.grad)
    assert plan.flops + plan.backward_flops < unweighted.flops + unweighted.backward_flops


def test_the_bounds_of_many_contractions_are_below_every_product_in_the_table():
    table = machine()
    rng = random.Random(0)
    extents = [[rng.choice([1, 2, 3, 7, 16, 100, 1024, 5000]) for _ in range(3)] for _ in range(50)]
    mm, bmm = table.fastest(*np.array(extents, float).T)
    for (m, n, k), one, item in zip(extents, mm, bmm, strict=True):
        assert one <= min(table.product(m, n, k, reads) for reads in READS) * (1 + 1e-9)
        assert item <= min(table.item(m, n, k, reads) for reads in READS) * (1 + 1e-9)
        assert one >= 0.5 * min(table.product(m, n, k, reads) for reads in READS)
