"""Plans ask operators: which parts of a plan are offered, what a table's rows choose, and that layers give the same numbers either way."""

import dataclasses
import sys
import warnings

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

import tn
from tests.kernels.oracle import DEVICE
from tn import measured, operators, regions
from tn.calibrate import with_operators
from tn.errors import OperatorError
from tn.machine import Machine, machine
from tn.operators import Offer, Refusal
from tn.program import OperatorProgram, Program, program
from tn.regions import TRAINED

BTT = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=4, j=5, r=2, k=3, l=6), cores=("a", "c"))
BILINEAR = tn.network("x: ... i, w: i o, x: ... j, v: j o -> ... o", dict(i=6, j=6, o=5), cores=("w", "v"))
SQUARED = tn.network("q: b h s d, k: b h t d, q: b h s e, k: b h t e, v: b h t f -> b h s f", dict(b=2, h=2, s=20, t=20, d=18, e=18, f=5))
PAIR = tn.network("q: b h s d, k: b h t d, p: b h s e, l: b h t e, v: b t h f -> b s h f", dict(b=2, h=2, s=40, t=38, d=16, e=16, f=5))
ALONE = tn.network("q: s d, k: t d, q: s e, k: t e, v: t f -> s f", dict(s=20, t=20, d=18, e=18, f=5))
SUMMED = tn.network("a: b m k, c: b k n -> m n", dict(b=64, m=32, k=32, n=32))


def case_of(network, operator, **options):
    """The row of a table that decides about the first part an operator offers for."""
    plan = tn.plan(network, device=DEVICE, **options)
    part, answer = next((a.part, a.answer) for a in regions.answers(plan) if a.answer.operator == operator)
    assert isinstance(answer, Offer), answer
    return regions.case(plan, part, answer)


def table(**rows):
    return dataclasses.replace(machine(), name="made up", operators=rows)


def exact(network, operands):
    """The one-shot float64 einsum, one letter an axis."""
    return program(tn.plan(network, search="left_to_right", dtype=torch.float64), "einsum")(*operands)


def compare(run, network, shapes):
    operands = [torch.randn(shape, device=DEVICE, requires_grad=True) for shape in shapes]
    wide = [operand.detach().double().cpu().requires_grad_() for operand in operands]
    got, want = run(*operands), exact(network, wide)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-4)
    g = torch.randn_like(got)
    for one, other in zip(torch.autograd.grad(got, operands, g), torch.autograd.grad(want, wide, g.double().cpu()), strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=1e-4, atol=2e-4)


def compare_layers(layer, plain, x):
    """Values and every gradient of a layer beside those of its twin in float64; gives the values."""
    x = x.clone().requires_grad_()
    wide = x.detach().double().cpu().requires_grad_()
    got, want = layer(x), plain(wide)
    torch.testing.assert_close(got.double().cpu(), want, rtol=1e-4, atol=1e-4)
    g = torch.randn_like(got)
    ours = torch.autograd.grad(got, [x, *layer.parameters()], g)
    theirs = torch.autograd.grad(want, [wide, *plain.parameters()], g.double().cpu())
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.double().cpu(), other, rtol=1e-4, atol=2e-4)
    return got


