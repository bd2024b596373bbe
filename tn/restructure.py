"""Replace the dense layers of a model by structured ones in one call, and back."""

import contextlib
import fnmatch
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tn import structures
from tn.checks import check_flags, check_model, positive
from tn.errors import StructureError, TnError, unknown
from tn.linear import StructuredLinear
from tn.planner import plan
from tn.projection import Projection, check_weight, project
from tn.projection_ranks import spread, spread_blocks
from tn.replaceable import features, is_conv1d, is_linear, matrix, replace, roles
from tn.saved_structure import remember
from tn.structures.registry import Factors, Options, Rank

# torch modules that use the `weight` of their linear children without calling them
_READS_WEIGHTS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)

_GROUPS: dict[str, Callable[[str | None], bool]] = {
    "all": lambda role: True,
    "all_but_last": lambda role: role != "head",
    "ffn": lambda role: role is not None and role.startswith("mlp."),
    "attn": lambda role: role is not None and role.startswith("attention."),
    "head": lambda role: role == "head",
}
_ROWS = 128  # of the forward passes that old and new layers are compared by
Layers = str | Iterable[str] | Callable[[str, nn.Module], bool]


@dataclass(frozen=True, slots=True)
class Change:
    """One replaced layer.

    Attributes:
        path: where. before, after: its repr. parameters_before, parameters_after; flops_before, flops_after: a row, 2 a multiply-add.
        predicted, measured: seconds of a forward pass without gradients, before and after, of as many rows; measured is None where that
        was not asked for. error: relative distance of a projected matrix from the old one, None where drawn anew.
        note: of the family, and of blocks with ranks of their own.
    """

    path: str
    before: str
    after: str
    parameters_before: int
    parameters_after: int
    flops_before: int = 0
    flops_after: int = 0
    predicted: tuple[float, float] = (0.0, 0.0)
    measured: tuple[float, float] | None = None
    error: float | None = None
    note: str = ""


@dataclass(frozen=True, slots=True)
class Report:
    """What `restructure` or `densify` did. `str(report)` is a table."""

    changes: tuple[Change, ...]

    def __str__(self) -> str:
        timed = any(c.measured for c in self.changes)
        head = f"{'layer':<40}{'parameters':>12} → {'':<12}{'kFLOP a row':>12} → {'':<10}{'predicted µs':>14} → {'':<9}"
        lines = [head + (f"{'measured µs':>14} → {'':<9}" if timed else "") + f"{'error':>8}  now"]
        for c in self.changes:
            row = f"{c.path:<40}{c.parameters_before:>12,} → {c.parameters_after:<12,}"
            row += f"{c.flops_before / 1e3:>12,.1f} → {c.flops_after / 1e3:<10,.1f}{_times(c.predicted)}"
            row += _times(c.measured) if timed else ""
            lines.append(f"{row}{'' if c.error is None else f'{c.error:.3f}':>8}  {c.after}{f'  {c.note}' if c.note else ''}")
        totals = [
            sum(getattr(c, name) for c in self.changes) for name in ("parameters_before", "parameters_after", "flops_before", "flops_after")
        ]
        before, after, work_before, work_after = totals
        label = f"{len(self.changes)} layers"
        total = f"{label:<40}{before:>12,} → {after:<12,}{work_before / 1e3:>12,.1f} → {work_after / 1e3:<10,.1f}"
        total += _times(_sum(c.predicted for c in self.changes))
        total += _times(_sum(c.measured for c in self.changes if c.measured)) if timed else ""
        lines.append(total.rstrip())
        return "\n".join(lines)


def _times(pair: tuple[float, float] | None) -> str:
    """Microseconds before and after."""
    return f"{'':>26}" if pair is None else f"{pair[0] * 1e6:>14,.0f} → {pair[1] * 1e6:<9,.0f}"


def _sum(pairs: Iterable[tuple[float, float]]) -> tuple[float, float]:
    before, after = zip((0.0, 0.0), *pairs, strict=True)
    return sum(before), sum(after)


