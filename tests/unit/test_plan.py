"""Plans: counts, determinism, layouts without copies, JSON, and the printed table."""

import dataclasses
import json

import pytest
import torch

import tn
from tn.machine import machine
from tn.pairing import is_run

BTT = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=32, j=32, r=4, k=32, l=32), cores=("a", "c"))
TT = tn.network("x: ... (a b), g: a i r, h: r b j -> ... (i j)", dict(a=16, b=24, i=24, j=32, r=8), cores=("g", "h"))


def test_flops_agree_with_cotengra():
    for net in (BTT, TT):
        plan = tn.plan(net, rows=300)
        assert plan.flops == 2 * plan.tree.contraction_cost()


def test_gradients_of_everything_cost_twice_the_forward_pass():
    plan = tn.plan(BTT, grad=("x", "a", "c"))
    assert plan.backward_flops == 2 * plan.flops
    assert tn.plan(BTT, grad=()).backward_flops == 0
    assert tn.plan(BTT, grad=("a", "c")).backward_flops < plan.backward_flops


NO_COPIES = dataclasses.replace(machine(), name="copies are slow", copy=1e3)


def test_two_core_btt_needs_no_copy_forward_or_backward():
    plan = tn.plan(BTT, grad=("x", "a", "c"), table=NO_COPIES)
    assert plan.copies == 0
    assert plan.orders[3][-1] == "..."  # the intermediate is batch-last


def test_copies_predicted_are_the_copies_that_run():
    plan = tn.plan(BTT, grad=("x", "a", "c"), table=NO_COPIES)
    run = tn.compile(plan)
    operands = [torch.randn(64, 1024), *(torch.randn(BTT.shape(name)) for name in BTT.cores)]
    operands = [operand.requires_grad_() for operand in operands]
    g = torch.randn_like(run(*operands))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        torch.autograd.grad(run(*operands), operands, g)
    copies = sum(event.count for event in profile.key_averages() if event.key in ("aten::copy_", "aten::clone"))
    assert copies == plan.copies == 0


def test_planning_is_a_pure_function():
    assert tn.plan(BTT, grad=("x",), rows=77) == tn.plan(BTT, grad=("x",), rows=77)
    assert tn.plan(BTT, grad=("x",)).to_json() == tn.Plan.from_json(tn.plan(BTT, grad=("x",)).to_json()).to_json()


def test_weights_are_merged_only_when_rows_pay_for_it():
    chain = tn.network("x: ... i, a: i r, b: r o -> ... o", dict(i=64, r=64, o=64), cores=("a", "b"))
    assert tn.plan(chain, rows=2, goal="flops").path[0] == (0, 1)
    assert tn.plan(chain, rows=10**6, goal="flops").path[0] == (1, 2)


def test_frozen_tensors_change_the_order():
    wide = tn.network("x: ... i, a: i r, b: r o -> ... o", dict(i=64, r=48, o=64), cores=("a", "b"))
    frozen, trained = tn.plan(wide, rows=128, goal="flops", grad=()), tn.plan(wide, rows=128, goal="flops", grad=("a",))
    assert trained.backward_flops + trained.flops <= tn.plan(wide, rows=128, goal="flops", grad=("a",), search="left_to_right").flops * 3
    assert frozen.flops <= trained.flops


def test_left_to_right_is_the_order_as_written():
    plan = tn.plan(BTT, search="left_to_right")
    assert plan.path == ((0, 1), (3, 2))


def test_runs_ignore_axes_of_size_one():
    sizes = {"a": 2, "b": 1, "c": 3}
    assert is_run(("a", "b", "c"), ("a", "c"), sizes)
    assert not is_run(("a", "b", "c"), ("c", "a"), sizes)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(goal="tiem"), "unknown goal 'tiem': did you mean 'time'"),
        (dict(search="cotenga"), "unknown search 'cotenga': did you mean 'cotengra'"),
        (dict(sizes={"q": 3}), "unknown axis 'q'"),
        (dict(grad=("b",)), "unknown tensor 'b'"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(ValueError) as error:
        tn.plan(BTT, **kwargs)
    assert message in str(error.value)


def test_another_table_is_refused():
    text = tn.plan(BTT).to_json().replace(machine().digest, "0" * 16)
    with pytest.raises(tn.PlanError, match="generic-cpu"):
        tn.Plan.from_json(text)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("x: i j -> a: i, b: j", "output 'a': no operand with axis 'i' takes part"),
        ("x: b i, w: i o, v: i p, u: i q -> y: b o, z: b p", "tensor 'u' takes part in no output"),
    ],
)
def test_outputs_that_cannot_be_told_apart_are_refused(spec, message):
    with pytest.raises(tn.SpecError, match=message):
        tn.network(spec)


