"""Regions: the parts of a plan that one operator outside torch could run, what the operators say to them, and which are chosen.

A choice depends on the dtype, the device and the measured rows of the plan's machine table. It is made when a program is bound, and is no
part of the plan: a saved plan does not know which kernel ran.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from tn.cost import volume
from tn.errors import OperatorError
from tn.operators import Layout, Offer, Refusal, Region, attempt, interpreting, offers, transforming, usable

if TYPE_CHECKING:
    from tn.order import Axes
    from tn.plan import Plan, Step

TRAINED = " trained"  # behind the case of a row: forward and gradients were timed
_FEW = 16  # of a dynamic axis, when an operator is tried in the interpreter


@dataclass(frozen=True, slots=True)
class Part:
    """Connected steps of a plan as one operator would run them.

    Attributes:
        values: SSA values that its steps make, the result last.
        operands: for each tensor of the operator its SSA value and, for each dimension, the axes of it; none for a size of one.
        result: the same of the operator's result. region: what operators are asked.
        operators: those that it is meant for, the likeliest first; what others say is of no interest.
    """

    values: tuple[int, ...]
    operands: tuple[tuple[int, tuple[Axes, ...]], ...]
    result: tuple[Axes, ...]
    region: Region
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What one operator says to one part, and what became of it.

    Attributes:
        gain: measured seconds of torch over those of the operator; None where the table has no row. saved: seconds, their difference.
        chosen: whether the plan runs it.
    """

    part: Part
    answer: Offer | Refusal
    gain: float | None = None
    saved: float = 0.0
    chosen: bool = False

    def __str__(self) -> str:
        if isinstance(self.answer, Refusal):
            return f"{self.answer.operator}: refused: {self.answer.reason}"
        if self.gain is None:
            return f"{self.answer.operator}: offered, no measurement on this table"
        return f"{self.answer.operator}: {'chosen' if self.chosen else 'offered, not chosen'} ({self.gain:.2f}× measured)"


_failures: dict[tuple[Region, str], Refusal] = {}  # operators that did not compile or launch in this process


def failed(part: Part, operator: str, reason: str) -> Refusal:
    """Remember that an operator does not run a region here."""
    return _failures.setdefault((part.region, operator), Refusal(operator, reason))


def answers(plan: Plan) -> list[Answer]:
    """What operators say to the parts of a plan, and which of them its table chooses; nothing where no operator runs."""
    if not usable(plan.device):
        return []
    found = _asked(plan, parts(plan))
    taken: set[int] = set()
    for place, one in sorted(enumerate(found), key=lambda entry: -entry[1].saved):
        if one.saved > 0 and not taken & set(one.part.values):
            taken |= set(one.part.values)
            found[place] = Answer(one.part, one.answer, one.gain, one.saved, chosen=True)
    return found


def choose(plan: Plan) -> tuple[tuple[Part, Offer], ...]:
    """Parts of a plan, and operators that were measured to run them faster than torch does; each has run once."""
    while True:
        chosen = [(one.part, one.answer) for one in answers(plan) if one.chosen and isinstance(one.answer, Offer)]
        refused = [one for one in (_tried(plan, part, offer) for part, offer in chosen) if isinstance(one, Refusal)]
        if not refused:  # otherwise another may take its place
            return tuple(chosen)


def insist(plan: Plan) -> tuple[tuple[Part, Offer], ...]:
    """Operators for every step of a plan, measured or not, the largest parts first.

    Raises:
        OperatorError: no operator can run some step; with every reason.
    """
    names, reasons = _names(plan), []
    if not usable(plan.device):
        reasons = [f"  triton: runs on CUDA, or on a CPU in its interpreter (TRITON_INTERPRET=1); the tensors are on {plan.device}"]
    elif not plan.steps:
        reasons = ["  there is no product to run"]
    elif _empty(plan):
        reasons = ["  an axis has size zero"]
    taken: set[int] = set()
    chosen = []
    for one in sorted(_asked(plan, parts(plan, every=True)), key=_suited) if not reasons else ():
        if taken & set(one.part.values):
            continue
        answer = _tried(plan, one.part, one.answer) if isinstance(one.answer, Offer) else one.answer
        if isinstance(answer, Offer):
            taken |= set(one.part.values)
            chosen.append((one.part, answer))
        else:
            reasons.append(f"  {_title(one.part, names)}: {answer}")
    if all(step.out in taken for step in plan.steps) and chosen:
        return tuple(chosen)
    raise OperatorError(f"backend 'triton' cannot run {plan.network.spec}:\n" + "\n".join(reasons))


