"""tn: every layer is a tensor-network contraction: written as a spec, planned, run fast, trained and looked into."""

from tn import errors, ops, structures, testing
from tn.contraction import Contraction, backend
from tn.coordinate_check import CoordinateCheck, coordinate_check
from tn.einsum import contract, einsum
from tn.errors import OperatorError, PlanError, ProjectionError, SizeError, SpecError, StructureError, TnError
from tn.experts import balance_loss
from tn.guidance import Guide, guide
from tn.linear import Embedding, StructuredLinear
from tn.network import Network, network
from tn.ops import Mask
from tn.plan import Plan, plan
from tn.program import Program, compile
from tn.projection import Projection, project
from tn.report import flops
from tn.restructure import densify, restructure
from tn.saved_structure import load_restructured, save_restructured
from tn.scaling import param_groups
from tn.structures import register_structure
from tn.tracing import Node, Trace, trace

__version__ = "0.1.0"

__all__ = [
    "Contraction", "CoordinateCheck", "Embedding", "Guide", "Mask", "Network", "Node", "OperatorError", "Plan", "PlanError", "Program",
    "Projection", "ProjectionError", "SizeError", "SpecError", "StructureError", "StructuredLinear", "TnError", "Trace", "backend",
    "balance_loss", "compile", "contract", "coordinate_check", "densify", "einsum", "errors", "flops", "guide", "load_restructured",
    "network", "ops", "param_groups", "plan", "project", "register_structure", "restructure", "save_restructured", "structures",
    "testing", "trace",
]  # fmt: skip
