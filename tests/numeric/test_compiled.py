"""torch.compile: the operator behind compiled layers, equal to the eager layer, one graph for each range of rows."""

import copy
import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounter

import tn
from tn import opaque
from tn.contraction import program
from tn.segments import ROW_RANGES

BTT = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=4, j=4, r=2, k=4, l=4), cores=("a", "c"))


def operands(rows: int, grad: bool = True) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [t.requires_grad_(grad) for t in (torch.randn(rows, 16), torch.randn(4, 4, 2, 4), torch.randn(4, 4, 2, 4))]


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("tile", [None, 64])
def test_the_operator_passes_torchs_own_checks(tile):
    plan = dataclasses.replace(tn.plan(BTT, grad=BTT.names, rows=256), tile=tile)
    key = opaque.register(program(plan, "planned"))
    torch.library.opcheck(torch.ops.tn.contraction, (operands(200), key))


@pytest.mark.parametrize("rows", [1, 200, 4096])
@pytest.mark.parametrize("structure", ["btt", "low_rank", "dense"])
def test_compiled_layers_equal_eager_ones(structure, rows):
    torch.manual_seed(0)
    layer = tn.StructuredLinear(64, 96, structure=structure)
    x = torch.randn(rows, 64, requires_grad=True)
    tensors = [x, *layer.parameters()]
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    wide = copy.deepcopy(layer).double()
    large = copy.deepcopy(wide)  # the same layer of absolute values bounds what one rounding can change
    for parameter in large.parameters():
        parameter.data.abs_()
    wides, larges = ([x.detach().double().requires_grad_(), *model.parameters()] for model in (wide, large))
    larges[0] = x.detach().double().abs().requires_grad_()
    want, got, bound = wide(wides[0]), compiled(x), large(larges[0])
    tn.testing.assert_close(got, want, bound=bound, roundings=128)
    cotangent = torch.randn_like(want)
    gots = torch.autograd.grad(got, tensors, cotangent.float())
    wants, bounds = torch.autograd.grad(want, wides, cotangent), torch.autograd.grad(bound, larges, cotangent.abs())
    for a, b, limit in zip(gots, wants, bounds, strict=True):
        tn.testing.assert_close(a, b, bound=limit, roundings=rows + 128)


@pytest.mark.parametrize("grad", [False, True])
def test_graphs_are_one_more_than_ranges_of_rows(grad):
    layer, counter = tn.StructuredLinear(512, 512, structure="btt", rank=1), CompileCounter()
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    with torch.set_grad_enabled(grad):
        for rows in [*range(2, 40), 64, 100, 128, 200, 256, 400, 511, 512, 600, 1024, 2000, 2048]:
            compiled(torch.randn(rows, 512))
    assert counter.frame_count <= len(ROW_RANGES) + 1