def restructure(
    model: nn.Module,
    *,
    structure: str,
    layers: Layers = "all_but_last",
    rank: Rank | Mapping[str, Rank] | None = None,
    factors: Factors | str | None = None,
    cores: int | None = None,
    blocks: int | tuple[int, int] | None = None,
    theta: str | tuple[float, ...] | None = None,
    match: str | None = None,
    budget: float | None = None,
    clamp: bool | None = None,
    init: str = "scratch",
    permute: bool = False,
    block_ranks: bool = False,
    inputs: Iterable[Any] | None = None,
    measure: int | None = _ROWS,
) -> Report:
    """Replace linear layers in place by structured ones of the same sizes. All or nothing.

    Args:
        model: any module; `nn.Linear`, `tn.StructuredLinear` and transformers' `Conv1D` layers can be replaced.
        structure, factors, cores, blocks, theta, match, budget, clamp: as in `tn.StructuredLinear`. rank: too, or a mapping from globs over
            paths to ranks, the first that matches. With init="project", a budget without match is one for all layers together, a share
            of their parameters, and each layer's rank follows from its singular values (two-core structures).
        layers: "all", "all_but_last", "ffn", "attn" or "head" (by the `tn_role` of a layer, or its path in Hugging Face's GPT-2, LLaMA and
            ViT; the last layer without a role is the head), a path or a glob over paths such as "blocks.*.mlp.*", several of them, or a
            predicate (path, module) → bool.
        init: "scratch" draws new cores, "project" takes the nearest ones to the old matrix (`tn.project`).
        permute: for init="project": also search for an order of each layer's inputs (see `tn.project`).
        block_ranks: for init="project" with a budget and no match: spread it over the blocks of all layers, whose ranks then differ inside
            a layer (see `tn.project`).
        inputs: for init="project": batches the model is called with (a tensor, a tuple or a dict of arguments); each layer is then
            projected for the inputs it sees there.
        measure: rows to time old and new layers at, forward, each pair of layers that are alike once; None: only predict.

    Returns:
        A Report of what changed.

    Raises:
        StructureError: an unknown structure or group, no matching layer, a matching layer with shared parameters. ProjectionError: a weight
        that cannot be projected. The message names the layer; nothing is replaced.
    """
    check_model(model)
    check_flags(permute=permute, block_ranks=block_ranks, clamp=clamp is None or clamp)
    structures.get(structure)
    _check_how(init, measure, permute, inputs)
    if block_ranks and (init != "project" or budget is None or match is not None or permute or inputs is not None):
        raise StructureError("block_ranks are for init='project' with a budget, without match, permute and inputs")
    chosen = _select(model, layers)
    shared: dict[str, Any] = dict(factors=factors, cores=cores, blocks=blocks, theta=theta, match=match, budget=budget)
    ranks = _ranks(rank, chosen)
    for path, layer in chosen.items() if init == "project" else ():  # all of them, before any work starts
        with _named(path):
            check_weight(matrix(layer))
    inside: dict[str, Tensor] = {}  # path → rank of every block
    if init == "project" and budget is not None and match is None:
        if rank is not None:
            raise StructureError(f"budget={budget} chooses the ranks: leave out rank={rank}")
        options = Options(factors=factors, cores=cores, blocks=blocks, theta=theta)
        weights = {path: matrix(layer) for path, layer in chosen.items()}
        inside = spread_blocks(structure, weights, options, budget) if block_ranks else {}
        ranks |= {path: int(of.max()) for path, of in inside.items()} or spread(structure, weights, options, budget)
        shared["budget"] = None
    grams = gram_matrices(model, chosen, inputs) if inputs is not None else {}
    built: dict[str, StructuredLinear] = {}
    found_as: dict[str, tuple[float, str]] = {}  # error, note
    for path, layer in chosen.items():
        with _named(path):
            new = _twin(layer, structure=structure, clamp=clamp, permuted=permute, rank=ranks[path], **shared)
            if init == "project":
                of: dict[str, Any] = {"block_ranks": inside[path]} if path in inside else {"rank": new.rank}
                found_as[path] = _take_over(new, layer, gram=grams.get(path), permute=permute, **of)
        built[path] = _frozen_as(layer, new)
    return _swap(model, chosen, built, found_as, measure)


@contextlib.contextmanager
def _named(path: str) -> Iterator[None]:
    """Errors raised inside name the layer."""
    try:
        yield
    except TnError as error:
        raise type(error)(f"layer {path!r}: {error}") from error


