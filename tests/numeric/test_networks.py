"""Random networks against the float64 one-shot sum: forward and every gradient, every way a network can run."""

import dataclasses

import pytest
import torch
from hypothesis import event, given
from hypothesis import strategies as st

import tn
from tn.testing import assert_close, networks, one_shot


def _operands(shapes: dict[str, tuple[int, ...]], seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}


def _check(run, network, operands, dtype):
    """Value and every gradient of `run` against the oracle, with the bound from absolute values."""
    wide = {name: tensor.to(dtype).double().requires_grad_() for name, tensor in operands.items()}
    cast = {name: tensor.to(dtype).requires_grad_() for name, tensor in operands.items()}
    wants, got = one_shot(network, wide), run(*cast.values())
    several = len(network.spec.outputs) > 1
    assert isinstance(got, tuple) == several
    want, got = (wants, got) if several else ((wants,), (got,))
    sizes = network.bind([t.shape for t in operands.values()])
    terms = 1
    for axis in network.axes:
        terms *= sizes[axis]
    roundings = terms + 2 * len(network.spec.operands)
    positive = {name: tensor.detach().abs().requires_grad_() for name, tensor in wide.items()}
    bound = one_shot(network, positive)
    bound = bound if several else (bound,)
    for result, wanted, largest in zip(got, want, bound, strict=True):
        assert_close(result, wanted, bound=largest, roundings=roundings)
    cotangent = [torch.ones_like(result) for result in want]
    wants = torch.autograd.grad(want, list(wide.values()), cotangent)
    bounds = torch.autograd.grad(bound, list(positive.values()), cotangent)
    gots = torch.autograd.grad(got, list(cast.values()), [ones.to(dtype) for ones in cotangent])
    for name, g, w, b in zip(network.names, gots, wants, bounds, strict=True):
        assert_close(g, w, bound=b, roundings=roundings, name=f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@given(case=networks(), seed=st.integers(0, 2**16), search=st.sampled_from(["auto", "cotengra", "left_to_right"]))
def test_planned_program_equals_the_sum(dtype, case, seed, search):
    network, shapes = case
    event(f"{len(network.spec.operands)} operands")
    plan = tn.plan(network, grad=network.names, sizes=dict.fromkeys(network.dynamic, 2), search=search)
    _check(tn.compile(plan), network, _operands(shapes, seed), dtype)


@given(case=networks(), seed=st.integers(0, 2**16))
def test_sizes_known_at_planning_equal_the_sum(case, seed):
    network, shapes = case
    sizes = network.bind(list(shapes.values()))
    fixed = tn.network(network.spec, sizes)
    _check(tn.compile(fixed), fixed, _operands(shapes, seed), torch.float64)


@given(case=networks(outputs=2), seed=st.integers(0, 2**16), backend=st.sampled_from(["planned", "einsum"]))
def test_two_outputs_equal_the_sums(case, seed, backend):
    network, shapes = case
    event(f"{len(network.spec.operands)} operands")
    _check(lambda *t: tn.contract(str(network.spec), *t, backend=backend), network, _operands(shapes, seed), torch.float64)


@given(case=networks(), seed=st.integers(0, 2**16))
def test_einsum_backend_equals_the_sum(case, seed):
    network, shapes = case
    _check(lambda *t: tn.contract(str(network.spec), *t, backend="einsum"), network, _operands(shapes, seed), torch.float64)


@given(case=networks(), seed=st.integers(0, 2**16))
def test_contract_equals_the_sum(case, seed):
    network, shapes = case
    _check(lambda *t: tn.contract(str(network.spec), *t), network, _operands(shapes, seed), torch.float64)


@given(case=networks(), seed=st.integers(0, 2**16), implicit=st.booleans())
def test_einsum_equals_the_sum(case, seed, implicit):
    """tn.einsum on the same networks in letters: a tensor used twice is passed twice, a size-one axis may broadcast."""
    network, shapes = case
    letter = dict(zip(network.axes, "aBcdEfg", strict=False))
    left = ",".join("".join(letter[axis] for axis in term.axes) for term in network.spec.operands)
    right = "".join(letter[axis] for axis in network.output.axes)
    where = [network.names.index(term.name) for term in network.spec.operands]
    _check(lambda *t: tn.einsum(f"{left}->{right}", *(t[i] for i in where)), network, _operands(shapes, seed), torch.float64)
    if implicit:
        tensors = [t.float() for t in _operands(shapes, seed).values()]
        got = tn.einsum(left, *(tensors[i] for i in where))
        assert torch.allclose(got, torch.einsum(left, *(tensors[i] for i in where)), rtol=1e-4, atol=1e-4)


TABLE = [
    ("gemm", "x: b i, w: i o -> b o", {}),
    ("hadamard", "x: b r, y: b r -> b r", {}),
    ("hyperaxis", "x: b r, u: i r, v: o r -> b i o", {}),
    ("lost axis", "x: b i, y: r -> b", {}),
    ("scalar operand", "s:, x: b i -> i b", {}),
    ("dot", "x: i, y: i -> ", {}),
    ("outer", "x: i, y: j -> j i", {}),
    ("trace", "x: i i -> ", {}),
    ("batched", "x: b i k, y: b k j -> i b j", {}),
    ("grouped", "x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=3, j=4, r=2, k=5, l=3)),
    ("tensor train", "x: ... (a b c), g: a i r, h: r b j s, w: s c k -> ... (i j k)", dict(a=2, b=3, c=2, i=3, j=2, k=2, r=2, s=3)),
    ("kronecker", "x: ... (a b), g: a i, h: b j -> ... (i j)", dict(a=3, b=4, i=5, j=2)),
    ("tucker", "x: ... (a b), u: a p, v: b q, c: p q s t, w: s k, z: t l -> ... (k l)", dict(a=3, b=4, p=2, q=3, s=2, t=3, k=4, l=2)),
    ("cp", "x: ... (a b), u: a r, v: b r, w: k r, z: l r -> ... (k l)", dict(a=3, b=4, r=5, k=2, l=3)),
    ("blast", "x: ... (j q), c: j r q, d: i j r, b: i p r -> ... (i p)", dict(j=2, q=3, r=4, i=3, p=2)),
    ("transposed weight", "x: ... a b, g: b i a -> ... i", dict(a=3, b=4, i=5)),
    ("squared", "x: ... i, w: i h, x: ... j, v: j h, p: h o -> ... o", {}),
    ("attention scores", "q: ... s h d, k: ... t h d -> ... h s t", {}),
    ("width one", "x: ... (i j), a: i j r, b: i r 1 o -> ... o", dict(i=1, j=3, r=1, o=4)),
]


@pytest.mark.parametrize("size", [1, 3, 7, 0], ids="size {}".format)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("spec", "sizes"), [row[1:] for row in TABLE], ids=[row[0] for row in TABLE])
def test_table(spec, sizes, dtype, size):
    network = tn.network(spec, sizes)
    full = {axis: sizes.get(axis, size) for axis in network.axes}
    shapes = {}
    for name in network.names:
        dims = [(2, size) if dim == ("...",) else (_product(full[axis] for axis in dim),) for dim in network.term(name).dims]
        shapes[name] = tuple(extent for dim in dims for extent in dim)
    plan = tn.plan(network, grad=network.names, sizes={axis: max(size, 2) for axis in network.dynamic})
    _check(tn.compile(plan), network, _operands(shapes, 0), dtype)


@pytest.mark.parametrize("rows", [129, 256, 300])
@pytest.mark.parametrize("needs", [("x", "a", "c"), ("x",), ("a",), ("c",)], ids="-".join)
@pytest.mark.parametrize(
    "spec",
    [
        "x: ... (i j), a: i j r k, c: k i r l -> ... (k l)",
        "x: ... (i j), c: j r l, a: i r k -> ... (k l)",
        "x: ... (i j), x: ... (k l), a: i k r, c: r o j l -> ... o",
    ],
)
def test_row_tiles(spec, needs, rows):
    network = tn.network(spec, dict(i=3, j=4, r=2, k=3, l=4, **({"o": 5} if "o" in spec else {})))
    f = tn.compile(dataclasses.replace(tn.plan(network, grad=needs, search="left_to_right", rows=128), tile=128))
    operands = {name: torch.randn(rows, 12) if name == "x" else torch.randn(network.shape(name)) for name in network.names}
    wide = {name: t.double().requires_grad_(name in needs) for name, t in operands.items()}
    cast = {name: t.clone().requires_grad_(name in needs) for name, t in operands.items()}
    want, got = one_shot(network, wide), f(*cast.values())
    assert torch.allclose(got.double(), want, rtol=1e-4, atol=1e-4)
    cotangent = torch.randn_like(want)
    wants = torch.autograd.grad(want, [wide[n] for n in needs], cotangent)
    gots = torch.autograd.grad(got, [cast[n] for n in needs], cotangent.float())
    for g, w in zip(gots, wants, strict=True):
        assert torch.allclose(g.double(), w, rtol=1e-3, atol=1e-3 * w.abs().max().item())
    assert "backward_tiled" in f.source


def _product(extents) -> int:
    result = 1
    for extent in extents:
        result *= extent
    return result
