"""Projections: exact where the structure contains the matrix, optimal where a closed form says so, near the best fit elsewhere."""

import pytest
import torch
from torch import Tensor

import tn
from tn import projection_ranks
from tn.structures import get

F64 = torch.float64
FULL = {
    "dense": {}, "low_rank": {}, "tt": {}, "tt of 3 cores": dict(cores=3), "kronecker": {}, "btt": {}, "btt of 3 cores": dict(cores=3),
    "monarch": dict(blocks=1), "block_diagonal": dict(blocks=1), "blast": {}, "einsum2": {}, "btt_norm": {},
    "kronecker of 3 cores": dict(cores=3),
}  # fmt: skip
PARTIAL = {
    "low_rank": dict(rank=3), "tt": dict(rank=3), "tt of 3 cores": dict(rank=(2, 3), cores=3), "kronecker": dict(rank=2),
    "kronecker of 3 cores": dict(rank=2, cores=3), "monarch": dict(blocks=2), "btt": dict(rank=2),
    "btt of 3 cores": dict(rank=(1, 2), cores=3),
    "block_diagonal": dict(blocks=2), "blast": dict(rank=4, blocks=(2, 3)), "einsum2": dict(theta=(0.3, 0.3, 0.4, 0.3, 0.3, 0.4, 0.3)),
}  # fmt: skip


def project(case: str, weight: Tensor, **options) -> tn.Projection:
    return tn.project(weight, structure=case.split(" of ")[0], **options)


@pytest.mark.parametrize("case", FULL)
@pytest.mark.parametrize("size", [(12, 12), (16, 12)], ids=str)
def test_exact_at_full_rank(case, size):
    weight = torch.randn(*size, dtype=F64)
    family = get(case.split(" of ")[0])
    built = family.build(size[1], size[0], tn.structures.Options(**FULL[case]))
    if built.factors and "rank" in family.takes:
        full = family.full_ranks(built.factors)
        options = dict(factors=built.factors, rank=full if len(full) > 1 else full[0])
    else:
        options = dict(rank=12) if case == "low_rank" else FULL[case]
    found = project(case, weight, **options)
    assert found.error < 1e-6 and found.energy > 1 - 1e-6
    assert torch.allclose(found.to_dense(), weight, atol=1e-5)


@pytest.mark.parametrize("case", PARTIAL)
@pytest.mark.parametrize("size", [(18, 12), (20, 30), (31, 13)], ids=str)
def test_exact_on_its_own_members(case, size):
    """The chain, Kronecker and two-core families from nothing; those whose fit has local minima from a start near the member."""
    if case == "blast" and 13 in size:
        size = (31, 18)
    layer = tn.StructuredLinear(size[1], size[0], structure=case.split(" of ")[0], bias=False, dtype=F64, **PARTIAL[case])
    weight = layer.to_dense().detach()
    start = None
    if case in ("blast", "kronecker of 3 cores") or (layer._pads != (0, 0) and not case.startswith(("btt", "monarch"))):
        start = {name: getattr(layer, name) * (1 + 0.05 * torch.randn_like(getattr(layer, name))) for name in layer.network.cores}
    found = tn.project(weight, structure=layer.structure, rank=layer.rank, factors=layer.factors, start=start, sweeps=2000)
    assert found.error < (1e-6 if start is None else 2e-3)


@pytest.mark.parametrize("size", [(24, 36), (23, 35)], ids=str)
def test_block_error_is_the_discarded_energy(size):
    weight = torch.randn(*size, dtype=F64)
    found = tn.project(weight, structure="btt", rank=2, factors=((6, 6), (4, 6)))
    padded = torch.nn.functional.pad(weight, (0, 36 - size[1], 0, 24 - size[0]))
    values = torch.linalg.svdvals(padded.reshape(4, 6, 6, 6).permute(0, 2, 1, 3))
    assert found.error == pytest.approx(float(values[..., 2:].square().sum().sqrt() / weight.norm()), rel=1e-9)


