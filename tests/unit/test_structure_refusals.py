"""Arguments that cannot be: every one a clear error in the user's names, raised before any work, with nothing half-replaced."""

import pytest
import torch
from torch import nn

import tn
from tn.structures.custom import RESERVED

NAN = float("nan")
WEIGHT = torch.randn(6, 8)


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4))


@pytest.mark.parametrize("structure", ["btt", "dense", "btt_moe", "blast"])
@pytest.mark.parametrize("size", [8, 128])
@pytest.mark.parametrize("grads", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.complex64, torch.bool], ids=str)
def test_an_input_of_another_dtype(structure, size, grads, dtype):
    """Where nn.Linear raises torch's RuntimeError."""
    layer, x = tn.StructuredLinear(size, 6, structure=structure), torch.ones(3, size)
    with torch.set_grad_enabled(grads):
        for _ in range(2):
            with pytest.raises(tn.OperatorError, match=f"input is {dtype}, the layer torch.float32: convert the input by"):
                layer(x.to(dtype))
            assert layer(x).shape == (3, 6)


def test_an_input_that_only_autocast_takes():
    layer, x = tn.StructuredLinear(128, 6, structure="btt"), torch.ones(3, 128, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
    with pytest.raises(tn.OperatorError, match="input is torch.bfloat16, the layer torch.float32"):
        layer(x)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ((), "the layer takes one input, got 0"),
        ((torch.ones(8), torch.ones(8)), "the layer takes one input, got 2"),
        ((torch.ones(3, 7),), r"input has shape \(3, 7\), expected a last dimension of 8"),
        ((torch.tensor(1.0),), r"input has shape \(\), expected a last dimension of 8"),
        ((None,), "input is a NoneType, expected a torch.Tensor"),
        ((torch.ones(3, 8, device="meta"),), "input is on meta, the layer on cpu: move one of them"),
    ],
)
def test_inputs_that_are_none(inputs, message):
    with pytest.raises(tn.TnError, match=message):
        tn.StructuredLinear(8, 6, structure="btt")(*inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(structure=["btt"]), r"unknown structure \['btt'\]"),
        (dict(structure="btt", match=["params"], budget=0.5), r"unknown match \['params'\]"),
        (dict(structure="einsum2", theta=(1, 0, 0, 1, 0, 0, float("inf"))), "expected seven numbers from 0 to 1"),
        (dict(structure="einsum2", theta=(1, 0, 0, 1, 0, 0, 1e9)), "expected seven numbers from 0 to 1"),
        (dict(structure="btt", dtype=torch.float8_e4m3fn), "torch.float8_e4m3fn, expected a floating or complex one of at least 16 bits"),
        (dict(structure="btt", clamp="yes"), "clamp is 'yes', expected True or False"),
        (dict(structure="btt", bias=torch.ones(6)), "bias is tensor.* expected True or False"),
        (dict(structure="btt_moe", match="params", budget=0.5, active=9999), "rank 9999 is more than 4096"),
        (dict(structure="btt_moe", match="params", budget=0.5, active="2"), "active is '2', expected an integer from 1"),
    ],
)
def test_layers_that_cannot_be(options, message):
    with pytest.raises(tn.StructureError, match=message):
        tn.StructuredLinear(64, 64, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(sweeps=-1), "sweeps is -1, expected an integer ≥ 0"),
        (dict(sweeps=None), "sweeps is None, expected an integer ≥ 0"),
        (dict(permute="yes"), "permute is 'yes', expected True or False"),
        (dict(start=3), "start is a int, expected the cores first, second by name"),
        (dict(start={"first": 3, "second": 3}), r"start has core 'first' as a int, expected shape \(4, 2, 1, 2\)"),
        (dict(start={}), "start has the cores none, expected first, second"),
        (dict(start={"first": torch.full((4, 2, 1, 2), NAN), "second": torch.ones(2, 4, 1, 3)}), "no finite floating numbers"),
        (dict(gram=torch.eye(8).long()), "gram is torch.int64, expected a real floating dtype"),
        (dict(gram=torch.eye(8, device="meta")), "gram is on the meta device"),
        (dict(weight=WEIGHT.to_sparse()), "weight has the layout torch.sparse_coo"),
        (dict(weight=WEIGHT.to(torch.float8_e4m3fn)), "weight is torch.float8_e4m3fn, expected a real floating dtype of at least 16 bits"),
    ],
)
def test_projections_that_cannot_be(options, message):
    with pytest.raises(tn.TnError, match=message):
        tn.project(**{"weight": WEIGHT, "structure": "btt", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(inputs=[torch.ones(3, 7)]), "the model does not run on batch 0 of inputs: mat1 and mat2 shapes"),
        (dict(inputs=[torch.ones(3, 8), None]), "the model does not run on batch 1 of inputs"),
        (dict(inputs=torch.ones(3, 8)), "inputs is a Tensor, expected batches"),
        (dict(inputs=3), "inputs is a int, expected batches"),
        (dict(inputs=[]), "no batch of inputs reaches layer '0'"),
        (dict(inputs=[torch.full((3, 8), NAN)]), "layer '0': gram has numbers that are not finite"),
        (dict(rank={0: 1}), "rank has the key 0, expected globs over paths"),
        (dict(permute=1), "permute is 1, expected True or False"),
        (dict(clamp="yes"), "clamp is 'yes', expected True or False"),
        (dict(rank=0), "layer '0': btt needs an integer rank ≥ 1, got 0"),
        (dict(rank={"2": 9}), "layer '2': btt rank 9 is more than"),
        (dict(factors=((2, 2), (2, 2))), "layer '0': btt factors .* make 4, less than 8"),
        (dict(budget="a"), "budget is 'a', expected a positive fraction"),
    ],
)
def test_models_stay_as_they_were(options, message):
    dense = model()
    before = [(type(m), {name: value.clone() for name, value in m.state_dict().items()}) for m in dense]
    with pytest.raises(tn.TnError, match=message):
        tn.restructure(dense, **{"structure": "btt", "layers": "all", "init": "project", **options})
    assert [type(m) for m in dense] == [kind for kind, _ in before]
    assert all(torch.equal(value, old[name]) for m, (_, old) in zip(dense, before, strict=True) for name, value in m.state_dict().items())
    assert not any(m._forward_pre_hooks for m in dense)


