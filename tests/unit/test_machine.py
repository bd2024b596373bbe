"""Machine tables: read between their extents, kept as JSON, refused when damaged; what a measured one says decides plans."""

import dataclasses
import json

import pytest

import tn
from tn.machine import EXTENTS, READS, SHAPES, Machine, machine, roofline


def test_tables_are_exact_at_their_extents_and_between_them_otherwise():
    table = machine()
    for shape in SHAPES[::17]:
        for line, reads in enumerate(READS):
            assert table.product(*shape, reads) == pytest.approx(table.mm[line][SHAPES.index(shape)])
            assert table.item(*shape, reads) == pytest.approx(table.bmm[line][SHAPES.index(shape)])
    ends = [table.product(64, 64, k) for k in (64, 256)]
    assert min(ends) <= table.product(64, 64, 128) <= max(ends)
    assert table.product(64, 64, 4 * EXTENTS[2][-1]) == pytest.approx(4 * table.product(64, 64, EXTENTS[2][-1]))


def test_json_round_trip_and_identity():
    table = machine()
    again = Machine.from_json(table.to_json())
    assert again == table and hash(again) == hash(table)
    other = dataclasses.replace(table, call=1.0)
    assert other != table and other.digest != table.digest


@pytest.mark.parametrize("damage", [{"format": 99}, {"mm": [[1.0]]}, {"bmm": []}])
def test_other_formats_and_sizes_are_refused(damage):
    value = {**json.loads(machine().to_json()), **damage}
    with pytest.raises(tn.PlanError, match="machine table"):
        Machine.from_json(json.dumps(value))


def test_a_copy_costs_more_where_fewer_elements_stay_together_or_lie_far_apart():
    table = machine()
    size = 1 << 24
    together, short, apart, far = (table.reorder(size, *way) for way in ((1 << 10, 64), (8, 1 << 18), (1, 64), (1, 1 << 18)))
    assert together < apart < far and together < short < far


def test_large_new_tensors_pay_for_their_memory():
    table = machine()
    assert table.traffic(1000) == 0 == table.traffic(1000, new=True)
    assert table.traffic(64 << 20, new=True) > 2 * table.traffic(64 << 20)


def test_the_table_decides():
    network = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=8, j=8, r=2, k=8, l=8), cores=("a", "c"))
    slow = dataclasses.replace(machine(), copy=1e3)
    assert tn.plan(network, rows=300, table=slow).copies == 0
    gpu = roofline("gpu", peak=1e14, small=64, bandwidth=1e12, launch=5e-6, source="test")
    assert tn.plan(network, rows=4096, grad=network.names, table=gpu).tile is None


@pytest.mark.slow
def test_calibration_measures_a_table_that_plans_can_use():
    table = tn.calibrate(budget=1e-4, name="here")
    assert Machine.from_json(table.to_json()) == table and "measured: cpu" in table.source
    assert 1e9 < 2 * 1024**3 / table.product(1024, 1024, 1024) < 1e13  # FLOP/s of any CPU
    plan = tn.plan(tn.network("x: ... i, w: i o -> ... o", dict(i=64, o=64), cores=("w",)), table=table)
    assert "table here" in str(plan)
