"""btt_moe: only the chosen experts run, and the result and every gradient are those of all experts weighed by the gate; tn.guide."""

import copy
import pickle

import pytest
import torch
from torch import nn

import tn
from tn.scaling import multipliers
from tn.testing import assert_close

F64 = torch.float64


def layer(d_in: int = 12, d_out: int = 20, **options) -> tn.StructuredLinear:
    torch.manual_seed(1)
    made = tn.StructuredLinear(d_in, d_out, structure="btt_moe", dtype=F64, **{"rank": 5, "active": 2, **options})
    with torch.no_grad():
        made.gate.normal_()
        made.bias.normal_()
    return made


def reference(moe: tn.StructuredLinear, x: torch.Tensor, values: dict[str, torch.Tensor]) -> torch.Tensor:
    """Every expert as a dense matrix, weighed; written without anything of the layer."""
    s = moe.network.sizes
    each = torch.einsum("ijrk,kirl->rklij", values["first"], values["second"]).reshape(s["r"], s["k"] * s["l"], s["i"] * s["j"])
    each = each[:, : moe.out_features, : moe.in_features]
    top, chosen = (x @ values["gate"].mT).topk(moe.experts.active, dim=-1)
    weights = torch.zeros(*x.shape[:-1], s["r"], dtype=x.dtype).scatter(-1, chosen, top.softmax(-1))
    scale = 1.0
    for name, std in moe.start().items():
        scale = scale / ((values[name].square().mean() + 1e-8).sqrt() / std).clamp(min=1)
    return torch.einsum("...r,roi,...i->...o", weights, each, x) * scale * values["gains"].prod() + values["bias"]


@pytest.mark.parametrize("sizes", [(12, 20), (13, 31), (64, 64)], ids=str)
@pytest.mark.parametrize("active", [1, 2, 5])
@pytest.mark.parametrize("rows", [(7,), (2, 3), (), (0,)], ids=str)
def test_value_and_gradients_are_those_of_all_experts_weighed(sizes, active, rows):
    moe = layer(*sizes, active=active)
    x = torch.randn(*rows, sizes[0], dtype=F64, requires_grad=True)
    values = {name: p.detach().requires_grad_() for name, p in moe.named_parameters()}
    want = reference(moe, x, values)
    got = moe(x)
    assert got.shape == want.shape
    cotangent = torch.randn_like(want)
    ours = torch.autograd.grad(got, [x, *moe.parameters()], cotangent)
    theirs = torch.autograd.grad(want, [x, *values.values()], cotangent)
    for one, other in zip([got, *ours], [want, *theirs], strict=True):
        assert_close(one, other.detach(), bound=torch.ones_like(other) * 100, roundings=100)


def test_only_chosen_experts_run(monkeypatch):
    moe = layer(64, 64)
    rows, real = [], moe.experts.run
    monkeypatch.setattr(moe.experts, "run", lambda x, *cores: rows.append(len(x)) or real(x, *cores))
    moe(torch.randn(100, 64, dtype=F64))
    assert sum(rows) == 2 * 100 and len(rows) <= 5
    single = tn.structures.get("btt").build(64, 64).macs
    assert tn.flops(moe, torch.randn(100, 64, dtype=F64)) == 2 * 100 * (2 * single + 5 * 64)


def test_compiled_copied_and_pickled():
    moe = layer()
    x = torch.randn(6, 12, dtype=F64)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(moe, backend="eager", fullgraph=True)(x), moe(x))
    for other in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe)), eval(repr(moe), {"StructuredLinear": tn.StructuredLinear}).double()):
        other.load_state_dict(moe.state_dict())
        assert torch.equal(other(x), moe(x))


def test_starts_and_rates_are_those_of_one_expert():
    moe, one = tn.StructuredLinear(64, 64, structure="btt_moe", rank=8), tn.StructuredLinear(64, 64, structure="btt")
    assert moe.start() == one.start() and multipliers(moe) == multipliers(one)
    assert moe.second.std().item() == pytest.approx(one.start()["second"], rel=0.05)
    assert moe.gate.abs().max() == 0


