"""Memory limits kept by slices: measured peaks, gradients, and what is refused."""

import dataclasses
import math
import pickle

import numpy as np
import pytest
import torch

import tn
from tests.unit.memory_tracker import measured
from tests.unit.random_layers import operands_for, random_grad, random_layer
from tests.unit.test_memory import OUTPUTS, of_outputs

BTT = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=8, j=8, r=4, k=8, l=8), cores=("a", "c"))
NAMED = tn.network("x: b s i, a: i r, c: r o -> b s o", dict(i=40, r=6, o=30), cores=("a", "c"))
TWICE = tn.network("x: i j, x: k j, y: k l -> i l", dict(i=13, k=13, j=11, l=5))


_LARGE = 1 << 24  # elements of a result that is too large to compare in float64


def limited(net: tn.Network, share: float, **options) -> tn.Plan:
    free = tn.plan(net, **options)
    return tn.plan(net, memory_limit=int(share * free.peak_bytes), **options)


def check(plan: tn.Plan, operands: list[torch.Tensor]) -> None:
    """Results and gradients equal those of the network in float64, within what rounding allows."""
    run = tn.compile(plan)
    whole = tn.compile(tn.plan(plan.network, grad=plan.grad))
    wide = [operand.detach().double().requires_grad_(operand.requires_grad) for operand in operands]
    large = [operand.detach().abs().requires_grad_(operand.requires_grad) for operand in wide]
    got, want, bound = (made if isinstance(made, tuple) else (made,) for made in (run(*operands), whole(*wide), whole(*large)))
    for a, b, c in zip(got, want, bound, strict=True):
        tn.testing.assert_close(a, b, bound=c, roundings=4096)
    needed = [place for place, operand in enumerate(operands) if operand.requires_grad]
    if needed:
        used = [place for place, result in enumerate(want) if result.requires_grad]
        cotangents = [torch.randn_like(want[i]) for i in used]
        narrow, sizes = [cotangent.to(got[0].dtype) for cotangent in cotangents], [cotangent.abs() for cotangent in cotangents]
        gots = torch.autograd.grad([got[i] for i in used], [operands[i] for i in needed], narrow)
        wants = torch.autograd.grad([want[i] for i in used], [wide[i] for i in needed], cotangents)
        bounds = torch.autograd.grad([bound[i] for i in used], [large[i] for i in needed], sizes)
        for a, b, c in zip(gots, wants, bounds, strict=True):
            tn.testing.assert_close(a, b, bound=c, roundings=4096)


def stays_within(seed: int) -> None:
    net = random_layer(seed)
    if math.prod(net.sizes[axis] for axis in net.output.axes) > _LARGE:
        net = random_layer(seed, most=8)
    grad = random_grad(seed, net)
    for share in (0.25, 0.5):
        plan = limited(net, share, grad=grad)
        operands = operands_for(plan)
        assert plan.slices or plan.path != tn.plan(net, grad=grad).path or plan.tile
        saved, peak = measured(tn.compile(plan), operands)
        assert (saved, peak) == (plan.saved_bytes, plan.peak_bytes)
        assert peak <= share * tn.plan(net, grad=grad).peak_bytes
        check(plan, operands)


@pytest.mark.parametrize("seed", range(6))
def test_random_layers_stay_within_their_limit(seed):
    stays_within(seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6, 50))
def test_many_random_layers_stay_within_their_limit(seed):
    stays_within(seed)


@pytest.mark.parametrize("net", [BTT, NAMED, TWICE], ids=["btt", "named", "twice"])
def test_every_gradient_mask(net):
    for mask in range(1 << len(net.names)):
        grad = tuple(name for place, name in enumerate(net.names) if mask >> place & 1)
        plan = limited(net, 0.3, grad=grad, sizes=dict.fromkeys(net.dynamic, 20))
        assert plan.peak_bytes <= 0.3 * tn.plan(net, grad=grad, sizes=dict.fromkeys(net.dynamic, 20)).peak_bytes
        operands = operands_for(plan)
        check(plan, operands)
        assert measured(tn.compile(plan), operands) == (plan.saved_bytes, plan.peak_bytes)


@pytest.mark.parametrize("name", [name for name in OUTPUTS if name not in ("an operand", "equal")])  # which need little anyway
def test_several_outputs_are_sliced_one_after_the_other(name):
    net = of_outputs(name)
    rows = dict(rows=20) if "..." in net.axes else {}
    for grad in (net.names, net.names[1:], net.names[:1], ()):
        free = tn.plan(net, grad=grad, **rows)
        for share in (0.5, 0.2) if free.peak_bytes else ():
            plan = limited(net, share, grad=grad, **rows)
            assert plan.peak_bytes <= share * free.peak_bytes
            operands = operands_for(plan)
            check(plan, operands)
            saved, peak = measured(tn.compile(plan), operands)
            assert (saved, peak) == (plan.saved_bytes, plan.peak_bytes) if plan.slices else peak <= plan.peak_bytes
            assert tn.Plan.from_json(plan.to_json()) == plan and str(plan)


