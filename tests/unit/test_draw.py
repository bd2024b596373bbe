"""Pictures of networks: what is in them and where it lies."""

import numpy as np
import pytest

import tn
from tn.draw import picture, places

BTT = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=2, j=3, r=4, k=5, l=6), cores=("a", "c"))


def test_what_there_is_to_draw():
    drawn = picture(BTT)
    assert drawn.texts[:3] == ("x", "a", "c")
    assert sorted(drawn.kinds[3:]) == ["dot", "dot", "end", "end", "end"]  # i and k are hyperaxes; ..., k and l are open
    assert {axis for a, b, axis in drawn.lines if {a, b} <= {0, 1, 2}} == {"j", "r"}


SPECS = ["x: -> ", "x: i -> ", "x: i i -> i", "x: i i ->", "x: i, y: j -> i j", "x: a b, y: a b -> ", str(BTT.spec)]


@pytest.mark.parametrize("spec", SPECS)
def test_every_network_has_a_picture(spec, tmp_path):
    net = tn.network(spec)
    at = places(picture(net))
    assert np.isfinite(at).all() and np.array_equal(at, places(picture(net)))
    apart = [np.linalg.norm(p - q) for i, p in enumerate(at) for q in at[:i]]
    assert min(apart, default=1.0) > 0.2  # no two nodes on each other
    figure = net.draw(tmp_path / "net.svg")
    assert (tmp_path / "net.svg").stat().st_size > 1000 and figure.axes


def test_a_chain_lies_in_order():
    net = tn.network("x: a b, y: b c, z: c d, w: d e -> a e")
    across = places(picture(net))[:4, 0]
    assert (np.diff(across) > 0.5).all()


def test_sizes_and_names_are_written():
    figure = BTT.draw(sizes={"...": 128})
    words = {text.get_text() for text in figure.axes[0].texts}
    assert {"x", "a", "c", "j 3", "r 4", "k 5", "l 6", "i 2", "... 128"} <= words
    assert str(BTT.spec) in {text.get_text() for text in figure.texts}
    with pytest.raises(tn.SizeError, match="unknown axis 'row'"):
        BTT.draw(sizes=dict(row=3))