NETWORKS = {
    "chain": (BTT, [(7, 20), BTT.shape("a"), BTT.shape("c")]),
    "gated": (BILINEAR, [(3, 2, 6), (6, 5), (6, 5)]),
    "squared_attention": (SQUARED, [(2, 2, 20, 18), (2, 2, 20, 18), (2, 2, 20, 5)]),
    "squared_attention, two pairs": (PAIR, [(2, 2, 40, 16), (2, 2, 38, 16), (2, 2, 40, 16), (2, 2, 38, 16), (2, 38, 2, 5)]),
    "squared_attention, no batch": (ALONE, [(20, 18), (20, 18), (20, 5)]),
    "batch_reduced_gemm": (SUMMED, [(64, 32, 32), (64, 32, 32)]),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_measured_row_chooses_the_operator_and_the_reverse_row_does_not(name):
    network, shapes = NETWORKS[name]
    operator = name.split(",")[0]
    case = case_of(network, operator, grad=network.names)
    fast, slow = table(**{case: (1e-6, 2e-6)}), table(**{case: (2e-6, 1e-6)})
    plan = tn.plan(network, grad=network.names, device=DEVICE, table=fast)
    assert f"{operator}: chosen (2.00× measured)" in str(plan)
    run = tn.compile(plan)
    assert isinstance(run, OperatorProgram)
    assert [offer.operator for _, offer in run.choices] == [operator]
    assert "op_0(" in run.source
    compare(run, network, shapes)
    other = tn.plan(network, grad=network.names, device=DEVICE, table=slow)
    assert f"{operator}: offered, not chosen (0.50× measured)" in str(other)
    assert type(tn.compile(other)) is Program
    unmeasured = tn.plan(network, grad=network.names, device=DEVICE)
    assert f"{operator}: offered, no measurement on this table" in str(unmeasured)
    assert type(tn.compile(unmeasured)) is Program


def test_refusals_are_printed():
    text = str(tn.plan(SQUARED, grad=SQUARED.names, device=DEVICE, dtype=torch.float64))
    assert "v8 from q, k, v: squared_attention: refused: dtype float64; it computes in float32" in text
    text = str(tn.plan(BTT, device=DEVICE, dtype=torch.float64))
    assert "x: chain: refused: dtype float64; it computes in float32, float16" in text
    layer = tn.StructuredLinear(12, 12, structure="btt", device=DEVICE)
    assert "chain: offered, no measurement on this table" in tn.explain(layer)


def test_rows_for_training_and_evaluation_are_apart():
    case = case_of(BTT, "chain")
    assert case_of(BTT, "chain", grad=("a",)) == case + TRAINED
    fast = table(**{case: (1e-6, 2e-6)})
    assert isinstance(tn.compile(tn.plan(BTT, device=DEVICE, table=fast)), OperatorProgram)
    assert type(tn.compile(tn.plan(BTT, device=DEVICE, table=fast, grad=("a",)))) is Program


def test_parts_do_not_overlap_and_the_rest_is_planned():
    """Three tensor-train cores: a chain of two and what is left."""
    network = tn.network(
        "x: ... (a b c), g: a i r, h: r b j s, k: s c l -> ... (i j l)", dict(a=3, b=2, c=4, i=2, j=3, l=5, r=2, s=3), cores="ghk"
    )
    plan = tn.plan(network, grad=network.names, device=DEVICE)
    cases = {answer.answer.case + TRAINED: (1e-6, 2e-6) for answer in regions.answers(plan) if isinstance(answer.answer, Offer)}
    run = tn.compile(tn.plan(network, grad=network.names, device=DEVICE, table=table(**cases)))
    values = [value for part, _ in run.choices for value in part.values]
    assert len(values) == len(set(values)) > 0
    compare(run, network, [(6, 24), *(network.shape(name) for name in "ghk")])


@pytest.mark.parametrize("structure", ["btt", "monarch", "low_rank", "tt", "kronecker", "blast", "dense", "block_diagonal"])
def test_a_layer_that_insists_gives_the_same_numbers(structure):
    layer = tn.StructuredLinear(24, 18, structure=structure, backend="triton", device=DEVICE)
    plain = tn.StructuredLinear(24, 18, structure=structure, dtype=torch.float64)
    plain.load_state_dict(layer.state_dict())
    for rows in (7, 1, 40) if structure == "btt" else (7,):
        compare_layers(layer, plain, torch.randn(rows, 24, device=DEVICE))
    runs = list(layer._programs.values())
    assert all(isinstance(run, OperatorProgram) and run.insists for run in runs)
    made = {value for part, _ in runs[0].choices for value in part.values}
    assert made == {step.out for step in runs[0].plan.steps}
    assert layer(torch.randn(0, 24, device=DEVICE)).shape == (0, 18)


@pytest.mark.parametrize("structure", ["btt", "monarch", "low_rank", "dense", "blast"])
@pytest.mark.parametrize("outputs", [18, 17])
def test_operators_add_the_bias(structure, outputs):
    """Also of padded layers, where the bias is shorter than the result and torch adds it."""
    layer = tn.StructuredLinear(24, outputs, structure=structure, backend="triton", device=DEVICE)
    plain = tn.StructuredLinear(24, outputs, structure=structure, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.normal_()
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(7, 24, device=DEVICE)
    got = compare_layers(layer, plain, x)
    (run,) = layer._programs.values()
    if layer.built.d_out == outputs:
        assert run.biased is not None
        with torch.no_grad():  # nothing is added outside
            torch.testing.assert_close(run.biased(x, *(getattr(layer, name) for name in layer.network.cores), layer.bias), got)
    torch.testing.assert_close(torch.func.vmap(layer)(x), got)


def test_a_bias_that_no_operator_adds_is_added_by_torch(monkeypatch):
    monkeypatch.setattr(regions, "with_bias", lambda *_: None)
    layer = tn.StructuredLinear(22, 18, structure="btt", backend="triton", device=DEVICE)
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(7, 22, device=DEVICE)
    torch.testing.assert_close(layer(x), x @ layer.to_dense().mT + layer.bias)


def test_the_bias_of_a_kernel_that_fails_later(monkeypatch):
    """The bias is there when torch takes over."""
    layer = tn.StructuredLinear(20, 18, structure="btt", factors=((4, 5), (3, 6)), rank=3, device=DEVICE)
    plan = layer.plan(4, grad=())
    case = next(regions.case(plan, a.part, a.answer) for a in regions.answers(plan) if a.answer.operator == "chain")
    with torch.no_grad():
        layer.bias.normal_()
    x = torch.randn(3, 20, device=DEVICE)
    tn.use_table(table(**{case: (1e-6, 2e-6)}), DEVICE)
    try:
        with torch.no_grad():
            want = layer(x)
            _breaking(monkeypatch)
            with pytest.warns(UserWarning, match="from here on: out of resource"):
                torch.testing.assert_close(layer(x), want)
            torch.testing.assert_close(layer(x), want)
    finally:
        tn.use_table(None, DEVICE)


def test_the_backend_of_a_block_and_of_one_call():
    layer = tn.StructuredLinear(12, 12, structure="btt", device=DEVICE)
    x = torch.randn(5, 12, device=DEVICE)
    with tn.backend("triton"):
        inside = layer(x)
    assert {type(run) for run in layer._programs.values()} == {OperatorProgram}
    torch.testing.assert_close(inside, layer(x))
    a, b = torch.randn(5, 6, device=DEVICE), torch.randn(6, 7, device=DEVICE)
    torch.testing.assert_close(tn.contract("m k, k n -> m n", a, b, backend="triton"), a @ b)


def test_what_a_backend_cannot_honour_is_an_error_with_every_reason():
    layer = tn.StructuredLinear(12, 12, structure="btt", backend="triton", device=DEVICE, dtype=torch.float64)
    with pytest.raises(OperatorError, match="backend 'triton' cannot run x: ") as raised:
        layer(torch.randn(5, 12, dtype=torch.float64, device=DEVICE))
    assert "chain: dtype float64; it computes in float32, float16" in str(raised.value)
    assert str(raised.value).count("strided_gemm: dtype float64") == 2
    for spec, sizes, reason in (("i j -> j i", {}, "there is no product to run"), ("i j, j k -> i k", {"k": 0}, "an axis has size zero")):
        with pytest.raises(OperatorError, match=reason):
            program(tn.plan(tn.network(spec, sizes), device=DEVICE), "triton")
    mixed = tn.StructuredLinear(12, 12, structure="btt", backend="triton", device=DEVICE)
    mixed.first.data = mixed.first.data.half()
    with pytest.raises(OperatorError, match=r"input is torch\.float32, the layer torch\.float16: convert the input"):
        mixed(torch.randn(5, 12, device=DEVICE))
    with pytest.raises(OperatorError, match="unknown backend 'tritn': did you mean 'triton'"):
        tn.StructuredLinear(12, 12, backend="tritn")


def test_insisting_where_no_kernel_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    layer = tn.StructuredLinear(12, 12, structure="btt", backend="triton")
    with pytest.raises(OperatorError, match=r"runs on CUDA, or on a CPU in its interpreter \(TRITON_INTERPRET=1\); the tensors are on cpu"):
        layer(torch.randn(5, 12))
    assert "operators (" not in str(layer.plan(5))


def test_a_layer_that_insists_can_be_traced_and_transformed():
    layer = tn.StructuredLinear(12, 12, structure="btt", backend="triton", device=DEVICE)
    assert tn.flops(layer.to("meta"), torch.empty(5, 12, device="meta")) > 0
    layer = tn.StructuredLinear(12, 12, structure="btt", backend="triton", device=DEVICE)
    x = torch.randn(3, 5, 12, device=DEVICE)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    jacobian = torch.func.jacrev(lambda t: layer(t))(x[0, 0])
    torch.testing.assert_close(jacobian, layer.to_dense(), rtol=1e-4, atol=1e-5)


def test_a_compiled_layer_runs_its_operators():
    calls = []

    def backend(graph, example):
        calls.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return aot_eager(graph, example)

    layer = tn.StructuredLinear(12, 12, structure="btt", backend="triton").to(DEVICE)
    x = torch.randn(5, 12, device=DEVICE, requires_grad=True)
    torch._dynamo.reset()
    got, want = torch.compile(layer, fullgraph=True, backend=backend)(x), layer(x)
    assert "tn.chain.default" in calls
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), x)[0] for y in (got, want)))
    torch._dynamo.reset()
    double = tn.StructuredLinear(12, 12, structure="btt", backend="triton", dtype=torch.float64).to(DEVICE)
    with pytest.raises((OperatorError, torch._dynamo.exc.TorchRuntimeError, torch._dynamo.exc.Unsupported), match="dtype float64"):
        torch.compile(double, fullgraph=True, backend="aot_eager")(x.double())


