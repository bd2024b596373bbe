"""What `python -m bench kernels` runs: each kernel at a size that matters and at a small one, its torch path and its peers.

Importing this loads the kernels and their compiler.
"""

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, flex_attention, sdpa_kernel

import tn
import tn_kernels
from tn_kernels import tuning
from tn_kernels.launch import config
from tn_kernels.squared_attention import CHUNK
from tn_kernels.squared_attention import flops as attention_flops

Shapes = Mapping[str, tuple[int, ...]]
Function = Callable[..., Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One kernel at one size.

    Attributes:
        kernel, name: the operator and what it is asked. run: the kernel. eager: the same in torch operations.
        shapes: operand → shape, of the size that matters. small: of a size that Triton's interpreter takes.
        flops, moved: of a forward pass, from shapes; `moved` counts elements that have to be read or written once.
        trained: whether operands get gradients. scale: of random operands, by name; 1 for the others.
        peers: name → functions of the same operands that answer the same need, though some with other numbers (a dense layer).
    """

    kernel: str
    name: str
    run: Function
    eager: Function
    shapes: Shapes
    small: Shapes
    flops: Callable[[Shapes], int]
    moved: Callable[[Shapes], int]
    trained: bool = True
    scale: Mapping[str, float] = field(default_factory=dict)
    peers: Mapping[str, Function] = field(default_factory=dict)

    def operands(self, shapes: Shapes, dtype: torch.dtype, device: str) -> list[Tensor]:
        """Random operands; on the meta device without numbers."""
        made = [torch.randn(shape, device=device) * self.scale.get(name, 1.0) for name, shape in shapes.items()]
        return [tensor.to(dtype).requires_grad_(self.trained and device != "meta") for tensor in made]


def _btt(width: int, rank: int, rows: int) -> Case:
    def shapes(side: int, rows: int) -> Shapes:
        return {"x": (rows, side, side), "a": (side, side, rank, side), "c": (side, side, rank, side)}

    def planned(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
        return _program(math.isqrt(width), rank, rows)(x.flatten(1), a, c)

    def dense(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
        return x.flatten(1) @ _weight(width, x.dtype, x.device, x.requires_grad)

    def flops(shapes: Shapes) -> int:
        (n, i, _), r = shapes["x"], shapes["a"][2]
        return 4 * n * i**3 * r

    def run(x: Tensor, a: Tensor, c: Tensor) -> Tensor:
        if width < 4096 or len(x) == rows:
            return tn_kernels.chain(x, a, c)
        with tuning.using(chain_panels=config(ROWS=64, AHEAD=1, BM=64, BRK=64, BL=64, warps=8)):  # also at a small size, several of them
            return tn_kernels.chain(x, a, c)

    return Case(
        kernel="chain",
        name=f"BTT {width} rank {rank}, {rows} rows",
        run=run,
        eager=lambda x, a, c: torch.einsum("nirk,kirl->nkl", torch.einsum("nij,ijrk->nirk", x, a), c),
        shapes=shapes(math.isqrt(width), rows),
        small=shapes(6, 37 if width < 4096 else 300),
        flops=flops,
        moved=lambda shapes: 2 * math.prod(shapes["x"]) + math.prod(shapes["a"]) + math.prod(shapes["c"]),
        scale={"a": width**-0.25, "c": (rank * width**0.5) ** -0.5},
        peers={"planned, unfused": planned, "dense": dense},
    )


@functools.cache
def _program(side: int, rank: int, rows: int) -> tn.Program:
    sizes = dict(i=side, j=side, r=rank, k=side, l=side)
    network = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", sizes, cores=("a", "c"))
    return tn.compile(tn.plan(network, grad=network.names, rows=rows, device="cuda", dtype=torch.bfloat16))


@functools.cache
def _weight(width: int, dtype: torch.dtype, device: torch.device, trained: bool) -> Tensor:
    return torch.randn(width, width, dtype=dtype, device=device, requires_grad=trained)


def _reduced() -> Case:
    return Case(
        kernel="batch_reduced_gemm",
        name="gradient of a core broadcast over 64",
        run=tn_kernels.batch_reduced_gemm,
        eager=lambda a, b: torch.einsum("bmk,bkn->mn", a, b),
        shapes={"a": (64, 64, 16384), "b": (64, 16384, 64)},
        small={"a": (5, 20, 33), "b": (5, 33, 18)},
        flops=lambda shapes: 2 * math.prod(shapes["a"]) * shapes["b"][2],
        moved=lambda shapes: math.prod(shapes["a"]) + math.prod(shapes["b"]),
    )


def _strided() -> Case:
    """y[m, h, n] = gelu(Σ_k x[m, k, h] w[h, n, k]): the batch is the fastest axis of the input and lies between those of the result."""

    def seen(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        a, b = x.permute(2, 0, 1), w.permute(0, 2, 1)
        return a[:, None, :, None, None, :, None, None], b[:, None, :, None, None, :, None, None]

    def run(x: Tensor, w: Tensor) -> Tensor:
        y = tn_kernels.strided_gemm(*seen(x, w), activation="gelu", order=(2, 0, 1, 3, 4, 5, 6, 7))
        return y.permute(2, 0, 5, 1, 3, 4, 6, 7).flatten(2)

    return Case(
        kernel="strided_gemm",
        name="batch of 16 on the fastest axis, gelu",
        run=run,
        eager=lambda x, w: functional.gelu(torch.einsum("mkh,hnk->mhn", x, w)),
        shapes={"x": (8192, 256, 16), "w": (16, 256, 256)},
        small={"x": (33, 20, 3), "w": (3, 18, 20)},
        flops=lambda shapes: 2 * math.prod(shapes["x"]) * shapes["w"][1],
        moved=lambda shapes: math.prod(shapes["x"]) * (1 + shapes["w"][1] // shapes["x"][1]) + math.prod(shapes["w"]),
        scale={"w": 0.1},
    )


def _gated(activation: str) -> Case:
    gate = {"none": lambda x: x, "silu": functional.silu}[activation]

    def shapes(n: int, d: int, e: int) -> Shapes:
        return {"x": (n, d), "w": (d, e), "v": (d, e)}

    return Case(
        kernel="gated",
        name={"none": "bilinear", "silu": "SwiGLU"}[activation] + " 1024 → 4096, 16384 rows",
        run=lambda x, w, v: tn_kernels.gated(x, w, v, activation),
        eager=lambda x, w, v: gate(x @ w) * (x @ v),
        shapes=shapes(16384, 1024, 4096),
        small=shapes(33, 20, 18),
        flops=lambda shapes: 4 * math.prod(shapes["x"]) * shapes["w"][1],
        moved=lambda shapes: math.prod(shapes["x"]) + 2 * math.prod(shapes["w"]) + shapes["x"][0] * shapes["w"][1],
        scale={"w": 1 / 32, "v": 1 / 32},
    )


def _squared(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return ((q @ k.mT / q.shape[-1]).square()).tril() @ v


def _heads(b: int, h: int, t: int, d: int) -> Shapes:
    return dict.fromkeys("qkv", (b, h, t, d))


def _pairs(shapes: Shapes, window: int | None = None) -> int:
    """Pairs of a query and a key it sees, over all heads."""
    b, h, t, _ = shapes["q"]
    w = t if window is None else min(window + 1, t)
    return b * h * (w * (w + 1) // 2 + (t - w) * w)


def _flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True)


def _attention(form: str) -> Case:
    size = (4, 16, 4096, 64) if form == "quadratic" else (1, 16, 16384, 32)
    run, chunk = (tn_kernels.squared_attention, None) if form == "quadratic" else (tn_kernels.chunked, CHUNK)
    return Case(
        kernel="squared_attention" if form == "quadratic" else "chunked",
        name=f"causal {form}, T = {size[2]}, {size[1]} heads of {size[3]}",
        run=run if chunk is None else lambda q, k, v: tn_kernels.chunked(q, k, v, chunk=16 if q.shape[2] < CHUNK else CHUNK),
        eager=_squared,
        shapes=_heads(*size),
        small=_heads(1, 2, 37, 8),
        flops=lambda shapes: attention_flops(*(torch.empty(shape, device="meta") for shape in shapes.values()), chunk=chunk),
        moved=lambda shapes: 4 * math.prod(shapes["q"]),
        peers={"SDPA FLASH_ATTENTION": _flash},
    )


WINDOW, SINK = 256, 4


def _window() -> Case:
    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        seen = tn.Mask(window=_reach(q), sink=SINK).matrix(q.shape[2], k.shape[2], q.device)
        return functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)

    return Case(
        kernel="window_attention",
        name=f"T = 8192, window {WINDOW}, {SINK} sinks, 16 heads of 64",
        run=lambda q, k, v: tn_kernels.window_attention(q, k, v, window=_reach(q), sink=SINK),
        eager=masked,
        shapes=_heads(2, 16, 8192, 64),
        small=_heads(1, 2, 60, 8),
        flops=lambda shapes: 4 * _pairs(shapes, WINDOW) * shapes["q"][3],
        moved=lambda shapes: 4 * math.prod(shapes["q"]),
        peers={"SDPA FLASH_ATTENTION, full causal": _flash, "FlexAttention, same mask": _flex},
    )


def _reach(q: Tensor) -> int:
    return WINDOW if q.shape[2] > WINDOW else 9


def _flex(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return _compiled_flex()(q, k, v, block_mask=_block_mask(q.shape[2], q.device))


@functools.cache
def _compiled_flex() -> Function:
    return torch.compile(flex_attention.flex_attention)


@functools.cache
def _block_mask(length: int, device: torch.device) -> flex_attention.BlockMask:
    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & ((q - k <= WINDOW) | (k < SINK))

    return flex_attention.create_block_mask(seen, None, None, length, length, device=str(device))


def _decode() -> Case:
    def torch_path(q: Tensor, qr: Tensor, latent: Tensor, rope: Tensor) -> Tensor:
        scores = torch.einsum("bshc,btc->bsht", q, latent) + torch.einsum("bshr,btr->bsht", qr, rope)
        return torch.einsum("bsht,btc->bshc", (0.1 * scores).softmax(-1), latent)

    def shapes(b: int, h: int, t: int, c: int, r: int) -> Shapes:
        return {"q": (b, 1, h, c), "qr": (b, 1, h, r), "latent": (b, t, c), "rope": (b, t, r)}

    return Case(
        kernel="mla_decode",
        name="128 sequences of 8192 tokens, 16 heads, 512 + 64",
        run=lambda q, qr, latent, rope: tn_kernels.mla_decode(q, qr, latent, rope, scale=0.1),
        eager=torch_path,
        shapes=shapes(128, 16, 8192, 512, 64),
        small=shapes(2, 4, 70, 20, 6),
        flops=lambda shapes: 2 * math.prod(shapes["latent"][:2]) * shapes["q"][2] * (2 * shapes["q"][3] + shapes["qr"][3]),
        moved=lambda shapes: math.prod(shapes["latent"]) + math.prod(shapes["rope"]) + 2 * math.prod(shapes["q"]),
        trained=False,
    )


CASES = (
    *(_btt(width, rank, 16384) for width in (1024, 4096) for rank in (1, 4)),
    _reduced(),
    _strided(),
    _gated("none"),
    _gated("silu"),
    _attention("quadratic"),
    _attention("chunked"),
    _window(),
    _decode(),
)
