"""tn: every layer is a tensor-network contraction: written as a spec, planned, run fast, trained and looked into."""

from tn import errors, ops, structures, testing
from tn.bridge import from_cotengra, from_quimb
from tn.calibrate import calibrate
from tn.contraction import Contraction, backend
from tn.einsum import contract, contract_path, einsum, tensordot, transpose
from tn.errors import OperatorError, PlanError, ProjectionError, SizeError, SpecError, StructureError, TnError
from tn.frozen import frozen
from tn.linear import Embedding, StructuredLinear
from tn.machine import Machine
from tn.network import Network, network
from tn.ops import Mask
from tn.plan import Plan, plan
from tn.program import Program, compile
from tn.report import explain, flops
from tn.restructure import densify, restructure
from tn.scaling import param_groups
from tn.tracing import Node, Trace, trace

__version__ = "0.1.0"

__all__ = [
    "Contraction", "Embedding", "Machine", "Mask", "Network", "Node", "OperatorError", "Plan", "PlanError", "Program", "ProjectionError",
    "SizeError", "SpecError", "StructureError", "StructuredLinear", "TnError", "Trace", "backend", "calibrate", "compile", "contract",
    "contract_path", "densify", "einsum", "errors", "explain", "flops", "from_cotengra", "from_quimb", "frozen", "network", "ops",
    "param_groups", "plan", "restructure", "structures", "tensordot", "testing", "trace", "transpose",
]  # fmt: skip
