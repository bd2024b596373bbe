"""Structured linear maps: one registry entry a family, and nothing about a family anywhere else."""

from tn.structures import btt, dense, low_rank
from tn.structures.registry import Built, Structure, get, names, register

__all__ = ["Built", "Structure", "get", "names", "register"]
