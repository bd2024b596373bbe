"""Several outputs and repeated parts: shared steps, tiled and untiled, compiled, layers; values and gradients against the one-shot sum."""

import dataclasses

import pytest
import torch

import tn
from tn.testing import one_shot

SIZES = dict(i=3, j=4, r=2, s=2, k=3, l=4, m=2, n=5)
CASES = {
    "two block tensor trains": "x: ... (i j), a: i j r k, c: k i r l, e: i j s m, f: m i s n -> y: ... (k l), z: ... (m n)",
    "a latent and its maps": "x: ... i, d: i r, u: r k, v: r l -> c: ... r, y: ... k, z: ... l",
    "quadratic form": "x: ... i, d: i r, x: ... n, d: n s, w: r s k -> ... k",
    "quadratic form and its root": "x: ... i, d: i r, x: ... n, d: n s, w: r s k, v: r l -> y: ... k, z: ... l",
    "square": "x: ... i, d: i r, x: ... n, d: n r, w: r k -> ... k",
    "an operand as a result": "x: ... i, w: i k -> y: ... k, again: ... i",
    "equal results": "x: ... i, w: i k -> y: ... k, again: ... k",
}


def _case(spec: str, rows: int, needs: tuple[str, ...] = ()):
    words = set(spec.replace("(", " ").replace(")", " ").replace(",", " ").split())
    net = tn.network(spec, {axis: 3 if axis == "n" and "x: ... n" in spec else size for axis, size in SIZES.items() if axis in words})
    generator = torch.Generator().manual_seed(rows)
    width = [12 if "(i j)" in spec else 3]
    shapes = {name: (rows, *width) if name == "x" else net.shape(name) for name in net.names}
    tensors = {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    return net, {name: tensor.requires_grad_(name in (needs or net.names)) for name, tensor in tensors.items()}


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


def _gradients(results, tensors):
    used = [result for result in _tuple(results) if result.requires_grad]
    cotangents = [torch.linspace(-1, 1, result.numel(), dtype=result.dtype).reshape(result.shape) for result in used]
    wanted = [tensor for tensor in tensors.values() if tensor.requires_grad]
    return torch.autograd.grad(used, wanted, cotangents, create_graph=True)


@pytest.mark.parametrize("rows", [7, 129, 300])
@pytest.mark.parametrize("tile", [None, 128])
@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_values_and_gradients(spec, tile, rows):
    for needs in ((), ("x",), ("w", "a", "d")):
        net, tensors = _case(spec, rows, needs)
        wanted = [name for name, tensor in tensors.items() if tensor.requires_grad]
        draft = tn.plan(net, grad=wanted, rows=300)
        usable = all(value >= len(draft.leaves) for value in draft.results)
        f = tn.compile(dataclasses.replace(draft, tile=tile if usable else None))
        got, want = f(*tensors.values()), one_shot(net, tensors)
        for g, w in zip(_tuple(got), _tuple(want), strict=True):
            torch.testing.assert_close(g, w)
        if wanted == list(net.names):
            torch.testing.assert_close(_gradients(got, tensors), _gradients(want, tensors))


def test_gradients_of_an_operand_without_rows_that_several_outputs_read_in_tiles():
    spec = "t0: ... d c, t1: ... b a, t2: d b, t3: b a, t0: ... d c -> o0: ... d, o1: ... a c d, o2: ... d b"
    net = tn.network(spec, dict(d=2, c=4, b=3, a=1))
    tensors = {"t0": (300, 2, 4), "t1": (300, 3, 1), "t2": (2, 3), "t3": (3, 1)}
    made = {name: torch.randn(shape, dtype=torch.float64).requires_grad_(name in ("t1", "t3")) for name, shape in tensors.items()}
    f = tn.compile(dataclasses.replace(tn.plan(net, grad=("t1", "t3"), rows=300), tile=64))
    torch.testing.assert_close(_gradients(f(*made.values()), made), _gradients(one_shot(net, made), made))


@pytest.mark.parametrize("spec", CASES.values(), ids=CASES)
def test_second_derivatives_transforms_and_compilation(spec):
    net, tensors = _case(spec, 5)
    f, leaves = tn.compile(tn.plan(net, grad=net.names, rows=64)), [*tensors.values()]

    def total(*operands):
        return sum(result.square().sum() for result in _tuple(f(*operands)))

    def oracle(*operands):
        return sum(result.square().sum() for result in _tuple(one_shot(net, dict(zip(net.names, operands, strict=True)))))

    assert torch.autograd.gradgradcheck(f, leaves)
    tangents = tuple(map(torch.ones_like, leaves))
    torch.testing.assert_close(torch.func.jvp(total, tuple(leaves), tangents), torch.func.jvp(oracle, tuple(leaves), tangents))
    compiled = torch.compile(f, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(_tuple(compiled(*leaves)), _tuple(f(*leaves)))
    for contract in (tn.contract, torch.compile(tn.contract, backend="aot_eager", fullgraph=True)):
        torch.testing.assert_close(_tuple(contract(str(net.spec), *leaves)), _tuple(one_shot(net, tensors)))


def test_a_layer_with_several_outputs_trains_compiles_and_is_saved():
    spec = "x: ... (i j), a: i j r k, c: k i r l, e: i j s m, f: m i s n -> q: ... (k l), v: ... (m n)"
    sizes = dict(i=8, j=8, r=1, k=8, l=8, s=1, m=8, n=8)
    torch.manual_seed(0)
    layer = tn.Contraction(spec, sizes=sizes, cores=("a", "c", "e", "f"), dtype=torch.float64)
    twin = tn.Contraction(spec, sizes=sizes, cores=("a", "c", "e", "f"), backend="einsum", dtype=torch.float64)
    twin.load_state_dict(layer.state_dict())
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 150, 64, dtype=torch.float64)
    for run in (layer, compiled):
        layer.zero_grad()
        twin.zero_grad()
        q, v = run(x)
        assert q.shape == v.shape == (2, 150, 64)
        (q.sin().sum() + v.square().sum()).backward()
        q, v = twin(x)
        (q.sin().sum() + v.square().sum()).backward()
        for mine, theirs in zip(layer.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, theirs.grad)
    with torch.no_grad(), tn.frozen(layer.eval()):
        torch.testing.assert_close(layer(x), twin(x))


def test_attention_gets_its_operands_in_the_order_it_wants():
    sizes = dict(width=32, head=4, dim=8, also=8, value=8)
    spec = "x: batch seq width, a: width head dim, c: width head also, e: width head value"
    outputs = "q: batch head seq dim, k: batch head seq also, v: batch head seq value"
    layer = tn.Contraction(f"{spec} -> {outputs}", sizes=sizes, cores=("a", "c", "e"), dtype=torch.float64)
    x = torch.randn(2, 5, 32, dtype=torch.float64)
    for made, core in zip(layer(x), layer.parameters(), strict=True):
        torch.testing.assert_close(made, torch.einsum("bsw,whd->bhsd", x, core))


def test_results_may_be_changed_in_place():
    A, x = torch.randn(4, 5, requires_grad=True), torch.randn(5, requires_grad=True)
    for equation, operands in (
        ("ij,j->i", (A, x)),
        ("i,ij->j", (torch.randn(4), A)),
        ("i,ij,jk->k", (torch.randn(4), A, torch.randn(5, 3))),
    ):
        got = tn.einsum(equation, *operands).relu_()
        want = torch.einsum(equation, *operands).relu()
        torch.testing.assert_close(got, want)
        wanted = [operand for operand in operands if operand.requires_grad]
        g = torch.ones_like(want)
        torch.testing.assert_close(torch.autograd.grad(got, wanted, g), torch.autograd.grad(want, wanted, g))
    y, z = tn.contract("x: i, w: i k, v: i l -> y: k, z: l", x, torch.randn(5, 3), torch.randn(5, 2))
    (y.mul_(2).sum() + z.sum()).backward()


def test_several_outputs_have_rates_start_at_zero_and_take_no_bias():
    spec, sizes = "x: ... i, u: i o, v: i p -> y: ... o, z: ... p", dict(i=4, o=4, p=4)
    layer = tn.Contraction(spec, sizes=sizes, cores=("u", "v"), zero_init=True)
    assert all(not result.any() for result in layer(torch.randn(2, 4)))
    alone = tn.Contraction("x: ... i, u: i o -> ... o", sizes=dict(i=4, o=4), cores=("u",))
    rates = {group["lr"] for model in (layer, alone) for group in tn.param_groups(model, lr=0.1)}
    assert len(rates) == 1
    with pytest.raises(tn.OperatorError, match="bias needs one output, this network has 2"):
        tn.Contraction(spec, sizes=sizes, cores=("u", "v"), bias=True)


@pytest.mark.parametrize(
    ("spec", "sizes"),
    [
        ("y: ... a, v: b -> p: ... a b, q: ... a", dict(a=2, b=2)),
        ("x: ... a, y: ... c, v: a -> p: c, q: ... c", dict(a=2, c=2)),
        ("x: a, y: a b -> b", dict(a=2, b=3)),
    ],
)
def test_tiles_of_plans_without_rows_are_refused(spec, sizes):
    plan = tn.plan(tn.network(spec, sizes))
    with pytest.raises(tn.PlanError, match="takes all rows at once"):
        dataclasses.replace(plan, tile=64)
