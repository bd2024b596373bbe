"""Plans for the gradients that are needed: never more FLOPs than the plan that ignores them."""

import dataclasses
import random

import pytest

import tn
from tests.unit.random_layers import random_layer
from tests.unit.test_memory import tt_matrix


def check(seed: int) -> None:
    net, draw = random_layer(seed // 5), random.Random(seed)
    grad = tuple(name for name in net.names if draw.random() < 0.5)
    plan, unweighted = tn.plan(net, grad=grad, goal="flops"), dataclasses.replace(tn.plan(net, goal="flops"), grad=grad)
    assert plan.flops + plan.backward_flops <= unweighted.flops + unweighted.backward_flops


@pytest.mark.parametrize("seed", range(0, 1000, 50))
def test_partial_gradients_never_cost_more_than_the_unweighted_plan(seed):
    check(seed)


@pytest.mark.slow
def test_a_thousand_masks():
    for seed in range(1000):
        check(seed)


@pytest.mark.parametrize(("net", "rows", "unweighted", "weighted"), [
    (tt_matrix(3, 16, 32), 32, 5.77e9, 5.10e9),
    (tt_matrix(4, 6, 16), 1024, 7.65e9, 7.05e9),
])  # fmt: skip
def test_layers_whose_input_needs_no_gradient(net, rows, unweighted, weighted):
    plan = tn.plan(net, grad=net.cores, goal="flops", rows=rows)
    assert plan.flops + plan.backward_flops == pytest.approx(weighted, rel=2e-3)
    forward = dataclasses.replace(tn.plan(net, goal="flops", rows=rows), grad=net.cores)
    assert forward.flops + forward.backward_flops == pytest.approx(unweighted, rel=2e-3)
