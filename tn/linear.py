"""StructuredLinear: nn.Linear with a structured matrix, and Embedding beside it."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tn import algebra, ops, structures, tracing
from tn.checks import check_flags, positive
from tn.clamp import factor, scaled
from tn.contraction import Contraction, current_backend
from tn.errors import OperatorError, SizeError, StructureError, unknown
from tn.experts import Choice, Experts
from tn.network import Network, network
from tn.planner import plan
from tn.program import added, autocast, program
from tn.structures.budget import fit
from tn.structures.registry import Built, Factors, Options, Rank, axes_of

_FULL = (torch.float32, torch.float64)
_autocasting = torch._C._is_any_autocast_enabled
INITS = ("mup", "standard", "normal")


class StructuredLinear(Contraction):
    """y = W x + b with W of a named structure; like nn.Linear otherwise.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: add a trainable vector (out_features,).
        structure: a name of `tn.structures.names()`. rank, factors, cores, blocks, theta: see the family; each has a default.
        match: choose the rank, blocks or factors so that "params", "flops" or predicted "time" are at most `budget` × those of a dense
            layer. budget: a fraction.
        clamp: divide each core by its RMS over its starting RMS where that is above one, times a learned gain (`gains=False`: without;
            as for queries and keys under a norm); None: as the family says, and only btt_norm says yes.
        active: of a gated structure, such as btt_moe, the experts each row uses, 2 by default.
        permuted: reorder the inputs first, by the buffer `permutation` (position → input), the given order until it is set.
        init: "mup" starts each core as `Contraction` does; "standard" normal with std 1/√d_in,c; "normal" so that the matrix has the
            standard deviation `std`. zero_init: start with the last core at zero.
        device, dtype: of the parameters. backend: see Contraction.

    Shapes: (..., in_features) → (..., out_features). Sizes that do not factor are padded inside and never truncated.

    Raises:
        StructureError: an unknown structure, or options it does not take. SizeError: a last dimension of another size.

    >>> import torch
    >>> layer = StructuredLinear(1024, 4096, structure="btt", rank=4)
    >>> layer(torch.ones(2, 3, 1024)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 3, 4096]), 790528)
    """

    replaced: type[nn.Module] | None = None  # what restructure put it in the place of, where densify must make that again
    permutation: Tensor | None
    shadow: nn.Parameter | None
    guidance: Tensor | None
    tn_role: str | None = None  # what the layer does in its model, such as "mlp.in"; restructure goes by it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        structure: str = "dense",
        rank: Rank | None = None,
        factors: Factors | str | None = None,
        cores: int | None = None,
        blocks: int | tuple[int, int] | None = None,
        theta: str | tuple[float, ...] | None = None,
        match: str | None = None,
        budget: float | None = None,
        clamp: bool | None = None,
        gains: bool = True,
        active: int | None = None,
        permuted: bool = False,
        init: str = "mup",
        std: float | None = None,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "planned",
    ) -> None:
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if not positive(size):
                raise StructureError(f"{what} is {size!r}, expected an integer ≥ 1")
        if dtype is not None and not (
            isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex) and dtype.itemsize > 1
        ):
            raise StructureError(f"dtype is {dtype!r}, expected a floating or complex one of at least 16 bits")
        check_flags(bias=bias, gains=gains, permuted=permuted, zero_init=zero_init, clamp=clamp is None or clamp)
        _check_init(init, std)
        family = structures.get(structure)
        options = Options(rank=rank, factors=factors, cores=cores, blocks=blocks, theta=theta, active=active)
        built = fit(family, in_features, out_features, options, match=match, budget=budget)
        super().__init__(
            str(built.network.spec),
            sizes=built.network.sizes,
            cores=built.network.cores,
            zero_init=zero_init,
            device=device,
            dtype=dtype,
            backend=backend,
        )
        self.built, self.in_features, self.out_features = built, in_features, out_features
        self.structure, self.rank, self.factors = structure, built.rank, built.factors
        self.clamp = family.clamped if clamp is None else clamp
        self.init, self.std = init, std
        self.experts = Experts(built) if family.gated else None
        self._choice: Choice | None = None
        self._stds = self.start()
        self._pads = built.d_in - in_features, built.d_out - out_features
        self._matrix_network = _of_matrix(built.network) if self._tiny and self.experts is None else None
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))
        if self.clamp and gains:
            self.gains = nn.Parameter(torch.ones(len(built.network.cores), device=device, dtype=dtype))
        order = torch.arange(in_features, device=device) if permuted else None
        self.register_buffer("permutation", order)
        self.register_parameter("shadow", None)  # a dense twin and its part of the output, see tn.guide
        self.register_buffer("guidance", None)
        self._extras = self.clamp or permuted  # asked first: looking up what is None costs a plain layer microseconds
        if self.experts is not None:
            self.gate = nn.Parameter(torch.zeros(self.experts.count, in_features, device=device, dtype=dtype))
        if init != "mup" or self.experts is not None:
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the cores anew; the bias starts at zero, gains at one."""
        super().reset_parameters()
        if "init" not in self.__dict__:  # Contraction calls this before there is anything of ours
            return
        with torch.no_grad():
            for name, std in self.start().items() if self.init != "mup" or self.experts is not None else ():
                core = getattr(self, name)
                if not core.is_meta and not (self.zero_init and name == self.network.cores[-1]):
                    nn.init.normal_(core, std=std)
            if getattr(self, "gains", None) is not None:
                nn.init.ones_(self.gains)
            if self.experts is not None:
                nn.init.zeros_(self.gate)
            if self.permutation is not None and not self.permutation.is_meta:
                self.permutation.copy_(torch.arange(self.in_features))

    def start(self, init: str | None = None) -> dict[str, float]:
        """core → standard deviation it starts with."""
        init = init or self.init
        if init == "normal":
            assert self.std is not None
            return dict.fromkeys(self.network.cores, core_std(self.built, self.std))
        if init == "standard":
            return {fan.core: 1 / math.sqrt(max(fan.d_in, 1)) for fan in self.reference.fans()}
        return {fan.core: math.sqrt(min(fan.d_in, fan.d_out)) / max(fan.d_in, 1) for fan in self.reference.fans()}

    @property
    def reference(self) -> Network:
        """What starts and rates go by: the network; of a gated structure, that of one expert."""
        return self.experts.single if self.experts is not None else self.network

    def forward(self, *inputs: Tensor) -> Tensor:
        """(..., in_features) → (..., out_features)."""
        if self._matrix_network is not None and torch.is_grad_enabled() and len(inputs) == 1 and isinstance(inputs[0], Tensor):
            matrix = self._trained_matrix(inputs[0])
            if matrix is not None:
                (x,), bias = inputs, self._parameters["bias"]
                if self._extras and self.permutation is not None:
                    x = x[..., self.permutation]
                return torch.addmm(bias, x, matrix) if x.dim() == 2 and bias is not None else nn.functional.linear(x, matrix.mT, bias)
        return super().forward(*inputs)

    def _trained_matrix(self, x: Tensor) -> Tensor | None:
        """The matrix (in_features, out_features) of a tiny layer, whose every call then is one product and the fewest small operations;
        None where something has to see the contraction, or the input is not what that takes."""
        parameters, dtype = self._parameters, x.dtype
        if dtype not in _FULL or not x.is_cpu or x.shape[-1:] != (self.in_features,):
            return None
        if torch.compiler.is_compiling() or self._hoisted is not None or "bias" not in parameters:
            return None
        cores, bias = [parameters.get(name) for name in self.network.cores], parameters["bias"]
        if any(core is None or core.dtype is not dtype for core in cores) or (bias is not None and bias.dtype is not dtype):
            return None  # a parametrisation; a mistake that the contraction names
        other = (self._extras and self.shadow is not None) or (current_backend() or self.backend) != "planned"
        if other or _autocasting() or tracing.recording():
            return None
        run = self._programs.get(("matrix", dtype))
        if run is None:
            assert self._matrix_network is not None
            made = plan(self._matrix_network, grad=self.network.cores, dtype=dtype)
            run = self._programs["matrix", dtype] = program(made, "plain")
        matrix: Tensor = run.plain(*cores)
        before, after = self._pads
        matrix = matrix.narrow(0, 0, self.in_features) if before else matrix
        matrix = matrix.narrow(1, 0, self.out_features) if after else matrix
        return scaled(matrix, *self._clamped()) if self.clamp else matrix

    def _contract(self, *inputs: Tensor, bias: Tensor | None = None) -> Tensor:
        if len(inputs) != 1:
            raise OperatorError(f"the layer takes one input, got {len(inputs)}")
        (x,) = inputs
        if not isinstance(x, Tensor):
            raise OperatorError(f"input is a {type(x).__name__}, expected a torch.Tensor")
        if x.shape[-1:] != (self.in_features,):
            raise SizeError(f"input has shape {tuple(x.shape)}, expected a last dimension of {self.in_features}")
        before, after = self._pads
        ordered = x[..., self.permutation] if self._extras and self.permutation is not None else x
        padded = nn.functional.pad(ordered, (0, before)) if before else ordered
        if not after and not self._extras and self.experts is None:
            return super()._contract(padded, bias=bias)
        result = self._routed(padded) if self.experts is not None else super()._contract(padded)
        result = result[..., : self.out_features] if after else result
        if not self._extras:
            return added(result, bias)
        result = scaled(result, *self._clamped()) if self.clamp else result
        if self.shadow is not None and self.guidance is not None:
            ratio = self.guidance.to(result.dtype)
            result = ratio * nn.functional.linear(x, self.shadow) + (1 - ratio) * result
        return added(result, bias)

    def set_shadow(self, present: bool) -> None:
        """Add the dense twin of `tn.guide`, equal to the matrix and all of the output at first, or take it away."""
        shadow = nn.Parameter(self.to_dense().detach().contiguous()) if present else None
        self.register_parameter("shadow", shadow)
        self.register_buffer("guidance", None if shadow is None else torch.ones((), device=shadow.device))
        self._extras = present or self.clamp or self.permutation is not None

    def _routed(self, x: Tensor) -> Tensor:
        """The contraction by the experts that the gate chooses for each row."""
        assert self.experts is not None
        x, gate, *others = autocast([x, self.gate, *(getattr(self, name) for name in self.network.cores)])
        self._check_alike([x, gate])
        cores = dict(zip(self.network.cores, others, strict=True))
        result, choice = self.experts(x.flatten(0, -2) if x.dim() != 1 else x[None], gate, cores)
        if not torch.compiler.is_compiling():
            self._choice = choice
        result = result.reshape(*x.shape[:-1], result.shape[-1])
        if tracing.recording():
            count = sum(parameter.numel() for parameter in self.parameters())
            self.experts.record(str(self.network.spec), result, math.prod(x.shape[:-1]), count, self.gate)
        return result

    def _clamped(self) -> tuple[list[float], Tensor | None, list[Tensor]]:
        """What `tn.clamp` needs: the standard deviation each core starts with, the gains, the cores."""
        return list(self._stds.values()), getattr(self, "gains", None), [getattr(self, name) for name in self._stds]

    def _gain(self) -> Tensor:
        """What the clamped cores together are of the stored ones."""
        return factor(*self._clamped())

    def to_dense(self) -> Tensor:
        """The matrix (out_features, in_features), differentiable in the cores. Raises OperatorError where there is none (btt_moe)."""
        if self.experts is not None:
            raise OperatorError(f"{self.structure} has no matrix: which experts it applies depends on the input")
        core = getattr(self, self.network.cores[0])
        return self._contract(torch.eye(self.in_features, device=core.device, dtype=core.dtype)).mT

    @classmethod
    def from_cores(
        cls,
        structure: str,
        cores: Mapping[str, Tensor],
        *,
        in_features: int | None = None,
        out_features: int | None = None,
        bias: Tensor | None = None,
        permutation: Tensor | None = None,
    ) -> "StructuredLinear":
        """The layer whose matrix these cores make, with copies of them; rank and factors are read off their shapes.

        Args:
            structure: as in the constructor. cores: by name, shaped as the structure's spec stores them.
            in_features, out_features: where less than the factors make, the rest is padding. bias: (out_features,) or None.
            permutation: of the inputs, position → input, or None.

        Raises:
            StructureError: other names than the structure's cores, sizes the family refuses, values that are no tensors.
            SizeError: shapes that disagree.

        >>> import torch
        >>> a, c = torch.randn(3, 4, 2, 5), torch.randn(5, 3, 2, 6)
        >>> StructuredLinear.from_cores("btt", {"first": a, "second": c})
        StructuredLinear(12, 30, bias=False, structure='btt', rank=2, factors=((3, 4), (5, 6)))
        """
        if not isinstance(cores, Mapping):
            raise StructureError(f"cores is a {type(cores).__name__}, expected tensors by name")
        for name, core in cores.items():
            if not isinstance(core, Tensor):
                raise StructureError(f"core {name!r} is a {type(core).__name__}, expected a torch.Tensor")
        if len({core.dtype for core in cores.values()}) > 1:
            raise StructureError(f"cores have the dtypes {', '.join(str(core.dtype) for core in cores.values())}, expected one")
        net = algebra.sizes_of(structure, cores)
        d_in, d_out = algebra.features(net)
        ins, outs, ranks = ([net.sizes[axis] for axis in axes] for axes in axes_of(net))
        if len({core.device for core in cores.values()}) > 1:
            raise StructureError(f"cores are on the devices {', '.join(str(core.device) for core in cores.values())}, expected one")
        for what, value in (("bias", bias), ("permutation", permutation)):
            if value is not None and not isinstance(value, Tensor):
                raise StructureError(f"{what} is a {type(value).__name__}, expected a torch.Tensor or None")
        if permutation is not None and (permutation.is_floating_point() or permutation.is_complex()):
            raise StructureError(f"permutation is {permutation.dtype}, expected integers")
        example = next(iter(cores.values()))
        layer = cls(
            d_in if in_features is None else in_features,
            d_out if out_features is None else out_features,
            bias=bias is not None,
            structure=structure,
            rank=None if not ranks else ranks[0] if len(ranks) == 1 else tuple(ranks),
            factors=(tuple(ins), tuple(outs)) if len(ins) > 1 or len(outs) > 1 else None,
            permuted=permutation is not None,
            device=example.device,
            dtype=example.dtype,
        )
        if layer.network.sizes != net.sizes:
            raise StructureError(
                f"these cores map {d_in} → {d_out}: no {structure} layer {layer.in_features} → {layer.out_features} has them"
            )
        if bias is not None and bias.shape != layer.bias.shape:
            raise SizeError(f"bias has shape {tuple(bias.shape)}, expected ({layer.out_features},)")
        if permutation is not None:
            if sorted(permutation.tolist()) != list(range(layer.in_features)):
                raise StructureError(
                    f"permutation is no order of the {layer.in_features} inputs: each of 0 to {layer.in_features - 1} once"
                )
            layer.permutation.copy_(permutation)
        layer.set_cores(cores)
        if bias is not None:
            with torch.no_grad():
                layer.bias.copy_(bias)
        return layer

    def __getstate__(self) -> dict:
        return {**super().__getstate__(), "_choice": None}  # belongs to one forward pass and its graph

    def set_cores(self, cores: Mapping[str, Tensor]) -> None:
        """Copy values into the cores; gains become what makes the matrix exactly that of these cores.

        Raises:
            StructureError: a name or a shape that is not a core's; cores beyond the clamp of a layer without gains.
        """
        for name, value in cores.items():
            if name not in self.network.cores:
                raise StructureError(unknown("core", name, self.network.cores))
            if tuple(value.shape) != self.network.shape(name):
                raise StructureError(f"core {name!r} has shape {tuple(value.shape)}, expected {self.network.shape(name)}")
        with torch.no_grad():
            for name, value in cores.items():
                getattr(self, name).copy_(value)
            gains = getattr(self, "gains", None)
            if gains is not None:
                gains.fill_(1)
                gains[0] = 1 / self._gain()
            elif self.clamp and self._gain() < 1:
                raise StructureError("these cores are larger than the clamp allows, and the layer has no gains; use clamp=False")

    @property
    def T(self) -> "StructuredLinear":
        """A layer of the same family with the transposed matrix, copies of the cores and no bias."""
        return algebra.transpose(self)

    def __matmul__(self, other: "StructuredLinear") -> "StructuredLinear":
        """The layer x ↦ self(other(x)) without biases, where it is in a family of its own: see `tn.algebra.multiply`."""
        return algebra.multiply(self, other) if isinstance(other, StructuredLinear) else NotImplemented

    def convert(self, structure: str) -> "StructuredLinear":
        """The same matrix and bias in a family that contains this one, exactly, also by way of others: block_diagonal → monarch or blast,
        monarch or low_rank → btt, low_rank → blast, btt ↔ btt_norm, kronecker → tt, btt or tt of two cores → einsum2, anything → dense.
        Raises StructureError naming the families that do."""
        return algebra.convert(self, structure)

    @property
    def note(self) -> str:
        """What its family has to say about a layer of these sizes, such as the exponents of an einsum2; often nothing."""
        note = structures.get(self.structure).note
        return note(self.built) if note else ""

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that build a layer like this one, without those that have their default."""
        family = structures.get(self.structure)
        gains = not self.clamp or getattr(self, "gains", None) is not None
        known = {
            "structure": (self.structure, "dense"),
            "rank": (self.rank, None),
            "factors": (self.factors, None),
            "clamp": (self.clamp, family.clamped),
            "gains": (gains, True),
            "active": (self.experts.active if self.experts is not None else None, None),
            "permuted": (self.permutation is not None, False),
            "init": (self.init, "mup"),
            "std": (self.std, None),
            "zero_init": (self.zero_init, False),
        }
        return {name: value for name, (value, default) in known.items() if value != default}

    def __repr__(self) -> str:
        options = {"bias": self.bias is not None, "structure": self.structure, **self.settings}
        return f"StructuredLinear({self.in_features}, {self.out_features}, {', '.join(f'{k}={v!r}' for k, v in options.items())})"


def core_std(built: Built, std: float) -> float:
    """The standard deviation of every core that gives the matrix a mean square of std².

    An element is a sum of Π rank products of one element of each core; where input and output share an axis, the others are zero."""
    ins, outs, ranks = axes_of(built.network)
    sizes = built.network.sizes
    terms = math.prod(sizes[axis] for axis in ranks)
    sparse = math.prod(sizes[axis] for axis in set(ins) & set(outs))
    return float((std * std * sparse / terms) ** (0.5 / len(built.network.cores)))


def _of_matrix(net: Network) -> Network | None:
    """The network of the matrix (in, out) alone; None where it has blocks of zeros."""
    (_, ins), (_, outs) = net.term("x").dims, net.output.dims
    shared = set(ins) & set(outs)
    if any(net.sizes[axis] > 1 for axis in shared):
        return None
    sides = (" ".join(axis for axis in side if axis not in shared) or "1" for side in (ins, outs))
    cores = ", ".join(str(net.term(name)) for name in net.cores)
    return network(f"{cores} -> {' '.join(f'({side})' for side in sides)}", net.sizes, cores=net.cores)


def _check_init(init: str, std: float | None) -> None:
    if init not in INITS:
        raise StructureError(unknown("init", init, INITS))
    if (std is not None) != (init == "normal") or (std is not None and not (isinstance(std, int | float) and 0 <= std < math.inf)):
        raise StructureError(f"init={init!r} with std={std!r}: std is a number ≥ 0, and init='normal' alone needs it")


class Embedding(nn.Module):
    """A table of vectors looked up by number: a contraction with a one-hot axis, run as a gather.

    Args:
        count: rows of the table. width: size of a vector. std: of the normal start. device, dtype: of the table.

    Shapes: integers (...) → (..., width). The parameter is `weight` (count, width).
    """

    def __init__(
        self, count: int, width: int, *, std: float = 0.02, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.std = std
        self.weight = nn.Parameter(torch.empty(count, width, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the table anew."""
        if not self.weight.is_meta:  # there is nothing to draw, and drawing imports the compiler
            nn.init.normal_(self.weight, std=self.std)

    def forward(self, numbers: Tensor) -> Tensor:
        """Vectors of the given rows."""
        return ops.embedding(numbers, self.weight)

    def __repr__(self) -> str:
        return f"Embedding({self.weight.shape[0]}, {self.weight.shape[1]}, std={self.std})"