def test_low_rank_is_eckart_young_and_kronecker_van_loan_pitsianis():
    weight = torch.randn(24, 36, dtype=F64)
    values = torch.linalg.svdvals(weight)
    assert tn.project(weight, structure="low_rank", rank=5).error == pytest.approx(float(values[5:].norm() / weight.norm()))
    rearranged = weight.reshape(4, 6, 6, 6).permute(0, 2, 1, 3).reshape(24, 36)
    tail = torch.linalg.svdvals(rearranged)[3:].norm() / weight.norm()
    assert tn.project(weight, structure="kronecker", rank=3, factors=((6, 6), (4, 6))).error == pytest.approx(float(tail))


@pytest.mark.parametrize("case", PARTIAL)
def test_no_small_step_improves_a_projection(case):
    """The gradient of the distance at the cores found is nothing beside its size at a random place: a stationary point."""
    weight = torch.randn(31, 26, dtype=F64)
    options = PARTIAL[case]
    found = project(case, weight, sweeps=3000, **options)

    def slope(cores: dict[str, Tensor]) -> float:
        layer = tn.StructuredLinear.from_cores(found.structure, cores, in_features=26, out_features=31)
        (layer.to_dense() - weight).square().sum().backward()
        return sum(float(p.grad.square().sum()) for p in layer.parameters()) ** 0.5

    noisy = {name: core + core.square().mean().sqrt() * torch.randn_like(core) for name, core in found.cores.items()}
    assert slope(dict(found.cores)) < 0.01 * slope(noisy)


@pytest.mark.parametrize("case", PARTIAL)
@pytest.mark.parametrize("pads", [False, True])
def test_projections_for_given_inputs_beat_plain_ones(case, pads):
    size = (31, 26) if pads else (36, 24)
    weight = torch.randn(*size, dtype=F64)
    x = torch.randn(200, size[1], dtype=F64) * torch.logspace(0, -3, size[1], dtype=F64)
    x = x @ torch.linalg.qr(torch.randn(size[1], size[1], dtype=F64))[0]

    def wrong(found: tn.Projection) -> float:
        return float((x @ (weight - found.to_dense()).mT).norm() / (x @ weight.mT).norm())

    plain, aware = project(case, weight, **PARTIAL[case]), project(case, weight, gram=x.mT @ x, **PARTIAL[case])
    assert wrong(aware) <= wrong(plain) * (1 + 1e-9) and aware.error == pytest.approx(wrong(aware), rel=1e-3)
    if case == "low_rank":
        assert wrong(aware) == pytest.approx(float(torch.linalg.svdvals(weight @ x.mT)[3:].norm() / (weight @ x.mT).norm()), rel=1e-3)


@pytest.mark.parametrize("structure", ["blast", "kronecker"])
def test_near_the_best_of_adam(structure):
    """A small cousin of the bench: three fits of 1,000 steps."""
    weight = torch.randn(24, 32, dtype=F64)
    options = dict(rank=6) if structure == "blast" else dict(rank=3, cores=3)
    found = tn.project(weight, structure=structure, **options)
    best = 9.0
    for seed in range(3):
        torch.manual_seed(seed)
        layer = tn.StructuredLinear(32, 24, structure=structure, bias=False, dtype=F64, **options)
        optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
        for _ in range(1000):
            optimizer.zero_grad()
            off = (layer.to_dense() - weight).square().sum()
            off.backward()
            optimizer.step()
        best = min(best, float((layer.to_dense().detach() - weight).norm() / weight.norm()))
    assert found.error <= 1.01 * best


def test_dtype_layer_and_bias():
    weight, bias = torch.randn(20, 12), torch.randn(20)
    found = tn.project(weight.to(torch.bfloat16), structure="btt", rank=2)
    assert {core.dtype for core in found.cores.values()} == {torch.bfloat16} and found.error < 1
    layer = tn.project(weight.mT.contiguous().mT, structure="btt_norm", rank=3).layer(bias)
    x = torch.randn(4, 12)
    assert torch.allclose(layer(x), x @ layer.to_dense().mT + bias, atol=1e-5)
    assert tn.project(torch.zeros(4, 6), structure="btt").error == 0


