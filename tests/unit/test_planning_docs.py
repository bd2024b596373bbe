"""docs/planning.md is true: its Python runs, its table is what the planner finds, and absorption follows the harmonic rule."""

import itertools
import re
from fractions import Fraction

import pytest

import tn
from tests.arch import rules
from tn.segments import ROW_RANGES

PAGE = (rules.ROOT / "docs" / "planning.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def space() -> dict:
    """What the blocks of the page define."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 6
    found: dict = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"planning.md block {number + 1}", "exec"), found)
    return found


def test_the_table_is_what_is_found(space):
    rows = re.findall(r"^\| ([\w ]+) \| (\w+=\d[^|]*) \| ([^|]+) \|$", PAGE, re.MULTILINE)
    assert {name for name, _, _ in rows} == set(space["SPECS"]) and len(rows) >= 10
    for name, sizes, found in rows:
        given = {axis: int(size) for axis, size in (part.split("=") for part in sizes.split(", "))}
        assert space["order"](name, **given) == found, (name, sizes)


def test_the_ranges_are_those_of_layers():
    found = re.findall(r"^\| (?:fewer than (\d+)|any other number) \| (\d+) \|$", PAGE, re.MULTILINE)
    assert [(float(below or "inf"), int(planned)) for below, planned in found] == list(ROW_RANGES)


@pytest.mark.parametrize("c", [64, 128, 256, 512])
@pytest.mark.parametrize("n", [64, 128])
def test_absorption_follows_the_harmonic_rule(space, n, c):
    """Absorb exactly where 1/S > 1/T + 1/n − 1/c (S queries, T keys, latent c, head n); where both sides are equal either order will do."""
    seen = set()
    for s, t in itertools.product((1, 2, 16, 85, 86, 128, 170, 171, 255, 256, 257, 1024), (1, 16, 171, 256, 4096, 1 << 20)):
        sides = Fraction(1, s), Fraction(1, t) + Fraction(1, n) - Fraction(1, c)
        if sides[0] == sides[1]:
            continue
        absorb = sides[0] > sides[1]
        seen.add(absorb)
        assert space["order"]("MLA scores", s=s, t=t, h=8, n=n, c=c) == ("(q up) kv" if absorb else "q (up kv)"), (s, t)
        assert space["order"]("MLA values", s=s, t=t, h=8, n=n, c=c) == ("(p kv) up" if absorb else "p (kv up)"), (s, t)
    assert seen == {True, False}


@pytest.mark.parametrize("rank", [4, 64, 480, 768])
def test_lora_is_merged_exactly_where_that_is_less_work(space, rank):
    i = o = 1024
    for s in (1, 64, 1024, 4096, 1 << 20):
        apart, merged = s * rank * (i + o), i * rank * o + s * i * o
        assert space["order"]("LoRA", s=s, i=i, r=rank, o=o) == ("(x a) b" if apart < merged else "x (a b)")


def test_squared_attention_becomes_linear_in_the_sequence(space):
    def flops(length: int) -> int:
        sizes = dict(h=2, s=length, t=length, d=16, e=16, w=16)
        return tn.plan(tn.network(space["SPECS"]["squared attention"], sizes), goal="flops").flops

    long = [flops(1 << power) for power in (13, 14, 15)]
    assert long[1] < 2.01 * long[0] and long[2] < 2.01 * long[1]
    assert flops(64) > 3.5 * flops(32)  # short sequences take the scores first
