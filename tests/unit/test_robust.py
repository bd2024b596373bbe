"""Findings of people who tried to break the core, kept as tests."""

import copy
import dataclasses
import linecache
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import tn

BTT = "x: ... (i j), {}: i j r k, {}: k i r l -> ... (k l)"
SIZES = dict(i=16, j=8, k=16, l=8, r=2)


@pytest.mark.parametrize("names", [("d1", "d2"), ("d3", "n"), ("b3", "e3"), ("class", "prod"), ("lead", "g_t")], ids="-".join)
def test_core_names_never_change_gradients(names):
    layer = tn.Contraction(BTT.format(*names), sizes=SIZES, cores=names, dtype=torch.float64)
    x = torch.randn(300, 128, dtype=torch.float64, requires_grad=True)
    got = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    with tn.backend("einsum"):
        want = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
    for a, b in zip(got, want, strict=True):
        assert torch.allclose(a, b, rtol=1e-10, atol=1e-10)


def test_names_are_python_identifiers():
    for spec in ("a²: i -> i", "x: i² -> i"):
        with pytest.raises(tn.SpecError):
            tn.network(spec)


def test_parametrised_and_pruned_cores():
    for change in (
        lambda m: parametrizations.weight_norm(m, "first"),
        lambda m: parametrize.register_parametrization(m, "first", nn.Identity()),
        lambda m: prune.random_unstructured(m, "first", 0.5),
    ):
        layer = tn.StructuredLinear(32, 48, structure="btt")
        change(layer)
        x = torch.ones(2, 32)
        assert torch.allclose(layer(x), x @ layer.to_dense().mT + layer.bias, atol=1e-5)
        layer(x).sum().backward()
        assert all(p.grad is not None for p in layer.parameters())


@pytest.mark.parametrize("structure", tn.structures.names())
def test_exported_layers_keep_a_dynamic_batch(structure):
    layer = tn.StructuredLinear(12, 20, structure=structure)
    program = torch.export.export(layer, (torch.randn(6, 12),), dynamic_shapes=(({0: torch.export.Dim("b", min=2)},),))
    x = torch.randn(9, 12)
    assert torch.allclose(program.module()(x), layer(x), atol=1e-5)


def test_a_layer_cannot_densify_itself():
    layer = tn.StructuredLinear(32, 48, structure="btt")
    with pytest.raises(tn.StructureError, match="cannot replace itself"):
        tn.densify(layer)


def test_layers_under_two_names_are_refused():
    layer = nn.Linear(32, 32)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Linear(32, 8))
    with pytest.raises(tn.StructureError, match=r"several names \(0, 2\)"):
        tn.restructure(model, structure="btt")
    shared = tn.StructuredLinear(32, 32, structure="btt")
    with pytest.raises(tn.StructureError, match="several names"):
        tn.densify(nn.Sequential(shared, shared))


def test_layers_that_torch_reads_directly_are_refused():
    model = nn.TransformerEncoderLayer(32, 2, 64, batch_first=True)
    with pytest.raises(tn.StructureError, match="reads its weight directly"):
        tn.restructure(model, structure="btt", layers="all")


def test_frozen_layers_stay_frozen():
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    model[0].requires_grad_(False)
    tn.restructure(model, structure="btt", layers="all")
    assert not any(p.requires_grad for p in model[0].parameters()) and all(p.requires_grad for p in model[1].parameters())
    tn.densify(model)
    assert not any(p.requires_grad for p in model[0].parameters()) and all(p.requires_grad for p in model[1].parameters())


