"""Operands that a plan copies into another memory order once, and gradients that are views."""

import dataclasses

import numpy as np
import pytest
import torch

import tn
from tests.unit.memory_tracker import measured
from tn.arrays import run_plan

SPEC = "x: ... (i0 i1 i2), w0: r0 i0 o0, w1: r1 r0 o1, w2: o0 o1 i2 r1 i1 -> ... (o0 o1)"
SIZES = dict(i0=6, i1=8, i2=4, r0=12, o0=5, r1=9, o1=3)
NETWORK = tn.network(SPEC, SIZES, cores=("w0", "w1", "w2"))
ROUNDINGS = 2 * sum(SIZES.values())  # longer than any chain of sums here, forward and backward


def _operands(rows: int = 7) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = {**SIZES, "...": rows}
    shapes = [[np.prod([sizes[axis] for axis in dim]) for dim in term.dims] for term in NETWORK.spec.operands]
    return [torch.randn([int(extent) for extent in shape], generator=generator, dtype=torch.float64) for shape in shapes]


def _turned(leaves: tuple[int, ...], cotangent: tuple[str, ...] = ()) -> tn.Plan:
    """The plan with exactly these operands copied, each into its own order reversed."""
    plan = tn.plan(NETWORK, grad=NETWORK.names, rows=7, dtype=torch.float64)
    own = [order if leaf not in leaves else order[::-1] for leaf, order in enumerate(plan.leaves)]
    return dataclasses.replace(plan, orders=(*own, *plan.orders[len(own) :]), tile=None, cotangent=cotangent)


def _values(run, operands: list[torch.Tensor]) -> list[torch.Tensor]:
    tracked = [operand.clone().requires_grad_() for operand in operands]
    y = run(*tracked)
    return [y, *torch.autograd.grad(y.square().sum(), tracked)]


def _reference(x, w0, w1, w2):
    sizes = (x.shape[0], SIZES["i0"], SIZES["i1"], SIZES["i2"])
    return torch.einsum("nabc,rae,sro,eocsb->neo", x.reshape(sizes), w0, w1, w2).reshape(x.shape[0], -1)


@pytest.mark.parametrize("cotangent", [(), ("o1", "o0", "...")], ids=["", "cotangent"])
@pytest.mark.parametrize("leaves", [(), (0,), (1,), (3,), (0, 2), (0, 1, 2, 3)])
def test_values_and_gradients_in_every_form(leaves, cotangent):
    plan, operands = _turned(leaves, cotangent), _operands()
    assert plan.turned == leaves
    want, bounds = _values(_reference, operands), _values(_reference, [operand.abs() for operand in operands])
    program = tn.compile(plan)
    torch._dynamo.reset()
    for run in (program, program.plain, torch.compile(program, backend="aot_eager", fullgraph=True)):
        for got, value, bound in zip(_values(run, operands), want, bounds, strict=True):
            tn.testing.assert_close(got, value, bound=bound, roundings=ROUNDINGS)
    assert measured(program, [t.requires_grad_() for t in _operands()]) == (plan.saved_bytes, plan.peak_bytes)


def test_arrays_json_and_the_printed_plan():
    plan, operands = _turned((0, 3), ("o1", "o0", "...")), _operands()
    assert tn.Plan.from_json(plan.to_json()) == plan
    (y,) = run_plan(plan, [operand.numpy() for operand in operands])
    bound = _reference(*(operand.abs() for operand in operands))
    tn.testing.assert_close(torch.from_numpy(y).reshape(7, -1), _reference(*operands), bound=bound, roundings=ROUNDINGS)
    assert [line.split()[2] for line in str(plan).splitlines() if "copy of" in line] == ["x", "w2", "dv6"]


def test_the_planner_copies_once_what_forward_and_gradients_read():
    plan = tn.plan(NETWORK, grad=NETWORK.names, rows=7)
    assert plan.turned
    assert not tn.plan(NETWORK, rows=7).turned  # without gradients it is read once
    without = dataclasses.replace(plan, orders=(*plan.leaves, *plan.orders[len(plan.leaves) :]))
    assert plan.seconds < without.seconds and plan.copies < without.copies