@pytest.mark.parametrize(
    ("weight", "options", "message"),
    [
        (torch.zeros(3), {}, r"shape \(3,\), expected a non-empty matrix"),
        (torch.zeros(0, 3), {}, "non-empty matrix"),
        (torch.zeros(3, 3, dtype=torch.int64), {}, "torch.int64, expected a real floating dtype"),
        (torch.zeros(3, 3, dtype=torch.complex64), {}, "torch.complex64"),
        (torch.tensor([[1.0, float("nan")]]), {}, r"weight is nan at \[0, 1\]"),
        ([[1.0]], {}, "weight is a list"),
        (torch.zeros(3, 3, device="meta"), {}, "meta device"),
        (torch.ones(3, 3), dict(gram=torch.ones(2, 2)), r"gram is \(2, 2\), expected the matrix \(3, 3\)"),
        (torch.ones(3, 3), dict(gram=-torch.eye(3)), "expected XᵀX of some inputs X"),
        (torch.ones(3, 3), dict(gram=torch.eye(3) * float("inf")), "not finite"),
        (torch.ones(4, 4), dict(start={"first": torch.ones(2), "second": torch.ones(2)}), "start has core 'first' of shape"),
    ],
)
def test_refusals(weight, options, message):
    with pytest.raises(tn.ProjectionError, match=message):
        tn.project(weight, structure="btt", **options)


def test_structure_refusals_come_through():
    with pytest.raises(tn.StructureError, match="btt rank 9 is more than 2"):
        tn.project(torch.ones(4, 4), structure="btt", rank=9)
    assert get("dense").takes == ()


@pytest.mark.parametrize("structure", ["block_diagonal", "btt", "monarch"])
def test_a_shuffled_member_is_found_again(structure):
    options = {"btt": dict(rank=1, factors=((4, 6), (4, 5))), "monarch": dict(factors=((4, 1, 6), (4, 1, 5)), rank=1)}.get(structure, {})
    layer = tn.StructuredLinear(24, 20, structure=structure, bias=False, dtype=F64, **options)
    shuffled = layer.to_dense().detach()[:, torch.randperm(24)]
    plain = tn.project(shuffled, structure=structure, **options)
    found = tn.project(shuffled, structure=structure, permute=True, **options)
    assert found.error < (1e-6 if structure == "block_diagonal" else 0.9 * plain.error) < plain.error
    assert sorted(found.permutation.tolist()) == list(range(24))
    off = float((found.to_dense() - shuffled).norm() / shuffled.norm())
    assert off == pytest.approx(found.error, abs=1e-9)
    again = eval(repr(found.layer()), {"StructuredLinear": tn.StructuredLinear}).double()
    again.load_state_dict(found.layer().state_dict())
    assert torch.equal(again.to_dense(), found.to_dense())


def test_a_permutation_never_hurts_and_what_cannot_be_permuted_says_so():
    weight = torch.randn(36, 24, dtype=F64)
    for structure in ("block_diagonal", "btt", "monarch", "btt_norm"):
        assert tn.project(weight, structure=structure, permute=True).error <= tn.project(weight, structure=structure).error + 1e-12
    gram = torch.diag(torch.logspace(0, -2, 24, dtype=F64))
    found = tn.project(weight, structure="btt", permute=True, gram=gram)
    off = (found.to_dense() - weight) @ gram.sqrt()
    assert found.error == pytest.approx(float(off.norm() / (weight @ gram.sqrt()).norm()), rel=1e-6)
    with pytest.raises(tn.ProjectionError, match="permute is for two-core"):
        tn.project(weight, structure="tt", permute=True)
    with pytest.raises(tn.ProjectionError, match="13 is padded to 14"):
        tn.project(weight[:, :13], structure="btt", permute=True)
    with pytest.raises(tn.StructureError, match="permuted inputs"):
        _ = found.layer().T