def test_balance_loss_falls_when_rows_spread():
    moe = layer(16, 16, rank=4, active=1)
    x = torch.randn(400, 16, dtype=F64)
    with torch.no_grad():
        moe.gate.zero_()
        moe.gate[0, :] = 0.5
        moe(x.abs())
        lopsided = tn.balance_loss(moe)
        moe.gate.copy_(torch.eye(4, 16, dtype=F64) * 0.5)
        moe(x)
    assert tn.balance_loss(moe) < lopsided
    moe(x)
    tn.balance_loss(nn.Sequential(moe)).backward()
    assert moe.gate.grad.abs().max() > 0
    with pytest.raises(tn.StructureError, match="has run yet"):
        tn.balance_loss(layer())


def test_what_has_no_matrix_says_so():
    moe = layer()
    for attempt in (moe.to_dense, lambda: moe.T, lambda: moe.convert("dense"), lambda: moe @ tn.StructuredLinear(6, 12, structure="btt")):
        with pytest.raises(tn.TnError, match="depends on the input"):
            attempt()
    with pytest.raises(tn.StructureError, match="active is 6, expected an integer from 1 to the 5 experts"):
        layer(active=6)
    with pytest.raises(tn.StructureError, match="btt takes only rank, factors, cores, got active=2"):
        tn.StructuredLinear(4, 4, structure="btt", active=2)


@pytest.mark.parametrize("size", [(24, 36), (23, 35)], ids=str)
def test_a_projection_gives_every_expert_the_nearest_matrix(size):
    """Then the layer is that matrix whatever its gate chooses, and the error is that of one expert."""
    weight = torch.randn(*size, dtype=F64)
    found, one = tn.project(weight, structure="btt_moe", rank=5), tn.project(weight, structure="btt")
    assert found.error == pytest.approx(one.error) and torch.allclose(found.to_dense(), one.to_dense())
    moe, x = found.layer(), torch.randn(7, size[1], dtype=F64)
    with torch.no_grad():
        moe.gate.normal_()
    assert moe.experts.count == 5 and torch.allclose(moe(x), x @ one.to_dense().mT)
    model = nn.Sequential(nn.Linear(size[1], size[0], dtype=F64), nn.ReLU())
    with torch.no_grad():
        model[0].weight.copy_(weight)
    bias = model[0].bias.detach().clone()
    report = tn.restructure(model, structure="btt_moe", layers="0", init="project")
    assert report.changes[0].error == pytest.approx(one.error) and torch.allclose(model[0](x), x @ one.to_dense().mT + bias)
    with pytest.raises(tn.ProjectionError, match="energy=0.5 chooses the rank"):
        tn.project(weight, structure="btt_moe", energy=0.5)


@pytest.mark.parametrize(("rows", "beside"), [(1, False), (12, True), (80, False), (300, False)])
def test_many_and_few_rows_are_one_function(rows, beside, monkeypatch):
    """Few rows run through all experts beside each other; cores of experts with many rows are copied."""
    moe, calls = layer(16, 16, rank=3 if rows > 1 else 8, active=1), []
    real = moe.experts.beside
    monkeypatch.setattr(moe.experts, "beside", lambda *operands: calls.append(operands[0].shape) or real(*operands))
    x = torch.randn(rows, 16, dtype=F64, requires_grad=True)
    values = {name: p.detach().requires_grad_() for name, p in moe.named_parameters()}
    want = reference(moe, x, values)
    got = moe(x)
    assert torch.allclose(got, want, atol=1e-12) and bool(calls) == beside
    ours = torch.autograd.grad(got.square().sum(), [x, *moe.parameters()])
    theirs = torch.autograd.grad(want.square().sum(), [x, *values.values()])
    for one, other in zip(ours, theirs, strict=True):
        assert torch.allclose(one, other, atol=1e-10)