def test_scores_used_twice_are_computed_once():
    net = tn.network("q: b s d, k: b t d, q: b s e, k: b t e, v: b t f -> b s f", dict(b=2, s=32, t=32, d=16, e=16, f=16))
    plan = tn.plan(net, grad=net.names)
    assert plan.tree_flops == plan.tree.contraction_cost() * 2 >= 1.4 * plan.flops
    assert str(plan).count("= q · k") == 1 and "v5 · v5" in str(plan) and "without sharing" in str(plan)
    assert tn.plan(net, search="left_to_right").steps[0].out == 5


def test_several_outputs_share_what_they_have_in_common():
    sizes = dict(w=64, c=8, h=4, d=16, e=16)
    latent = tn.network(
        "x: ... w, down: w c, up: c (h d), also: c (h e) -> k: ... (h d), v: ... (h e)", sizes, cores=("down", "up", "also")
    )
    plan = tn.plan(latent, rows=4096, grad=latent.names, goal="flops")
    assert [part.names for part in latent.parts] == [("x", "down", "up"), ("x", "down", "also")]
    assert plan.flops == 2 * 4096 * (64 * 8 + 2 * 8 * 64) and str(plan).count("x · down") == 1
    with pytest.raises(tn.PlanError, match="one output"):
        _ = plan.tree
    assert tn.Plan.from_json(plan.to_json()) == plan


def test_the_table_names_steps_and_operators():
    text = str(tn.plan(BTT, grad=("x", "a", "c"), table=NO_COPIES))
    for words in ("v3 = x · a", "bmm into a view", "dc = dv4 · v3", "0 copies", "table copies are slow"):
        assert words in text


def test_source_is_printable_python_without_the_planner():
    source = tn.compile(BTT).source
    assert "torch.bmm" in source and "def backward" in source and "out=" in source
    compile(source, "<program>", "exec")


def test_a_program_names_the_tensor_that_does_not_fit():
    f = tn.compile(BTT)
    a, c = torch.zeros(32, 32, 4, 32), torch.zeros(32, 32, 4, 32)
    with pytest.raises(tn.SizeError, match="tensor 'x': dimension"):
        f(torch.zeros(2, 1000), a, c)
    with pytest.raises(tn.SizeError, match="tensor 'c': axis 'l' has size 31"):
        f(torch.zeros(2, 1024), a, c[..., :31])


def test_planning_for_one_row_still_serves_many():
    f = tn.compile(tn.plan(BTT, rows=1, grad=("x", "a", "c")))
    operands = [torch.randn(5, 1024, dtype=torch.float64), *(torch.randn(32, 32, 4, 32, dtype=torch.float64) for _ in range(2))]
    want = torch.einsum("bij,ijrk,kirl->bkl", operands[0].reshape(5, 32, 32), *operands[1:]).reshape(5, 1024)
    assert torch.allclose(f(*operands), want)


CLASHES = [
    "rows",
    "lead",
    "n",
    "size",
    "start",
    "g",
    "y",
    "gradient",
    "torch",
    "mismatch",
    "v3",
    "s1",
    "d0",
    "x0",
    "n_i",
    "lambda",
    "range",
    "v3_",
]


