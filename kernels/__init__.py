"""Triton operators, one file each: the maths, the kernel, the registered operator, and the regions of a plan it offers for.

Importing the package registers them with `tn.operators`.
"""

from tn_kernels.batch_reduced_gemm import batch_reduced_gemm
from tn_kernels.chain import chain
from tn_kernels.gated import gated
from tn_kernels.mla_decode import mla_decode
from tn_kernels.pair_state import pair_read, pair_write
from tn_kernels.rotary import rotary
from tn_kernels.squared_attention import chunked, squared_attention
from tn_kernels.strided_gemm import strided_gemm
from tn_kernels.window_attention import window_attention

__all__ = [
    "batch_reduced_gemm", "chain", "chunked", "gated", "mla_decode", "pair_read", "pair_write", "rotary", "squared_attention",
    "strided_gemm", "window_attention",
]  # fmt: skip
