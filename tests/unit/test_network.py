"""Networks: roles, sizes found from shapes, fans, and errors in the user's axis names."""

import copy
import pickle

import pytest

import tn

BTT = "x: ... (i j), a: i j r k, c: k i r l -> ... (k l)"
SIZES = dict(i=32, j=32, r=4, k=32, l=32)


def btt() -> tn.Network:
    return tn.network(BTT, SIZES, cores=("a", "c"))


def test_roles_axes_and_shapes():
    net = btt()
    assert (net.inputs, net.cores, net.dynamic) == (("x",), ("a", "c"), ("...",))
    assert net.shape("a") == (32, 32, 4, 32)
    with pytest.raises(tn.SizeError, match="axis '...' has no known size"):
        net.shape("x")


def test_bind_solves_sizes_from_any_dimension():
    net = tn.network("x: (i j) k, y: j -> i k")
    assert net.bind([(12, 5), (3,)]) == {"j": 3, "i": 4, "k": 5}
    assert tn.network("x: ... i, y: ... j -> ... i j").bind([(2, 3, 4), (2, 3, 5)]) == {"...": 6, "i": 4, "j": 5}


@pytest.mark.parametrize(
    ("spec", "sizes", "shapes", "message"),
    [
        ("x: i j, y: j -> i", {}, [(2, 3), (4,)], "tensor 'y': axis 'j' has size 4, expected j=3"),
        ("x: (i j), y: i -> j", {}, [(7,), (2,)], "dimension (i j) has size 7, expected i=2 × j=?"),
        ("x: (i j) -> i", {}, [(6,)], "does not say how it splits"),
        ("x: i 1 -> i", {}, [(2, 2)], "a dimension written '1' has size 2"),
        ("x: ... i j -> ... i", {}, [(3,)], "expected at least 2 dimensions"),
        ("x: i -> i", {}, [(3, 3)], "expected 1 dimensions"),
        ("x: ... i, y: ... j -> i j", {}, [(2, 3), (4, 3)], "leading dimensions '...' are (2,) on one tensor and (4,) on 'y'"),
        ("x: i, y: i -> i", {}, [(3,)], "takes 2 tensors (x, y), got 1"),
        ("x: i -> i", {"i": 4}, [(3,)], "axis 'i' has size 3, expected i=4"),
    ],
)
def test_shapes_that_do_not_fit(spec, sizes, shapes, message):
    with pytest.raises(tn.SizeError) as error:
        tn.network(spec, sizes).bind(shapes)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "kind", "message"),
    [
        (dict(sizes={"ranc": 3}), tn.SizeError, "unknown axis 'ranc': did you mean 'rank'"),
        (dict(sizes={"rank": -1}), tn.SizeError, "expected an integer ≥ 0"),
        (dict(sizes={"rank": 2.0}), tn.SizeError, "expected an integer ≥ 0"),
        (dict(sizes={"rank": True}), tn.SizeError, "expected an integer ≥ 0"),
        (dict(cores=("weigth",)), tn.SpecError, "unknown tensor 'weigth': did you mean 'weight'"),
        (dict(cores=("weight",)), tn.SizeError, "axis 'rank' has no known size"),
        (dict(sizes={"rank": 2}, cores=("weight",), consts=("weight",)), tn.SpecError, "both as a core and as a const"),
    ],
)
def test_networks_that_contradict_themselves(kwargs, kind, message):
    with pytest.raises(kind) as error:
        tn.network("x: ... rank, weight: rank -> ...", **kwargs)
    assert message in str(error.value)


def test_fans_apply_cores_in_spec_order():
    assert [(f.core, f.d_in, f.d_out) for f in btt().fans()] == [("a", 32, 128), ("c", 128, 32)]
    tt = tn.network("x: ... (a b), g: a i r, h: r b j -> ... (i j)", dict(a=32, b=32, i=64, j=64, r=16), cores=("g", "h"))
    assert [(f.d_in, f.d_out) for f in tt.fans()] == [(32, 1024), (512, 64)]


def test_json_copies_and_pickles_are_equal():
    net = btt()
    _ = net.sizes, net.axes
    assert tn.Network.from_json(net.to_json()) == net == copy.deepcopy(net) == pickle.loads(pickle.dumps(net))
    with pytest.raises(TypeError):
        net.sizes["i"] = 3
    with pytest.raises(tn.SpecError, match="format 99"):
        tn.Network.from_json('{"format": 99}')
