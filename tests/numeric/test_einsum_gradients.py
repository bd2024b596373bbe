"""Derivatives through tn.einsum and tn.contract: second order, torch.func, torch.compile without planning again."""

import itertools

import pytest
import torch
from opt_einsum.tests.test_contract import tests as EQUATIONS
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import tn
from tn import family, graph


def _operands(equation: str, **options) -> list[torch.Tensor]:
    """One operand a term, every size 2."""
    terms = equation.split("->")[0].split(",")
    return [torch.randn((2,) * len(term), dtype=torch.float64, **options) for term in terms]


@pytest.mark.parametrize("equation", list(dict.fromkeys(EQUATIONS)))
def test_second_derivatives(equation):
    """Every equation of opt_einsum's own test of `contract`."""
    operands = _operands(equation, requires_grad=True)

    def run(*t):
        return tn.einsum(equation, *t)

    assert torch.autograd.gradcheck(run, operands, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(run, operands)


def test_there_are_equations():
    assert len(EQUATIONS) > 60


SPEC = "x: ... (i j), a: i j r k, c: k i r l -> ... (k l)"


def _layer(rows: int) -> list[torch.Tensor]:
    return [torch.randn(shape, dtype=torch.float64) for shape in ((rows, 6), (2, 3, 2, 4), (4, 2, 2, 3))]


# name → (function of the call under test, operands for a number of rows, the same with torch alone)
CALLS = {
    "letters": (
        lambda x, a, c: tn.einsum("xij,ijrk,kirl->xkl", x.reshape(-1, 2, 3), a, c).flatten(1),
        lambda x, a, c: torch.einsum("xij,ijrk,kirl->xkl", x.reshape(-1, 2, 3), a, c).flatten(1),
    ),
    "lists": (
        lambda x, a, c: tn.einsum(x.reshape(-1, 2, 3), [..., 0, 1], a, [0, 1, 9, 5], c, [5, 0, 9, 6], [..., 5, 6]).flatten(1),
        lambda x, a, c: torch.einsum("xij,ijrk,kirl->xkl", x.reshape(-1, 2, 3), a, c).flatten(1),
    ),
    "a path": (
        lambda x, a, c: tn.einsum("xij,ijrk,kirl->xkl", x.reshape(-1, 2, 3), a, c, optimize=[(1, 2), (0, 1)]).flatten(1),
        lambda x, a, c: torch.einsum("xij,ijrk,kirl->xkl", x.reshape(-1, 2, 3), a, c).flatten(1),
    ),
    "broadcast": (
        lambda x, a, c: tn.einsum("xi,yj,yj->xij", x, a[:1, :, 0, 0], c[:1, 0, 0, :]).flatten(1),
        lambda x, a, c: torch.einsum("xi,yj,yj->xij", x, a[:1, :, 0, 0], c[:1, 0, 0, :]).flatten(1),
    ),
    "one operand": (lambda x, a, c: tn.einsum("xi->ix", x * a.sum() * c.sum()), lambda x, a, c: (x * a.sum() * c.sum()).mT),
    "words": (
        lambda x, a, c: tn.contract(SPEC, x, a, c),
        lambda x, a, c: torch.einsum("xij,ijrk,kirl->xkl", x.reshape(-1, 2, 3), a, c).flatten(1),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_functional_transforms(name):
    run, reference = CALLS[name]
    x, a, c = _layer(5)
    tangents = tuple(torch.randn_like(t) for t in (x, a, c))

    def loss(f):
        return lambda *t: f(*t).square().sum()

    for got, want in (
        (torch.func.grad(loss(run), argnums=(0, 1, 2))(x, a, c), torch.func.grad(loss(reference), argnums=(0, 1, 2))(x, a, c)),
        (torch.func.jvp(run, (x, a, c), tangents), torch.func.jvp(reference, (x, a, c), tangents)),
        ((torch.func.jacrev(run)(x, a, c),), (torch.func.jacrev(reference)(x, a, c),)),
        ((torch.func.hessian(loss(run))(x, a, c),), (torch.func.hessian(loss(reference))(x, a, c),)),
    ):
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w)
    many = torch.stack([_layer(5)[0] for _ in range(3)])
    got = torch.func.vmap(run, in_dims=(0, None, None))(many, a, c)
    torch.testing.assert_close(got, torch.stack([reference(row, a, c) for row in many]))


def test_forward_mode():
    a, b = torch.randn(3, 4, dtype=torch.float64), torch.randn(4, 5, dtype=torch.float64)
    with forward_ad.dual_level():
        got = tn.einsum("ij,jk->ik", forward_ad.make_dual(a, torch.ones_like(a)), b)
        torch.testing.assert_close(forward_ad.unpack_dual(got).tangent, torch.ones_like(a) @ b)


@pytest.mark.parametrize("name", CALLS)
def test_fifty_batch_sizes_make_two_graphs(name, monkeypatch):
    """One graph for the first size, one for all others; nothing is planned while the graphs run."""
    run, reference = CALLS[name]
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter)
    for rows in range(2, 52):
        operands = [t.requires_grad_() for t in _layer(rows)]
        got, want = compiled(*operands), reference(*operands)
        torch.testing.assert_close(got, want)
        gots, wants = (torch.autograd.grad(value.square().sum(), operands) for value in (got, want))
        torch.testing.assert_close(gots, wants)
        if rows == 4:
            monkeypatch.setattr(graph, "make", _refuse)
            monkeypatch.setattr(family, "make", _refuse)
    assert counter.frame_count <= 2


def _refuse(*_):
    raise AssertionError("planned again")


def test_transforms_inside_the_compiler():
    x, a, c = _layer(5)
    compiled = torch.compile(torch.func.vmap(CALLS["words"][0], in_dims=(0, None, None)), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x[:, None], a, c)[:, 0], CALLS["words"][1](x, a, c))
    inner = torch.compile(torch.func.grad(lambda x: CALLS["letters"][0](x, a, c).sum()), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(inner(x), torch.func.grad(lambda x: CALLS["letters"][1](x, a, c).sum())(x))


@pytest.fixture
def planned(monkeypatch) -> list:
    """The (structure, sizes, dynamic axes) of every plan that is made during the test."""
    calls: list = []
    plain = family.make.__wrapped__
    monkeypatch.setattr(family, "make", lambda *arguments: (calls.append(arguments), plain(*arguments))[1])
    return calls


def test_checkpointing():
    operands = [t.requires_grad_() for t in _layer(5)]
    run, reference = CALLS["words"]
    got = torch.utils.checkpoint.checkpoint(run, *operands, use_reentrant=False)
    gots, wants = (torch.autograd.grad(y.square().sum(), operands) for y in (got, reference(*operands)))
    torch.testing.assert_close(gots, wants)


@pytest.mark.parametrize("name", CALLS)
def test_symbolic_tracing(name):
    """make_fx with open sizes, and torch.export with a dynamic dimension: one program for every size."""
    run, reference = CALLS[name]
    traced = make_fx(run, tracing_mode="symbolic")(*_layer(5))
    module = torch.nn.Module()
    module.forward = run  # type: ignore[method-assign]  # a module is what torch.export takes
    exported = torch.export.export(module, tuple(_layer(5)), dynamic_shapes=({0: torch.export.Dim("rows")}, None, None)).module()
    for rows in (2, 5, 33):
        operands = _layer(rows)
        torch.testing.assert_close(traced(*operands), reference(*operands))
        torch.testing.assert_close(exported(*operands), reference(*operands))


def test_a_loop_over_batch_sizes_plans_twice(planned):
    a, b = torch.randn(7, 8), torch.randn(8, 9)
    for rows in range(1, 65):
        x = torch.randn(rows, 7)
        torch.testing.assert_close(tn.einsum("zy,yx,xw->zw", x, a, b), x @ a @ b)
    assert [sorted(dynamic) for _, _, dynamic in planned] == [[], ["z"]]
    planned.clear()
    for rows in range(1, 65):
        x = torch.randn(rows, 7)
        torch.testing.assert_close(tn.contract("... y, y x, x w -> ... w", x, a, b), x @ a @ b)
    assert len(planned) <= 2 and all(dynamic == {"..."} for _, _, dynamic in planned)


def test_networks_of_one_equation_are_planned_apart(planned):
    """The best order of the second is not that of the first, whose sizes differ everywhere."""
    orders = []
    for sizes in ((2, 40, 3, 50), (60, 3, 41, 2)):
        a, b, c = (torch.randn(m, n) for m, n in itertools.pairwise(sizes))
        torch.testing.assert_close(tn.einsum("pq,qr,rs->ps", a, b, c), a @ b @ c)
        orders.append(family.family(planned[-1][0]).find(dict(zip("pqrs", sizes, strict=True))).plan.path)
    assert orders == [((0, 1), (3, 2)), ((1, 2), (0, 3))]
    assert [dynamic for _, _, dynamic in planned] == [frozenset(), frozenset()]
