"""Bad arguments of the front ends, of JSON and of pictures: an error of the family that names what is wrong, before any work."""

import json

import numpy as np
import pytest
import torch

import tn
from tn.plan import Plan

A, B = torch.ones(2, 3), torch.ones(3, 4)
N, M = A.numpy(), B.numpy()
NET = tn.network("x: i j, w: j k -> i k", dict(j=3, k=4), cores=("w",))
EQUATION = "ij,jk->ik"


@pytest.mark.parametrize(
    ("call", "kind", "words"),
    [
        (lambda: tn.einsum(None, A, B), TypeError, "the equation is a NoneType, expected text"),
        (lambda: tn.einsum(b"ij,jk->ik", A, B), TypeError, "the equation is a bytes, expected text"),
        (lambda: tn.einsum(b"ij,jk->ik", N, M), TypeError, "the equation is a bytes"),
        (lambda: tn.einsum(["ij,jk->ik"], A, B), TypeError, "has a Tensor for labels, expected a list"),
        (lambda: tn.einsum(EQUATION, None, B), TypeError, "operand 0 is a NoneType"),
        (lambda: tn.einsum(EQUATION, N, None), TypeError, "operand 1 is a NoneType"),
        (lambda: tn.einsum(EQUATION, {}, M), TypeError, "operand 0 is a dict"),
        (lambda: tn.einsum(EQUATION, [[1, 2], [3]], M), ValueError, "operand 0 is a list that is no array"),
        (
            lambda: tn.einsum(EQUATION, A, B, dtype=torch.int32),
            TypeError,
            r"operand 0 is torch.float32, which dtype=torch.int32 cannot hold",
        ),
        (lambda: tn.einsum(EQUATION, A, B, dtype=torch.bfloat16), TypeError, "cannot hold: convert it with .to"),
        (lambda: tn.einsum(EQUATION, A.cfloat(), B.cfloat(), dtype=torch.float64), TypeError, "operand 0 is torch.complex64"),
        (lambda: tn.tensordot(A, B, "x"), TypeError, "tensordot axes='x', expected a number of dimensions"),
        (lambda: tn.tensordot(A, B, True), TypeError, "axes=True"),
        (lambda: tn.tensordot(A, B, None), TypeError, "axes=None"),
        (lambda: tn.tensordot(A, B, 1.0), TypeError, "axes=1.0"),
        (lambda: tn.tensordot(A, B, ([1.0], [0])), TypeError, r"axes=\(\[1.0\]"),
        (lambda: tn.tensordot(A, B, ([None], [0])), TypeError, "axes="),
        (lambda: tn.tensordot(A, B, ([1],)), ValueError, "are 1 lists"),
        (lambda: tn.tensordot(A, B, ([1], [0], [0])), ValueError, "are 3 lists"),
        (lambda: tn.tensordot(A, B, -1), ValueError, "axes=-1"),
        (lambda: tn.tensordot(A, B, 3), ValueError, "more dimensions than the operands have: 2 and 2"),
        (lambda: tn.tensordot(None, B, 1), TypeError, "operand 0 is a NoneType"),
        (lambda: tn.transpose(A, None), TypeError, "transpose axes=None"),
        (lambda: tn.transpose(A, "ab"), TypeError, "transpose axes='ab'"),
        (lambda: tn.transpose(A, (0, 5)), ValueError, r"axes=\(0, 5\) are not each"),
        (lambda: tn.transpose(N, (0, 0)), ValueError, r"axes=\(0, 0\) are not each"),
        (lambda: tn.transpose(None, (0, 1)), TypeError, "operand 0 is a NoneType"),
        (lambda: tn.contract_path(EQUATION, None, None, shapes=True), TypeError, "operand 0 is None, expected a shape"),
        (lambda: tn.contract_path(EQUATION, ("a", "b"), (3, 4), shapes=True), TypeError, "operand 0 is"),
        (lambda: tn.contract_path(EQUATION, None, M), TypeError, "operand 0 is a NoneType"),
        (lambda: tn.contract(None, A, B), TypeError, "the spec is a NoneType"),
        (lambda: tn.contract(b"i j, j k -> i k", A, B), TypeError, "the spec is a bytes"),
        (lambda: NET.to_quimb(None), TypeError, "tensors is a NoneType, expected data by name or in the order of x, w"),
        (lambda: NET.to_quimb([A, None]), TypeError, "tensor 'w' is a NoneType"),
        (lambda: NET.to_quimb({"x": A, "w": "hi"}), TypeError, "tensor 'w' is a str"),
        (lambda: NET.to_quimb([A, B], tags=5), TypeError, "tags is a int"),
        (lambda: NET.to_quimb([A, B], tags={"x": "word"}), TypeError, "tags of 'x' are 'word', expected a list"),
        (lambda: NET.draw(5), TypeError, "path is a int"),
        (lambda: NET.draw("net.pgn"), ValueError, "did you mean 'png'"),
        (lambda: NET.draw(sizes=5), TypeError, "sizes is a int"),
        (lambda: NET.draw(sizes={"i": "a"}), ValueError, "axis 'i' has size 'a'"),
        (lambda: NET.draw(sizes={"j": 7}), ValueError, "axis 'j' has size 3 in the network, sizes says 7"),
        (lambda: tn.plan(NET).draw(5), TypeError, "path is a int"),
        (lambda: tn.plan(NET).draw("plan.pgn"), ValueError, "did you mean 'png'"),
        (lambda: tn.plan(NET).draw(""), ValueError, "cannot draw to '', expected a file"),
        (lambda: tn.plan(NET).draw("no/such/plan.png"), ValueError, "there is no folder 'no/such'"),
        (lambda: NET.draw("no/such/net.png"), ValueError, "there is no folder 'no/such'"),
        (lambda: tn.network(None), ValueError, "a spec is a string such as .* got NoneType"),
        (lambda: tn.network("x: i -> i", 3), ValueError, "sizes is 3, expected a size for each known axis"),
        (lambda: tn.network("x: i -> i", cores=3), ValueError, "cores is 3, expected names of tensors"),
        (lambda: tn.plan(None), ValueError, r"tn.plan takes a network, such as tn.network\(spec, sizes\) gives, got None"),
        (lambda: tn.plan(NET, grad=None), ValueError, "grad is None, expected names of tensors: x, w"),
        (lambda: tn.plan(NET, sizes=[3]), ValueError, r"sizes is \[3\], expected a size for each axis"),
        (lambda: tn.plan(NET, device="gpu"), ValueError, "device is 'gpu', expected a torch.device or the name of one"),
        (lambda: tn.plan(NET, search=[]), ValueError, "unknown search"),
        (lambda: tn.compile("x: i -> i"), ValueError, "tn.compile takes a network, such as .* or a plan, got 'x: i -> i'"),
        (lambda: tn.compile(NET)(A), ValueError, r"the program takes 2 tensors \(x, w\), got 1"),
        (lambda: tn.compile(NET)(), ValueError, r"the program takes 2 tensors \(x, w\), got 0"),
        (lambda: tn.compile(NET)(A, M), ValueError, "operand 'w' is a ndarray, expected a torch.Tensor"),
        (lambda: tn.compile(NET)(None, B), ValueError, "operand 'x' is a NoneType, expected a torch.Tensor"),
        (lambda: tn.segments(None), ValueError, "tn.segments takes a network"),
        (lambda: tn.segments(NET, axis=3), ValueError, "axis is 3, expected a dynamic axis, or two different ones"),
        (lambda: tn.segments(NET, axis=("i", "j", "k")), ValueError, "expected a dynamic axis, or two different ones"),
        (lambda: tn.frozen(None).__enter__(), ValueError, "tn.frozen takes a torch.nn.Module, got a NoneType"),
        (lambda: tn.plan_store(""), ValueError, "plan store folder is '', expected the path of a folder"),
        (lambda: tn.plan_store(3), ValueError, "plan store folder is 3, expected the path of a folder"),
    ],
)
def test_the_message_names_what_is_wrong(call, kind, words):
    with pytest.raises(tn.TnError, match=words) as caught:
        call()
    assert isinstance(caught.value, kind)


