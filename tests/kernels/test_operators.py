"""The registry: offers, refusals and their reasons."""

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch

import tn
import tn_kernels
from tests.kernels.oracle import DEVICE
from tn import operators
from tn.errors import OperatorError
from tn.operators import Layout, Offer, Refusal, Region, attempt, offers, register, require
from tn_kernels import pointwise
from tn_kernels.launch import recording

SIZES = dict(b=6, i=3, j=4, r=2, k=5, l=7)


def region(spec, out, sizes=SIZES, dtype=torch.float32, orders=None, device=DEVICE):
    terms = [term.split() for term in spec.split(",")]
    layouts = []
    for term, order in zip(terms, orders or terms, strict=True):
        dense = dict(zip(order, Layout.dense(order, sizes).strides, strict=True))
        layouts.append(Layout(tuple(term), tuple(dense[axis] for axis in term)))
    axes = dict.fromkeys(axis for term in terms for axis in term)
    known = tuple((axis, sizes[axis]) for axis in axes)
    return Region("contraction", tuple(layouts), tuple(out.split()), known, dtype, device)


def answer(name, region):
    (found,) = [answer for answer in offers(region) if answer.operator == name]
    return found


def tensors_of(region):
    """Random tensors with the strides the region tells."""
    found = []
    for layout in region.operands:
        shape = [region.size[axis] for axis in layout.axes]
        span = 1 + sum((size - 1) * stride for size, stride in zip(shape, layout.strides, strict=True))
        found.append(torch.randn(span, dtype=torch.float64, device=DEVICE).to(region.dtype).as_strided(shape, layout.strides))
    return found


def exact(region, tensors):
    letter = {axis: chr(97 + place) for place, axis in enumerate(region.size)}
    terms = ["".join(letter[axis] for axis in layout.axes) for layout in region.operands]
    return torch.einsum(",".join(terms) + "->" + "".join(letter[axis] for axis in region.out), *(t.double() for t in tensors))


CHAINS = {
    "btt": region("b i j, i j r k, k i r l", "b k l"),
    "monarch": region("b i j, i r k j, k l i r", "b k l"),
    "tensor train": region("b i j, j r k, i r l", "b k l"),
    "low rank": region("b j, j r, r l", "b l"),
    "operands in another order": region("i j r k, b i j, k i r l", "b k l"),
    "merged axes": region("b i j, i j r k, r k l", "b l"),
    "stored batch last": region("b i j, i j r k, k i r l", "b k l", orders=[["i", "j", "b"], ["r", "j", "i", "k"], ["l", "r", "i", "k"]]),
    "sizes of one": region("b i j, i j r k, k i r l", "b k l", dict(b=1, i=1, j=4, r=1, k=5, l=1)),
}


@pytest.mark.parametrize("name", CHAINS)
def test_chain_offers(name):
    case = CHAINS[name]
    offer, tensors = answer("chain", case), tensors_of(case)
    assert isinstance(offer, Offer), offer
    got, want = offer.run(*tensors), exact(case, tensors)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_every_layout_of_a_batched_product_runs_without_a_copy():
    """All orders of axes of bmk, bkn → bmn; the reshapes in between must be views."""
    sizes = dict(b=2, m=3, k=4, n=5)
    count = 0
    for left, right, out in itertools.product(*(itertools.permutations(term) for term in ("bmk", "bkn", "bmn"))):
        case = region("b m k, b k n", " ".join(out), sizes, orders=[left, right])
        offer, tensors = answer("strided_gemm", case), tensors_of(case)
        assert isinstance(offer, Offer), offer
        with recording() as calls:
            offer.run(*tensors)
        assert [tensor.data_ptr() for tensor in calls[0].arguments[:2]] == [tensor.data_ptr() for tensor in tensors]
        count += 1
        if count % 3:
            continue  # a third of the numbers is enough
        got = offer.run(*tensors)
        assert got.is_contiguous()
        torch.testing.assert_close(got.double(), exact(case, tensors), rtol=1e-4, atol=1e-4)
    assert count == 216


