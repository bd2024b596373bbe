"""The search for trees: every tree once, the least bound first, what layouts teach, and nothing better among all trees."""

import itertools
import random

import pytest

import tn
from tn.layout import Job, choose
from tn.machine import machine
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
    first, *_ = trees
    trees.learn(first, (1e9, 1e9, 1e9))
    _, second = next(trees._pool.ranked(trees._learnt))
    shared = [*zip((frozenset(out) for _, _, out in steps_of(first, CHAIN, ("a", "e"))), (1, 1, 1), strict=True)]
    assert second != first and len(shared) == 3


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
