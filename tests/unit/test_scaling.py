"""Structure-aware rates and starts against the golden values of the paper's code (arXiv:2406.06248)."""

import math

import pytest
import torch
from torch import nn

import tn
from tn.scaling import multipliers

# d_in, d_out, structure, options, (multiplier, std) of each core, parameters
GOLDEN = [
    (1024, 1024, "dense", {}, [(1, 0.03125)], 1048576),
    (1024, 1024, "low_rank", {}, [(0.5, 0.00552), (16, 0.17678)], 65536),
    (1024, 1024, "btt", dict(rank=1), [(16, 0.17678), (16, 0.17678)], 65536),
    (1024, 1024, "btt", dict(rank=4), [(16, 0.17678), (4, 0.04419)], 262144),
    (1024, 4096, "btt", dict(rank=1), [(16, 0.17678), (16, 0.17678)], 196608),
    (1024, 4096, "btt", dict(rank=4), [(16, 0.17678), (4, 0.0625)], 786432),
    (4096, 1024, "btt", dict(rank=1), [(32, 0.08839), (32, 0.08839)], 196608),
    (4096, 1024, "btt", dict(rank=4), [(32, 0.125), (8, 0.0221)], 786432),
    (768, 3072, "btt", dict(rank=1, factors=((48, 16), (32, 96))), [(24, 0.25), (8, 0.14434)], 172032),
    (768, 3072, "btt", dict(rank=4, factors=((48, 16), (32, 96))), [(24, 0.25), (2, 0.05103)], 688128),
    (768, 3072, "low_rank", {}, [(0.5, None), (13.714, None)], 107520),
    (384, 384, "btt", dict(rank=1, factors=((24, 16), (16, 24))), [(12, 0.25), (8, 0.20412)], 15360),
]


@pytest.mark.parametrize(("d_in", "d_out", "structure", "options", "cores", "count"), GOLDEN)
def test_golden(d_in, d_out, structure, options, cores, count):
    layer = tn.StructuredLinear(d_in, d_out, structure=structure, bias=False, **options)
    assert sum(p.numel() for p in layer.parameters()) == count
    for (name, multiplier), (want, std) in zip(multipliers(layer).items(), cores, strict=True):
        assert multiplier == pytest.approx(want, rel=1e-4)
        if std is not None:
            fan = next(f for f in layer.network.fans() if f.core == name)
            assert math.sqrt(min(fan.d_in, fan.d_out)) / fan.d_in == pytest.approx(std, rel=2e-3)
            assert getattr(layer, name).std().item() == pytest.approx(std, rel=0.02)


def test_default_factors_spend_no_more_than_the_even_split():
    assert sum(p.numel() for p in tn.StructuredLinear(768, 3072, structure="btt", rank=1, bias=False).parameters()) <= 135_168


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.table = tn.Embedding(10, width)
        self.norm = nn.LayerNorm(width)
        self.dense = nn.Linear(width, 2 * width)
        self.lin = tn.StructuredLinear(2 * width, width, structure="btt", rank=2)


def by_name(groups) -> dict[str, dict]:
    return {name: group for group in groups for name in group["names"]}


def test_groups_cover_every_parameter_once():
    net = Net(64)
    groups = tn.param_groups(net, lr=0.1, weight_decay=0.5)
    assert sorted(name for g in groups for name in g["names"]) == sorted(name for name, _ in net.named_parameters())
    assert sum(len(g["params"]) for g in groups) == len(list(net.parameters()))
    torch.optim.AdamW(groups)


@pytest.mark.parametrize("base", [16, Net(16)], ids=["width", "model"])
def test_width_ratio_and_decay(base):
    groups = by_name(tn.param_groups(Net(64), lr=0.1, weight_decay=0.5, base=base))
    assert groups["dense.weight"]["multiplier"] == 0.25 and groups["dense.weight"]["weight_decay"] == 0.5
    for name in ("table.weight", "norm.weight", "norm.bias", "dense.bias", "lin.bias"):
        assert groups[name]["multiplier"] == 1 and groups[name]["weight_decay"] == 0
    plain = multipliers(Net(64).lin)
    for core, rate in plain.items():
        assert groups[f"lin.{core}"]["multiplier"] == pytest.approx(rate * 0.25)
        assert groups[f"lin.{core}"]["lr"] == pytest.approx(0.1 * rate * 0.25)


def test_tied_parameters_appear_once():
    net = nn.Sequential(tn.StructuredLinear(4, 4), tn.StructuredLinear(4, 4))
    net[1].weight = net[0].weight
    assert [n for g in tn.param_groups(net, lr=1.0) for n in g["names"]].count("0.weight") == 1
    assert not [n for g in tn.param_groups(net, lr=1.0) for n in g["names"] if n == "1.weight"]


def test_refusals():
    with pytest.raises(tn.SizeError, match="model.width, which is None"):
        tn.param_groups(nn.Linear(2, 2), lr=0.1, base=64)
    with pytest.raises(tn.SizeError, match="lr is nan"):
        tn.param_groups(nn.Linear(2, 2), lr=math.nan)
    with pytest.raises(tn.StructureError, match="no parameter 'dense.weight'"):
        tn.param_groups(Net(64), lr=0.1, base=nn.Sequential(nn.Linear(2, 2)))