def test_grad_may_be_an_iterator():
    net = tn.network("x: ... i, w: i o -> ... o", dict(i=3, o=2))
    assert tn.plan(net, grad=iter(net.names)).grad == ("x", "w")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: tn.Contraction("x: ... i, bias: i o -> ... o", sizes=dict(i=4, o=3), cores=("bias",)), "core name 'bias' is taken"),
        (lambda: tn.Contraction("x: ... i, _slots: i o -> ... o", sizes=dict(i=4, o=3), cores=("_slots",)), "is taken"),
        (lambda: tn.network("x: i, a: i -> i", dict(i=3), cores=("a", "a")), "cores names a tensor twice: a, a"),
        (lambda: tn.plan(tn.network("x: ... i -> ... i", dict(i=3)), sizes=dict(i=4)), "axis 'i' has size 3 in the network, sizes says 4"),
        (lambda: tn.einsum("ii->i", torch.ones(1, 3)), "operand 0 has sizes 1 and 3 for 'i'"),
        (lambda: tn.StructuredLinear(3, 2)(np.ones((2, 3))), "input is a ndarray"),
        (lambda: tn.Contraction("x: ... i, w: i o -> ... o", sizes=dict(i=4, o=3), cores=("w",))([1.0]), "input 'x' is a list"),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)


def test_operand_order_does_not_decide_what_compiles():
    x, m = torch.randn(5, 12), torch.randn(3, 4, 3)
    for spec, operands in (("x: ... (h w), m: h w o -> ... o", (x, m)), ("m: h w o, x: ... (h w) -> ... o", (m, x))):
        f = tn.compile(tn.network(spec, dict(o=3)))
        assert torch.allclose(f(*operands), x @ m.reshape(12, 3), atol=1e-5)


@pytest.mark.parametrize("spec", ["a: i j -> i j", "a: i j -> j i", "a: i i -> i", "a: i j -> (i j)"])
@pytest.mark.parametrize("backend", ["planned", "einsum"])
def test_results_never_alias_operands(spec, backend):
    a = torch.zeros(3, 3)
    tn.contract(spec, a, backend=backend).add_(1)
    assert a.abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.uint8], ids=str)
def test_integers_keep_their_dtype(dtype):
    a, b = torch.arange(4).to(dtype), torch.arange(4).to(dtype)
    for spec in ("a: i, b: i -> ", "a: i, b: j -> i", "a: i, b: i -> i"):
        got, want = tn.contract(spec, a, b), tn.contract(spec, a, b, backend="einsum")
        assert got.dtype is dtype and torch.equal(got, want)


def test_backends_and_traces_belong_to_one_thread():
    layer, seen = tn.StructuredLinear(4, 4, structure="low_rank", rank=2), []
    inside, done = threading.Event(), threading.Event()

    def other():
        inside.wait()
        layer(torch.ones(1, 4))
        seen.append([type(run).__name__ for run in layer._programs.values()])
        done.set()

    thread = threading.Thread(target=other)
    thread.start()
    with tn.backend("einsum"):
        inside.set()
        done.wait()
    thread.join()
    assert seen == [["Program"]]


def test_tracebacks_show_the_program_that_ran():
    programs = [tn.compile(tn.network("x: ... i, w: i o -> ... o", dict(i=i, o=2))) for i in (3, 5)]
    texts = ["".join(linecache.getlines(f.plain.__code__.co_filename)) for f in programs]
    assert "!= 3" in texts[0] and "!= 5" in texts[1]


def test_deepcopy_of_a_parametrised_layer():
    layer = parametrizations.weight_norm(tn.StructuredLinear(32, 48, structure="btt"), "first")
    assert torch.equal(copy.deepcopy(layer)(torch.ones(1, 32)), layer(torch.ones(1, 32)))


@pytest.mark.parametrize("structure", ["btt", "kronecker"])
def test_low_precision_with_more_rows_than_the_smallest_range(structure):
    layer = tn.StructuredLinear(64, 6, structure=structure)
    x = torch.randn(40, 64)
    want = layer(x)
    assert torch.allclose(layer.bfloat16()(x.bfloat16()).float(), want, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("tile", [0, 1, -1, 2.5, True])
def test_impossible_tiles_are_refused(tile):
    plan = tn.plan(tn.network("x: ... i, a: i r, c: r o -> ... o", dict(i=3, r=2, o=4), cores=("a", "c")))
    with pytest.raises(tn.PlanError, match="expected at least 2 rows"):
        dataclasses.replace(plan, tile=tile)
