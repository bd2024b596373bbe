"""Doors to the tools that people already use: one file each for opt_einsum, cotengra and quimb."""

from tn.bridge.cotengra import from_cotengra
from tn.bridge.quimb import from_quimb
