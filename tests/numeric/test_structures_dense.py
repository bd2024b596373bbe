"""Every family against the dense layer with the same matrix: value and every gradient, any size, rank, dtype and stride."""

import copy
import pickle
import string

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

import tn
from tn import clamp
from tn.testing import assert_close

F64 = torch.float64
CASES = {
    "dense": {}, "low_rank": dict(rank=3), "tt": dict(rank=3), "tt of 3 cores": dict(rank=(2, 3), cores=3), "kronecker": dict(rank=2),
    "kronecker of 3 cores": dict(rank=2, cores=3), "monarch": dict(blocks=2), "monarch of many blocks": dict(blocks=6), "btt": dict(rank=2),
    "btt of 3 cores": dict(rank=(1, 2), cores=3), "block_diagonal": dict(blocks=2), "blast": dict(rank=4, blocks=(2, 3)),
    "einsum2": dict(theta=(0.3, 0.3, 0.4, 0.3, 0.3, 0.4, 0.3)), "btt_norm": dict(rank=2),
}  # fmt: skip


def make(case: str, d_in: int = 12, d_out: int = 18, **options) -> tn.StructuredLinear:
    return tn.StructuredLinear(d_in, d_out, structure=case.split(" of ")[0], **{"dtype": F64, **CASES[case], **options})


def matrix(layer: tn.StructuredLinear, cores: dict[str, Tensor]) -> Tensor:
    """The matrix of the spec as one einsum over cores, (out, in); nothing of the layer runs."""
    net = layer.network
    letters = dict(zip((axis for axis in net.axes if axis != "..."), string.ascii_letters, strict=False))
    ins, outs = ([axis for axis in term.axes if axis != "..."] for term in (net.term("x"), net.output))
    shared = [axis for axis in outs if axis in ins]
    wide = dict(zip(shared, string.ascii_letters[::-1], strict=False))  # an axis of both input and output makes a diagonal
    terms = ["".join(letters[axis] for axis in net.term(name).axes) for name in cores]
    eyes = [torch.eye(net.sizes[axis], dtype=F64) for axis in shared]
    terms += [letters[axis] + wide[axis] for axis in shared]
    result = "".join(letters[axis] for axis in outs) + "".join(wide.get(axis, letters[axis]) for axis in ins)
    flat = [t.reshape([net.sizes[axis] for axis in net.term(name).axes]) for name, t in cores.items()]
    whole = torch.einsum(f"{','.join(terms)}->{result}", *flat, *eyes)
    return whole.reshape(layer.built.d_out, layer.built.d_in)[: layer.out_features, : layer.in_features]


def reference(layer: tn.StructuredLinear, x: Tensor, cotangent: Tensor, absolute: bool) -> dict[str, Tensor]:
    """Value and gradients of x W.T + b in float64; with `absolute`, of the same sums over absolute values."""

    def leaf(t: Tensor) -> Tensor:
        return (t.detach().to(F64).abs() if absolute else t.detach().to(F64)).requires_grad_()

    values = {name: leaf(parameter) for name, parameter in layer.named_parameters()}
    x, cotangent = leaf(x), leaf(cotangent).detach()
    w = matrix(layer, {name: values[name] for name in layer.network.cores})
    y = x @ w.mT + values["bias"]
    grads = torch.autograd.grad(y, [x, *values.values()], cotangent, allow_unused=True)
    return {"value": y.detach(), **dict(zip(["x", *values], grads, strict=True))}


def check(layer: tn.StructuredLinear, x: Tensor, cotangent: Tensor) -> None:
    want, bound = (reference(layer, x, cotangent, absolute) for absolute in (False, True))
    x = x.detach().requires_grad_()
    y = layer(x)
    names = [name for name, _ in layer.named_parameters()]
    grads = torch.autograd.grad(y, [x, *layer.parameters()], cotangent)
    for name, got in zip(["value", "x", *names], [y, *grads], strict=True):
        assert_close(got, want[name], bound=bound[name], roundings=20 + sum(layer.network.sizes.values()), name=name)