def _breaking(monkeypatch):
    """Launches of the chain fail."""

    def launch(*arguments, **rest):
        raise OperatorError("out of resource: shared memory, Required: 300000")

    monkeypatch.setattr(sys.modules["tn_kernels.chain"], "launch", launch)
    monkeypatch.setattr(regions, "_failures", {})


def test_a_kernel_that_does_not_launch_is_a_refusal_and_torch_runs(monkeypatch):
    network = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=2, j=5, r=2, k=3, l=6), cores=("a", "c"))
    fast = table(**{case_of(network, "chain"): (1e-6, 2e-6)})
    plan = tn.plan(network, device=DEVICE, table=fast)
    _breaking(monkeypatch)
    run = tn.compile(plan)
    assert type(run) is Program
    operands = [torch.randn(shape, device=DEVICE) for shape in ((7, 10), network.shape("a"), network.shape("c"))]
    torch.testing.assert_close(run(*operands).double().cpu(), exact(network, [t.double().cpu() for t in operands]), rtol=1e-4, atol=1e-4)
    assert "chain: refused: does not run here: out of resource: shared memory, Required: 300000" in str(plan)
    with tn.backend("triton"):  # whose chain is refused, and whose single steps run
        layer = tn.Contraction(str(network.spec), sizes=network.sizes, cores=("a", "c"), device=DEVICE)
        layer(operands[0])
    (run,) = layer._programs.values()
    assert [offer.operator for _, offer in run.choices] == ["strided_gemm", "strided_gemm"]