def densify(model: nn.Module) -> Report:
    """Replace every structured layer inside a model in place by the dense one with the same matrix and bias. All or nothing.

    A layer that `restructure` made of a transformers `Conv1D` becomes one again, so that the model saves and loads as before.

    Raises:
        StructureError: the model itself is such a layer, or a layer cannot be replaced alone (see `restructure`).
    """
    check_model(model)
    if isinstance(model, StructuredLinear):
        raise StructureError("a layer cannot replace itself: give densify the model that holds it, or take layer.to_dense()")
    chosen: dict[str, nn.Module] = {
        path: m for path, m in model.named_modules() if isinstance(m, StructuredLinear) and (m.structure != "dense" or m.replaced)
    }
    _check_owned(model, chosen)
    built: dict[str, nn.Module] = {}
    for path, layer in chosen.items():
        assert isinstance(layer, StructuredLinear)
        core = next(layer.parameters())
        with _named(path):
            weight = layer.to_dense()
        if layer.replaced is not None:
            new: nn.Module = layer.replaced(layer.out_features, layer.in_features).to(core.device, core.dtype)
            weight = weight.mT
        else:
            bias = layer.bias is not None
            new = StructuredLinear(layer.in_features, layer.out_features, bias=bias, device=core.device, dtype=core.dtype)
        with torch.no_grad():
            new.weight.copy_(weight)
            if layer.bias is not None:
                new.bias.copy_(layer.bias)
        built[path] = _frozen_as(layer, new)
    return _swap(model, chosen, built, {}, None)


def gram_matrices(model: nn.Module, chosen: Mapping[str, nn.Module], inputs: Iterable[Any]) -> dict[str, Tensor]:
    """path → XᵀX in float64 of the inputs X that each layer sees while the model is called, without gradients, on every batch.

    Raises:
        StructureError: no batch, or a layer that no batch reaches.
    """
    grams: dict[str, Tensor] = {}

    def watch(path: str) -> Callable[[nn.Module, tuple], None]:
        def hook(_: nn.Module, arguments: tuple) -> None:
            rows = torch.atleast_2d(arguments[0].detach()).flatten(0, -2).to(torch.float64)
            grams[path] = grams.get(path, 0) + rows.mT @ rows

        return hook

    handles = [layer.register_forward_pre_hook(watch(path)) for path, layer in chosen.items()]
    try:
        with torch.no_grad():
            for number, batch in enumerate(inputs):
                try:
                    if isinstance(batch, Mapping):
                        model(**batch)
                    else:
                        model(*batch) if isinstance(batch, tuple | list) else model(batch)
                except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
                    raise StructureError(f"the model does not run on batch {number} of inputs: {error}") from error
    finally:
        for handle in handles:
            handle.remove()
    missing = [path for path in chosen if path not in grams]
    if missing:
        raise StructureError(f"no batch of inputs reaches layer {missing[0]!r}")
    return grams


def _check_how(init: str, measure: object, permute: bool, inputs: object) -> None:
    """Raise StructureError for an unknown start, no number of rows, no batches to call a model with, or what only projections take."""
    if init not in ("scratch", "project"):
        raise StructureError(unknown("init", init, ("scratch", "project")))
    if measure is not None and not positive(measure):
        raise StructureError(f"measure is {measure!r}, expected a number of rows ≥ 1, or None")
    if (inputs is not None or permute) and init != "project":
        raise StructureError(f"{'permute is' if permute else 'inputs are'} for init='project'")
    if inputs is None:
        return
    if isinstance(inputs, Tensor | Mapping | str) or not isinstance(inputs, Iterable):
        raise StructureError(f"inputs is a {type(inputs).__name__}, expected batches: a list of tensors, tuples or dicts of arguments")


def _twin(layer: nn.Module, **options: Any) -> StructuredLinear:
    """A new structured layer with the sizes, bias, dtype and device of a linear one."""
    weight = next(layer.parameters())
    d_out, d_in = features(layer)
    bias = getattr(layer, "bias", None) is not None
    zero = bool(getattr(layer, "zero_init", False))
    new = StructuredLinear(d_in, d_out, bias=bias, zero_init=zero, device=weight.device, dtype=weight.dtype, **options)
    new.replaced = type(layer) if is_conv1d(layer) else getattr(layer, "replaced", None)
    return new


def _take_over(new: StructuredLinear, old: nn.Module, **how: Any) -> tuple[float, str]:
    """Give a layer the cores nearest to the matrix of another, and its bias. Returns the error and what a table says of the ranks."""
    found = project(matrix(old), structure=new.structure, factors=new.factors, **how)
    new.set_cores(found.cores)
    if found.permutation is not None:
        new.permutation.copy_(found.permutation)
    _copy_bias(old, new)
    return found.error, _of_blocks(found)