def describe(plan: Plan) -> list[str]:
    """A line for each answer, for the table of a plan."""
    found, names = answers(plan), _names(plan)
    if not found:
        return []
    where = f"{plan.device}, {str(plan.dtype).removeprefix('torch.')}, table {plan.machine.name}"
    return [f"  operators ({where}):", *(f"    {_title(one.part, names)}: {one}" for one in found)]


def offered(plan: Plan) -> Iterator[tuple[Part, Offer]]:
    """Parts of a plan and the operators that run them, measured or not; each has run once."""
    for one in answers(plan):
        if isinstance(one.answer, Offer) and isinstance(_tried(plan, one.part, one.answer), Offer):
            yield one.part, one.answer


def case(plan: Plan, part: Part, offer: Offer) -> str:
    """The row of a machine table that tells how fast an operator runs a part of this plan."""
    trained = any(plan.needs[value] for value, _ in part.operands)
    return offer.case + (TRAINED if trained else "")


def example(plan: Plan, part: Part) -> list[Tensor]:
    """Tensors of ones for the operator of a part, of the sizes that the plan was made for, with gradients where the plan wants them."""
    made = []
    for (value, _), layout in zip(part.operands, part.region.operands, strict=True):
        shape = [part.region.size[axis] for axis in layout.axes]
        tensor = torch.ones(shape, dtype=plan.dtype, device=plan.device)
        made.append(tensor.requires_grad_(plan.needs[value]))
    return made


def with_bias(plan: Plan, part: Part, offer: Offer) -> Offer | None:
    """The operator of a part when it also adds a bias along the result's last stored dimension, which follows the operands.

    None where the part does not make the result, or the operator adds none.
    """
    if len(plan.results) != 1 or part.values[-1] != plan.first(plan.results[0]) or part.region.what != "contraction":
        return None
    last = plan.network.output.dims[-1]
    if not set(last) <= set(part.region.out):
        return None
    layout = Layout.dense(last, part.region.size)
    region = replace(part.region, operands=(*part.region.operands, layout), options=(*part.region.options, ("bias", True)))
    for answer in offers(region):
        if isinstance(answer, Offer) and answer.operator == offer.operator:
            bias = torch.ones([region.size[axis] for axis in last], dtype=plan.dtype, device=plan.device)
            tried = answer if transforming() else attempt(answer, [*_few(plan, part), bias.requires_grad_(bool(plan.grad))])
            return tried if isinstance(tried, Offer) else None
    return None


def _tried(plan: Plan, part: Part, offer: Offer) -> Offer | Refusal:
    """The offer after it has run once, or why it does not. Where functions are being transformed nothing can run, and it is believed."""
    known = _failures.get((part.region, offer.operator))
    if known is not None or transforming():
        return known or offer
    answer = attempt(offer, _few(plan, part))
    return failed(part, offer.operator, answer.reason) if isinstance(answer, Refusal) else answer


def _few(plan: Plan, part: Part) -> list[Tensor]:
    """The example; with few rows in the interpreter, which takes seconds for microseconds of a device and shows mistakes at any size."""
    tensors = example(plan, part)
    for place, layout in enumerate(part.region.operands) if interpreting() else ():
        few = [slice(_FEW if axis in part.region.dynamic else None) for axis in layout.axes]
        tensors[place] = tensors[place][tuple(few)].detach().requires_grad_(tensors[place].requires_grad)
    return tensors


def _asked(plan: Plan, asked: Sequence[Part]) -> list[Answer]:
    found = []
    for part in asked:
        for answer in offers(part.region):
            if answer.operator not in (*part.operators, "triton"):
                continue
            answer = _failures.get((part.region, answer.operator), answer)
            row = None
            if isinstance(answer, Offer):
                row = plan.machine.operators.get(case(plan, part, answer))
            found.append(Answer(part, answer) if row is None else Answer(part, answer, row[1] / row[0], row[1] - row[0]))
    return found