def test_what_is_fine_stays_fine():
    assert tn.tensordot(A, B, np.int64(1)).shape == tn.tensordot(A, B, (1, 0)).shape == (2, 4)
    assert tn.tensordot(A, B, 0).shape == (2, 3, 3, 4)
    assert tn.transpose(A, (-1, 0)).shape == (3, 2)
    assert tn.einsum(EQUATION, A, B, dtype=torch.float64).dtype is torch.float64
    assert tn.einsum(EQUATION, A.int(), B.int(), dtype=torch.float32).dtype is torch.float32


def test_a_lossy_dtype_is_refused_inside_compile_too():
    run = torch.compile(lambda a, b: tn.einsum(EQUATION, a, b, dtype=torch.float64), backend="eager", fullgraph=True)
    assert run(A, B).dtype is torch.float64


NETWORK = json.loads(NET.to_json())
PLAN = json.loads(tn.plan(NET, grad=("w",)).to_json())
GARBAGE = [None, 5, "", "{", "nonsense", "[]", "null", "3", '"text"', "{}", b"\xff"]
WRONG = [None, 5, "text", [5], [[1]], {"a": 1}, [[None, None]], [["i", "j", "k"]], True, -1, 1.5]


@pytest.mark.parametrize("text", GARBAGE)
def test_garbage_is_no_network_and_no_plan(text):
    with pytest.raises(tn.SpecError, match="network"):
        tn.Network.from_json(text)
    with pytest.raises(tn.PlanError, match="plan"):
        Plan.from_json(text)
    with pytest.raises(tn.PlanError, match="machine table"):
        tn.Machine.from_json(text)


@pytest.mark.parametrize("key", [*NETWORK])
def test_a_network_with_a_wrong_or_missing_part_is_refused(key):
    with pytest.raises(tn.SpecError, match=key):
        tn.Network.from_json(json.dumps({name: value for name, value in NETWORK.items() if name != key}))
    for value in WRONG:
        with pytest.raises((tn.SpecError, tn.SizeError)):
            tn.Network.from_json(json.dumps({**NETWORK, key: value}))


@pytest.mark.parametrize("key", [*PLAN])
def test_a_plan_with_a_wrong_or_missing_part_is_refused(key):
    with pytest.raises(tn.PlanError, match=key):
        Plan.from_json(json.dumps({name: value for name, value in PLAN.items() if name != key}))
    allowed = {"tile": (None, 5), "search": ("text",), "machine": ("text",), "floor": (5, -1, 1.5), "itemsize": (5,)}
    for value in WRONG:
        if value not in allowed.get(key, ()) or isinstance(value, bool):
            with pytest.raises((tn.PlanError, tn.SpecError, tn.SizeError)):
                Plan.from_json(json.dumps({**PLAN, key: value}))
