"""Every family against its definition written out, its golden sizes, its factors and its refusals."""

import math

import pytest
import torch

import tn
from tn.scaling import multipliers
from tn.structures import Options, exponents, factors, get, macs, registry
from tn.testing import assert_close

F64 = torch.float64


def dense_of(structure: str, d_in: int, d_out: int, **options) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, int]]:
    """The matrix of a layer, its cores with one dimension an axis, and the sizes of its axes."""
    layer = tn.StructuredLinear(d_in, d_out, structure=structure, dtype=F64, bias=False, **options)
    return layer.to_dense().detach(), {n: getattr(layer, n).detach() for n in layer.network.cores}, dict(layer.network.sizes)


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    assert_close(got, want, bound=torch.ones_like(want) * 50, roundings=50)


def test_block_diagonal_is_block_diagonal():
    w, c, _ = dense_of("block_diagonal", 12, 8)
    close(w, torch.block_diag(*(block.mT for block in c["weight"])))


def test_kronecker_is_a_sum_of_kronecker_products():
    w, c, _ = dense_of("kronecker", 12, 20, rank=3)
    close(w, sum(torch.kron(a.mT, b.mT) for a, b in zip(c["first"], c["second"], strict=True)))
    w, c, _ = dense_of("kronecker", 30, 8, rank=2, cores=3)
    triples = zip(c["first"], c["second"], c["third"], strict=True)
    padded = sum(torch.kron(torch.kron(a.mT.contiguous(), b.mT.contiguous()), d.mT.contiguous()) for a, b, d in triples)
    close(w, padded[:8, :30])


def test_monarch_is_two_block_diagonal_matrices_around_a_permutation():
    w, c, s = dense_of("monarch", 32, 48, blocks=4)  # q = 2: the middle has 32 features
    assert (s["k"], s["m"], s["p"], s["q"], s["l"], s["s"]) == (4, 1, 8, 2, 4, 12)
    first = torch.block_diag(*(c["first"][k, 0].reshape(8, 8).mT for k in range(4)))  # x (k p) → z (k q l)
    order = [k * 8 + q * 4 + block for block in range(4) for k in range(4) for q in range(2)]  # (k q l) → (l k q)
    second = torch.block_diag(*(c["second"][block, 0].reshape(8, 12).mT for block in range(4)))
    close(w, second @ first[order])


def test_blast_blocks_share_their_factors():
    w, c, s = dense_of("blast", 12, 20, rank=3, blocks=(2, 3))
    assert (s["i"], s["j"]) == (2, 3)
    rows = [torch.cat([c["left"][i].mT @ torch.diag(c["mix"][i, j]) @ c["right"][j].mT for j in range(3)], dim=1) for i in range(2)]
    close(w, torch.cat(rows))


@pytest.mark.parametrize("cores", [2, 3, 4])
def test_tt_and_btt_of_many_cores(cores):
    w, c, s = dense_of("tt", 3**cores, 2**cores, rank=2, cores=cores)
    total, *rest = c.values()  # (in, out, rank)
    for core in rest:
        core = core if core.dim() == 4 else core.unsqueeze(-1)
        total = torch.einsum("ior,rjps->ijops", total, core).flatten(0, 1).flatten(1, 2)
    close(w, total[..., 0].mT)
    w, c, s = dense_of("btt", 3**cores, 2**cores, rank=1, cores=cores)
    assert tn.StructuredLinear(3**cores, 2**cores, structure="btt", cores=cores).built.parameters == sum(t.numel() for t in c.values())
    assert macs(tn.StructuredLinear(3**cores, 2**cores, structure="btt", cores=cores).network) == sum(t.numel() for t in c.values())


def test_per_core_ranks():
    layer = tn.StructuredLinear(64, 64, structure="btt", cores=3, rank=(2, 3))
    assert layer.rank == (2, 3) and layer.network.sizes["r2"] == 3
    assert tn.StructuredLinear(64, 64, structure="tt", factors=((4,) * 3,) * 2, rank=1000).rank == (16, 16), (
        "one number is cut to each full rank"
    )
    with pytest.raises(tn.StructureError, match=r"3 cores take 2 integer ranks ≥ 1, got \(2,\)"):
        tn.StructuredLinear(64, 64, structure="btt", cores=3, rank=(2,))
    with pytest.raises(tn.StructureError, match="tt rank 17 is more than 16"):
        tn.StructuredLinear(64, 64, structure="tt", factors=((4,) * 3,) * 2, rank=(17, 4))


