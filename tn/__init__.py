"""tn: every layer is a tensor-network contraction: written as a spec, planned, run fast, trained and looked into."""

from tn import errors, ops, structures, testing
from tn.accumulate import accumulate
from tn.bridge import from_cotengra, from_quimb
from tn.calibrate import calibrate
from tn.contraction import Contraction, backend
from tn.coordinate_check import CoordinateCheck, coordinate_check
from tn.einsum import contract, contract_path, einsum, tensordot, transpose
from tn.errors import OperatorError, PlanError, ProjectionError, SizeError, SpecError, StructureError, TnError
from tn.experts import balance_loss
from tn.frozen import frozen
from tn.guidance import Guide, guide
from tn.linear import Embedding, StructuredLinear
from tn.machine import Machine, use_table
from tn.network import Network, network
from tn.ops import Mask
from tn.plan import Plan
from tn.planner import plan
from tn.program import Program, compile
from tn.projection import Projection, project
from tn.report import explain, flops
from tn.restructure import densify, restructure
from tn.saved_structure import load_restructured, save_restructured
from tn.scaling import param_groups
from tn.segments import segments
from tn.store import PlanStore, plan_store
from tn.structures import register_structure
from tn.tracing import Node, Trace, trace

__version__ = "0.1.0"

__all__ = [
    "Contraction", "CoordinateCheck", "Embedding", "Guide", "Machine", "Mask", "Network", "Node", "OperatorError", "Plan", "PlanError",
    "PlanStore", "Program", "Projection", "ProjectionError", "SizeError", "SpecError", "StructureError", "StructuredLinear", "TnError",
    "Trace", "accumulate", "backend", "balance_loss", "calibrate", "compile", "contract", "contract_path", "coordinate_check", "densify",
    "einsum", "errors", "explain", "flops", "from_cotengra", "from_quimb", "frozen", "guide", "load_restructured", "network", "ops",
    "param_groups", "plan", "plan_store", "project", "register_structure", "restructure", "save_restructured", "segments", "structures",
    "tensordot", "testing", "trace", "transpose", "use_table",
]  # fmt: skip
