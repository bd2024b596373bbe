"""The nearest structured matrix to a given one: closed forms where they exist, alternating least squares otherwise."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tn import structures
from tn.algebra import features
from tn.checks import check_flags
from tn.errors import ProjectionError
from tn.linear import StructuredLinear
from tn.network import Network
from tn.program import compile
from tn.projection_als import Fit
from tn.projection_permute import search
from tn.projection_ranks import check_ranks, masked, spread_blocks
from tn.projection_svd import as_tensor, separable, split
from tn.structures.budget import fit, full_ranks
from tn.structures.registry import Built, Factors, Options, Rank

_SWEEPS = 200
_ROUNDING = 1e-9  # of the energy, which is computed from cores in the weight's dtype
_RIDGE = 1e-8  # of the mean of a Gram matrix's diagonal: inputs that never occur still count a little


@dataclass(frozen=True, slots=True)
class Projection:
    """A structured matrix near a given one.

    Attributes:
        structure: its family. cores: by name, as the structure stores them. sizes: of the axes.
        permutation: position → input, None for the order given. error: ‖W − A‖ / ‖W‖, both times the Gram root where one was given.
        energy: 1 − error². built: the structure at these sizes. shape: of the weight. block_ranks: of every block, where they differ.
    """

    structure: str
    cores: Mapping[str, Tensor]
    sizes: Mapping[str, int]
    permutation: Tensor | None
    error: float
    energy: float
    built: Built
    shape: tuple[int, int]
    block_ranks: Tensor | None = None

    @property
    def nonzero(self) -> int:
        """Elements of the cores that are not zero: fewer than are stored where blocks have ranks of their own."""
        return sum(int(torch.count_nonzero(core)) for core in self.cores.values())

    def layer(self, bias: Tensor | None = None) -> StructuredLinear:
        """A StructuredLinear with this matrix."""
        out_features, in_features = self.shape
        sizes = {"in_features": in_features, "out_features": out_features}
        return StructuredLinear.from_cores(self.structure, self.cores, bias=bias, permutation=self.permutation, **sizes)

    def to_dense(self) -> Tensor:
        """The matrix (out, in)."""
        core = next(iter(self.cores.values()))
        with torch.no_grad():
            return self.layer()(torch.eye(self.shape[1], dtype=core.dtype, device=core.device)).mT


def project(
    weight: Tensor,
    *,
    structure: str,
    rank: Rank | None = None,
    factors: Factors | str | None = None,
    cores: int | None = None,
    blocks: int | tuple[int, int] | None = None,
    theta: str | tuple[float, ...] | None = None,
    match: str | None = None,
    budget: float | None = None,
    energy: float | None = None,
    gram: Tensor | None = None,
    permute: bool = False,
    start: Mapping[str, Tensor] | None = None,
    sweeps: int = _SWEEPS,
    block_ranks: bool | Tensor = False,
) -> Projection:
    """The member of a structure nearest to a matrix, in the Frobenius norm or for given inputs.

    Args:
        weight: (out, in), floating, finite.
        structure, rank, factors, cores, blocks, theta, match, budget: as in `tn.StructuredLinear`.
        energy: take the smallest rank that keeps this share of ‖W‖² (or ‖W Xᵀ‖²), found by bisection.
        gram: (in, in) XᵀX of the inputs X (rows, in) the layer sees: then ‖X (W − A)ᵀ‖ is minimised instead, as SVD-LLM
            (arXiv:2403.07378) does for low rank.
        permute: also search for an order of the inputs that suits the blocks, for block_diagonal, monarch and two-core btt.
        start: cores to improve, such as another projection's; None: a singular value decomposition, core after core.
        sweeps: at most so many rounds of alternating least squares, where there is no closed form.
        block_ranks: of two cores of independent blocks, such as btt: True spreads `budget`, a share of the weight's parameters, over the
            blocks by their singular values, the largest first; or integers, a rank for each block. Cores are stored at the largest of these
            ranks, what is beyond a block's own rank exactly zero, where it stays in training.

    Returns:
        A Projection; exact to rounding where the structure contains the matrix. Computed in float64, cores in the weight's dtype. Gains
        make up for a clamp; of btt_moe every expert is the nearest matrix, so that the layer is linear until training tells them apart.

    Raises:
        ProjectionError: a weight or Gram matrix that cannot be used. StructureError: options that cannot be.

    >>> import torch
    >>> weight = torch.kron(torch.randn(4, 3), torch.randn(5, 6))
    >>> project(weight, structure="kronecker", factors=((3, 6), (4, 5))).error < 1e-6
    True
    """
    check_weight(weight)
    check_flags(permute=permute)
    _check_how(sweeps, block_ranks)
    out_features, in_features = weight.shape
    family = structures.get(structure)
    options = Options(rank=rank, factors=factors, cores=cores, blocks=blocks, theta=theta)
    ranks: Tensor | None = None
    if block_ranks is not False:
        beside = dict(rank=rank, match=match, energy=energy, gram=gram, start=start, permute=permute or None)
        ranks = _block_ranks(weight, family, options, block_ranks, budget, beside)
        options, budget = dataclasses.replace(options, rank=int(ranks.max())), None
    if energy is not None:
        shape: dict[str, Any] = dict(structure=structure, factors=factors, cores=cores, blocks=blocks, theta=theta)
        how: dict[str, Any] = dict(gram=gram, permute=permute, start=start, sweeps=sweeps)
        if rank is not None or match is not None or "rank" not in family.takes or family.gated:
            raise ProjectionError(f"energy={energy} chooses the rank: leave out rank= and match=, and take a structure that has one")
        return _with_energy(weight, energy, family, options, lambda rank: project(weight, rank=rank, **shape, **how))
    built = fit(family, in_features, out_features, options, match=match, budget=budget)
    one = dataclasses.replace(built, network=built.reference)  # of experts that are all alike: then no choice of the gate matters
    _check_start(one.network, start)
    with torch.no_grad():
        whole = weight.detach().to(torch.float64)
        order = _order(whole, built) if permute else None
        if order is not None:
            whole, gram = whole[:, order], None if gram is None else gram[order][:, order]
        white = None if gram is None else _root(gram, in_features, whole)
        found = _nearest(one, family, whole, white, start, sweeps)
        net = built.network
        stored = {name: found[name].reshape(one.network.shape(name)).to(weight.dtype) for name in net.cores}
        stored = stored if ranks is None else masked(built, stored, ranks)
        off = whole - _dense(one.network, stored)[:out_features, :in_features]
        stored = {name: core.expand(net.shape(name)).contiguous() for name, core in stored.items()}
        norms = [float(torch.linalg.norm(m if white is None else m @ white)) for m in (off, whole)]
    error = norms[0] / norms[1] if norms[1] else norms[0]
    return Projection(structure, stored, net.sizes, order, error, 1 - error**2, built, (out_features, in_features), ranks)


def _check_how(sweeps: object, block_ranks: object) -> None:
    if not isinstance(block_ranks, bool | Tensor):
        raise ProjectionError(f"block_ranks is {block_ranks!r}, expected True, False or integers, one for each block")
    if isinstance(sweeps, bool) or not isinstance(sweeps, int) or sweeps < 0:
        raise ProjectionError(f"sweeps is {sweeps!r}, expected an integer ≥ 0")


def _block_ranks(
    weight: Tensor, family: structures.Structure, options: Options, wanted: bool | Tensor, budget: float | None, given: Mapping[str, object]
) -> Tensor:
    """The rank of every block, asked for or by singular values."""
    beside = [name for name, value in given.items() if value is not None]
    if beside:
        raise ProjectionError(f"block_ranks go by the blocks' own singular values and choose the rank: leave out {beside[0]}=")
    if wanted is True:
        if budget is None:
            raise ProjectionError("block_ranks=True needs budget=, a share of the weight's parameters")
        return spread_blocks(family.name, {"": weight.detach()}, options, budget)[""]
    if budget is not None:
        raise ProjectionError(f"block_ranks are given: leave out budget={budget}")
    return check_ranks(family.build(weight.shape[1], weight.shape[0], dataclasses.replace(options, rank=1)), weight.shape, wanted)


def _with_energy(
    weight: Tensor, energy: float, family: structures.Structure, options: Options, at: Callable[[int], Projection]
) -> Projection:
    """The projection of the smallest rank that keeps so much of the squared norm."""
    if isinstance(energy, bool) or not isinstance(energy, int | float) or not 0 < energy <= 1:
        raise ProjectionError(f"energy is {energy!r}, expected a share above 0 and at most 1")
    low, high = 1, max(full_ranks(family, family.build(weight.shape[1], weight.shape[0], dataclasses.replace(options, rank=1))))
    best = None
    while low < high:
        middle = (low + high) // 2
        found = at(middle)
        low, high, best = (low, middle, found) if found.energy >= energy - _ROUNDING else (middle + 1, high, best)
    return best if best is not None and best.built.rank == low else at(low)


def _order(weight: Tensor, built: Built) -> Tensor:
    """A better order of the inputs; the padding stays at the end, where the layer puts it."""
    rows, columns = built.d_out - weight.shape[0], built.d_in - weight.shape[1]
    if columns:
        raise ProjectionError(
            f"permute needs inputs that factor without padding, {weight.shape[1]} is padded to {built.d_in}; give factors"
        )
    return search(torch.nn.functional.pad(weight, (0, 0, 0, rows)), built)


def _nearest(
    built: Built, family: structures.Structure, weight: Tensor, white: Tensor | None, start: Mapping[str, Tensor] | None, sweeps: int
) -> dict[str, Tensor]:
    """Cores with one dimension an axis."""
    net = built.network
    rows, columns = built.d_out - weight.shape[0], built.d_in - weight.shape[1]
    padded = torch.nn.functional.pad(weight, (0, columns, 0, rows))
    known = None
    if (rows or columns) and not (white is None and separable(net)):
        known = torch.nn.functional.pad(torch.ones_like(weight, dtype=torch.bool), (0, columns, 0, rows))
    if white is not None and columns:
        white = torch.block_diag(white, torch.eye(columns, dtype=white.dtype, device=white.device))
    closed = white is None and len(net.cores) <= 2
    if start is not None:
        cores = {name: _given(net, start[name], name, weight) for name in net.cores}
    elif family.start is not None and not closed:
        cores = family.start(built, padded, white)
    else:
        cores = split(net, *as_tensor(net, padded))
    if closed and known is None and start is None:
        return cores
    return Fit(net, padded, known, white).improve(cores, sweeps)


def _check_start(net: Network, start: object) -> None:
    """Raise ProjectionError unless these are finite cores of the network, or None."""
    if start is None:
        return
    if not isinstance(start, Mapping):
        raise ProjectionError(f"start is a {type(start).__name__}, expected the cores {', '.join(net.cores)} by name")
    if sorted(map(str, start)) != sorted(net.cores):
        raise ProjectionError(f"start has the cores {', '.join(map(str, start)) or 'none'}, expected {', '.join(net.cores)}")
    for name, core in start.items():
        got = f"of shape {tuple(core.shape)}" if isinstance(core, Tensor) else f"as a {type(core).__name__}"
        if not isinstance(core, Tensor) or tuple(core.shape) != net.shape(name):
            raise ProjectionError(f"start has core {name!r} {got}, expected shape {net.shape(name)}")
        if not core.is_floating_point() or core.is_meta or not torch.isfinite(core).all():
            raise ProjectionError(f"start has core {name!r} with values that are no finite floating numbers")


def _given(net: Network, core: Tensor, name: str, weight: Tensor) -> Tensor:
    return core.detach().to(weight).reshape([net.sizes[axis] for axis in net.term(name).axes])


def _dense(net: Network, cores: Mapping[str, Tensor]) -> Tensor:
    """The matrix of the cores in float64, padding included."""
    wide = [cores[name].to(torch.float64) for name in net.cores]
    return compile(net)(torch.eye(features(net)[0], dtype=torch.float64, device=wide[0].device), *wide).mT


def check_weight(weight: object) -> None:
    """Raise ProjectionError unless this is a matrix that can be projected."""
    if not isinstance(weight, Tensor):
        raise ProjectionError(f"weight is a {type(weight).__name__}, expected a torch.Tensor of shape (out, in)")
    if weight.dim() != 2 or 0 in weight.shape:
        raise ProjectionError(f"weight has shape {tuple(weight.shape)}, expected a non-empty matrix (out, in)")
    if not weight.is_floating_point() or weight.dtype.itemsize == 1:
        raise ProjectionError(f"weight is {weight.dtype}, expected a real floating dtype of at least 16 bits")
    if weight.layout is not torch.strided:
        raise ProjectionError(f"weight has the layout {weight.layout}, expected a dense tensor; take weight.to_dense()")
    if weight.is_meta:
        raise ProjectionError("weight is on the meta device and has no values to project")
    if not torch.isfinite(weight).all():
        place = torch.nonzero(~torch.isfinite(weight))[0].tolist()
        raise ProjectionError(f"weight is {weight[tuple(place)].item()} at {place}, expected finite numbers")


def _root(gram: object, features: int, weight: Tensor) -> Tensor:
    """L with L Lᵀ = gram, slightly ridged."""
    if not isinstance(gram, Tensor) or gram.shape != (features, features):
        shape = tuple(gram.shape) if isinstance(gram, Tensor) else type(gram).__name__
        raise ProjectionError(f"gram is {shape}, expected the matrix ({features}, {features}) of inputs times inputs")
    if not gram.is_floating_point() or gram.is_meta:
        what = "on the meta device and has no values" if gram.is_meta else f"{gram.dtype}, expected a real floating dtype"
        raise ProjectionError(f"gram is {what}")
    gram = gram.detach().to(weight)
    if not torch.isfinite(gram).all():
        raise ProjectionError("gram has numbers that are not finite")
    values, vectors = torch.linalg.eigh((gram + gram.mT) / 2)
    mean = float(values.clamp(min=0).mean())
    if mean <= 0 or float(values[0]) < -1e-4 * float(values[-1]):
        raise ProjectionError(f"gram has eigenvalues from {float(values[0]):.3g} to {float(values[-1]):.3g}, expected XᵀX of some inputs X")
    return vectors * (values.clamp(min=0) + _RIDGE * mean).sqrt()
