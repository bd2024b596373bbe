"""Rates beyond the golden ones: SGD, weight decay that does not grow, input layers, tables of multipliers; the coordinate check."""

import math

import pytest
import torch
from torch import nn

import tn
from tn.scaling import multipliers


class Net(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.input_layer = nn.Linear(8, width)
        self.norm = nn.LayerNorm(width)
        self.lin = tn.StructuredLinear(width, 2 * width, structure="btt", rank=2)
        self.head = nn.Linear(2 * width, 4)

    def forward(self, x):
        return self.head(self.lin(self.norm(self.input_layer(x))))


def by_name(groups) -> dict[str, dict]:
    return {name: group for group in groups for name in group["names"]}


def test_sgd_rates_go_as_out_over_in():
    groups = by_name(tn.param_groups(Net(64), lr=1.0, base=Net(16), rule="sgd"))
    assert groups["input_layer.weight"]["multiplier"] == 4  # 8 → width
    assert groups["head.weight"]["multiplier"] == 0.25  # width → 4
    for name in ("input_layer.bias", "norm.weight", "lin.bias"):
        assert groups[name]["multiplier"] == 4
    assert groups["head.bias"]["multiplier"] == 1
    layer = Net(64).lin
    rates = multipliers(layer, "sgd")
    for fan in layer.network.fans():
        assert rates[fan.core] == pytest.approx(fan.d_out / fan.d_in * 64 / 128 / 2)
        assert groups[f"lin.{fan.core}"]["multiplier"] == pytest.approx(rates[fan.core])  # width cancels between widths
    assert multipliers(tn.StructuredLinear(6, 4), "sgd") == {"weight": 1}


def test_decay_that_does_not_grow_with_the_rate():
    coupled = by_name(tn.param_groups(Net(64), lr=1e-3, weight_decay=0.1))
    apart = by_name(tn.param_groups(Net(64), lr=1e-3, weight_decay=0.1, independent_decay=True))
    for name in ("lin.first", "lin.second", "head.weight"):
        assert coupled[name]["weight_decay"] == 0.1
        assert apart[name]["weight_decay"] * apart[name]["lr"] == pytest.approx(0.1 * 1e-3)
    assert apart["lin.bias"]["weight_decay"] == 0
    torch.optim.AdamW(tn.param_groups(Net(64), lr=1e-3, weight_decay=0.1, independent_decay=True))


def test_input_layers_get_their_own_factor():
    groups = by_name(tn.param_groups(Net(16), lr=1.0, input_lr_mult=0.1))
    assert groups["input_layer.weight"]["multiplier"] == groups["input_layer.bias"]["multiplier"] == pytest.approx(0.1)
    assert groups["head.weight"]["multiplier"] == 1
    groups = by_name(tn.param_groups(Net(16), lr=1.0, input_lr_mult=0.1, input_layers=["he*"]))
    assert groups["head.weight"]["multiplier"] == pytest.approx(0.1) and groups["input_layer.weight"]["multiplier"] == 1
    plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    assert by_name(tn.param_groups(plain, lr=1.0, input_lr_mult=0.5))["0.weight"]["multiplier"] == 0.5
    assert by_name(tn.param_groups(plain, lr=1.0, input_lr_mult=0.5))["1.weight"]["multiplier"] == 1


def test_gains_of_clamped_layers_are_neither_scaled_nor_decayed():
    model = nn.Sequential(tn.StructuredLinear(64, 64, structure="btt_norm"))
    groups = by_name(
        tn.param_groups(model, lr=1.0, weight_decay=0.1, base=nn.Sequential(tn.StructuredLinear(16, 16, structure="btt_norm")))
    )
    assert groups["0.gains"]["multiplier"] == 1 and groups["0.gains"]["weight_decay"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(rule="adma"), "unknown rule 'adma': did you mean 'adam'"),
        (dict(rule="sgd", base=16), "give a base model instead of base=16"),
        (dict(input_lr_mult=-1.0), "input_lr_mult is -1.0"),
        (dict(input_lr_mult=0.5, input_layers=["x*"]), "match none of the model's layers"),
    ],
)
def test_refusals(options, message):
    with pytest.raises(tn.TnError) as error:
        tn.param_groups(Net(16), lr=1.0, **options)
    assert message in str(error.value)


def structured(structure: str, **options):
    def make(width: int) -> nn.Module:
        def layer() -> nn.Module:
            return tn.StructuredLinear(width, width, structure=structure, bias=False, **options)

        head = tn.StructuredLinear(width, 10, zero_init=True, bias=False)
        return nn.Sequential(nn.Linear(64, width, bias=False), nn.ReLU(), layer(), nn.ReLU(), layer(), nn.ReLU(), head)

    return make


@pytest.mark.parametrize("structure", ["dense", "btt", "monarch"])
def test_features_change_alike_at_every_width(structure):
    check = tn.coordinate_check(structured(structure), (64, 128, 256, 512), seeds=3)
    for layer in ("2", "4"):
        assert check.spread(layer) < 1.5 and abs(check.slope(layer)) < 0.25


def test_one_rate_for_all_cores_does_not_keep_features_changing():
    """What the check is for: the same small rate everywhere, as for a dense layer, learns less and less as the width grows."""

    def naive(model: nn.Module) -> list[dict]:
        width = model[0].out_features
        return [{"params": [p], "lr": 1e-3 * 64 / width if i else 0.0} for i, p in enumerate(model.parameters())]

    def aware(model: nn.Module) -> list[dict]:
        return tn.param_groups(model, lr=1e-3, base=structured("btt")(64), input_lr_mult=0.0)

    widths = (64, 256, 1024)
    slopes = [tn.coordinate_check(structured("btt"), widths, seeds=2, groups=groups).slope("4") for groups in (naive, aware)]
    assert slopes[0] < -0.3 and abs(slopes[1]) < 0.25


def test_the_check_is_drawn_and_leaves_the_random_state(tmp_path):
    state = torch.get_rng_state()
    check = tn.coordinate_check(structured("btt"), (16, 64), seeds=1, steps=2)
    assert torch.equal(state, torch.get_rng_state())
    check.draw(tmp_path / "check.png")
    assert (tmp_path / "check.png").read_bytes()[1:4] == b"PNG"
    assert "slope" in str(check) and math.isfinite(check.slope("2"))


def test_own_losses_and_refusals():
    x = torch.randint(0, 9, (4, 5))

    def make(width: int) -> nn.Module:
        return nn.Sequential(nn.Embedding(9, width), nn.Linear(width, 9))

    check = tn.coordinate_check(make, (8, 16), loss=lambda model: model(x).square().mean(), seeds=1)
    assert list(check.changes) == ["1"]
    with pytest.raises(tn.SizeError, match="two or more widths"):
        tn.coordinate_check(make, (8,))
    with pytest.raises(tn.StructureError, match="no linear layer to watch"):
        tn.coordinate_check(lambda width: nn.Sequential(nn.LayerNorm(width)), (8, 16))