def test_budgets_count_the_experts_that_run():
    moe = tn.StructuredLinear(256, 256, structure="btt_moe", match="flops", budget=0.4)
    single = tn.structures.get("btt").build(256, 256).macs
    assert moe.built.macs == 2 * single + 256 * moe.experts.count == tn.flops(moe, torch.randn(1, 256)) / 2
    assert 0.4 * 256**2 - 256 < moe.built.macs <= 0.4 * 256**2
    held = tn.StructuredLinear(256, 256, structure="btt_moe", match="params", budget=0.5, active=3, bias=False)
    assert held.built.parameters == sum(p.numel() for p in held.parameters()) - len(held.gains) <= 0.5 * 256**2
    assert held.experts.active == 3 <= held.experts.count
    with pytest.raises(tn.StructureError, match="cannot do with 0.01 of the dense layer's flops"):
        tn.StructuredLinear(256, 256, structure="btt_moe", match="flops", budget=0.01)


def test_learns_to_route():
    """Two kinds of rows that need two different maps: two experts, one a row, fit them better than one expert can."""
    torch.manual_seed(0)
    kind = torch.arange(256) % 2
    x = torch.randn(256, 16) * 0.3
    x[:, 0] = torch.where(kind == 1, 2.0, -2.0)
    maps = torch.stack([tn.StructuredLinear(16, 16, structure="btt").to_dense().detach() for _ in range(2)])
    y = torch.einsum("nio,ni->no", maps[kind], x)
    left = {}
    for experts in (1, 2):
        torch.manual_seed(0)
        moe = tn.StructuredLinear(16, 16, structure="btt_moe", rank=experts, active=1, clamp=False)
        with torch.no_grad():
            moe.gate[-1, 0], moe.gate[0, 0] = 1.0, moe.gate[0, 0] - float(experts > 1)  # the kind is the sign of the first feature
        optimizer = torch.optim.Adam(moe.parameters(), lr=1e-2)
        for _ in range(300):
            optimizer.zero_grad()
            off = (moe(x) - y).square().mean()
            off.backward()
            optimizer.step()
        left[experts] = off.item()
    assert left[2] < 0.2 * left[1]


def test_a_guided_model_starts_as_it_was_and_ends_as_its_cores():
    model = nn.Sequential(
        tn.StructuredLinear(12, 16, structure="btt"), nn.ReLU(), tn.StructuredLinear(16, 4, structure="tt"), nn.Linear(4, 4)
    )
    x = torch.randn(5, 12)
    before = model(x)
    plain = list(model.state_dict())
    fading = tn.guide(model, steps=3)
    assert torch.allclose(model(x), before, atol=1e-5) and model[0].shadow.shape == (16, 12)
    groups = tn.param_groups(model, lr=1e-3, weight_decay=0.1)
    assert {"0.shadow", "2.shadow"} <= {name for group in groups for name in group["names"]}
    optimizer = torch.optim.AdamW(groups)
    ratios = []
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()
        ratios.append(fading.step())
    assert ratios == pytest.approx([0.75, 0.25, 0.0]) and list(model.state_dict()) == plain
    first = model[0]
    assert torch.allclose(first(x), x @ first.to_dense().mT + first.bias, atol=1e-5)
    with pytest.raises(tn.StructureError, match="no structured layer to guide"):
        tn.guide(nn.Linear(2, 2), 3)
    tn.guide(model, steps=3)
    with pytest.raises(tn.StructureError, match="layer '0' is guided already"):
        tn.guide(model, steps=3)


def test_the_mixture_in_the_middle():
    model = nn.Sequential(tn.StructuredLinear(12, 16, structure="btt", dtype=F64))
    fading = tn.guide(model, steps=2)
    lin, x = model[0], torch.randn(3, 12, dtype=F64)
    with torch.no_grad():
        lin.shadow.add_(1.0)
    alone = tn.StructuredLinear.from_cores("btt", {"first": lin.first.detach(), "second": lin.second.detach()})
    assert fading.step() == pytest.approx(0.5)
    assert torch.allclose(lin(x), 0.5 * x @ lin.shadow.mT + 0.5 * alone(x) + lin.bias)


def test_under_autocast():
    lin = tn.StructuredLinear(64, 96, structure="btt_moe")
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = lin(x)
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.dtype is torch.float32 for parameter in lin.parameters())
