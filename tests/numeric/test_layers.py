"""Layers under everything PyTorch does to a module: gradients of every order, transforms, compilation, autocast, copies, threads."""

import copy
import dataclasses
import pickle
import sys
import threading

import pytest
import torch
from torch import nn

import tn
from tn.machine import machine
from tn.testing import assert_close

STRUCTURES = {"dense": {}, "low_rank": {"rank": 3}, "btt": {"rank": 2}, "btt padded": {"rank": 1}}


def make(case: str, dtype: torch.dtype = torch.float64, **options) -> tn.StructuredLinear:
    sizes = (13, 31) if case == "btt padded" else (12, 20)
    layer = tn.StructuredLinear(*sizes, structure=case.split()[0], **STRUCTURES[case], dtype=dtype, **options)
    nn.init.normal_(layer.bias) if layer.bias is not None else None
    return layer


def absolute(layer: tn.StructuredLinear) -> torch.Tensor:
    """The matrix of the absolute values of the cores: no sum inside the layer is larger than its own."""
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.abs_()
    return twin.to_dense().detach()


def loss(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return torch.tanh(layer(x)).square().sum()


@pytest.fixture(params=STRUCTURES)
def case(request) -> str:
    return request.param


def test_equals_its_dense_matrix(case):
    layer = make(case)
    x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
    bound = x.abs() @ absolute(layer).mT + layer.bias.abs()
    assert_close(layer(x), x @ layer.to_dense().mT + layer.bias, bound=bound, roundings=40)


def test_first_and_second_derivatives(case):
    layer = make(case)
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def f(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    assert torch.autograd.gradcheck(f, (x, *parameters), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, *parameters))


def test_only_needed_gradients(case):
    for frozen in range(len(make(case).network.cores)):
        layer, whole = make(case), make(case)
        whole.load_state_dict(layer.state_dict())
        getattr(layer, layer.network.cores[frozen]).requires_grad_(False)
        x = torch.randn(5, layer.in_features, dtype=torch.float64)
        loss(layer, x).backward()
        loss(whole, x).backward()
        for name, parameter in layer.named_parameters():
            if not parameter.requires_grad:
                assert parameter.grad is None
            else:
                assert_close(
                    parameter.grad, dict(whole.named_parameters())[name].grad, bound=torch.ones_like(parameter) * 100, roundings=100
                )


def test_functional_transforms_agree_with_autograd(case):
    layer = make(case)
    x = torch.randn(4, layer.in_features, dtype=torch.float64)
    values = {name: p.detach() for name, p in layer.named_parameters()}

    def per_sample(values, row):
        return torch.tanh(torch.func.functional_call(layer, values, (row,))).square().sum()

    mapped = torch.func.vmap(torch.func.grad(per_sample), in_dims=(None, 0))(values, x)
    loss(layer, x).backward()
    for name, parameter in layer.named_parameters():
        assert torch.allclose(mapped[name].sum(0), parameter.grad, rtol=1e-9, atol=1e-9)


def test_forward_derivative_is_not_silently_zero(case):
    layer = make(case)
    x, t = (torch.randn(4, layer.in_features, dtype=torch.float64) for _ in range(2))
    _, tangent = torch.func.jvp(layer, (x,), (t,))
    assert_close(tangent, t @ layer.to_dense().mT, bound=t.abs() @ absolute(layer).mT, roundings=40)


def test_compiles_to_one_graph_for_all_batch_sizes(case):
    layer = make(case, dtype=torch.float32)
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, dynamic=True)
    for rows in (2, 3, 8, 17, 64):
        x = torch.randn(rows, layer.in_features)
        assert torch.allclose(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
    assert len(graphs) <= 2


def test_compiled_training_step_equals_eager(case):
    torch._dynamo.reset()
    layer = make(case, dtype=torch.float32)
    twin = copy.deepcopy(layer)
    compiled = torch.compile(twin, backend="aot_eager", fullgraph=True)
    x = torch.randn(6, layer.in_features)
    loss(layer, x).backward()
    loss(compiled, x).backward()
    for a, b in zip(layer.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_its_dtype_like_nn_linear(case, dtype):
    layer = make(case, dtype=torch.float32)
    x = torch.randn(8, layer.in_features)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
        y.float().sum().backward()
    assert y.dtype is dtype
    assert all(p.grad is not None and p.grad.dtype is torch.float32 for p in layer.parameters())
    assert torch.allclose(y.float(), layer(x), rtol=0.1, atol=0.1)


def test_copies_and_pickles_run(case):
    layer = make(case)
    x = torch.randn(3, layer.in_features, dtype=torch.float64)
    want = layer(x)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), want)
        assert set(map(id, other.parameters())).isdisjoint(map(id, layer.parameters()))


def test_meta_device_then_real(case):
    layer = make(case, device="meta")
    assert layer(torch.empty(7, layer.in_features, dtype=torch.float64, device="meta")).shape == (7, layer.out_features)
    real = layer.to_empty(device="cpu")
    real.reset_parameters()
    assert torch.isfinite(real(torch.ones(1, layer.in_features, dtype=torch.float64))).all()