GEMMS = {
    "axes that merge": ("strided_gemm", region("b i j, i j k l", "b k l")),
    "two of each, interleaved": ("strided_gemm", region("b i j r, r i k j", "b k", orders=[[*"rbji"], [*"jkir"]])),
    "rows of three dimensions": ("strided_gemm", region("b i j k, l k", "b l i j", orders=[[*"jbki"], [*"kl"]])),
    "two batches": ("strided_gemm", region("b i r j, i r j k", "r b i k")),
    "sum over one": ("batch_reduced_gemm", region("b j, j k", "b k")),
    "sum over two": ("batch_reduced_gemm", region("b j i, i k j", "k b")),
    "summed axes apart": ("batch_reduced_gemm", region("i b j, j k i", "b k")),
    "the result turned": ("batch_reduced_gemm", region("i j b, i j k", "k b")),
    "sizes of one": ("batch_reduced_gemm", region("i b j, i j k", "b k", dict(i=1, b=3, j=4, k=1))),
}


@pytest.mark.parametrize("name", GEMMS)
def test_products_offer(name):
    operator, case = GEMMS[name]
    offer, tensors = answer(operator, case), tensors_of(case)
    assert isinstance(offer, Offer), offer
    torch.testing.assert_close(offer.run(*tensors).double(), exact(case, tensors), rtol=1e-4, atol=1e-4)


def test_a_product_with_everything_around_it():
    case = region("b i j, j k, k, b k i", "i b k")
    case = dataclasses.replace(case, options=(("bias", True), ("other", True), ("activation", "silu"), ("scale", 0.5)))
    offer, (a, b, bias, other) = answer("strided_gemm", case), tensors_of(case)
    assert isinstance(offer, Offer), offer
    a64, b64, bias64, other64 = (t.double() for t in (a, b, bias, other))
    want = torch.nn.functional.silu(0.5 * torch.einsum("bij,jk->ibk", a64, b64) + bias64) * other64.permute(2, 0, 1)
    torch.testing.assert_close(offer.run(a, b, bias, other).double(), want, rtol=1e-4, atol=1e-4)


BIASED = {
    "chain": region("b i j, i j r k, k i r l, k l", "b k l"),
    "chain, operands in another order": region("k i r l, i j r k, b i j, k l", "b k l"),
    "strided_gemm": region("b k i r, k i r l, k l", "b k l"),
    "strided_gemm, the weight first": region("k j, b j, k", "b k"),
}


