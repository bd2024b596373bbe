"""The learning rate: warm-up, cosine, constant, and what reaches the optimiser."""

import dataclasses
import itertools
import math

import pytest
import torch

import zoo
from train import optim, recipes, schedule


def _config(**settings):
    return dataclasses.replace(recipes.gpt(), **settings)


def test_cosine_after_warm_up():
    config = _config(steps=110, warmup=10, lr_floor=0.1)
    factors = [schedule.factor(config, step) for step in range(110)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[59] == pytest.approx(0.55)
    assert factors[34] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert factors[-1] == pytest.approx(0.1)
    assert all(after < before for before, after in itertools.pairwise(factors[10:]))


def test_constant_after_warm_up():
    config = _config(steps=10, warmup=2, schedule="constant")
    assert [schedule.factor(config, step) for step in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_no_warm_up_and_a_single_step():
    assert schedule.factor(_config(steps=10, warmup=0), 0) < 1.0
    assert schedule.factor(_config(steps=1, warmup=1), 0) == 1.0


@pytest.mark.parametrize("steps, expected", [(300, 30), (9, 0), (600_000, 2000)])
def test_default_warm_up(steps, expected):
    assert _config(steps=steps).warmup_steps == expected


def test_every_group_follows_its_own_peak():
    model = zoo.GPT(zoo.GPTConfig(vocab=64, context=8, layers=1, width=64, heads=2, structure="btt", rank=2))
    optimizer = optim.adamw(model, _config(lr=1e-3, weight_decay=0.1))
    assert len(optimizer.param_groups) > 2
    optim.set_rates(optimizer, 0.25)
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(0.25 * 1e-3 * group["multiplier"])
        decays = {parameter.dim() >= 2 for parameter in group["params"]}
        assert group["weight_decay"] in (0.0, 0.1)
        assert group["weight_decay"] == 0.0 or decays == {True}


def test_update_ratio_is_the_size_of_the_real_update():
    torch.manual_seed(0)
    model = zoo.GPT(zoo.GPTConfig(vocab=64, context=8, layers=1, width=32, heads=2, structure="btt"))
    optimizer = optim.adamw(model, _config(lr=1e-2, weight_decay=0.1))
    tokens = torch.randint(64, (2, 8))
    assert optim.update_ratio(optimizer) == 0.0
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(tokens, tokens).backward()
        before = [parameter.detach().clone() for parameter in model.parameters()]
        optimizer.step()
    after = [parameter.detach() for parameter in model.parameters()]
    update = math.sqrt(sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True)))
    weight = math.sqrt(sum(float(a.square().sum()) for a in after))
    assert optim.update_ratio(optimizer) == pytest.approx(update / weight, rel=1e-4)