# d_in, d_out, structure, options, (multiplier, std) of each core, parameters, multiply-adds: the paper's code (arXiv:2406.06248)
GOLDEN = [
    (1024, 1024, "kronecker", {}, [(16, 0.17678)] * 2, 2048, 65536),
    (1024, 1024, "tt", dict(rank=16), [(16, 0.17678), (1, 0.01105)], 32768, 1048576),
    (1024, 1024, "monarch", dict(blocks=4), [(2, 0.0625)] * 2, 524288, 524288),
    (1024, 1024, "monarch", dict(blocks=16), [(8, 0.125)] * 2, 131072, 131072),
    (1024, 4096, "monarch", dict(blocks=4), [(2, 0.0625)] * 2, 1310720, 1310720),
    (4096, 1024, "monarch", dict(blocks=4), [(2, 0.01562), (8, 0.0625)], 1310720, 1310720),
    (1024, 4096, "tt", dict(rank=16), [(16, 0.17678), (1, 0.01563)], 65536, 3145728),
    (768, 3072, "btt", dict(factors="compat"), [(24, 0.25), (8, 0.14434)], 172032, 172032),
    (768, 3072, "btt", dict(rank=4, factors="compat"), [(24, 0.25), (2, 0.05103)], 688128, 688128),
    (384, 384, "btt", dict(factors="compat"), [(12, 0.25), (8, 0.20412)], 15360, 15360),
]


@pytest.mark.parametrize(("d_in", "d_out", "structure", "options", "cores", "count", "work"), GOLDEN)
def test_golden(d_in, d_out, structure, options, cores, count, work):
    layer = tn.StructuredLinear(d_in, d_out, structure=structure, bias=False, device="meta", **options)
    assert (layer.built.parameters, layer.built.macs) == (count, work)
    for (name, rate), (want, std) in zip(multipliers(layer).items(), cores, strict=True):
        assert rate == pytest.approx(want, rel=1e-4) and layer.start()[name] == pytest.approx(std, rel=2e-3)


def layer_macs(d_in: int, d_out: int, structure: str, **options) -> int:
    return get(structure).build(d_in, d_out, Options(**options)).macs


@pytest.mark.parametrize(
    ("structure", "options", "widths", "want"),
    [
        ("dense", {}, [2**n for n in range(5, 13)], [123200, 295552, 787712, 2361856, 7869440, 28321792, 106975232, 415277056]),
        (
            "btt",
            dict(factors="compat"),
            [2**n for n in range(7, 15)],
            [93440, 223744, 545792, 1386496, 3854336, 10067968, 29376512, 77627392],
        ),
        ("monarch", dict(blocks=4), [64, 128, 256], [81536, 226560, 707072]),
    ],
)
def test_golden_work_of_the_papers_mlp(structure, options, widths, want):
    def image(w: int) -> int:
        block = layer_macs(w, 4 * w, structure, **options) + layer_macs(4 * w, w, structure, **options)
        return layer_macs(3072, w, structure, **options) + 3 * block + 10 * w

    assert [image(w) for w in widths] == want


@pytest.mark.parametrize(
    ("structure", "rank", "widths", "want"),
    [("dense", None, (80, 192, 384), (0.063, 0.306, 1.143)), ("btt", 1, (256, 784, 1936), (0.068, 0.319, 1.156)),
     ("btt", 2, (144, 484, 1296), (0.055, 0.296, 1.222))],
)  # fmt: skip
def test_golden_work_of_the_papers_vision_transformer(structure, rank, widths, want):
    """ViT of patch 32 at 224 pixels: 49 patches and a class token, 12 blocks, queries, keys and values apart, a dense head of 1000."""
    options = {} if rank is None else dict(rank=rank, factors="compat")
    for w, giga in zip(widths, want, strict=True):
        block = (
            4 * layer_macs(w, w, structure, **options)
            + layer_macs(w, 4 * w, structure, **options)
            + layer_macs(4 * w, w, structure, **options)
        )
        total = 49 * layer_macs(3072, w, structure, **options) + 12 * (50 * block + 2 * 50 * 50 * w) + 1000 * w
        assert round(total / 1e9, 3) == giga


@pytest.mark.parametrize(
    ("structure", "width", "attention", "want"),
    [
        ("btt", 1024, 384, (24.77, 6.54, 36.0)), ("btt", 1536, 384, (43.94, 9.81, 58.5)),
        ("btt", 2048, 384, (67.83, 13.07, 85.6)), ("btt", 2560, 768, (104.4, 16.34, 130.2)),
        ("dense", 384, 384, (21.23, 19.32, 45.3)), ("dense", 512, 512, (37.75, 25.76, 69.8)), ("dense", 768, 768, (84.93, 38.63, 133.0)),
    ],
)  # fmt: skip
def test_golden_work_of_the_papers_gpt(structure, width, attention, want):
    """GPT-2 of 12 layers at 512 tokens, vocabulary 50304, an untied head: (non-embedding, head, all) million multiply-adds a token."""
    options = dict(rank=4, factors="compat") if structure == "btt" else {}
    block = 3 * layer_macs(width, attention, structure, **options) + layer_macs(attention, width, structure, **options)
    block += layer_macs(width, 4 * width, structure, **options) + layer_macs(4 * width, width, structure, **options)
    head = layer_macs(width, 50304, structure, **options)
    total = 12 * (block + 2 * 512 * attention) + head
    digits = [1 if number >= 100 else 2 for number in want[:2]]
    assert [round(12 * block / 1e6, digits[0]), round(head / 1e6, digits[1]), round(total / 1e6, 1)] == list(want)


