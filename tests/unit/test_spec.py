"""The spec grammar: what is read, and the words of every refusal."""

import pytest

import tn
from tn.spec import parse


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", "x: ... (i j), a: i j r k, c: k i r l -> ... (k l)"),
        ("x, y -> x y", "t0: x, t1: y -> x y"),
        ("i i -> i", "t0: i i -> i"),
        (" -> ", "t0: ->"),
        ("s: , x: i 1 -> i 1", "s:, x: i 1 -> i 1"),
        ("x: (i 1) -> i", "x: i -> i"),
        ("x: i, x: j -> i j", "x: i, x: j -> i j"),
        ("x: i j -> q: i, k: j", "x: i j -> q: i, k: j"),
    ],
)
def test_reads(text, canonical):
    assert str(parse(text)) == canonical
    assert str(parse(canonical)) == canonical


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ij,jk->ik", "call tn.einsum for letters"),
        ("x: i", "has 0 '->'"),
        ("x: i -> i -> i", "has 2 '->'"),
        ("x: i -> j", "output axis 'j' is on no operand; axes are ['i']"),
        ("x: i -> i i", "axis 'i' is repeated in the output"),
        ("x: i ... -> i", "must come first"),
        ("x: ... ... i -> i", "must come first"),
        ("x: (i j -> i", "'(' without ')'"),
        ("x: i) -> i", "cannot read ')'"),
        ("x: ((i j) k) -> i", "cannot read '('"),
        ("x: i+j -> i", "cannot read '+'"),
        ("x: 3 -> ", "cannot read '3'"),
        ("2x: i -> i", "tensor name '2x' is not a word"),
        ("x: i, x: i j -> i", "1 dimensions in one place and 2 in another"),
        ("x: i j -> x: i, y: j", "must differ"),
    ],
)
def test_refuses(text, message):
    with pytest.raises(tn.SpecError) as error:
        parse(text)
    assert message in str(error.value)


def test_a_spec_is_text():
    with pytest.raises(tn.SpecError, match="got int"):
        parse(3)


def test_a_comma_too_many_is_named():
    with pytest.raises(tn.SpecError, match="comma too many"):
        tn.network("x: i j -> y: i,")
    assert len(tn.network("x: i, y: i -> a: i, b:").parts) == 2