def test_a_kernel_that_fails_later_warns_once_and_torch_runs(monkeypatch):
    network = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=5, j=2, r=2, k=3, l=6), cores=("a", "c"))
    run = tn.compile(tn.plan(network, device=DEVICE, table=table(**{case_of(network, "chain"): (1e-6, 2e-6)})))
    _breaking(monkeypatch)
    operands = [torch.randn(shape, device=DEVICE) for shape in ((7, 10), network.shape("a"), network.shape("c"))]
    with pytest.warns(UserWarning, match="torch runs x: .* from here on: out of resource"):
        first = run(*operands)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(run(*operands), first)
    assert "chain: refused: does not run here: out of resource" in str(run.plan)


def test_shapes_that_do_not_fit_are_the_callers_mistake():
    run = tn.compile(tn.plan(BTT, device=DEVICE, table=table(**{case_of(BTT, "chain"): (1e-6, 2e-6)})))
    with pytest.raises(tn.SizeError, match="has size 21, expected i=4 × j=5"):
        run(torch.randn(7, 21, device=DEVICE), torch.randn(BTT.shape("a"), device=DEVICE), torch.randn(BTT.shape("c"), device=DEVICE))
    assert run.choices


def test_saved_plans_do_not_know_operators():
    fast = table(**{case_of(BTT, "chain"): (1e-6, 2e-6)})
    plan = tn.plan(BTT, device=DEVICE, table=fast)
    again = tn.Plan.from_json(plan.to_json(), fast)
    assert again == plan
    assert "dtype" not in plan.to_json()
    assert "triton" not in plan.to_json()
    assert plan == tn.plan(BTT, device=DEVICE, table=fast, dtype=torch.int32)  # of as many bytes


