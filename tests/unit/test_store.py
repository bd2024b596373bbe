"""Plans on disk: found again by value, shared by processes, and never trusted blindly."""

import json
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib import import_module

import pytest

import tn
from tests.arch import rules
from tn import store as stores
from tn.machine import machine, roofline

NET = tn.network("x: ... (i j), a: i j r k, c: k i r l -> ... (k l)", dict(i=4, j=8, r=2, k=16, l=4), cores=("a", "c"))
OTHER = roofline("other", peak=1e11, small=8, bandwidth=1e10, launch=1e-6, source="made up")

planning = import_module("tn.planner")  # the module: tn.plan is its function


@pytest.fixture
def searches(monkeypatch) -> list[dict]:
    """What was searched for."""
    made: list[dict] = []
    plain = planning._frugal

    def counted(*positional, **asked):
        made.append(asked)
        return plain(*positional, **asked)

    monkeypatch.setattr(planning, "_frugal", counted)
    return made


def files(folder) -> list:
    return sorted(path for path in folder.iterdir() if path.name.startswith("plan-"))


def test_a_plan_is_searched_for_once(tmp_path, searches):
    for _ in range(3):
        with tn.plan_store(tmp_path / "plans"):
            plans = [tn.plan(NET, grad=("a",)) for _ in range(2)]
            assert str(plans[0]) == str(plans[1]) == str(tn.plan(NET, grad=["a"], sizes={}, rows=1024))
    assert len(searches) == 1 and len(files(tmp_path / "plans")) == 1
    tn.plan(NET, grad=("a",))
    assert len(searches) == 2 and len(files(tmp_path / "plans")) == 1  # no store is in use


@pytest.mark.parametrize(
    "changed",
    [
        {"network": tn.network(str(NET.spec), {**NET.sizes, "r": 3}, cores=("a", "c"))},
        {"network": tn.network(str(NET.spec), NET.sizes, cores=("a",), consts=("c",))},
        {"grad": ("a", "c")},
        {"goal": "flops"},
        {"rows": 64},
        {"search": "cotengra"},
        {"seed": 1},
        {"table": OTHER},
        {"table": replace(machine(), call=machine().call * 2)},
    ],
)
def test_keys_differ_when_anything_does(tmp_path, searches, changed):
    asked = {"network": NET, "grad": ("a",)}
    with tn.plan_store(tmp_path):
        for request in (asked, asked | changed):
            tn.plan(request["network"], **{name: value for name, value in request.items() if name != "network"})
    assert len(searches) == 2 and len(files(tmp_path)) == 2


def test_another_planner_searches_anew_and_a_pinned_store_does_not(tmp_path, searches, monkeypatch):
    for pinned, count in ((False, 2), (True, 1)):
        folder = tmp_path / str(pinned)
        searches.clear()
        for planner in ("one", "two"):
            monkeypatch.setattr(stores, "_planner", lambda planner=planner: planner)
            with tn.plan_store(folder, pinned=pinned):
                tn.plan(NET)
        assert len(searches) == count


def test_a_pinned_store_keeps_the_machine_table(tmp_path, searches):
    with tn.plan_store(tmp_path, pinned=True):
        before = tn.plan(NET)
    now = replace(machine(), call=machine().call * 100)
    with tn.plan_store(tmp_path, pinned=True) as store:
        assert store.table(now) == machine()
        assert tn.plan(NET, table=now) == before and len(searches) == 1
        assert tn.plan(NET, table=now, rows=64).machine == machine()  # and plans that are new
    (path,) = tmp_path.glob("table-*")
    path.write_text("[]")
    with tn.plan_store(tmp_path, pinned=True) as store, pytest.warns(UserWarning, match="machine table JSON is an object, got a list"):
        assert store.table(now) == now