def test_a_block_diagonal_matrix_for_given_inputs_is_the_regression_on_each_block():
    """What lies outside the blocks is not made, but the inputs inside them stand in for it as far as they are correlated."""
    weight, x = torch.randn(20, 24, dtype=F64), torch.randn(200, 24, dtype=F64) @ torch.randn(24, 24, dtype=F64)
    found = tn.project(weight, structure="block_diagonal", gram=x.mT @ x).to_dense()
    for block in range(4):
        rows, columns = slice(5 * block, 5 * block + 5), slice(6 * block, 6 * block + 6)
        want = torch.linalg.lstsq(x[:, columns], x @ weight[rows].mT).solution.mT
        assert torch.allclose(found[rows, columns], want, atol=1e-5)


@pytest.mark.parametrize("case", ["low_rank", "btt", "tt", "kronecker", "monarch", "blast"])
def test_energy_chooses_the_smallest_rank_that_keeps_it(case):
    weight = torch.randn(24, 36, dtype=F64) * torch.logspace(0, -2, 36, dtype=F64)
    found = tn.project(weight, structure=case, energy=0.9)
    assert found.energy >= 0.9
    if found.built.rank > 1:
        assert tn.project(weight, structure=case, rank=found.built.rank - 1).energy < 0.9


@pytest.mark.parametrize("case", ["low_rank", "btt", "tt", "kronecker", "monarch", "einsum2"])
def test_singular_values_foretell_what_a_rank_keeps(case):
    weight = torch.randn(24, 36, dtype=F64)
    built = get(case).build(36, 24, tn.structures.Options(rank=1))
    kept = projection_ranks.kept(built, weight)
    for rank in (1, 2, 3):
        found = tn.project(weight, structure=case, rank=rank)
        assert found.energy == pytest.approx(float(kept[:rank].sum()), abs=1e-6)


def test_energy_that_cannot_be_is_refused():
    weight = torch.randn(6, 6)
    for options, message in (
        (dict(energy=0.0), "share above 0 and at most 1"),
        (dict(energy=0.5, rank=2), "energy=0.5 chooses the rank"),
        (dict(energy=0.5, structure="block_diagonal"), "take a structure that has one"),
    ):
        with pytest.raises(tn.ProjectionError, match=message):
            tn.project(weight, **{"structure": "btt", **options})


def uneven(rows: int = 24, columns: int = 36) -> Tensor:
    """A matrix whose blocks are of very different sizes."""
    blocks = torch.randn(4, 6, 6, 6, dtype=F64) * torch.logspace(0, -2, 24, dtype=F64)[torch.randperm(24)].reshape(4, 1, 6, 1)
    return blocks.reshape(24, 36)[:rows, :columns]


@pytest.mark.parametrize("structure", ["btt", "btt_norm", "monarch", "einsum2"])
@pytest.mark.parametrize("size", [(24, 36), (23, 35)], ids=str)
def test_ranks_spread_over_blocks_keep_more_than_one_rank_everywhere(structure, size):
    if structure == "einsum2" and 23 in size:
        with pytest.raises(tn.StructureError, match=r"block ranks of einsum2 need sizes without padding, \(23, 35\) is padded"):
            tn.project(uneven(*size), structure=structure, factors=((6, 1, 6), (4, 6, 1)), budget=0.3, block_ranks=True)
        return
    factors = {"monarch": ((6, 1, 6), (4, 1, 6)), "einsum2": ((6, 1, 6), (4, 6, 1))}.get(structure, ((6, 6), (4, 6)))
    weight = uneven(*size)
    flat = tn.project(weight, structure=structure, factors=factors, rank=2)
    found = tn.project(weight, structure=structure, factors=factors, budget=(48 * 12 + 0.5) / weight.numel(), block_ranks=True)
    padded = torch.nn.functional.pad(weight, (0, 36 - size[1], 0, 24 - size[0]))
    values = torch.linalg.svdvals(padded.reshape(4, 6, 6, 6).permute(0, 2, 1, 3)).flatten().sort(descending=True).values
    assert int(found.block_ranks.sum()) == 48 and found.nonzero <= flat.nonzero <= 48 * 12
    assert found.error == pytest.approx(float(values[48:].square().sum().sqrt() / weight.norm()), rel=1e-9)  # no choice keeps more
    assert found.error < flat.error and int(found.block_ranks.max()) == found.built.rank > 2
    again = tn.project(weight, structure=structure, factors=factors, block_ranks=found.block_ranks)
    assert again.error == found.error and torch.equal(again.block_ranks, found.block_ranks)