def test_checkpointed_activations_give_the_same_gradients(case):
    layer = make(case)
    x = torch.randn(3, layer.in_features, dtype=torch.float64, requires_grad=True)
    want = torch.autograd.grad(loss(layer, x), x)
    got = torch.autograd.grad(torch.utils.checkpoint.checkpoint(loss, layer, x, use_reentrant=False), x)
    assert torch.equal(want[0], got[0])


def test_two_threads_at_once(case):
    layer = make(case)
    xs = [torch.randn(5, layer.in_features, dtype=torch.float64) for _ in range(2)]
    wants = [layer(x).detach() for x in xs]
    wrong = []

    def work(x, want):
        for _ in range(50):
            if not torch.equal(layer(x).detach(), want):
                wrong.append(x)

    threads = [threading.Thread(target=work, args=pair) for pair in zip(xs, wants, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("rows", [(), (0,), (1,), (2, 0, 3), (431,)], ids=str)
def test_any_leading_shape(case, rows):
    layer = make(case)
    x = torch.randn(*rows, layer.in_features, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    assert y.shape == (*rows, layer.out_features)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_strided_input_and_gradient(case):
    layer = make(case)
    x = torch.randn(layer.in_features, 9, dtype=torch.float64).mT.requires_grad_()
    y = layer(x)
    cotangent = torch.randn(layer.out_features, 9, dtype=torch.float64).mT
    (got,) = torch.autograd.grad(y, x, cotangent)
    assert_close(got, cotangent @ layer.to_dense(), bound=cotangent.abs() @ absolute(layer), roundings=40)


def test_changed_input_is_noticed_before_backward(case):
    layer = make(case)
    x = torch.randn(3, layer.in_features, dtype=torch.float64).requires_grad_()
    inner = x * 1
    y = layer(inner)
    inner.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_user_spec_is_a_layer():
    spec = "x: ... i, w: i h, x: ... j, v: j h, p: h o -> ... o"
    layer = tn.Contraction(spec, sizes=dict(i=5, j=5, h=4, o=3), cores=("w", "v", "p"), dtype=torch.float64)
    x = torch.randn(2, 7, 5, dtype=torch.float64)
    assert_close(layer(x), ((x @ layer.w) * (x @ layer.v)) @ layer.p, bound=torch.ones(2, 7, 3, dtype=torch.float64) * 10, roundings=20)


def test_einsum_backend_runs_the_same_layer(case):
    layer = make(case)
    x = torch.randn(4, layer.in_features, dtype=torch.float64)
    with tn.backend("einsum"):
        reference = layer(x)
    assert_close(layer(x), reference, bound=torch.ones_like(reference) * 20, roundings=50)
    with pytest.raises(tn.OperatorError, match="unknown backend 'einsun': did you mean 'einsum'"), tn.backend("einsun"):
        pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_programs_and_calls_follow_autocast(dtype):
    x, a, c = torch.randn(9, 12), torch.randn(3, 4, 2, 5, requires_grad=True), torch.randn(5, 3, 2, 4, requires_grad=True)
    spec = "x: ... (i j), a: i j r k, c: k i r l -> ... (k l)"
    program = tn.compile(tn.network(spec, dict(i=3, j=4, r=2, k=5, l=4)))
    want = tn.contract(spec, x, a, c)
    for f in (program, lambda *t: tn.contract(spec, *t)):
        with torch.autocast("cpu", dtype=dtype):
            got = f(x, a, c)
        assert got.dtype is dtype and torch.allclose(got.float(), want, rtol=0.1, atol=0.3)
        got.float().sum().backward()
        assert a.grad.dtype is torch.float32


def test_training_goes_on_under_another_plan(monkeypatch):
    """A square block tensor train, whose cores would fit transposed: weights and optimizer state mean the same under every plan."""
    sizes = dict(i=4, j=4, r=4, k=4, l=4)
    spec = "x: ... (i j), a: i j r k, c: k i r l -> ... (k l)"
    inputs = torch.randn(8, 40, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    slow = dataclasses.replace(machine(), name="calls are slow", call=1.0)

    def run(switch: bool) -> list[float]:
        torch.manual_seed(0)
        layer = tn.Contraction(spec, sizes=sizes, cores=("a", "c"), dtype=torch.float64)
        optimizer, losses = torch.optim.Adam(layer.parameters(), lr=0.1), []
        for step, x in enumerate(inputs):
            if switch and step == 4:
                states, before = (layer.state_dict(), optimizer.state_dict()), layer.plan(40)
                monkeypatch.setattr(sys.modules["tn.planner"], "machine", lambda *_: slow)
                layer = tn.Contraction(spec, sizes=sizes, cores=("a", "c"), dtype=torch.float64)
                assert layer.plan(40).orders != before.orders
                optimizer = torch.optim.Adam(layer.parameters(), lr=0.1)
                layer.load_state_dict(states[0])
                optimizer.load_state_dict(states[1])
            loss = (layer(x) - x.flip(-1)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    expected = run(switch=False)
    assert run(switch=True) == pytest.approx(expected, rel=1e-9)
