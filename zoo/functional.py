"""A model as a pure function of its parameters, for torch.func and for circuit work."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def functional(model: nn.Module) -> tuple[Callable[..., Any], dict[str, Tensor]]:
    """Split a model into a pure function and its parameters.

    Args:
        model: any module; it is not changed. Buffers and the training mode stay as they are.

    Returns:
        (f, parameters): f(parameters, *inputs) is what model(*inputs) gives with those parameters in place of its own; `parameters`
        maps names to the model's tensors without gradient tracking, sharing their memory. A tied parameter appears once.

    Example:
        >>> import torch, zoo
        >>> model = zoo.GPT(zoo.GPTConfig(vocab=16, context=8, layers=1, width=16, heads=2))
        >>> f, parameters = functional(model)
        >>> tokens = torch.zeros(1, 4, dtype=torch.long)
        >>> torch.equal(f(parameters, tokens), model(tokens))
        True
    """

    def f(parameters: dict[str, Tensor], *inputs: object) -> Any:
        return torch.func.functional_call(model, parameters, inputs)

    return f, {name: parameter.detach() for name, parameter in model.named_parameters()}