def test_what_is_beyond_a_blocks_rank_stays_zero_in_training():
    layer = tn.project(uneven(), structure="btt", factors=((6, 6), (4, 6)), budget=0.3, block_ranks=True).layer()
    zeros = {name: core == 0 for name, core in layer.named_parameters()}
    assert any(zero.any() for zero in zeros.values())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    for _ in range(5):
        optimizer.zero_grad()
        layer(torch.randn(8, 36, dtype=F64)).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(core == 0, zeros[name]) for name, core in layer.named_parameters())


def test_a_budget_over_the_blocks_of_a_model():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(36, 24), torch.nn.ReLU(), torch.nn.Linear(24, 36))
    with torch.no_grad():
        model[0].weight.copy_(uneven())
        model[2].weight.copy_(0.01 * uneven().mT)
    weights = [model[i].weight.detach().clone() for i in (0, 2)]
    report = tn.restructure(model, structure="btt", layers="all", init="project", budget=0.4, block_ranks=True)
    left = sum(int(torch.count_nonzero(core)) for i in (0, 2) for core in (model[i].first, model[i].second))
    assert 0.4 * 2 * 24 * 36 - 24 < left <= 0.4 * 2 * 24 * 36
    for change, i, weight in zip(report.changes, (0, 2), weights, strict=True):
        off = float((model[i].to_dense().detach() - weight).norm() / weight.norm())
        assert change.error == pytest.approx(off, rel=1e-4) and "block ranks 0 to" in change.note and "not zero" in str(report)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(block_ranks=True), "block_ranks=True needs budget="),
        (dict(block_ranks=3), "block_ranks is 3, expected True, False or integers"),
        (dict(block_ranks=True, budget=0.3, rank=2), "leave out rank="),
        (dict(block_ranks=True, budget=0.3, gram=torch.eye(36)), "leave out gram="),
        (dict(block_ranks=True, budget=0.3, permute=True), "leave out permute="),
        (dict(block_ranks=True, budget=0.001), "cannot do with 0.001 of the dense parameters; one rank of one block takes"),
        (dict(block_ranks=True, budget=-1), "budget is -1, expected a positive fraction"),
        (dict(block_ranks=True, budget=0.3, structure="low_rank"), "block ranks are of two cores of independent blocks"),
        (dict(block_ranks=True, budget=0.3, structure="blast"), "block ranks are of two cores of independent blocks"),
        (dict(block_ranks=True, budget=0.3, cores=3), "block ranks are of two cores of independent blocks"),
        (dict(block_ranks=torch.ones(3, 3, dtype=torch.int64)), r"expected True or integers of shape \(\d+, \d+\), one for each block"),
        (dict(block_ranks=torch.full((4, 6), 99), factors=((6, 6), (4, 6))), "block_ranks are from 99 to 99, expected 0 to 6"),
        (dict(block_ranks=torch.zeros(4, 6, dtype=torch.int64), factors=((6, 6), (4, 6))), "not all zero"),
    ],
)
def test_block_ranks_that_cannot_be(options, message):
    with pytest.raises(tn.TnError, match=message):
        tn.project(uneven().float(), **{"structure": "btt", **options})
    with pytest.raises(tn.StructureError, match="block_ranks are for init='project' with a budget"):
        tn.restructure(torch.nn.Sequential(torch.nn.Linear(4, 4)), structure="btt", layers="all", block_ranks=True)