@pytest.mark.parametrize("backend", ["planned", "einsum"])
@pytest.mark.parametrize("name", CLASHES)
def test_any_word_names_a_tensor_or_an_axis(name, backend):
    spec = f"{name}: ... (i {name}), a: i {name} r k, c: k i r l -> ... (k l)"
    operands = [
        torch.randn(300, 12, dtype=torch.float64),
        torch.randn(3, 4, 2, 5, dtype=torch.float64),
        torch.randn(5, 3, 2, 4, dtype=torch.float64),
    ]
    for operand in operands:
        operand.requires_grad_()
    want = torch.einsum("bij,ijrk,kirl->bkl", operands[0].reshape(300, 3, 4), *operands[1:]).reshape(300, 20)
    got = tn.contract(spec, *operands, backend=backend)
    assert torch.allclose(got, want)
    for a, b in zip(torch.autograd.grad(got.sum(), operands), torch.autograd.grad(want.sum(), operands), strict=True):
        assert torch.allclose(a, b)


def test_a_plan_remembers_what_it_was_chosen_over():
    plan = tn.plan(TT, grad=("x", "g", "h"), rows=2048)
    assert plan.others and all(seconds >= plan.seconds for seconds, _, _ in plan.others)
    assert "not chosen: " in str(plan) and "with every step in a layout of its own, all rows at once" in str(plan)
    assert tn.Plan.from_json(plan.to_json()) == plan


def test_explain_shows_every_range_of_rows_in_both_modes():
    model = torch.nn.Sequential(tn.StructuredLinear(64, 64, structure="btt"), torch.nn.GELU(), tn.StructuredLinear(64, 64, structure="btt"))
    text = tn.explain(model)
    assert text.startswith("0, 2\nStructuredLinear(64, 64")
    assert text.count("plan of x: ") == 8 and "training, fewer than 16 rows:" in text and "evaluation, any other number of rows:" in text
    assert tn.explain(torch.nn.ReLU()) == "no contractions"


def test_one_layer_runs_another_plan_for_few_rows():
    layer = tn.StructuredLinear(64, 64, structure="btt", rank=2)
    with torch.no_grad():
        for rows in (1, 15, 16, 95, 96, 511, 512, 3000):
            layer(torch.randn(rows, 64))
    assert sorted(segment for *_, segment, _cast in layer._programs) == [0, 1, 2, 3]


def _like_einsum(network, equation, *operands):
    run = tn.compile(tn.plan(network, grad=network.names, rows=len(operands[0])))
    operands = [operand.double().requires_grad_() for operand in operands]
    got, want = run(*operands), torch.einsum(equation, *operands)
    assert torch.allclose(got, want)
    cotangent = torch.randn_like(got)
    for one, other in zip(*(torch.autograd.grad(value, operands, cotangent) for value in (got, want)), strict=True):
        assert torch.allclose(one, other)


def test_gradients_of_elementwise_products_are_products_summed_in_place():
    network = tn.network("x: ... t i, w: t o i -> ... t o i", dict(t=40, i=60, o=4))
    plan = tn.plan(network, grad=("x", "w"), rows=130)
    assert [step.pairing.kind for step in (*plan.steps, *plan.backward_steps)] == ["multiply", "dot", "dot"] and plan.copies == 0
    _like_einsum(network, "bti,toi->btoi", torch.randn(130, 40, 60), torch.randn(40, 4, 60))


def test_a_small_operand_is_copied_where_a_large_one_would_be():
    network = tn.network("x: ... i j, w: r j i o -> ... r o", dict(i=30, j=31, r=10, o=130))
    (step,) = tn.plan(network, rows=6).steps
    assert (step.pairing.batch_on, step.pairing.copy_left, step.pairing.copy_right) == ("right", True, False)
    _like_einsum(network, "bij,rjio->bro", torch.randn(6, 30, 31), torch.randn(10, 31, 30, 130))


@pytest.mark.parametrize(
    "change",
    [
        lambda value: value["others"][0].__setitem__(0, None),
        lambda value: value["others"][0][1][0].__setitem__(1, 7),
        lambda value: value.update(tile=64, orders=value["orders"][:1]),
    ],
)
def test_edited_plans_are_refused(change):
    value = json.loads(tn.plan(BTT, rows=4096).to_json())
    assert value["others"]
    change(value)
    with pytest.raises(tn.PlanError):
        tn.Plan.from_json(json.dumps(value))