@st.composite
def layers(draw):
    """Any family at any small sizes and ranks that it takes."""
    name = draw(st.sampled_from([n for n in tn.structures.names() if n not in ("btt_norm", "btt_moe")]))
    d_in, d_out = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    takes = tn.structures.get(name).takes
    options: dict = {"cores": draw(st.integers(2, 4))} if "cores" in takes else {}
    if "blocks" in takes:
        options["blocks"] = draw(st.sampled_from([None, 1]))
    if "theta" in takes:
        a, b, d, e = (draw(st.sampled_from([0, 0.25, 0.5])) for _ in range(4))
        options["theta"] = (a, b, 1 - a - b, d, e, 1 - d - e, draw(st.sampled_from([0, 0.3])))
    if "rank" in takes and name != "einsum2":
        built = tn.structures.get(name).build(d_in, d_out, tn.structures.Options(**options))
        if isinstance(built.rank, int):
            options["rank"] = draw(st.integers(1, max(1, built.rank)))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    return tn.StructuredLinear(d_in, d_out, structure=name, dtype=dtype, **options)


@hypothesis.given(
    layer=layers(),
    rows=st.sampled_from([(), (1,), (5,), (2, 3), (0,)]),
    strided=st.booleans(),
    whole=st.booleans(),
    seed=st.integers(0, 99),
)
@hypothesis.settings(max_examples=200, suppress_health_check=list(hypothesis.HealthCheck))
def test_value_and_every_gradient_equal_the_dense_layers(layer, rows, strided, whole, seed):
    torch.manual_seed(seed)
    if not whole:
        layer._matrix_network = None  # these sizes are tiny and train as one matrix; without it they run as larger ones do
    dtype = next(layer.parameters()).dtype

    def tensor(features: int) -> Tensor:
        if not strided:
            return torch.randn(*rows, features, dtype=dtype)
        whole = torch.randn(features * 2, *rows, dtype=dtype)  # features slowest, every other one
        return whole[::2].movedim(0, -1)

    check(layer, tensor(layer.in_features), tensor(layer.out_features))


@pytest.mark.parametrize("case", [case for case in CASES if case != "btt_norm"])
@pytest.mark.parametrize("sizes", [(12, 18), (18, 12), (13, 31), (431, 63), (64, 64)], ids=str)
def test_cases_equal_the_dense_layer(case, sizes):
    options = {"blocks": 2} if case.startswith("monarch of") and 13 in sizes else {}
    layer = make(case, *sizes, **options)
    check(layer, torch.randn(7, sizes[0], dtype=F64), torch.randn(7, sizes[1], dtype=F64))


@pytest.mark.parametrize("case", CASES)
def test_derivatives_of_both_orders(case):
    layer = make(case, 6, 8, **({"blocks": 2} if "blocks" in CASES[case] else {}))
    if layer.clamp:
        with torch.no_grad():
            layer.first.mul_(3)  # so that the clamp acts
            layer.gains.copy_(torch.tensor([1.5, 0.7]))
    names, values = zip(*layer.named_parameters(), strict=True)

    def f(x, *values):
        return torch.func.functional_call(layer, dict(zip(names, values, strict=True)), (x,))

    x = torch.randn(3, 6, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(f, (x, *values), check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, (x, *values))


@pytest.mark.parametrize("case", CASES)
def test_compiles_copies_pickles_and_reads_back(case):
    layer = make(case, dtype=torch.float32)
    x = torch.randn(5, 12)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(layer, backend="eager", fullgraph=True)(x), layer(x), rtol=1e-4, atol=1e-5)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other(x), layer(x))
    again = eval(repr(layer), {"StructuredLinear": tn.StructuredLinear})
    again.load_state_dict(layer.state_dict())
    assert torch.equal(again(x), layer(x)) and again.settings == layer.settings


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("sizes", [(12, 18), (13, 31)], ids=str)
def test_transposes(case, sizes):
    options = {"blocks": 2} if case.startswith("monarch of") else {}
    layer = make(case, *sizes, **options)
    if layer.clamp:
        with torch.no_grad():
            layer.second.mul_(5)
            layer.gains.copy_(torch.tensor([0.3, 4.0]))
    turned = layer.T
    want = layer.to_dense().mT
    assert turned.structure == layer.structure and (turned.in_features, turned.out_features) == sizes[::-1]
    assert torch.allclose(turned.to_dense(), want, rtol=1e-10, atol=1e-12)