def _of_blocks(found: Projection) -> str:
    """What a table says of a layer whose blocks have ranks of their own."""
    if found.block_ranks is None:
        return ""
    low, high = int(found.block_ranks.min()), int(found.block_ranks.max())
    return f"block ranks {low} to {high}, {found.nonzero:,} core elements not zero"


def _copy_bias(old: nn.Module, new: nn.Module) -> None:
    bias: Tensor | None = getattr(old, "bias", None)
    if bias is not None:
        with torch.no_grad():
            new.bias.copy_(bias)


def _ranks(rank: Rank | Mapping[str, Rank] | None, chosen: Mapping[str, nn.Module]) -> dict[str, Rank | None]:
    if not isinstance(rank, Mapping):
        return dict.fromkeys(chosen, rank)
    for glob in rank:
        if not isinstance(glob, str):
            raise StructureError(f"rank has the key {glob!r}, expected globs over paths such as 'blocks.*.mlp.*'")
    unused = [glob for glob in rank if not any(fnmatch.fnmatchcase(path, glob) for path in chosen)]
    if unused:
        raise StructureError(f"rank for {unused[0]!r} matches none of the chosen layers: {', '.join(list(chosen)[:8])}")
    return {path: next((r for glob, r in rank.items() if fnmatch.fnmatchcase(path, glob)), None) for path in chosen}


def _frozen_as(old: nn.Module, new: Any) -> Any:
    """The new layer with its cores frozen if the old weights are, and its bias frozen if the old bias is."""
    weights = [parameter for name, parameter in old.named_parameters(recurse=False) if name != "bias"]
    for name, parameter in new.named_parameters():
        was = [old.bias] if name == "bias" else weights
        parameter.requires_grad_(any(p.requires_grad for p in was))
    return new


def _select(model: nn.Module, layers: Layers) -> dict[str, nn.Module]:
    linear: dict[str, nn.Module] = {path: m for path, m in model.named_modules() if path and is_linear(m)}
    known = roles(linear)
    if callable(layers):
        chosen = {path: m for path, m in linear.items() if layers(path, m)}
    elif not isinstance(layers, str):
        if not isinstance(layers, Iterable):
            raise StructureError(f"layers is {layers!r}, expected one of {', '.join(_GROUPS)}, globs over paths, or a predicate")
        globs = list(layers)
        for glob in globs:
            if not isinstance(glob, str):
                raise StructureError(f"layers has {glob!r} in it, expected globs over paths such as 'blocks.*.mlp.*'")
            if not any(fnmatch.fnmatchcase(path, glob) for path in linear):
                raise StructureError(unknown("layer", glob, linear))
        chosen = {path: m for path, m in linear.items() if any(fnmatch.fnmatchcase(path, glob) for glob in globs)}
    elif layers in _GROUPS:
        chosen = {path: m for path, m in linear.items() if _GROUPS[layers](known[path])}
    elif any(mark in layers for mark in "*?[.") or layers in linear:
        chosen = {path: m for path, m in linear.items() if fnmatch.fnmatchcase(path, layers)}
    else:
        raise StructureError(unknown("layers", layers, _GROUPS))
    if not chosen:
        if is_linear(model):
            raise StructureError(
                "a layer cannot replace itself: give restructure the model that holds it, or take tn.project of its weight"
            )
        if not linear:
            raise StructureError(f"the {type(model).__name__} has no linear layer to replace")
        raise StructureError(f"layers={layers!r} matches none of the {len(linear)} linear layers: {', '.join(list(linear)[:8])}")
    _check_owned(model, chosen)
    _check_matrices(chosen)
    return chosen


def _check_matrices(chosen: Mapping[str, nn.Module]) -> None:
    """Raise StructureError for a layer whose weight is no matrix of its features."""
    for path, layer in chosen.items():
        if isinstance(layer, StructuredLinear):
            continue
        weight: Tensor = layer.weight  # type: ignore[assignment]
        if nn.parameter.is_lazy(weight):
            raise StructureError(f"layer {path!r} has no weight yet; call the model once before restructuring")
        expected = "a matrix" if is_conv1d(layer) else f"({layer.out_features}, {layer.in_features})"
        if weight.dim() != 2 or (not is_conv1d(layer) and features(layer) != weight.shape):
            raise StructureError(f"layer {path!r}: weight has shape {tuple(weight.shape)}, expected {expected}")