def test_tables_keep_their_rows_and_refuse_others():
    made = table(**{"chain n1 float32": (1e-6, 2e-6)})
    again = Machine.from_json(made.to_json())
    assert again == made != dataclasses.replace(made, operators={})
    assert dict(again.operators) == {"chain n1 float32": (1e-6, 2e-6)}
    for row in ("[1.0]", "[1.0, 0]", '["a", 1.0]', "[1.0, Infinity]"):
        with pytest.raises(tn.PlanError, match="expected seconds of the operator and of torch"):
            Machine.from_json(made.to_json().replace("[1e-06,2e-06]", row))


def test_attempts_reach_the_gradient():
    class Breaks(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x + 1

        @staticmethod
        def backward(ctx, g):
            raise OperatorError("no backward here")

    offer = Offer("breaks", Breaks.apply, "")
    assert operators.attempt(offer, [torch.ones(3)]) is offer
    refusal = operators.attempt(offer, [torch.ones(3, requires_grad=True)])
    assert isinstance(refusal, Refusal) and "no backward here" in refusal.reason


class Clock:
    """Runs what it is given and pretends that operators take one second, torch two."""

    def __init__(self):
        self.runs = []

    def __call__(self, run):
        self.runs.append(run)
        run()
        return 1.0 if len(self.runs) % 2 else 2.0


def test_measured_rows_choose_and_say_where_they_were_measured():
    clock, device = Clock(), torch.device(DEVICE)
    plans = [tn.plan(BTT, grad=grad, rows=16, device=DEVICE) for grad in ((), BTT.names)]
    made = with_operators(machine(), device, torch.float32, clock, plans)
    assert dict(made.operators) == {case_of(BTT, "chain", rows=16, grad=grad): (1.0, 2.0) for grad in ((), BTT.names)}
    assert len(clock.runs) == 4
    where = "2 cases of kernels measured" if DEVICE == "cuda" else "kernels not measured on hardware, but interpreted"
    assert made.source.endswith(where)
    assert isinstance(tn.compile(tn.plan(BTT, rows=16, device=DEVICE, table=made)), OperatorProgram)


def test_a_table_without_rows_says_so():
    assert with_operators(machine(), torch.device("cpu"), torch.float32, Clock()).source.endswith("; kernels not measured")


def test_what_does_not_run_has_no_row(monkeypatch):
    network = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=3, j=2, r=2, k=3, l=6), cores=("a", "c"))
    _breaking(monkeypatch)
    assert measured.rows([tn.plan(network, rows=16, device=DEVICE)], Clock()) == {}


def test_common_layers_ask_for_the_kernels():
    """Every plan that a calibration times by default is offered an operator that is meant for it."""
    asked = set()
    for plan in measured.common(machine(), torch.float32, torch.device(DEVICE)):
        offers = [answer.answer.operator for answer in regions.answers(plan) if isinstance(answer.answer, Offer)]
        assert offers, str(plan)
        asked |= set(offers)
    assert asked >= {"chain", "gated", "squared_attention", "batch_reduced_gemm", "strided_gemm"}


def test_layers_plan_with_the_table_in_use(monkeypatch):
    layer = tn.StructuredLinear(20, 18, structure="btt", factors=((4, 5), (3, 6)), rank=2, device=DEVICE)
    plan = layer.plan(4, grad=())
    case = next(regions.case(plan, a.part, a.answer) for a in regions.answers(plan) if a.answer.operator == "chain")
    tn.use_table(table(**{case: (1e-6, 2e-6)}), DEVICE)
    try:
        with torch.no_grad():
            layer(torch.randn(3, 20, device=DEVICE))
        assert "chain: chosen (2.00× measured)" in str(layer.plan(4, grad=()))
    finally:
        tn.use_table(None, DEVICE)
    assert "made up" not in str(layer.plan(4, grad=()))
    (run,) = layer._programs.values()
    assert [offer.operator for _, offer in run.choices] == ["chain"]