def test_products_stay_in_their_family():
    def pair(structure: str, **options) -> tuple[tn.StructuredLinear, tn.StructuredLinear]:
        shapes = ((16, 36), (36, 64)) if structure != "block_diagonal" else ((16, 36), (36, 20))
        return tuple(tn.StructuredLinear(*s, structure=structure, dtype=F64, **options) for s in shapes)[::-1]  # type: ignore[return-value]

    for structure, options in (
        ("dense", {}), ("low_rank", dict(rank=3)), ("block_diagonal", {}), ("kronecker", dict(rank=2)), ("tt", dict(rank=3)),
        ("tt", dict(cores=3, rank=2)), ("kronecker", dict(cores=3, rank=2)),
    ):  # fmt: skip
        after, before = pair(structure, **options)
        if structure in ("tt", "kronecker"):
            split = before.factors[0], after.factors[0]
            before = tn.StructuredLinear(16, 36, structure=structure, dtype=F64, rank=before.rank, factors=split)
        product = after @ before
        assert product.structure == structure
        assert torch.allclose(product.to_dense(), after.to_dense() @ before.to_dense(), rtol=1e-9, atol=1e-11)
    narrow, wide = pair("low_rank", rank=2)[0], pair("btt")[1]
    assert (narrow @ wide).structure == "low_rank"
    assert torch.allclose((narrow @ wide).to_dense(), narrow.to_dense() @ wide.to_dense())
    with pytest.raises(tn.StructureError, match="btt @ btt is in no smaller family"):
        pair("btt")[0] @ pair("btt")[1]
    with pytest.raises(tn.StructureError, match=r"the left layer's \(4, 4\) of d_in and the right one's \(2, 8\) of d_out; give factors="):
        tn.StructuredLinear(16, 16, structure="tt") @ tn.StructuredLinear(16, 16, structure="tt", factors=((4, 4), (2, 8)))
    with pytest.raises(tn.StructureError, match="takes 16 features, the right one gives 64"):
        pair("btt")[1] @ pair("btt")[0]


@pytest.mark.parametrize(
    ("source", "target"),
    [("monarch", "btt"), ("monarch of many blocks", "btt"), ("low_rank", "btt"), ("low_rank", "blast"), ("kronecker", "tt"),
     ("kronecker of 3 cores", "tt"), ("block_diagonal", "monarch"), ("block_diagonal", "blast"), ("block_diagonal", "btt"),
     ("btt", "einsum2"), ("tt", "einsum2"), ("kronecker", "einsum2"), ("low_rank", "einsum2"), ("btt", "btt_norm"), ("btt_norm", "btt"),
     ("btt of 3 cores", "btt_norm"), ("tt", "tt"), *((case, "dense") for case in CASES)],
)  # fmt: skip
@pytest.mark.parametrize("sizes", [(12, 18), (18, 13)], ids=str)
def test_exact_conversions(source, target, sizes):
    if source == "monarch of many blocks" and 13 in sizes:
        sizes = (18, 12)
    layer = make(source, *sizes)
    other = layer.convert(target)
    assert other.structure == target
    assert torch.allclose(other.to_dense(), layer.to_dense(), rtol=1e-10, atol=1e-12)
    assert torch.equal(other.bias, layer.bias)


