"""Structured layers: sizes, padding, options, restructure and densify."""

import pytest
import torch
from torch import nn

import tn
from tn.testing import assert_close


@pytest.mark.parametrize("d_in", [1, 2, 3, 7, 13, 64, 431])
@pytest.mark.parametrize("d_out", [1, 5, 63, 50257 // 100])
@pytest.mark.parametrize("structure", [name for name in tn.structures.names() if not tn.structures.get(name).gated])
def test_any_size_is_accepted_and_never_truncated(d_in, d_out, structure):
    layer = tn.StructuredLinear(d_in, d_out, structure=structure, dtype=torch.float64)
    x = torch.randn(3, d_in, dtype=torch.float64)
    assert layer.to_dense().shape == (d_out, d_in)
    assert_close(layer(x), x @ layer.to_dense().mT + layer.bias, bound=torch.ones(3, d_out, dtype=torch.float64) * 100, roundings=20)
    assert (layer.to_dense() != 0).any(dim=0).all(), "an input is ignored"


def test_full_rank_btt_represents_any_matrix_shape():
    layer = tn.StructuredLinear(64, 64, structure="btt", rank=8, dtype=torch.float64)
    assert torch.linalg.matrix_rank(layer.to_dense()) == 64


def test_zero_init_gives_zero_and_still_learns():
    for structure in tn.structures.names():
        layer = tn.StructuredLinear(12, 8, structure=structure, zero_init=True)
        assert layer(torch.randn(2, 12)).abs().max() == 0
        layer(torch.randn(2, 12)).sum().backward()
        assert getattr(layer, layer.network.cores[-1]).grad.abs().max() > 0


def test_repr_is_a_constructor_call():
    for structure in tn.structures.names():
        layer = tn.StructuredLinear(12, 8, structure=structure, bias=False)
        again = eval(repr(layer), {"StructuredLinear": tn.StructuredLinear})
        assert repr(again) == repr(layer) and [p.shape for p in again.parameters()] == [p.shape for p in layer.parameters()]
    layer = tn.Contraction("x: ... i, w: i o -> ... o", sizes=dict(i=2, o=3), cores=("w",), bias=True)
    assert repr(eval(repr(layer), {"Contraction": tn.Contraction})) == repr(layer)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (dict(structure="bbt"), "unknown structure 'bbt': did you mean 'btt'"),
        (dict(structure="btt", rank=0), "btt needs an integer rank ≥ 1, got 0"),
        (dict(structure="btt", rank=1.5), "got 1.5"),
        (dict(structure="btt", rank=1000), "btt rank 1000 is more than 3, which already gives every matrix"),
        (dict(structure="low_rank", rank=9), "low_rank rank 9 is more than 8"),
        (dict(structure="dense", rank=2), "dense takes no options, got rank=2"),
        (dict(structure="low_rank", factors=((2, 3), (2, 4))), "low_rank takes only rank, got factors"),
        (dict(structure="btt", factors=((2, 3), (2, 4))), "make 6, less than 12"),
        (dict(structure="btt", factors=((2, 3, 2), (2, 4))), "btt takes 3 positive factors of d_out"),
        (dict(structure="btt", dtype=torch.int8), "dtype is torch.int8, expected a floating or complex one"),
        (dict(structure="btt", dtype="float32"), "dtype is 'float32', expected a floating or complex one"),
    ],
)
def test_refusals(kwargs, message):
    with pytest.raises(tn.StructureError) as error:
        tn.StructuredLinear(12, 8, **kwargs)
    assert message in str(error.value)


def test_wrong_inputs_are_named():
    layer = tn.StructuredLinear(12, 8, structure="btt")
    with pytest.raises(tn.SizeError, match="expected a last dimension of 12"):
        layer(torch.zeros(2, 13))
    with pytest.raises(tn.StructureError, match="in_features is 0"):
        tn.StructuredLinear(0, 8)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def test_restructure_all_but_last_and_back():
    model = mlp()
    report = tn.restructure(model, structure="btt", rank=2)
    assert [c.path for c in report.changes] == ["0", "2"]
    assert isinstance(model[0], tn.StructuredLinear) and isinstance(model[4], nn.Linear)
    assert "2 layers" in str(report)
    x = torch.randn(3, 12)
    before = model(x)
    tn.densify(model)
    assert model[0].structure == "dense" and torch.allclose(model(x), before, rtol=1e-4, atol=1e-5)


def test_restructure_by_glob_predicate_and_head():
    for layers, paths in (
        ("2", ["2"]),
        ("*", ["0", "2", "4"]),
        ("head", ["4"]),
        (lambda path, m: m.out_features == 16, ["0", "2"]),
        ("all", ["0", "2", "4"]),
    ):
        assert [c.path for c in tn.restructure(mlp(), structure="low_rank", layers=layers).changes] == paths


def test_restructure_is_all_or_nothing():
    model = mlp()
    before = [repr(m) for m in model]
    for kwargs in (
        dict(structure="btt", rank=-1),
        dict(structure="btt", layers="nothing"),
        dict(structure="xyz"),
        dict(structure="btt", init="warm"),
        dict(structure="btt", layers="x.*"),
    ):
        with pytest.raises(tn.StructureError):
            tn.restructure(model, **kwargs)
        assert [repr(m) for m in model] == before


def test_tied_layers_are_refused():
    model = nn.Sequential(nn.Embedding(16, 12), nn.Linear(12, 16, bias=False))
    model[1].weight = model[0].weight
    with pytest.raises(tn.StructureError, match="shares a parameter"):
        tn.restructure(model, structure="btt", layers="all")