def test_what_has_no_matrix_names_its_layer():
    gated = model()
    tn.restructure(gated, structure="btt_moe", layers="all")
    kinds = [type(m) for m in gated]
    for attempt in (lambda: tn.densify(gated), lambda: tn.restructure(gated, structure="btt", layers="all", init="project")):
        with pytest.raises(tn.OperatorError, match="layer '0': btt_moe has no matrix"):
            attempt()
    assert [type(m) for m in gated] == kinds


@pytest.mark.parametrize("name", ["restructure", "densify", "guide", "param_groups", "balance_loss", "load_restructured"])
@pytest.mark.parametrize("value", [None, 3, torch.ones(2)], ids=["none", "number", "tensor"])
def test_what_is_no_model(name, value):
    more = {
        "restructure": dict(structure="btt"),
        "guide": dict(steps=3),
        "param_groups": dict(lr=1.0),
        "load_restructured": dict(folder="."),
    }
    with pytest.raises(tn.StructureError, match=f"model is a {type(value).__name__}, expected a torch.nn.Module"):
        getattr(tn, name)(value, **more.get(name, {}))


def test_a_model_without_linear_layers():
    with pytest.raises(tn.StructureError, match="the Sequential has no linear layer to replace"):
        tn.restructure(nn.Sequential(nn.ReLU()), structure="btt")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(model_fn=None), "model_fn is None, expected a function"),
        (dict(model_fn=lambda width: None), r"model_fn\(8\) is a NoneType, expected a torch.nn.Module"),
        (dict(widths=None), "needs two or more widths .* got widths=None"),
        (dict(widths=8), "needs two or more widths"),
        (dict(widths=(8.0, 16.0)), "needs two or more widths"),
        (dict(widths=("a", "b")), "needs two or more widths"),
        (dict(steps=1.5), "got .* steps=1.5"),
        (dict(seeds=None), "got .* seeds=None"),
        (dict(lr=-1), "lr is -1, expected a finite number"),
        (dict(loss=3), "loss is 3, expected a function"),
        (dict(loss=lambda m: None), "loss gave a NoneType, expected one number as a tensor"),
        (dict(loss=lambda m: m(torch.ones(3, 8))), r"loss gave shape \(3, 8\), expected one number"),
        (dict(groups=3), "groups is 3, expected a function"),
        (dict(groups=lambda m: []), "groups gave no parameter groups"),
    ],
)
def test_coordinate_checks_that_cannot_be(options, message):
    with pytest.raises(tn.TnError, match=message):
        tn.coordinate_check(**{"model_fn": lambda width: nn.Linear(8, width), "widths": (8, 16), "seeds": 1, **options})
    check = tn.coordinate_check(lambda width: nn.Linear(8, width), (8, 16), seeds=1, steps=1)
    with pytest.raises(tn.StructureError, match="unknown layer 'x'"):
        check.slope("x")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(base="a"), "base is 'a', expected a width, a model or None"),
        (dict(base=2.5), "base is 2.5, expected a width"),
        (dict(weight_decay="a"), "weight_decay is 'a', expected a finite number"),
        (dict(weight_decay=-1), "weight_decay is -1, expected a finite number"),
        (dict(input_lr_mult=0.1, input_layers=3), "input_layers is 3, expected globs"),
        (dict(input_lr_mult=0.1, input_layers="0"), "input_layers is '0', expected globs"),
    ],
)
def test_groups_that_cannot_be(options, message):
    with pytest.raises(tn.TnError, match=message):
        tn.param_groups(model(), lr=1.0, **options)


