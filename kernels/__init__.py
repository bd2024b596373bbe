"""Triton operators, one file each: the maths, the kernel, the registered operator, and the regions of a plan it offers for.

Importing the package registers them with `tn.operators`.
"""

from tn_kernels.chain import chain

__all__ = ["chain"]
