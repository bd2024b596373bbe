"""What kernels cannot take: a refusal with its reason and the torch path, or an error with every reason for a caller who insists."""

import itertools
import subprocess
import sys

import pytest
import torch

import tn
from tests.kernels.oracle import DEVICE, DTYPES
from tn import regions
from tn.errors import OperatorError
from tn.operators import Offer, Refusal, attempt
from tn.program import program
from tn_kernels import chain, tuning
from tn_kernels.launch import config

SIZES = dict(i=3, j=4, r=2, k=5, l=6)
BTT = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", SIZES, cores=("a", "c"))
OTHERS = [dtype for dtype in (torch.float64, torch.bfloat16, torch.complex64) if dtype not in DTYPES]


@pytest.mark.parametrize("dtype", OTHERS, ids=str)
def test_a_dtype_that_no_kernel_takes(dtype):
    plan = tn.plan(BTT, device=DEVICE, dtype=dtype)
    name = str(dtype).removeprefix("torch.")
    assert f"chain: refused: dtype {name}; it computes in float32, float16" in str(plan)
    x, a, c = (torch.randn(shape, dtype=dtype, device=DEVICE) for shape in ((7, 12), BTT.shape("a"), BTT.shape("c")))
    wide = torch.complex128 if dtype.is_complex else torch.float64
    want = torch.einsum("nij,ijrk,kirl->nkl", *(t.to(wide) for t in (x.view(7, 3, 4), a, c))).flatten(1)
    tolerance = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(tn.compile(plan)(x, a, c).to(wide), want, rtol=tolerance, atol=tolerance)
    with pytest.raises(OperatorError, match="backend 'triton' cannot run") as raised:
        program(plan, "triton")
    assert {line.split(": ")[1] for line in str(raised.value).splitlines()[1:]} == {"chain", "strided_gemm", "batch_reduced_gemm"}


def test_heads_that_are_too_wide():
    wide = tn.network(
        "q: b h s d, k: b h t d, q: b h s e, k: b h t e, v: b h t f -> b h s f", dict(b=1, h=1, s=5, t=5, d=300, e=300, f=4)
    )
    assert "v (1, 1, 5, 4): head widths up to 256" in str(tn.plan(wide, device=DEVICE))
    q, k, v = (torch.randn(1, 1, 5, n, device=DEVICE) / 20 for n in (300, 300, 4))
    want = (q.double() @ k.double().mT).square() @ v.double()
    torch.testing.assert_close(tn.compile(tn.plan(wide, device=DEVICE))(q, k, v).double(), want, rtol=1e-4, atol=1e-4)
    for run in (tn.ops.attention, tn.ops.squared_attention):
        with pytest.raises(OperatorError, match="300"):
            run(q, k, v, backend="triton")


def test_strides_that_a_plan_did_not_expect():
    """Plans count on contiguous operands; others are copied, not misread."""
    layer = tn.StructuredLinear(12, 30, structure="btt", backend="triton", device=DEVICE)
    base = torch.randn(14, 24, device=DEVICE)
    strided = {
        "every second": base[::2, ::2],
        "turned": torch.randn(12, 7, device=DEVICE).mT,
        "one row, seen again": base[:1, :12].expand(7, 12),
        "backwards": base[:7, :12].flip(0, 1),
        "overlapping": base.as_strided((7, 12), (1, 1)),
    }
    for name, x in strided.items():
        want = layer(x.clone(memory_format=torch.contiguous_format))
        torch.testing.assert_close(layer(x), want, msg=lambda text, name=name: f"{name}: {text}")
    layer.first.data = layer.first.data.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)  # a core that lies otherwise
    torch.testing.assert_close(layer(base[:7, :12]), base[:7, :12] @ layer.to_dense().mT + layer.bias)


def test_a_kernel_that_really_does_not_compile_is_a_refusal(monkeypatch):
    """Blocks that are no power of two; the message is Triton's."""
    monkeypatch.setattr(regions, "_failures", {})
    plan = tn.plan(tn.network(str(BTT.spec), {**SIZES, "l": 7}, cores=("a", "c")), device=DEVICE)
    part, offer = next((one.part, one.answer) for one in regions.answers(plan) if one.answer.operator == "chain")
    assert isinstance(offer, Offer)
    with tuning.using(chain=config(BN=24, BI=16, BJ=16, BR=2, BK=16, BL=16)):
        refusal = attempt(offer, regions.example(plan, part))
    assert isinstance(refusal, Refusal)
    assert "does not run here: _forward_kernel with" in refusal.reason
    assert "power of 2" in refusal.reason
    x = torch.randn(7, 3, 4, device=DEVICE)
    with tuning.using(chain=config(BN=24, BI=16, BJ=16, BR=2, BK=16, BL=16)), pytest.raises(OperatorError, match="power of 2"):
        chain(x, torch.randn(3, 4, 2, 5, device=DEVICE), torch.randn(5, 3, 2, 7, device=DEVICE))


def test_a_kernel_that_does_not_compile_for_a_gpu_says_why(environment_without_interpreter):
    code = (
        "import torch\n"
        "from tn_kernels import gated, tuning\n"
        "from tn_kernels.ahead import compile_call\n"
        "from tn_kernels.launch import config, recording\n"
        "from tn.errors import OperatorError\n"
        "x = torch.empty(64, 64, dtype=torch.float16, device='meta')\n"
        "for cut in (config(BN=8, BD=8, BE=8), config(BN=256, BD=256, BE=256, stages=4)):\n"
        "    with recording() as calls, tuning.using(gated=cut):\n"
        "        gated(x, x, x)\n"
        "    try:\n"
        "        compile_call(calls[0])\n"
        "    except OperatorError as error:\n"
        "        print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment_without_interpreter)
    assert "_forward_kernel does not compile for compute capability 90" in done.stdout, done.stderr
    assert "bytes of shared memory, the device has 232448" in done.stdout, done.stderr


@pytest.mark.parametrize("dtypes", itertools.permutations((torch.float32, torch.float16), 2))
def test_operands_of_two_dtypes(dtypes):
    one, other = dtypes
    x, w = torch.ones(4, 8, dtype=one, device=DEVICE), torch.ones(8, 4, dtype=other, device=DEVICE)
    with pytest.raises(OperatorError, match="expected one dtype"):
        tn.ops.gated(x, w, w, backend="triton")
    q, k = (torch.ones(1, 1, 4, 8, dtype=dtype, device=DEVICE) for dtype in dtypes)
    with pytest.raises(OperatorError, match="expected one dtype"):
        tn.ops.attention(q, k, k, backend="triton")
    with pytest.raises(OperatorError, match="expected one dtype"):
        tn.ops.squared_attention(q, k, k, backend="triton")