def _suited(one: Answer) -> tuple[int, int]:
    """The largest part first, and for one part the operator that is meant for it most."""
    names = one.part.operators
    return -len(one.part.values), names.index(one.answer.operator) if one.answer.operator in names else len(names)


def _names(plan: Plan) -> list[str]:
    return [term.name for term in plan.terms] + [f"v{i}" for i in range(len(plan.leaves), len(plan.orders))]


def _title(part: Part, names: Sequence[str]) -> str:
    return f"{names[part.values[-1]]} from {', '.join(names[value] for value, _ in part.operands)}"


def parts(plan: Plan, every: bool = False) -> list[Part]:
    """The parts of a plan that operators are asked about.

    Args:
        every: single steps too that torch runs without a copy and without a summed batch.
    """
    if _empty(plan):
        return []
    made = {step.out: step for step in plan.steps}
    found: list[Part] = []
    for step in plan.steps:
        found += _squared(plan, step, made)
        found += _gated(plan, step, made)
        for inner, other in ((step.left, step.right), (step.right, step.left)):
            first = made.get(inner)
            if first is not None and "multiply" not in (first.pairing.kind, step.pairing.kind):
                found.append(_contraction(plan, (inner, step.out), (first.left, first.right, other), ("chain",)))
        summed = step.pairing.batch_on == "operands"
        if every or summed or step.pairing.copies:
            names = ("batch_reduced_gemm", "strided_gemm") if summed else ("strided_gemm", "batch_reduced_gemm")
            found.append(_contraction(plan, (step.out,), (step.left, step.right), names))
    return [part for part in found if _alone(plan, part)]


def _empty(plan: Plan) -> bool:
    return any(plan.network.sizes.get(axis) == 0 for axis in plan.network.axes)


def _alone(plan: Plan, part: Part) -> bool:
    """Whether nobody else takes what a part makes on its way."""
    inner = set(part.values[:-1])
    outside = {plan.first(value) for step in plan.steps if step.out not in part.values for value in (step.left, step.right)}
    return inner.isdisjoint(outside | {plan.first(value) for value in plan.results})


def _contraction(plan: Plan, values: tuple[int, ...], operands: tuple[int, ...], operators: tuple[str, ...]) -> Part:
    orders = [plan.orders[value] for value in operands]
    return _part(plan, values, operands, orders, plan.orders[values[-1]], "contraction", operators)


def _part(
    plan: Plan, values: tuple[int, ...], operands: tuple[int, ...], orders: Sequence[Axes], out: Axes, what: str, operators: tuple[str, ...]
) -> Part:
    """A part whose operands keep their axes; `orders` may name some of them otherwise than the plan does."""
    size: dict[str, int] = {}
    for value, order in zip(operands, orders, strict=True):
        size |= {axis: plan.size[own] for axis, own in zip(order, plan.orders[value], strict=True)}
    layouts = tuple(Layout.dense(order, size) for order in orders)
    dynamic = tuple(axis for axis in plan.network.dynamic if axis in size)
    region = Region(what, layouts, out, tuple(size.items()), plan.dtype, plan.device, dynamic=dynamic)
    seen = tuple((value, tuple((axis,) for axis in plan.orders[value])) for value in operands)
    return Part(values, seen, tuple((axis,) for axis in out), region, operators)


def _same(plan: Plan, one: int, other: int) -> dict[str, str] | None:
    """Axes of the second value → those of the first, where both are one tensor, used twice; None where they are not."""
    if plan.first(one) != plan.first(other):
        return None
    own = {axis: axis for axis in plan.orders[plan.first(one)]}
    (_, first), (_, second) = (plan.same.get(value, (value, own)) for value in (one, other))
    return {second[axis]: first[axis] for axis in own}


