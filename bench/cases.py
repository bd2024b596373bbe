"""The structured layers that benches run: spec and sizes of each, at three widths and two savings.

Per row a dense layer of width d costs d² multiply-adds; a case of saving 4 or 16 costs about that many times less when it is contracted
in its cheapest order for many rows (ranks are integers, so the saving is near, not exact: `saving_of`).
"""

from dataclasses import dataclass

import tn

ROWS = (16, 256, 4096)


@dataclass(frozen=True)
class Layer:
    """A layer to time: family, spec, sizes of its axes, width of input and output, intended saving over dense."""

    family: str
    spec: str
    sizes: tuple[tuple[str, int], ...]
    width: int
    saving: int

    @property
    def name(self) -> str:
        """Family, width and saving in words."""
        return f"{self.family} {self.width} /{self.saving}"

    @property
    def network(self) -> tn.Network:
        """The network, every operand but `x` a core."""
        names = [part.split(":")[0].strip() for part in self.spec.split("->")[0].split(",")]
        return tn.network(self.spec, dict(self.sizes), cores=tuple(name for name in names if name != "x"))

    def saving_of(self, rows: int) -> float:
        """FLOPs of a dense layer over those of this one's cheapest order."""
        return 2 * rows * self.width**2 / tn.plan(self.network, rows=rows, goal="flops").flops


_TT = "x: ... (a b c), g: a i r, h: r b j s, w: s c k -> ... (i j k)"
_TUCKER = "x: ... (a b), u: a p, v: b q, core: p q s t, w: s k, z: t l -> ... (k l)"
_CP = "x: ... (a b), u: a r, v: b r, w: k r, z: l r -> ... (k l)"
_MONARCH = "x: ... (k p), first: k q l p, second: l s k q -> ... (l s)"
_MONARCH_THIN = "x: ... (k m p), first: k m q p, second: m q s k -> ... (m q s)"  # more blocks than √d: l = (m q)


def _tt(width: int, saving: int, modes: tuple[int, int, int], rank: int) -> Layer:
    a, b, c = modes
    return Layer("TT", _TT, tuple(dict(a=a, b=b, c=c, i=a, j=b, k=c, r=rank, s=rank).items()), width, saving)


def _tucker(width: int, saving: int, modes: tuple[int, int], rank: int) -> Layer:
    a, b = modes
    return Layer("Tucker", _TUCKER, tuple(dict(a=a, b=b, k=a, l=b, p=rank, q=rank, s=rank, t=rank).items()), width, saving)


def _cp(width: int, saving: int, modes: tuple[int, int], rank: int) -> Layer:
    a, b = modes
    return Layer("CP", _CP, tuple(dict(a=a, b=b, k=a, l=b, r=rank).items()), width, saving)


def _monarch(width: int, saving: int, blocks: int) -> Layer:
    size = width // blocks
    if size >= blocks:
        sizes = dict(k=blocks, p=size, q=size // blocks, l=blocks, s=size)
        return Layer("Monarch", _MONARCH, tuple(sizes.items()), width, saving)
    sizes = dict(k=size, m=blocks // size, p=size, q=size, s=size)
    return Layer("Monarch", _MONARCH_THIN, tuple(sizes.items()), width, saving)


LAYERS = (
    _tt(512, 4, (8, 8, 8), 3),
    _tt(512, 16, (8, 8, 8), 1),
    _tt(1024, 4, (8, 16, 8), 3),
    _tt(1024, 16, (8, 16, 8), 2),
    _tt(4096, 4, (16, 16, 16), 7),
    _tt(4096, 16, (16, 16, 16), 3),
    _tucker(512, 4, (16, 32), 14),
    _tucker(512, 16, (16, 32), 8),
    _tucker(1024, 4, (32, 32), 20),
    _tucker(1024, 16, (32, 32), 13),
    _tucker(4096, 4, (64, 64), 42),
    _tucker(4096, 16, (64, 64), 27),
    _cp(512, 4, (16, 32), 64),
    _cp(512, 16, (16, 32), 16),
    _cp(1024, 4, (32, 32), 128),
    _cp(1024, 16, (32, 32), 32),
    _cp(4096, 4, (64, 64), 512),
    _cp(4096, 16, (64, 64), 128),
    _monarch(512, 4, 8),
    _monarch(512, 16, 32),
    _monarch(1024, 4, 8),
    _monarch(1024, 16, 32),
    _monarch(4096, 4, 8),
    _monarch(4096, 16, 32),
)
