"""zoo.functional: a model as a pure function."""

import torch

import zoo
from tests.zoo.models import small, tokens


def test_gradients_of_the_function_are_the_models():
    model = small(structure="btt", rank=1)
    f, parameters = zoo.functional(model)
    numbers = tokens(2, 5)
    gradients = torch.func.grad(lambda p: f(p, numbers).square().mean())(parameters)
    model(numbers).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert torch.allclose(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6), name


def test_the_model_itself_is_left_alone():
    model = small()
    f, parameters = zoo.functional(model)
    before = model(tokens(1, 3))
    f({name: torch.zeros_like(p) for name, p in parameters.items()}, tokens(1, 3))
    assert torch.equal(model(tokens(1, 3)), before)
    assert all(p.requires_grad for p in model.parameters()) and not any(p.requires_grad for p in parameters.values())
