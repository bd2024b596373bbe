"""Structured linear maps: one registry entry a family, and nothing about a family anywhere else."""

from tn.structures import blast, block_diagonal, btt, btt_moe, dense, einsum2, factors, kronecker, low_rank, monarch, tt
from tn.structures.budget import cost, matching_width
from tn.structures.custom import register_structure
from tn.structures.einsum2 import exponents
from tn.structures.registry import Built, Options, Structure, get, macs, names, register

__all__ = [
    "Built",
    "Options",
    "Structure",
    "cost",
    "exponents",
    "factors",
    "get",
    "macs",
    "matching_width",
    "names",
    "register",
    "register_structure",
]