@pytest.mark.parametrize("name", BIASED)
def test_a_bias_is_offered(name):
    case = dataclasses.replace(BIASED[name], options=(("bias", True),))
    offer, (*tensors, bias) = answer(name.split(",")[0], case), tensors_of(case)
    assert isinstance(offer, Offer), offer
    without = dataclasses.replace(case, operands=case.operands[:-1])
    torch.testing.assert_close(offer.run(*tensors, bias).double(), exact(without, tensors) + bias, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", ["chain", "strided_gemm"])
def test_a_bias_that_is_not_along_columns_is_refused(operator):
    spec = {"chain": "b i j, i j r k, k i r l, b l", "strided_gemm": "b j, j k, b k"}[operator]
    case = dataclasses.replace(region(spec, "b k l" if operator == "chain" else "b k"), options=(("bias", True),))
    refusal = answer(operator, case)
    assert isinstance(refusal, Refusal) and "a bias along b" in refusal.reason


def test_gated_offers():
    case = dataclasses.replace(region("b i j, i j k, k j i", "b k", orders=[[*"bij"], [*"kij"], [*"jik"]]), what="gated")
    refusal = answer("gated", case)
    assert isinstance(refusal, Refusal)
    assert "axes i j are not one dimension of operand 2" in refusal.reason
    case = dataclasses.replace(region("b i j, i j k, i j k", "b k"), what="gated", options=(("activation", "silu"),))
    offer, (x, w, v) = answer("gated", case), tensors_of(case)
    assert isinstance(offer, Offer), offer
    inside, outside = (torch.einsum("bij,ijk->bk", x.double(), t.double()) for t in (w, v))
    torch.testing.assert_close(offer.run(x, w, v).double(), torch.nn.functional.silu(inside) * outside, rtol=1e-4, atol=1e-4)


def test_squared_attention_offers_the_cheaper_form():
    sizes = dict(b=1, h=2, g=1, s=9, t=9, d=4, e=5)
    case = dataclasses.replace(region("b h s d, b g t d, b g t e", "b h s e", sizes), what="squared_attention")
    offer, (q, k, v) = answer("squared_attention", case), tensors_of(case)
    assert isinstance(offer, Offer), offer
    assert offer.case.startswith("squared_attention ")
    torch.testing.assert_close(offer.run(q, k, v), tn_kernels.squared_attention(q, k, v))
    long = dataclasses.replace(region("b h s d, b g t d, b g t e", "b h s e", {**sizes, "s": 4000, "t": 4000}), what="squared_attention")
    assert answer("squared_attention", long).case.startswith("chunked ")
    more = dataclasses.replace(region("b h s d, b g t d, b g t e", "b h s e", {**sizes, "s": 10}), what="squared_attention")
    assert "a causal pattern needs at least as many keys as queries" in answer("squared_attention", more).reason


def test_decoding_offers():
    sizes = dict(b=2, s=1, h=3, c=8, r=4, t=9)
    case = dataclasses.replace(region("b s h c, b s h r, b t c, b t r, b", "b s h c", sizes), what="mla_decode", options=(("scale", 0.5),))
    offer, (*operands, _) = answer("mla_decode", case), tensors_of(case)
    assert isinstance(offer, Offer), offer
    lengths = torch.tensor([9, 9], device=DEVICE)
    torch.testing.assert_close(offer.run(*operands, lengths), tn_kernels.mla_decode(*operands, scale=0.5))
    assert "scale None; expected a float" in answer("mla_decode", dataclasses.replace(case, options=())).reason


def test_attention_through_tn_ops():
    q, k, v = (torch.randn(2, 3, 2, 40, 8, device=DEVICE) for _ in range(3))
    mask = tn.Mask(window=7, sink=2)
    torch.testing.assert_close(tn.ops.attention(q, k, v, mask, backend="triton"), tn.ops.attention(q, k, v, mask))
    one = q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]
    torch.testing.assert_close(tn.ops.attention(*one, backend="triton"), tn.ops.attention(*one))
    with pytest.raises(OperatorError, match="window_attention: the mask is not causal"):
        tn.ops.attention(q, k, v, tn.Mask(causal=False), backend="triton")
    with pytest.raises(OperatorError, match="window_attention: dtype float64"):
        tn.ops.attention(q.double(), k.double(), v.double(), backend="triton")
    with pytest.raises(OperatorError, match="unknown attention backend 'trition': did you mean 'triton'"):
        tn.ops.attention(q, k, v, backend="trition")


def test_grouped_attention_through_tn_ops():
    q, k, v = torch.randn(2, 6, 40, 8, device=DEVICE), *(torch.randn(2, 2, 40, 8, device=DEVICE) for _ in range(2))
    for mask in (tn.Mask(window=7, sink=2), tn.Mask()):
        torch.testing.assert_close(tn.ops.attention(q, k, v, mask, backend="triton"), tn.ops.attention(q, k, v, mask))