SPEC = "x: ... i, a: i r, b: r o -> ... o"


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((3, SPEC), {}, "name is 3, expected a word"),
        (("own", None), {}, "spec is None, expected text such as"),
        (("own", SPEC), dict(rank=0), "rank is 0, expected an integer ≥ 1"),
        (("own", SPEC), dict(rank=(1, 2)), r"rank is \(1, 2\), expected one for each of the rank axes r"),
        (("own", SPEC), dict(factors=3), "factors is 3, expected a function or None"),
        (("own", "x: ... i, gains: i o -> ... o"), {}, "core name 'gains' is taken by an attribute"),
    ],
)
def test_families_that_cannot_be(arguments, options, message):
    with pytest.raises(tn.StructureError, match=message):
        tn.register_structure(*arguments, **options)
    assert "own" not in tn.structures.names()


def test_a_family_whose_factors_are_too_small():
    tn.register_structure("small", "x: ... (i j), a: i j o -> ... o", factors=lambda d_in, d_out: ((2, 1), (d_out,)))
    try:
        with pytest.raises(tn.StructureError, match=r"small factors \(2, 1\) of d_in make 2, less than 4"):
            tn.StructuredLinear(4, 4, structure="small")
    finally:
        tn.structures.registry._registry.pop("small")


def test_no_attribute_of_a_layer_can_be_a_core():
    layer = tn.StructuredLinear(8, 6, structure="btt_moe", permuted=True)
    made = {*vars(layer), *layer._parameters, *layer._buffers} - set(layer.network.cores)
    assert {name for name in made if not name.startswith("_")} <= RESERVED


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(bias=[1.0]), "bias is a list, expected a torch.Tensor or None"),
        (dict(permutation=[0]), "permutation is a list, expected a torch.Tensor or None"),
        (dict(permutation=torch.arange(12.0)), "permutation is torch.float32, expected integers"),
        (
            dict(cores={"first": torch.ones(3, 4, 2, 5), "second": torch.ones(5, 3, 2, 6, device="meta")}),
            "cores are on the devices cpu, meta",
        ),
        (dict(cores={"first": torch.ones(3, 4, 2, 5, dtype=torch.int64), "second": torch.ones(5, 3, 2, 6).long()}), "dtype is torch.int64"),
    ],
)
def test_cores_that_make_no_layer(options, message):
    cores = {"first": torch.ones(3, 4, 2, 5), "second": torch.ones(5, 3, 2, 6)}
    with pytest.raises(tn.StructureError, match=message):
        tn.StructuredLinear.from_cores("btt", **{"cores": cores, **options})


def test_values_that_are_no_cores():
    layer = tn.StructuredLinear(8, 6, structure="btt")
    with pytest.raises(tn.StructureError, match="unknown core 'third'"):
        layer.set_cores({"third": torch.ones(2)})
    with pytest.raises(tn.StructureError, match=r"core 'first' has shape \(2,\), expected"):
        layer.set_cores({"first": torch.ones(2)})
    with pytest.raises(tn.StructureError, match="cannot multiply: the left layer is torch.float32 on cpu, the right one torch.float64"):
        layer @ tn.StructuredLinear(6, 8, structure="btt", dtype=torch.float64)


def test_widths_that_match_nothing():
    for options in (dict(width=0), dict(width="a"), dict(width=8, multiple=0), dict(width=8, options=3)):
        with pytest.raises(tn.StructureError, match="expected an integer ≥ 1|expected tn.structures.Options"):
            tn.structures.matching_width("btt", **options)