def test_gradients_are_views_of_products_where_the_stored_shape_allows_it():
    spec, sizes = "x: ... (i j), v: r s p, w: o s j q i r -> ... (o p q)", dict(i=6, j=16, r=10, s=16, p=59, o=6, q=22)
    net = tn.network(spec, sizes, cores=("v", "w"))
    plan = tn.plan(net, grad=net.names, rows=65)
    viewed = [step.out for step in plan.backward_steps if plan.viewed(step) and step.pairing.out != "native"]
    assert viewed
    tracked = [torch.randn(shape).requires_grad_() for shape in ((65, 96), net.shape("v"), net.shape("w"))]
    found = torch.autograd.grad(tn.compile(plan)(*tracked).sum(), tracked)
    assert all(not found[leaf].is_contiguous() for leaf in viewed)
    tn.compile(plan)(*tracked).sum().backward()
    assert all(t.grad.is_contiguous() for t in tracked)  # autograd copies what it adds up into the operand's layout


def test_rows_that_are_copied_at_once_are_in_no_tiles():
    with pytest.raises(tn.PlanError, match="tile is 2 rows, but 'x' is copied for all rows at once"):
        dataclasses.replace(_turned((0,)), tile=2)
    with pytest.raises(tn.PlanError, match="the gradient of the result is copied as a whole"):
        dataclasses.replace(_turned((), ("o1", "o0", "...")), tile=2)


def test_the_gradient_of_a_result_is_copied_once():
    net = tn.network("x: ... (i a), w: r i o, v: r a p -> ... (o p a)", dict(i=8, a=5, r=9, o=40, p=30), cores=("w", "v"))
    plan = tn.plan(net, grad=net.names, rows=60)
    assert plan.cotangent and not tn.plan(net, grad=("w",), rows=60).cotangent  # for one gradient step it would be no gain
    assert plan.seconds < dataclasses.replace(plan, cotangent=()).seconds


def test_an_operand_whose_axes_are_summed_first_prints_and_measures():
    net = tn.network("x: ... d, w: d (a e) -> ... e", dict(d=8, e=8, a=2))
    plan = tn.plan(net, grad=net.names)
    assert "predicted" in str(plan) and plan.saved_bytes == 0  # one product of operands alone


def test_elementwise_gradients_are_written_in_place():
    """Else torch lays them out as the operands lie, and a grouped dimension is a copy that nobody counted."""
    net = tn.network("t0: (b c), t1: c -> (c b)", dict(b=120, c=30))
    plan = tn.plan(net, grad=net.names, dtype=torch.float64, goal="peak")
    operands = [torch.randn(3600, dtype=torch.float64).requires_grad_(), torch.randn(30, dtype=torch.float64).requires_grad_()]
    assert measured(tn.compile(plan), operands) == (plan.saved_bytes, plan.peak_bytes)


def test_axes_of_size_one_are_never_copied_for():
    net = tn.network("t0: c, t1: e, t2: (b a c), t3: (c a), t4: (e a f) d -> c (d b) f", dict(a=8, b=1, c=5, d=8, e=24, f=4))
    plan = tn.plan(net, grad=net.names, dtype=torch.float64)
    operands = [torch.randn(shape, dtype=torch.float64).requires_grad_() for shape in (5, 24, 40, 40, (768, 8))]
    assert measured(tn.compile(plan), operands) == (plan.saved_bytes, plan.peak_bytes)


def test_an_output_without_gradient_beside_one_with():
    layer = tn.Contraction(
        "x: ... (i j), a: i j r k, c: k i r l, b: i j s, d: s p -> y: ... (k l), z: i j p",
        sizes=dict(i=8, j=8, r=4, k=8, l=8, s=3, p=5),
        cores=("a", "c", "b", "d"),
    )
    layer.b.requires_grad_(False)
    layer.d.requires_grad_(False)
    y, _ = layer(torch.randn(40, 64))
    (first,) = torch.autograd.grad(y.square().sum(), layer.a, create_graph=True)
    assert torch.autograd.grad(first.sum(), layer.a)[0].shape == layer.a.shape
