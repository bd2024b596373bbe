"""The test tools can fail, and the strategy of random networks reaches the hard cases."""

import pytest
import torch
from hypothesis import find, settings

import tn
from tn.testing import assert_close, networks, one_shot

QUIET = settings(max_examples=3000, database=None, derandomize=True)


def test_assert_close_can_fail():
    x = torch.ones(3, dtype=torch.float32)
    assert_close(x, x.double())
    for bad in (x * 1.01, x[None], x * float("nan"), x + 1e-6):
        with pytest.raises(AssertionError):
            assert_close(bad, x.double())


@pytest.mark.parametrize(
    "wanted",
    [
        lambda net: any(sum(axis in t.axes for t in net.spec.operands) >= 3 for axis in net.axes),
        lambda net: any(len(set(t.axes)) < len(t.axes) for t in net.spec.operands),
        lambda net: len({t.name for t in net.spec.operands}) < len(net.spec.operands),
        lambda net: any(not t.axes for t in net.spec.operands),
        lambda net: any(sum(axis in t.axes for t in net.spec.operands) == 2 and axis in net.output.axes for axis in net.axes),
    ],
    ids=["hyperaxis", "diagonal", "one tensor twice", "scalar", "batch axis"],
)
def test_the_strategy_reaches(wanted):
    network, shapes = find(networks(), lambda case: wanted(case[0]), settings=QUIET)
    assert set(network.bind(list(shapes.values()))) == set(network.axes)


def test_the_strategy_reaches_size_one_and_the_fast_form():
    find(networks(), lambda case: any(1 in shape for shape in case[1].values()), settings=QUIET)
    find(networks(), lambda case: tn.compile(case[0]).fast is not None, settings=QUIET)


def test_one_shot_is_einsum():
    net = tn.network("x: ... i, w: i o -> ... o")
    x, w = torch.randn(2, 3, 4), torch.randn(4, 5)
    assert torch.allclose(one_shot(net, {"x": x, "w": w}), x @ w, atol=1e-6)
