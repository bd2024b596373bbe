"""For the tests of this library and of code built on it: one comparison with an error bound, and a strategy of random networks."""

from typing import Any

import torch
from torch import Tensor

from tn.errors import SpecError
from tn.network import Network, network

_SLACK = 4.0


def assert_close(
    got: Tensor, want: Tensor, *, bound: Tensor | None = None, roundings: int = 1, dtype: torch.dtype | None = None, name: str = "result"
) -> None:
    """Compare a computed tensor with a float64 (or exact) one; shape and finiteness are checked first.

    Args:
        got: what was computed. want: the reference, same shape.
        bound: the same computation on absolute values, so that one rounding errs by at most bound × unit round-off; |want| if None.
        roundings: length of the longest chain of roundings in the computation.
        dtype: precision of the computation; got's by default.

    Raises:
        AssertionError: with the worst element, its error and the bound.
    """
    if got.shape != want.shape:
        raise AssertionError(f"{name}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
    if not torch.isfinite(want).all():
        raise AssertionError(f"{name}: the reference is not finite")
    if not torch.isfinite(got).all():
        raise AssertionError(f"{name}: not finite at {torch.nonzero(~torch.isfinite(got))[0].tolist()}")
    unit = torch.finfo(dtype or got.dtype).eps / 2
    scale = (want if bound is None else bound).detach().to(torch.float64).abs()
    allowed = _SLACK * roundings * unit * scale
    error = (got.detach().to(torch.float64) - want.detach().to(torch.float64)).abs()
    if (error > allowed).any():
        worst = (error - allowed).flatten().argmax()
        raise AssertionError(
            f"{name}: element {worst.item()} is {got.flatten()[worst].item():.8g}, expected {want.flatten()[worst].item():.8g}: "
            f"error {error.flatten()[worst].item():.2e} above the bound {allowed.flatten()[worst].item():.2e}"
        )


def one_shot(network: Network, operands: dict[str, Tensor]) -> Any:
    """The network as a single sum over all axes, in the dtype of the operands: the oracle, exponential in memory, for small sizes only.

    Several outputs give a tuple.
    """
    if len(network.parts) > 1:
        return tuple(one_shot(part, operands) for part in network.parts)
    sizes = network.bind([operands[name].shape for name in network.names])
    axes, total = network.axes, None
    for term in network.spec.operands:
        tensor = operands[term.name].reshape([sizes[axis] for axis in term.axes])
        order = list(term.axes)
        for axis in dict.fromkeys(term.axes):
            while order.count(axis) > 1:
                first, second = [i for i, a in enumerate(order) if a == axis][:2]
                tensor = tensor.diagonal(dim1=first, dim2=second)
                order = [a for i, a in enumerate(order) if i not in (first, second)] + [axis]
        tensor = tensor.permute([order.index(axis) for axis in axes if axis in order])
        tensor = tensor.reshape([sizes[axis] if axis in order else 1 for axis in axes])
        total = tensor if total is None else total * tensor
    total = total.expand([sizes[axis] for axis in axes])
    summed = [i for i, axis in enumerate(axes) if axis not in network.output.axes]
    total = total.sum(summed) if summed else total.clone()
    kept = [axis for axis in axes if axis in network.output.axes]
    total = total.permute([kept.index(axis) for axis in network.output.axes])
    lead = next((operands[t.name].shape[: operands[t.name].dim() - len(t.dims) + 1] for t in network.spec.operands if "..." in t.axes), ())
    shape = [size for dim in network.output.dims for size in (lead if dim == ("...",) else [_product(sizes, dim)])]
    return total.reshape(shape)


def _product(sizes: dict[str, int], dim: tuple[str, ...]) -> int:
    result = 1
    for axis in dim:
        result *= sizes[axis]
    return result


def networks(*, operands: int = 4, axes: int = 5, size: int = 3, outputs: int = 1) -> Any:
    """A hypothesis strategy of (network, shapes): random networks with hyperaxes, diagonals, repeated tensors, size-one axes and scalars.

    Args:
        operands: at most this many. axes: names to draw from. size: largest axis size (≥ 1). outputs: exactly this many.

    Returns:
        A strategy of (Network without known sizes, {name: shape}).
    """
    from hypothesis import reject, strategies  # late: hypothesis belongs to the tests

    words = ["a1", "bee", "c", "dim", "e", "f0", "gg"][:axes]

    @strategies.composite
    def draw_network(draw):
        sizes = {word: draw(strategies.integers(1, size)) for word in words}
        count = draw(strategies.integers(1, operands))
        terms: list[tuple[str, list[str]]] = []
        for i in range(count):
            mine = draw(strategies.lists(strategies.sampled_from(words), max_size=3))
            name = f"t{i}"
            earlier = [t for t in terms if [sizes[w] for w in t[1]] == [sizes[w] for w in mine]]
            if earlier and draw(strategies.booleans()):
                name = earlier[0][0]
            terms.append((name, mine))
        known = list(dict.fromkeys(word for _, mine in terms for word in mine))
        results = []
        for i in range(outputs):
            out = draw(strategies.lists(strategies.sampled_from(known), unique=True, max_size=3)) if known else []
            results.append((f"y{i}: " if outputs > 1 else "") + " ".join(out))
        spec = ", ".join(f"{name}: {' '.join(mine)}" for name, mine in terms) + " -> " + ", ".join(results)
        shapes = {name: tuple(sizes[word] for word in mine) for name, mine in terms}
        try:
            return network(spec), shapes
        except SpecError:  # with several outputs: an operand that takes part in none
            reject()

    return draw_network()