@pytest.mark.parametrize("activation", tn.ops.ACTIVATIONS)
def test_gated_through_tn_ops(activation):
    """Value and gradients, w as nn.Linear stores it."""
    x, w, v = torch.randn(2, 9, 20, device=DEVICE), torch.randn(18, 20, device=DEVICE).mT, torch.randn(20, 18, device=DEVICE)
    operands = [t.requires_grad_() for t in (x, w, v)]
    got, want = (tn.ops.gated(*operands, activation, backend=backend) for backend in ("triton", "torch"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    g = torch.randn_like(want)
    for one, other in zip(torch.autograd.grad(got, operands, g), torch.autograd.grad(want, operands, g), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-2 if activation == "square" else 1e-3)
    assert tn.ops.gated(x[:0], w, v, activation, backend="triton").shape == (0, 9, 18)
    with pytest.raises(OperatorError, match="gated: dtype float64; it computes in float32"):
        tn.ops.gated(*(t.double() for t in operands), activation, backend="triton")
    assert tuple(tn.ops.ACTIVATIONS) == tuple(pointwise.ACTIVATIONS)


def test_latent_attention_through_tn_ops():
    sizes = (2, 2, 3, 20), (2, 2, 3, 6), (2, 40, 20), (2, 40, 6)
    q, qr, latent, rope = (torch.randn(shape, device=DEVICE) for shape in sizes)
    for lengths in (None, torch.tensor([40, 1], device=DEVICE)):
        got, want = (tn.ops.mla_decode(q, qr, latent, rope, lengths, scale=0.2, backend=backend) for backend in ("triton", "torch"))
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    with pytest.raises(OperatorError, match="no operator can run this mla_decode:\n(.*\n)*  mla_decode: dtype float64"):
        tn.ops.mla_decode(*(t.double() for t in (q, qr, latent, rope)), scale=0.2, backend="triton")
    wide = torch.randn(1, 1, 1, 600, device=DEVICE)
    with pytest.raises(OperatorError, match="c up to 512, r up to 128"):
        tn.ops.mla_decode(wide, wide[..., :6], wide[0], wide[0, ..., :6], scale=0.2, backend="triton")


def test_squared_attention_through_tn_ops():
    """Both backends, both forms, turned or not, against one einsum in float64."""
    q, k, v, q2, k2 = (torch.randn(2, 3, 2, 20, 6, device=DEVICE) for _ in range(5))
    phi = torch.arange(20.0, device=DEVICE)[:, None] * torch.tensor([1.0, 0.1], device=DEVICE)
    tables = phi.cos(), phi.sin()

    def exact(*pair, causal, rotary):
        turn = torch.view_as_complex(torch.stack(tables, -1).double())

        def turned(x):
            z = torch.complex(x[..., :2].double(), x[..., 2:4].double()) * turn
            return torch.cat([z.real, z.imag, x[..., 4:].double()], -1) if rotary else x.double()

        a, b, c, d = map(turned, pair)
        pattern = torch.einsum("...sd,...td->...st", a, b) * torch.einsum("...sd,...td->...st", c, d) / 36
        return (pattern.tril() if causal else pattern) @ v.double()

    for pair, causal, rotary in itertools.product((False, True), (False, True), (False, True)):
        want = exact(q, k, *((q2, k2) if pair else (q, k)), causal=causal, rotary=rotary)
        for backend in ("torch", "triton"):
            got = tn.ops.squared_attention(
                q, k, v, *((q2, k2) if pair else ()), mask=tn.Mask(causal=causal), rotary=tables if rotary else None, backend=backend
            )
            torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)
    one = q[0, 0, 0], k[0, 0, 0], v[0, 0, 0]
    torch.testing.assert_close(tn.ops.squared_attention(*one, backend="triton"), tn.ops.squared_attention(*one))


def test_squared_attention_says_what_is_wrong():
    q = torch.randn(2, 9, 6, device=DEVICE)
    for options, error, words in (
        ({"backend": "triton", "mask": tn.Mask(window=3)}, OperatorError, "squared_attention: the mask has a window"),
        ({"backend": "trition"}, OperatorError, "did you mean 'triton'"),
        ({"q2": q}, tn.SizeError, "q2 and k2 come together"),
        ({"rotary": (q[0, :4, :2], q[0, :4, :2])}, tn.SizeError, r"expected cos and sin \(9, at most 3\)"),
    ):
        with pytest.raises(error, match=words):
            tn.ops.squared_attention(q, q, q, **options)
    with pytest.raises(OperatorError, match="squared_attention: dtype float64"):
        tn.ops.squared_attention(q.double(), q.double(), q.double(), backend="triton")
    with pytest.raises(tn.SizeError, match="9 queries see 4 keys"):
        tn.ops.squared_attention(q, q[:, :4], q[:, :4])


REFUSED = {
    "too many dimensions": (
        region("b i j r, b i j r k", "k", orders=[[*"bjir"], [*"rijbk"]]),
        "strided_gemm",
        "axes b i j r are 4 dimensions, at most 3 are merged",
    ),
    "an axis alone": (region("b i, j k", "b k i"), "strided_gemm", "axes j are on one tensor alone"),
    "a batch of all": (region("b i j, b j k", "b i k"), "batch_reduced_gemm", "axes b are on one tensor alone, or a batch of all three"),
    "nothing summed": (region("b, k", "b k"), "batch_reduced_gemm", "nothing is summed"),
    "two tensors": (region("b j, j k", "b k"), "chain", "takes a contraction of three tensors, this is a contraction of 2"),
    "wrong order": (
        region("b i j, i j r k, k i r l", "b l k"),
        "chain",
        "the result is wanted in the order b l k, the kernel writes b k l",
    ),
    "double": (region("b j, j r, r l", "b l", dtype=torch.float64), "chain", "dtype float64; it computes in float32, float16"),
    "batch": (region("b i j, i b r k, k i r l", "b k l"), "chain", "axis b is on x A y"),
    "rank": (region("b j, j r, r l", "b l", {**SIZES, "r": 200}), "chain", "rank 200; the intermediate stays in registers up to rank 128"),
    "split rows": (
        region("b i j, j r, r l", "b i l", orders=[["i", "j", "b"], ["j", "r"], ["r", "l"]]),
        "chain",
        "axes i b are not one dimension of operand 0 (strides (1, 24, 6) of b i j)",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_why(name):
    case, operator, reason = REFUSED[name]
    refusal = answer(operator, case)
    assert isinstance(refusal, Refusal)
    assert reason in refusal.reason
    assert str(refusal).startswith(f"{operator}: ")


def test_offers_come_first_and_require_takes_one():
    found = offers(CHAINS["btt"])
    assert isinstance(found[0], Offer)
    assert [isinstance(answer, Refusal) for answer in found] == sorted(isinstance(answer, Refusal) for answer in found)
    assert require(CHAINS["btt"]).operator == found[0].operator


def test_require_raises_with_every_reason():
    case = REFUSED["double"][0]
    with pytest.raises(OperatorError, match="no operator can run this contraction:\n") as raised:
        require(case)
    assert all(str(answer) in str(raised.value) for answer in offers(case))


def test_kernels_run_and_not_torch(monkeypatch):
    """What these tests compare are launches, for every dtype that kernels take; others take the torch path."""
    launched = []
    # tn_kernels.chain is the operator; its module of the same name is in sys.modules alone.
    monkeypatch.setattr(
        sys.modules["tn_kernels.chain"], "launch", lambda kernel, grid, *arguments, **rest: launched.append(arguments[3].zero_())
    )
    for dtype in (torch.float32, torch.float16, torch.float64):
        x = torch.ones(2, 2, 2, device=DEVICE, dtype=dtype)
        a = torch.ones(2, 2, 1, 2, device=DEVICE, dtype=dtype)
        tn_kernels.chain(x, a, a)
    assert [tensor.dtype for tensor in launched] == [torch.float32, torch.float16]


def test_where_no_operator_runs(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    (refusal,) = offers(region("b j, j r, r l", "b l", device="cpu"))
    assert str(refusal) == "triton: runs on CUDA, or on a CPU in its interpreter; the tensors are on cpu"


def test_a_name_is_registered_once():
    with pytest.raises(OperatorError, match="operator 'chain' is registered already"):
        register("chain", lambda region: Refusal("chain", "no"))


def test_what_fails_becomes_a_refusal_and_operands_stay():
    def fails(x):
        x.zero_()
        raise OperatorError("out of resource: shared memory")

    x = torch.ones(3, device=DEVICE)
    refusal = attempt(Offer("broken", fails, ""), [x])
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "does not run here: out of resource: shared memory"
    assert x.sum() == 3
    works = Offer("works", lambda x: x + 1, "")
    assert attempt(works, [x]) is works


def test_kernels_that_cannot_be_imported_are_a_reason(monkeypatch):
    monkeypatch.setattr(operators, "PACKAGE", "tn_kernels_missing")
    operators._load.cache_clear()
    try:
        (refusal,) = offers(CHAINS["btt"])
    finally:
        operators._load.cache_clear()
    assert "cannot be imported: No module named 'tn_kernels_missing'" in refusal.reason


def test_asking_about_a_cpu_loads_no_compiler(environment_without_interpreter):
    code = (
        "import torch, sys; before = set(sys.modules)\n"
        "from tn.operators import Layout, Region, offers\n"
        "offers(Region('contraction', (Layout(('i',), (1,)),), (), (('i', 2),), torch.float32, 'cpu'))\n"
        "print(sorted({'triton', 'tn_kernels'} & (set(sys.modules) - before)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment_without_interpreter)
    assert done.stdout.strip() == "[]", done.stderr