def test_conversions_that_are_not_exact_are_refused_by_name():
    with pytest.raises(tn.StructureError, match="low_rank does not contain every monarch matrix; what does: dense, btt"):
        make("monarch").convert("low_rank")
    with pytest.raises(tn.StructureError, match="einsum2 has two cores, this tt has 3"):
        make("tt of 3 cores").convert("einsum2")


def test_clamp_never_lets_a_core_grow_past_its_start():
    plain = make("btt", clamp=False)
    layer = make("btt", clamp=True)
    layer.load_state_dict({**plain.state_dict(), "gains": torch.ones(2, dtype=F64)})
    std = layer.start()
    with torch.no_grad():
        for lin in (plain, layer):
            lin.first.mul_(0.1 * std["first"] / lin.first.square().mean().sqrt())  # small cores are left alone
            lin.second.mul_(4 * std["second"] / lin.second.square().mean().sqrt())  # large ones divided
    expected = plain.to_dense() * std["second"] / (plain.second.square().mean() + 1e-8).sqrt()
    assert torch.allclose(layer.to_dense(), expected)
    assert "gains" not in dict(make("btt", clamp=True, gains=False).named_parameters())
    assert make("btt_norm").clamp and {"gains"} <= set(dict(make("btt_norm").named_parameters()))


@pytest.mark.parametrize("gains", [None, (1.5, 0.7), (1.5, 0.0)], ids=str)
@pytest.mark.parametrize("first", [0.0, 0.2, 3.0])
def test_the_clamp_has_the_gradients_of_its_definition(gains, first):
    """At a zero core, inside the clamp and outside; both orders."""
    operands = [
        torch.randn(3, 4, dtype=F64),
        torch.tensor(gains or (1.0, 1.0), dtype=F64),
        torch.randn(5, dtype=F64),
        torch.randn(6, dtype=F64),
    ]
    operands[2] *= first
    result, gammas, *cores = (t.to(F64).requires_grad_() for t in operands)
    given = gammas if gains else None
    wanted = [t for t in (result, given, *cores) if t is not None]
    definition = result * clamp.factor((0.5, 0.4), given, cores)
    found = clamp.scaled(result, (0.5, 0.4), given, cores)
    assert type(found.grad_fn).__name__ == "_ScaledBackward" and torch.allclose(found, definition, rtol=1e-12)
    both = []
    for value in (found, definition):
        slopes = torch.autograd.grad((value**3).sum(), wanted, create_graph=True, allow_unused=True)
        known = [slope for slope in slopes if slope is not None]
        both.append([slopes, torch.autograd.grad(sum((slope**2).sum() for slope in known), wanted, allow_unused=True)])
    for ours, theirs in zip(*both, strict=True):
        for one, other in zip(ours, theirs, strict=True):
            one, other = (torch.zeros(()) if t is None else t for t in (one, other))
            assert torch.allclose(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(7, 13), (2, 3, 13), (13,), (0, 13)], ids=str)
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"permuted": True}, {"structure": "btt_norm"}], ids=str)
def test_a_tiny_layer_trains_as_its_matrix(shape, options):
    layer = tn.StructuredLinear(13, 10, dtype=F64, **{"structure": "blast", **options})
    if layer.permutation is not None:
        layer.permutation.copy_(torch.randperm(13))
    x = torch.randn(*shape, dtype=F64, requires_grad=True)
    y = layer(x)
    assert [key[0] for key in layer._programs] == ["matrix"]
    with torch.no_grad():
        assert torch.allclose(y, layer(x), atol=1e-12) and len(layer._programs) == 2  # without gradients the contraction runs
    slopes = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
    layer._matrix_network = None
    for one, other in zip(slopes, torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()]), strict=True):
        assert torch.allclose(one, other, atol=1e-11)