def test_default_factors_are_the_cheapest_at_the_width_of_the_even_split():
    assert get("btt").build(1024, 1024, Options(rank=4)).parameters == 262_144
    assert get("btt").build(768, 3072).parameters <= 135_168
    for family, d_in, d_out in (("btt", 640, 1280), ("tt", 768, 3072), ("btt", 50257, 768)):
        built = get(family).build(d_in, d_out, Options(rank=1))
        ins, outs = factors.even(factors.padded(d_in)), factors.even(factors.padded(d_out))
        even = get(family).build(d_in, d_out, Options(rank=1, factors=((ins[::-1] if family == "btt" else ins), outs)))
        assert built.parameters <= even.parameters and middle(built) >= middle(even)


def middle(built) -> int:
    s = built.network.sizes
    return s["r"] * s["k"] * (s["i"] if built.structure == "btt" else s["j"])


@pytest.mark.parametrize("size", [1, 2, 7, 13, 431, 50257, 1_000_003])
@pytest.mark.parametrize("parts", [2, 3, 4])
def test_padding_is_never_truncation_and_little(size, parts):
    padded = factors.padded(size, parts)
    assert size <= padded <= size * 1.06 + 8 and math.prod(factors.even(padded, parts)) == padded


def test_greedy_split_is_the_papers():
    for size, want in ((768, (16, 48)), (3072, (32, 96)), (640, (16, 40)), (11008, (16, 688)), (50304, (24, 2096)), (608, (8, 76))):
        assert factors.greedy(size) == want


def test_match_takes_the_largest_member_within_the_budget():
    for match in ("params", "flops"):
        for structure in ("btt", "tt", "low_rank", "kronecker", "blast", "einsum2", "monarch", "block_diagonal"):
            layer = tn.StructuredLinear(256, 384, structure=structure, match=match, budget=0.3, bias=False, device="meta")
            cost = layer.built.parameters if match == "params" else layer.built.macs
            assert cost <= 0.3 * 256 * 384
            if structure in ("btt", "low_rank", "blast"):
                more = get(structure).build(256, 384, Options(rank=layer.rank + 1, factors=layer.factors))
                assert (more.parameters if match == "params" else more.macs) > 0.3 * 256 * 384
    fast = tn.StructuredLinear(1024, 1024, structure="btt", match="time", budget=0.5, device="meta")
    assert fast.plan().seconds <= 0.5 * tn.StructuredLinear(1024, 1024, device="meta").plan().seconds
    narrow = tn.StructuredLinear(256, 256, structure="btt", match="params", budget=0.05, device="meta")
    assert narrow.rank == 1 and narrow.built.parameters <= 0.05 * 256 * 256 < get("btt").build(256, 256).parameters


def test_exponents_of_the_famous_points():
    assert exponents("(1|0|0|0|1|0|1/2)") == {"nu": 0.5, "omega": 0.0, "psi": 0.5}  # low rank
    assert exponents((0.5, 0.5, 0, 0.5, 0.5, 0, 0)) == {"nu": 0.5, "omega": 0.5, "psi": 1.0}  # Kronecker
    assert exponents((0.5, 0, 0.5, 0, 0.5, 0.5, 0.25)) == {"nu": 0.75, "omega": 0.0, "psi": 1.0}  # block tensor train
    assert "ν 0.50 ω 0.50 ψ 1.00" in tn.StructuredLinear(256, 256, structure="einsum2", theta="(1/2|1/2|0|1/2|1/2|0|0)").note


