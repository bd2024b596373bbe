"""Operators outside torch: how a plan asks for one, and what it hears.

A *region* is a part of a plan that one operator could run: a contraction of a few tensors with the pointwise work around it, described
without data. Each operator that is registered answers a region with an Offer, which is a callable, or with a Refusal and its reason.
The package of kernels registers its operators when it is imported, and it is looked up by name when an operator is first
asked for: importing `tn` never loads a compiler.
"""

import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad

from tn.errors import OperatorError
from tn.settings import cache_folder, interpreting

__all__ = [
    "Layout", "Offer", "OperatorError", "Refusal", "Region", "attempt", "cache_folder", "interpreting", "offers", "register", "require",
    "transforming", "tune", "usable",
]  # fmt: skip

PACKAGE = "tn_kernels"


@dataclass(frozen=True, slots=True)
class Layout:
    """Axes of a tensor and the stride of each in elements; 0 where the tensor is broadcast along the axis."""

    axes: tuple[str, ...]
    strides: tuple[int, ...]

    @classmethod
    def dense(cls, axes: Sequence[str], sizes: dict[str, int]) -> "Layout":
        """A contiguous tensor with its axes in this order.

        >>> Layout.dense(("row", "i"), {"row": 5, "i": 3}).strides
        (3, 1)
        """
        strides = tuple(math.prod(sizes[axis] for axis in axes[place + 1 :]) for place in range(len(axes)))
        return cls(tuple(axes), strides)


@dataclass(frozen=True, slots=True)
class Region:
    """What one operator is asked to run.

    Attributes:
        what: "contraction" (of all operands, summed over the axes that `out` lacks), or the name of an operation in `tn.ops`.
        operands: one Layout for each tensor that the callable will be given; its dimensions are the axes in this order.
        out: axes of the result in memory order; the result is contiguous.
        sizes: (axis, size) pairs. dtype, device: of all operands.
        dynamic: axes whose size may be another at a call; an offer holds for every size, a view of an operand says -1 for it.
        options: (name, value) pairs that belong to `what`, such as an activation or a mask.
    """

    what: str
    operands: tuple[Layout, ...]
    out: tuple[str, ...]
    sizes: tuple[tuple[str, int], ...]
    dtype: torch.dtype
    device: str = "cuda"
    options: tuple[tuple[str, object], ...] = ()
    dynamic: tuple[str, ...] = ()

    @property
    def size(self) -> dict[str, int]:
        """axis → size."""
        return dict(self.sizes)

    def extent(self, axes: Sequence[str]) -> int:
        """The size of axes as one dimension; -1 where a call decides it."""
        size = self.size
        return -1 if any(axis in self.dynamic for axis in axes) else math.prod(size[axis] for axis in axes)

    @property
    def option(self) -> dict[str, object]:
        """name → value."""
        return dict(self.options)


@dataclass(frozen=True, slots=True)
class Offer:
    """An operator that can run a region.

    Attributes:
        operator: its name. run: takes one tensor for each operand of the region and returns the result; differentiable.
        case: which row of a machine table would tell how fast this is: the operator, its sizes and the dtype.
    """

    operator: str
    run: Callable[..., Tensor]
    case: str


@dataclass(frozen=True, slots=True)
class Refusal:
    """An operator that cannot run a region, and why, in the words of the region."""

    operator: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {self.reason}"


Ask = Callable[[Region], Offer | Refusal]
Tune = Callable[[Callable[..., Tensor], Sequence[Tensor]], object]
_registry: dict[str, Ask] = {}
_tuners: dict[str, Tune] = {}


def register(name: str, ask: Ask, tune: Tune | None = None) -> None:
    """Make an operator known.

    Args:
        tune: measures how the operator is best cut into blocks for a function of some tensors, and keeps that for this device.

    Raises:
        OperatorError: the name is taken.
    """
    if name in _registry:
        raise OperatorError(f"operator {name!r} is registered already; registered are: {', '.join(sorted(_registry))}")
    _registry[name] = ask
    if tune is not None:
        _tuners[name] = tune


def usable(device: torch.device | str) -> bool:
    """Whether operators run there: on CUDA, and on a CPU while Triton's interpreter is switched on (TRITON_INTERPRET=1)."""
    kind = torch.device(device).type
    return kind == "cuda" or (kind == "cpu" and interpreting())


def offers(region: Region) -> tuple[Offer | Refusal, ...]:
    """What every operator says to a region, offers first, each group by name."""
    if not usable(region.device):
        return (Refusal("triton", f"runs on CUDA, or on a CPU in its interpreter; the tensors are on {region.device}"),)
    missing = _load()
    if missing:
        return (Refusal("triton", missing),)
    answers = [_registry[name](region) for name in sorted(_registry)]
    return tuple(sorted(answers, key=lambda answer: isinstance(answer, Refusal)))


def require(region: Region) -> Offer:
    """The first offer for a region, for a caller who insists on an operator. Raises OperatorError with every reason when none offers."""
    answers = offers(region)
    if isinstance(answers[0], Offer):
        return answers[0]
    raise OperatorError(f"no operator can run this {region.what}:\n" + "\n".join(f"  {answer}" for answer in answers))


def attempt(offer: Offer, operands: Sequence[Tensor]) -> Offer | Refusal:
    """Run an offer once on copies of the operands, and the gradients of those that take one.

    Returns:
        The offer itself, or a Refusal with the message of what failed to compile or launch.
    """
    copies = [operand.detach().clone(memory_format=torch.preserve_format).requires_grad_(operand.requires_grad) for operand in operands]
    try:
        _pass(offer, *copies)
        if operands and operands[0].is_cuda:
            torch.cuda.synchronize(operands[0].device)  # a kernel that faults says so only when it is waited for
    except (OperatorError, RuntimeError) as error:
        return Refusal(offer.operator, f"does not run here: {error}")
    return offer


def _pass(offer: Offer, *operands: Tensor) -> Tensor:
    """The result, after the gradients of the operands that take one."""
    trained = [operand for operand in operands if operand.requires_grad]
    with torch.set_grad_enabled(bool(trained)):
        result = offer.run(*operands)
        if trained:
            torch.autograd.grad(result, trained, torch.zeros_like(result))
    return result


def tune(offer: Offer, operands: Sequence[Tensor]) -> None:
    """Measure how the operator, and its gradients where operands take them, are best cut into blocks, if it is one that is tuned."""
    measure = _tuners.get(offer.operator)
    if measure is not None:
        measure(functools.partial(_pass, offer), operands)


def transforming() -> bool:
    """Whether a torch.func transform or forward-mode derivative is at work, which sees only through plain torch operations."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


@functools.cache
def _load() -> str:
    """Import the package of kernels once; says why it is not there, or nothing."""
    try:
        importlib.import_module(PACKAGE)
    except ImportError as error:
        return f"the kernels cannot be imported: {error}"
    return ""