def test_slices_of_one_output_do_not_repeat_the_others():
    net = of_outputs("a latent and its maps")
    plan = dataclasses.replace(tn.plan(net, grad=net.names, rows=20), tile=None, slices=(("k", 3), ("...", 8)))
    assert plan.slice_count == 3 + 3 * 3 + 3  # only the second output has k
    latent, first, second = 2 * 20 * 12 * 6, 2 * 20 * 6 * 8, 2 * 20 * 6 * 9
    by_columns = dataclasses.replace(plan, slices=(("k", 4),))
    assert by_columns.flops == latent + 2 * latent + first + latent + second
    check(plan, operands_for(plan))


def test_nothing_but_operands_is_kept():
    plan = limited(BTT, 0.1, grad=BTT.names, rows=100)
    assert plan.slices and plan.saved_bytes == 0
    assert measured(tn.compile(plan), operands_for(plan))[0] == 0


def test_contracted_axes_are_added_up_and_kept_ones_written():
    net = tn.network("x: i j k, y: i j l, z: k m, w: l m -> m", dict(i=6, j=9, k=15, l=17, m=2))
    plan = limited(net, 0.05, grad=net.names)
    cut = {axis for axis, _ in plan.slices}
    assert cut - {"m"}
    check(plan, operands_for(plan))


def test_other_sizes_than_planned_for_run_in_slices_too():
    plan = limited(BTT, 0.1, grad=BTT.names, rows=100)
    source = torch.Generator().manual_seed(0)
    for lead in ((37,), (3, 5), (), (0,)):
        shapes = [(*lead, 64), (8, 8, 4, 8), (8, 8, 4, 8)]
        check(plan, [torch.randn(shape, generator=source).requires_grad_() for shape in shapes])


def test_a_limit_that_is_met_anyway_changes_nothing():
    free = tn.plan(BTT, grad=BTT.names, rows=100)
    assert tn.plan(BTT, grad=BTT.names, rows=100, memory_limit=free.peak_bytes) == free


def test_a_limit_that_no_plan_meets_names_the_smallest():
    with pytest.raises(tn.PlanError, match=r"memory_limit is 10 bytes, no plan needs less than \d+ bytes") as error:
        tn.plan(BTT, grad=BTT.names, rows=100, memory_limit=10)
    smallest = int(str(error.value).split()[-2])
    assert tn.plan(BTT, grad=BTT.names, rows=100, memory_limit=smallest).peak_bytes == smallest
    with pytest.raises(tn.PlanError, match=f"less than {smallest} bytes"):
        tn.plan(BTT, grad=BTT.names, rows=100, memory_limit=smallest - 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(memory_limit=-1), "memory_limit is -1, expected a whole number of bytes ≥ 0, or None"),
        (dict(memory_limit=True), "memory_limit is True"),
        (dict(memory_limit="1 MB"), "memory_limit is '1 MB'"),
        (dict(memory_limit=1.5), "memory_limit is 1.5"),
        (dict(memory_limit=10**6, dtype=torch.bfloat16), "memory_limit= holds for float32 and float64, got torch.bfloat16"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(tn.PlanError, match=message):
        tn.plan(BTT, **options)


def test_a_limit_is_any_integer():
    free = tn.plan(BTT, grad=BTT.names, rows=100)
    assert tn.plan(BTT, grad=BTT.names, rows=100, memory_limit=np.int64(free.peak_bytes)) == free


@pytest.mark.parametrize("spec", ["x: i i j, y: j k -> k", "x: i j, y: j k -> k"])
def test_operands_that_are_reduced_first_are_refused_by_name(spec):
    with pytest.raises(tn.PlanError, match="'x' has an axis that is repeated or summed alone"):
        tn.plan(tn.network(spec), memory_limit=10**9)


def test_other_dtypes_are_refused_by_name():
    run = tn.compile(limited(BTT, 0.1, rows=100))
    with pytest.raises(tn.OperatorError, match=r"operand 'x' is torch.bfloat16: slices are added up in float32 or float64"):
        run(*(operand.bfloat16() for operand in operands_for(run.plan)))
    with pytest.raises(tn.SizeError, match="tensor 'x'"):
        run(torch.zeros(3, 63), *operands_for(run.plan)[1:])


def test_sliced_plans_are_printed_stored_and_pickled():
    plan = limited(BTT, 0.1, grad=BTT.names, rows=100)
    assert f"in {plan.slice_count} slices of " in str(plan) and "nothing kept" in str(plan)
    assert tn.Plan.from_json(plan.to_json()) == plan
    run = tn.compile(plan)
    assert "# run on slices of" in run.source and "def backward" in run.source
    again, operands = pickle.loads(pickle.dumps(run)), operands_for(plan)
    assert torch.equal(again(*operands), run(*operands))
    with pytest.raises(tn.PlanError, match="runs through tn.compile"):
        tn.Program(plan)


def test_transforms_and_second_derivatives_see_the_whole():
    plan = limited(BTT, 0.1, grad=BTT.names, rows=10)
    run, operands = tn.compile(plan), [operand.detach() for operand in operands_for(plan, torch.float64)]

    def loss(*operands):
        return run(*operands).square().sum()

    want = torch.func.grad(loss)(*operands)
    tracked = [operand.requires_grad_() for operand in operands]
    (got,) = torch.autograd.grad(loss(*tracked), tracked[:1], create_graph=True)
    torch.testing.assert_close(got, want)
    (second,) = torch.autograd.grad(got.sum(), tracked[1:2])
    assert second.abs().max() > 0
    compiled = torch.compile(run.__call__, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*tracked), run(*tracked))