def _gated(plan: Plan, step: Step, made: Mapping[int, Step]) -> Iterator[Part]:
    """(x W) ∘ (x V)."""
    if step.left not in made or step.right not in made or not _pointwise(plan, step):
        return
    first, second = made[step.left], made[step.right]
    for x, w in ((first.left, first.right), (first.right, first.left)):
        for again, v in ((second.left, second.right), (second.right, second.left)):
            renamed = _same(plan, x, again)
            if renamed is None or first is second:
                continue
            out = plan.orders[step.out]
            if any(renamed[axis] != axis for axis in plan.orders[again] if axis in out):
                continue
            order = tuple(renamed.get(axis, axis) for axis in plan.orders[v])
            values = (step.left, step.right, step.out)
            yield _part(plan, values, (x, w, v), (plan.orders[x], plan.orders[w], order), out, "gated", ("gated",))
            return


def _pointwise(plan: Plan, step: Step) -> bool:
    return set(plan.orders[step.left]) == set(plan.orders[step.right]) == set(plan.orders[step.out])


def _squared(plan: Plan, step: Step, made: Mapping[int, Step]) -> Iterator[Part]:
    """Σ_t (Σ_d q k) (Σ_d q' k') v, every query seeing every key."""
    out = set(plan.orders[step.out])
    for pattern, v in ((step.left, step.right), (step.right, step.left)):
        product = made.get(pattern)
        if product is None or not _pointwise(plan, product):
            continue
        factors = [product.left, product.right]
        if plan.squares(*factors):
            factors = [plan.first(product.left)] * 2
        if any(factor not in made for factor in factors):
            continue
        scores, on_v = plan.orders[pattern], set(plan.orders[v])
        keys = tuple(axis for axis in scores if axis not in out)
        queries = tuple(axis for axis in scores if axis not in on_v)
        heads = tuple(axis for axis in scores if axis in on_v and axis in out)
        pairs = [_scores(plan, made[factor], queries, keys) for factor in factors]
        if not queries or not keys or None in pairs:
            continue
        (q, k, d), (q2, k2, d2) = (pair for pair in pairs if pair is not None)
        alike = {axis: other for both in (_same(plan, q, q2), _same(plan, k, k2)) for axis, other in (both or {"": " "}).items()}
        once = all(alike.get(axis) == axis for axis in scores) and tuple(alike.get(axis, "") for axis in d2) == d
        split = (heads[:-1], heads[-1:])
        width = tuple(axis for axis in plan.orders[v] if axis not in scores)
        operands = [(q, (*split, queries, d)), (k, (*split, keys, d)), (v, (*split, keys, width))]
        if not once:
            operands += [(q2, (*split, queries, d2)), (k2, (*split, keys, d2))]
        values = tuple(dict.fromkeys((*factors, pattern, step.out)))
        yield _attention(plan, values, operands, (*split, queries, width))


def _scores(plan: Plan, step: Step, queries: Axes, keys: Axes) -> tuple[int, int, Axes] | None:
    """(q, k, contracted axes) of a step that makes scores."""
    for q, k in ((step.left, step.right), (step.right, step.left)):
        on_q, on_k = plan.orders[q], plan.orders[k]
        d = tuple(axis for axis in on_q if axis in on_k and axis not in plan.orders[step.out])
        rest = set(plan.orders[step.out]) - {*queries, *keys}
        if d and set(on_q) == {*rest, *queries, *d} and set(on_k) == {*rest, *keys, *d}:
            return q, k, d
    return None


_DIMENSIONS = tuple(
    ("batch", "head", *rest) for rest in (("query", "d"), ("key", "d"), ("key", "e"), ("query", "d2"), ("key", "d2"))
)  # of q, k, v and a second pair


def _attention(plan: Plan, values: tuple[int, ...], operands: list[tuple[int, tuple[Axes, ...]]], result: tuple[Axes, ...]) -> Part:
    names = _DIMENSIONS[: len(operands)]
    groups = {axis: group for dims, (_, grouped) in zip(names, operands, strict=True) for axis, group in zip(dims, grouped, strict=True)}
    size = {axis: volume(group, plan.size) for axis, group in groups.items()}
    dynamic = tuple(axis for axis, group in groups.items() if set(group) & set(plan.network.dynamic))
    options = (("causal", False), ("scale", 1.0))
    layouts = tuple(Layout.dense(dims, size) for dims in names)
    out = ("batch", "head", "query", "e")
    region = Region("squared_attention", layouts, out, tuple(size.items()), plan.dtype, plan.device, options, dynamic)
    return Part(values, tuple(operands), result, region, ("squared_attention",))
