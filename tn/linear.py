"""StructuredLinear: nn.Linear with a structured matrix, and Embedding beside it."""

import torch
from torch import Tensor, nn

from tn import ops, structures
from tn.contraction import Contraction
from tn.errors import OperatorError, SizeError, StructureError
from tn.structures.registry import Factors


class StructuredLinear(Contraction):
    """y = W x + b with W of a named structure; like nn.Linear otherwise.

    Args:
        in_features, out_features: sizes of the last dimension of input and output.
        bias: add a trainable vector (out_features,).
        structure: a name of `tn.structures.names()`. rank, factors: see the family; each has a default.
        zero_init: start with the last core at zero. device, dtype: of the parameters. backend: see Contraction.

    Shapes: (..., in_features) → (..., out_features). Sizes that do not factor are padded inside and never truncated.

    Raises:
        StructureError: an unknown structure, or options it does not take. SizeError: a last dimension of another size.

    >>> import torch
    >>> layer = StructuredLinear(1024, 4096, structure="btt", rank=4)
    >>> layer(torch.ones(2, 3, 1024)).shape, sum(p.numel() for p in layer.parameters())
    (torch.Size([2, 3, 4096]), 790528)
    """

    tn_role: str | None = None  # what the layer does in its model, such as "mlp.in"; restructure goes by it

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        structure: str = "dense",
        rank: int | None = None,
        factors: Factors | None = None,
        zero_init: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        backend: str = "planned",
    ) -> None:
        for what, size in (("in_features", in_features), ("out_features", out_features)):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise StructureError(f"{what} is {size!r}, expected an integer ≥ 1")
        built = structures.get(structure).build(in_features, out_features, rank, factors)
        super().__init__(built.spec, sizes=built.sizes, cores=built.cores, zero_init=zero_init, device=device, dtype=dtype, backend=backend)
        self.in_features, self.out_features = in_features, out_features
        self.structure, self.rank, self.factors = structure, built.rank, built.factors or None
        self._pads = built.d_in - in_features, built.d_out - out_features
        if bias:
            self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype))

    def _contract(self, *inputs: Tensor) -> Tensor:
        (x,) = inputs
        if not isinstance(x, Tensor):
            raise OperatorError(f"input is a {type(x).__name__}, expected a torch.Tensor")
        if x.shape[-1:] != (self.in_features,):
            raise SizeError(f"input has shape {tuple(x.shape)}, expected a last dimension of {self.in_features}")
        before, after = self._pads
        result = super()._contract(nn.functional.pad(x, (0, before)) if before else x)
        return result[..., : self.out_features] if after else result

    def to_dense(self) -> Tensor:
        """The matrix (out_features, in_features), differentiable in the cores."""
        core = getattr(self, self.network.cores[0])
        return self._contract(torch.eye(self.in_features, device=core.device, dtype=core.dtype)).mT

    def __repr__(self) -> str:
        options = [f"bias={self.bias is not None}", f"structure={self.structure!r}"]
        options += [f"rank={self.rank}"] if self.rank is not None else []
        options += [f"factors={self.factors}"] if self.factors else []
        options += ["zero_init=True"] if self.zero_init else []
        return f"StructuredLinear({self.in_features}, {self.out_features}, {', '.join(options)})"


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
