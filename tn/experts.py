"""Structures of which each row uses a few values of the rank axis only: the gate, and running just the experts it chose."""

import torch
from torch import Tensor, nn

from tn import tracing
from tn.checks import check_model
from tn.errors import StructureError
from tn.network import Network, network
from tn.planner import plan
from tn.program import compile, program
from tn.spec import ROWS
from tn.structures.registry import Built, get, macs

Choice = tuple[Tensor, Tensor]  # logits (rows, experts), the experts of each row (rows, active)
_MANY = 64  # rows of an expert from which its cores are worth a copy of their own
_FEW = 16  # rows of the busiest expert up to which all run beside each other
_WASTE = 3  # times as many rows as were chosen that this may take
_BALANCE = 0.1  # weight of the logits' size beside their balance, arXiv:2410.02117


class Experts:
    """How the rows of a layer are given to its experts; holds no parameters.

    Args:
        built: of a gated structure.
    """

    def __init__(self, built: Built) -> None:
        axis = get(built.structure).gated
        assert axis is not None and built.active is not None
        self.axis, self.active, self.count = axis, built.active, built.network.sizes[axis]
        self.single = built.reference
        self.run = compile(self.single)
        self.gated = compile(_with_gate(built.network, axis))
        beside = network(str(built.network.spec).replace(ROWS, f"{axis} slot"), built.network.sizes, cores=built.network.cores)
        self.beside = program(plan(beside, grad=beside.names, sizes={"slot": _FEW}), "planned")

    def __call__(self, x: Tensor, gate: Tensor, cores: dict[str, Tensor]) -> tuple[Tensor, Choice | None]:
        """x (rows, d_in) and weights of the gate (experts, at most d_in) → (result (rows, d_out), what it was chosen by)."""
        logits = x[:, : gate.shape[1]] @ gate.mT.to(x.dtype)
        logits = logits.float() if logits.dtype.itemsize < 4 else logits
        top, chosen = logits.topk(self.active, dim=-1)
        weights = top.softmax(-1)
        seen = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if seen or x.is_meta or not x.shape[0]:
            # Which rows an expert gets depends on data; where there is none or it cannot be followed, all experts run, weighed by the gate.
            whole = torch.zeros_like(logits).scatter(-1, chosen, weights)
            result = self.gated(x, whole.to(x.dtype), *cores.values())
        else:
            result = self._dispatched(x, weights.to(x.dtype), chosen, cores)
        return result, None if seen or not x.shape[0] else (logits, chosen)

    def _dispatched(self, x: Tensor, weights: Tensor, chosen: Tensor, cores: dict[str, Tensor]) -> Tensor:
        """Expert after expert, added to the result in place: gathering all rows at once would touch four times as much new memory.

        Few rows, where calls count, go through all experts beside each other, as many to each as the one with most has, zeros elsewhere."""
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.count).tolist()
        if max(counts) <= _FEW and self.count * max(counts) <= _WASTE * len(order):
            return self._beside(x, weights, order, counts, cores)
        rows, shares = (order // self.active).split(counts), weights.flatten().index_select(0, order).split(counts)
        places = [self.single.term(name).axes.index(self.axis) for name in cores]
        slices = [core.unbind(place) for core, place in zip(cores.values(), places, strict=True)]
        result = None
        for expert in (expert for expert, count in enumerate(counts) if count):
            mine = [part[expert] for part in slices]
            if counts[expert] >= _MANY:
                mine = [core.contiguous() for core in mine]
            mine = [core.unsqueeze(place) for core, place in zip(mine, places, strict=True)]
            part = self.run(x.index_select(0, rows[expert]), *mine) * shares[expert][:, None]
            result = part.new_zeros(len(x), part.shape[1]) if result is None else result
            result.index_add_(0, rows[expert], part)
        assert result is not None
        return result

    def _beside(self, x: Tensor, weights: Tensor, order: Tensor, counts: list[int], cores: dict[str, Tensor]) -> Tensor:
        slots = torch.tensor([expert * max(counts) + n for expert, count in enumerate(counts) for n in range(count)], device=x.device)
        rows, shares = order // self.active, weights.flatten().index_select(0, order)
        given = x.new_zeros(self.count * max(counts), x.shape[1]).index_copy(0, slots, x.index_select(0, rows))
        made = self.beside(given.unflatten(0, (self.count, -1)), *cores.values()).flatten(0, 1)
        part = made.index_select(0, slots) * shares[:, None]
        return part.new_zeros(len(x), part.shape[1]).index_add_(0, rows, part)

    def balance(self, logits: Tensor, chosen: Tensor) -> Tensor:
        """experts · ⟨share of probability, share of rows⟩ + 0.1 · mean logsumexp²."""
        share = torch.zeros_like(logits).scatter(-1, chosen, 1.0).mean(0) / self.active
        return self.count * (logits.softmax(-1).mean(0) * share).sum() + _BALANCE * logits.logsumexp(-1).square().mean()

    def macs(self, gate: Tensor) -> int:
        """Multiply-adds of a row: the gate and the experts that it uses."""
        return self.active * macs(self.single) + gate.numel()

    def record(self, what: str, result: Tensor, rows: int, parameters: int, gate: Tensor) -> None:
        """Tell a trace what a row costs: the gate and the experts that it uses."""
        work = 2 * rows * self.macs(gate)
        sizes = {**self.single.sizes, self.axis: self.active, "...": rows}
        tracing.record(
            "contraction", f"{what} ({self.active} of {self.count})", sizes=sizes, result=result, flops=work, parameters=parameters
        )


def _with_gate(net: Network, axis: str) -> Network:
    head, _, tail = str(net.spec).partition(", ")
    return network(f"{head}, gate: ... {axis}, {tail}", net.sizes, cores=net.cores)


def balance_loss(model: nn.Module) -> Tensor:
    """The mean balance loss of all gated layers in their last forward pass; add a small multiple (0.01) to the loss.

    Raises:
        StructureError: no gated layer that has run.
    """
    check_model(model)
    found = [module for module in model.modules() if getattr(module, "_choice", None) is not None]
    if not found:
        raise StructureError("no gated layer (structure='btt_moe') of the model has run yet")
    return torch.stack([module.experts.balance(*module._choice) for module in found]).mean()  # type: ignore[misc]