def _check_owned(model: nn.Module, chosen: Mapping[str, nn.Module]) -> None:
    """Raise StructureError for a layer that cannot be replaced alone: shared, tied, or read by its parent behind its back."""
    paths: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        paths.setdefault(id(module), []).append(path)
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + (parameter is not None)
    for path, layer in chosen.items():
        if len(paths[id(layer)]) > 1:
            raise StructureError(
                f"layer {path!r} is used under several names ({', '.join(paths[id(layer)])}); give each place its own layer"
            )
        if any(owners[id(parameter)] > 1 for parameter in layer.parameters(recurse=False)):
            raise StructureError(f"layer {path!r} shares a parameter with another one (a tied head?); untie it before restructuring")
        parent = model.get_submodule(path.rpartition(".")[0])
        if isinstance(parent, _READS_WEIGHTS):
            raise StructureError(f"layer {path!r} belongs to a {type(parent).__name__}, which reads its weight directly; leave it out")


def _swap(
    model: nn.Module,
    old: Mapping[str, nn.Module],
    new: Mapping[str, nn.Module],
    found_as: Mapping[str, tuple[float, str]],
    measure: int | None,
) -> Report:
    times: dict[tuple, tuple[float, float] | None] = {}
    changes = [_change(path, old[path], new[path], found_as.get(path, (None, "")), measure, times) for path in new]
    for path in new:
        replace(model, path, old[path], new[path])
    remember(model)
    return Report(tuple(changes))


def _change(path: str, old: nn.Module, new: nn.Module, found_as: tuple[float | None, str], measure: int | None, times: dict) -> Change:
    error, blocks = found_as
    (work_before, seconds_before), (work_after, seconds_after) = (_cost(layer, measure or _ROWS) for layer in (old, new))
    parameter = next(new.parameters())
    alike = (repr(old), repr(new), parameter.dtype, parameter.device)
    if alike not in times:
        times[alike] = _measured(old, new, measure) if measure and not parameter.is_meta else None
    return Change(
        path=path,
        before=repr(old),
        after=repr(new),
        parameters_before=sum(p.numel() for p in old.parameters()),
        parameters_after=sum(p.numel() for p in new.parameters()),
        flops_before=2 * work_before,
        flops_after=2 * work_after,
        predicted=(seconds_before, seconds_after),
        measured=times[alike],
        error=error,
        note="  ".join(filter(None, (new.note if isinstance(new, StructuredLinear) else "", blocks))),
    )


def _cost(layer: nn.Module, rows: int) -> tuple[int, float]:
    """(multiply-adds a row, predicted seconds of a forward pass) of a linear layer."""
    parameter = next(layer.parameters())
    how: dict[str, Any] = dict(dtype=parameter.dtype, device=parameter.device)
    if isinstance(layer, StructuredLinear) and layer.experts is not None:
        return layer.experts.macs(layer.gate), plan(layer.experts.single, rows=layer.experts.active * rows, **how).forward_seconds
    if isinstance(layer, StructuredLinear):
        built = layer.built
    else:
        d_out, d_in = features(layer)
        built = structures.get("dense").build(d_in, d_out)
    return built.macs, plan(built.network, rows=rows, **how).forward_seconds


def _measured(old: nn.Module, new: nn.Module, rows: int) -> tuple[float, float]:
    """Median seconds of a forward pass of both, taken in turns; hooks are not called, and the random state stays."""
    parameter = next(new.parameters())
    x = torch.linspace(-1, 1, rows * features(new)[1], device=parameter.device, dtype=parameter.dtype).reshape(rows, -1)
    samples: tuple[list[float], list[float]] = ([], [])
    with torch.no_grad():
        for turn in range(6):
            for layer, times in zip((old, new), samples, strict=True):
                if x.is_cuda:
                    torch.cuda.synchronize()
                begun = time.perf_counter()
                layer.forward(x)
                if x.is_cuda:
                    torch.cuda.synchronize()
                if turn:
                    times.append(time.perf_counter() - begun)
    if isinstance(new, StructuredLinear):
        new._choice = None  # of a pass that its model did not make
    return statistics.median(samples[0]), statistics.median(samples[1])