def test_from_cores_of_a_clamped_layer_is_exact_too():
    cores = {name: 100 * getattr(make("btt"), name).detach() for name in ("first", "second")}
    want = tn.StructuredLinear.from_cores("btt", cores).to_dense()
    assert torch.allclose(tn.StructuredLinear.from_cores("btt_norm", cores).to_dense(), want)


@pytest.mark.parametrize(
    ("structure", "cores", "message"),
    [("btt", dict(first=(2, 3, 4, 5), third=(5, 2, 4, 3)), "btt has the cores first, second, got first, third"),
     ("blast", dict(right=(1, 2, 3)), "blast has the cores right, mix, left, got right"),
     ("low_rank", dict(first=(3, 7), second=(7, 3)), "low_rank rank 7 is more than 3"),
     ("btt", dict(first=(2, 3, 4, 5)), "number of cores is 1, expected an integer from 2 to 8"),
     ("btt", dict(first=(2, 3, 4, 5), second=(5, 2, 6, 3)), "axis 'r' has size 6, expected r=4"),
     ("btt", dict(first=(2, 3, 4), second=(5, 2, 6, 3)), "expected 4 dimensions: i j r k")],
)  # fmt: skip
def test_from_cores_names_what_is_wrong(structure, cores, message):
    with pytest.raises((tn.StructureError, tn.SizeError), match=message):
        tn.StructuredLinear.from_cores(structure, {name: torch.zeros(shape) for name, shape in cores.items()})


@pytest.mark.parametrize(
    "case", ["low_rank", "tt", "tt of 3 cores", "kronecker", "monarch", "btt", "btt of 3 cores", "blast", "block_diagonal", "dense"]
)
def test_normal_start_has_the_asked_mean_square(case):
    """Fewer draws than the bench takes; the mean over draws is held to three standard errors of itself, or 4 %."""
    s = 0.02
    layer = make(case, 24, 36, init="normal", std=s)
    squares = []
    for _ in range(200):
        layer.reset_parameters()
        squares.append(layer.to_dense().detach().square().mean() / s**2)
    found = torch.stack(squares)
    error = found.std() / len(found) ** 0.5
    assert abs(found.mean() - 1) <= max(0.04, 3 * error), (found.mean(), error)


def test_four_core_normal_start():
    layer = tn.StructuredLinear(81, 81, structure="tt", cores=4, rank=3, init="normal", std=0.5, dtype=F64)
    squares = []
    for _ in range(300):
        layer.reset_parameters()
        squares.append(layer.to_dense().detach().square().mean() / 0.25)
    found = torch.stack(squares)
    assert abs(found.mean() - 1) <= max(0.04, 3 * found.std() / 300**0.5)


def test_from_cores_checks_sizes_and_bias():
    cores = {"first": torch.ones(3, 2), "second": torch.ones(2, 3)}
    with pytest.raises(tn.StructureError, match="map 3 → 3: no low_rank layer 5 → 3 has them"):
        tn.StructuredLinear.from_cores("low_rank", cores, in_features=5)
    with pytest.raises(tn.SizeError, match=r"bias has shape \(5,\), expected \(3,\)"):
        tn.StructuredLinear.from_cores("low_rank", cores, bias=torch.ones(5))
    with pytest.raises(tn.StructureError, match="core 'first' is a list"):
        tn.StructuredLinear.from_cores("low_rank", {**cores, "first": [[1.0]]})
    with pytest.raises(tn.StructureError, match="cores is a list, expected tensors by name"):
        tn.StructuredLinear.from_cores("low_rank", list(cores.values()))
    with pytest.raises(tn.StructureError, match="cores have the dtypes torch.float32, torch.float64, expected one"):
        tn.StructuredLinear.from_cores("low_rank", {**cores, "second": cores["second"].double()})
    for order in ([0, 1], [0, 0, 2], [0, 1, 3]):
        with pytest.raises(tn.StructureError, match="permutation is no order of the 3 inputs: each of 0 to 2 once"):
            tn.StructuredLinear.from_cores("low_rank", cores, permutation=torch.tensor(order))