def damage(text: str) -> list[str]:
    kept = json.loads(text)
    other = json.loads(tn.plan(tn.network("x: i, y: i ->", dict(i=3))).to_json())
    return [
        "",
        text[: len(text) // 2],
        "\0" * 100,
        "[]",
        "null",
        json.dumps({"request": kept["request"]}),
        json.dumps({**kept, "request": {}}),
        json.dumps({**kept, "plan": other}),
        json.dumps({**kept, "plan": {**kept["plan"], "path": [[0, 1]]}}),
        json.dumps({**kept, "plan": {**kept["plan"], "path": [[0, 7], [2, 3]]}}),
        json.dumps({**kept, "plan": {**kept["plan"], "orders": []}}),
        json.dumps({**kept, "plan": {**kept["plan"], "tile": "x"}}),
        json.dumps({**kept, "plan": {**kept["plan"], "format": 0}}),
        json.dumps({**kept, "plan": {**kept["plan"], "machine_digest": "0"}}),
    ]


def test_damaged_and_foreign_files_are_replaced_with_one_warning(tmp_path):
    with tn.plan_store(tmp_path):
        want = tn.plan(NET)
    (path,) = files(tmp_path)
    text = path.read_text()
    (tmp_path / "notes.txt").write_text("of somebody else")
    for bad in damage(text):
        path.write_text(bad)
        with tn.plan_store(tmp_path), pytest.warns(UserWarning, match="ignored .*plan-") as caught:
            assert tn.plan(NET) == want
        assert len(caught) == 1
        assert path.read_text() == text
    other = tn.network("x: i, y: i ->", dict(i=3))
    with tn.plan_store(tmp_path):
        tn.plan(other)
    for path in files(tmp_path):
        path.write_bytes(b"\xff\xfe")
    with tn.plan_store(tmp_path), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        tn.plan(NET)
        tn.plan(other)
    assert len(files(tmp_path)) == 2 and len(caught) == 1


def test_a_folder_that_cannot_be_written_costs_one_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(tn.PlanError, match="is a file, expected a folder"):
        tn.plan_store(tmp_path / "file")
    monkeypatch.setenv("TN_PLAN_STORE", str(tmp_path / "file"))
    stores._from_environment.cache_clear()
    with pytest.raises(tn.PlanError, match=r"\$TN_PLAN_STORE: plan store .*file is a file, expected a folder"):
        tn.plan(NET)
    monkeypatch.delenv("TN_PLAN_STORE")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(stores.tempfile, "mkstemp", refuse)  # a folder's mode does not stop a superuser
    with tn.plan_store(tmp_path), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tn.plan(NET) == tn.plan(NET)
        tn.plan(NET, rows=8)
    assert ["cannot write" in str(warning.message) for warning in caught] == [True] and files(tmp_path) == []


def test_a_write_that_is_cut_short_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(stores.os, "replace", interrupt)
    with tn.plan_store(tmp_path), pytest.raises(KeyboardInterrupt):
        tn.plan(NET)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_with_a_named_result_is_found_again(tmp_path):
    named = tn.network("x: a b, w: b c -> product: a c", dict(a=2, b=3, c=4))
    assert tn.Network.from_json(named.to_json()) == named
    for found in (0, 1):
        with warnings.catch_warnings(), tn.plan_store(tmp_path) as store:
            warnings.simplefilter("error")
            tn.plan(named)
        assert store.found == found


def test_blocks_nest_and_close(tmp_path):
    outer = tn.plan_store(tmp_path / "outer")
    with tn.plan_store(tmp_path / "inner"):
        tn.plan(NET)
    tn.plan(NET, rows=5)
    outer.close()
    outer.close()
    tn.plan(NET, rows=6)
    assert len(files(tmp_path / "outer")) == len(files(tmp_path / "inner")) == 1


def test_processes_share_a_folder(tmp_path):
    script = (
        "import sys, warnings, tn; warnings.simplefilter('error'); n = int(sys.argv[1])\n"
        "nets = [tn.network('x: ... i, a: i r, c: r o -> ... o', dict(i=8, r=r, o=8)) for r in range(2, 14)]\n"
        "for net in nets if n % 2 else nets[::-1]: tn.plan(net)\n"
        "store = tn.store._from_environment(); print(store.found + store.made)\n"
    )
    environment = {**os.environ, "TN_PLAN_STORE": str(tmp_path / "plans"), "PYTHONPATH": str(rules.ROOT)}
    started = [
        subprocess.Popen([sys.executable, "-c", script, str(n)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for n in range(2)
    ]
    for process in started:
        out, error = process.communicate(timeout=120)
        assert process.returncode == 0, error
        assert out.strip() == "12"
    assert len(files(tmp_path / "plans")) == 12
    with warnings.catch_warnings(), tn.plan_store(tmp_path / "plans") as store:
        warnings.simplefilter("error")
        tn.plan(tn.network("x: ... i, a: i r, c: r o -> ... o", dict(i=8, r=5, o=8)))
    assert (store.found, store.made) == (1, 0)