def test_einsum2_at_the_points_of_other_families_is_those_families():
    torch.manual_seed(0)
    point = tn.StructuredLinear(36, 64, structure="einsum2", theta=(0.5, 0, 0.5, 0, 0.5, 0.5, 0), dtype=F64, bias=False)
    s = point.network.sizes
    assert s["b"] == s["d"] == 1
    cores = {
        "first": point.first.detach().reshape(s["g"], s["a"], s["f"], s["r"]).permute(0, 1, 3, 2),
        "second": point.second.detach().reshape(s["g"], s["f"], s["e"], s["r"]).permute(1, 0, 3, 2),
    }
    close(tn.StructuredLinear.from_cores("btt", cores).to_dense().detach(), point.to_dense().detach())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(structure="monarch", blocks=0), "monarch blocks is 0, expected an integer from 1 to 12"),
        (dict(structure="monarch", blocks=8), "blocks that are padding alone"),
        (dict(structure="block_diagonal", blocks=9), "expected an integer from 1 to 8"),
        (dict(structure="blast", blocks=(2, 3, 4)), "a number or (of the output, of the input), got (2, 3, 4)"),
        (dict(structure="btt", cores=9), "btt cores is 9, expected an integer from 2 to 8"),
        (dict(structure="tt", cores=1), "tt cores is 1, expected an integer from 2 to 8"),
        (dict(structure="tt", cores=3, factors=((3, 4), (2, 4))), "takes factors=((3, 4), (2, 4)) or cores=3, not both"),
        (dict(structure="blast", blocks=2, factors=((3, 4), (2, 4))), "or blocks=2, not both"),
        (dict(structure="btt", factors=((1,) * 9, (1,) * 9)), "make 1, less than 12"),
        (dict(structure="btt", factors=((2,) * 9, (2,) * 9)), "number of cores is 9"),
        (dict(structure="btt", dtype=torch.int32), "dtype is torch.int32, expected a floating or complex one"),
        (dict(structure="btt", blocks=2), "btt takes only rank, factors, cores, got blocks=2"),
        (dict(structure="btt", factors="compact"), "unknown factors 'compact': did you mean 'compat'"),
        (dict(structure="btt", factors=7), "btt factors are 7, expected two tuples"),
        (dict(structure="btt", factors=((3, 4.0), (2, 4))), "positive factors of d_in"),
        (dict(structure="block_diagonal", factors=((2, 6), (4, 2))), "shares axis 'b' between input and output"),
        (dict(structure="einsum2", theta="(1|1|1)"), "theta is '(1|1|1)', expected seven numbers"),
        (dict(structure="einsum2", theta=(0.5, 0.5, 0.5, 0, 1, 0, 0)), "alpha+beta+gamma = 1"),
        (dict(structure="btt", match="parms", budget=0.5), "unknown match 'parms': did you mean 'params'"),
        (dict(structure="btt", match="params"), "needs a budget"),
        (dict(structure="btt", budget=0.5), "budget=0.5 needs match"),
        (dict(structure="btt", match="params", budget=0.5, rank=2), "leave out rank=2"),
        (dict(structure="low_rank", match="params", budget=0.01), "the least tried takes"),
        (dict(structure="btt", init="normal"), "init='normal' alone needs it"),
        (dict(structure="btt", init="xavier"), "unknown init 'xavier'"),
    ],
)  # fmt: skip
def test_refusals(options, message):
    with pytest.raises(tn.StructureError) as error:
        tn.StructuredLinear(12, 8, **options)
    assert message in str(error.value)


def test_a_structure_of_your_own(monkeypatch):
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))  # other tests list the names
    spec = "x: ... (a b), u: a p, v: b q, core: p q s t, w: s k, z: t l -> ... (k l)"
    tn.register_structure("test_tucker", spec, rank=2)
    layer = tn.StructuredLinear(30, 16, structure="test_tucker", rank=(3, 4, 2, 2), dtype=F64)
    assert layer.factors == ((6, 5), (4, 4)) and layer.rank == (3, 4, 2, 2)
    assert set(multipliers(layer)) == {"u", "v", "core", "w", "z"}
    want = torch.einsum("ap,bq,pqst,sk,tl->klab", layer.u, layer.v, layer.core, layer.w, layer.z).reshape(16, 30)
    close(layer.to_dense().detach(), want.detach())
    weight = layer.to_dense().detach()
    found = tn.project(weight, structure="test_tucker", rank=(3, 4, 2, 2))
    assert found.error < 1e-3 and found.layer().structure == "test_tucker"
    with pytest.raises(tn.StructureError, match="registered already"):
        tn.register_structure("test_tucker", spec)
    for bad, message in (
        ("y: ... i, w: i o -> ... o", "an input 'x'"),
        ("x: i, w: i o -> o", "maps '... (axes)' to '... (axes)'"),
        ("x: ... (b i), w: b i o -> ... (b o)", "shared by input and output"),
    ):
        with pytest.raises(tn.StructureError) as error:
            tn.register_structure("test_bad", bad)
        assert message in str(error.value)
    assert "test_bad" not in tn.structures.names()


def test_matching_width_costs_what_the_dense_layer_does():
    for structure in ("btt", "monarch", "low_rank", "tt"):
        for match in ("params", "flops"):
            width = tn.structures.matching_width(structure, 256, match=match, multiple=8)
            built = get(structure).build(width, width)
            spent = built.parameters if match == "params" else built.macs
            assert width % 8 == 0 and 0.7 * 256 * 256 <= spent <= 256 * 256
    with pytest.raises(tn.StructureError, match="costs more params than a dense one of 2"):
        tn.structures.matching_width("btt", 2, match="params", multiple=64)
