"""Random networks against the float64 one-shot sum: forward and every gradient, every way a network can run."""

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import tn
from tn.testing import assert_close, networks, one_shot


def _operands(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def _check(run, network, operands, dtype):
    """Value and every gradient of `run` against the oracle, with the bound from absolute values."""
    wide = {name: tensor.to(dtype).double().requires_grad_() for name, tensor in operands.items()}
    cast = {name: tensor.to(dtype).requires_grad_() for name, tensor in operands.items()}
    want = one_shot(network, wide)
    got = run(*cast.values())
    sizes = network.bind([t.shape for t in operands.values()])
    terms = 1
    for axis in network.axes:
        terms *= sizes[axis]
    roundings = terms + 2 * len(network.spec.operands)
    positive = {name: tensor.detach().abs().requires_grad_() for name, tensor in wide.items()}
    bound = one_shot(network, positive)
    assert_close(got, want, bound=bound, roundings=roundings)
    cotangent = torch.ones_like(want)
    wants = torch.autograd.grad(want, list(wide.values()), cotangent)
    bounds = torch.autograd.grad(bound, list(positive.values()), cotangent)
    gots = torch.autograd.grad(got, list(cast.values()), cotangent.to(dtype))
    for name, g, w, b in zip(network.names, gots, wants, bounds, strict=True):
        assert_close(g, w, bound=b, roundings=roundings, name=f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(case=networks(), seed=st.integers(0, 2**16), search=st.sampled_from(["auto", "cotengra", "left_to_right"]))
def test_planned_program_equals_the_sum(dtype, case, seed, search):
    network, shapes = case
    event(f"{len(network.spec.operands)} operands")
    plan = tn.plan(network, grad=network.names, sizes={axis: 2 for axis in network.dynamic}, search=search)
    _check(tn.compile(plan), network, _operands(shapes, seed), dtype)


@given(case=networks(), seed=st.integers(0, 2**16))
def test_sizes_known_at_planning_equal_the_sum(case, seed):
    network, shapes = case
    sizes = network.bind(list(shapes.values()))
    fixed = tn.network(network.spec, sizes)
    _check(tn.compile(fixed), fixed, _operands(shapes, seed), torch.float64)


@given(case=networks(), seed=st.integers(0, 2**16))
def test_einsum_backend_equals_the_sum(case, seed):
    network, shapes = case
    _check(lambda *t: tn.contract(str(network.spec), *t, backend="einsum"), network, _operands(shapes, seed), torch.float64)


@given(case=networks(), seed=st.integers(0, 2**16))
def test_contract_equals_the_sum(case, seed):
    network, shapes = case
    _check(lambda *t: tn.contract(str(network.spec), *t), network, _operands(shapes, seed), torch.float64)
