"""The planner bench: its networks are what it says, losses and errors are counted right, rows are printed and stored."""

import itertools
import json

import pytest

import tn
from bench.__main__ import main as bench_main
from bench.networks import EXTENT, random_layers
from bench.planner import main, regret_rows, summary
from tn.machine import machine

FEW = list(itertools.islice(random_layers(), 40))


def test_random_layers_are_the_same_every_time_and_within_their_limits():
    again = list(itertools.islice(random_layers(), 40))
    assert [(layer.network, layer.rows) for layer in again] == [(layer.network, layer.rows) for layer in FEW]
    for layer in FEW:
        assert 3 <= len(layer.network.names) <= 6 and layer.network.inputs == ("x",)
        assert all(EXTENT[0] <= size <= EXTENT[1] for size in (*layer.network.sizes.values(), layer.rows))
    assert {len(layer.network.names) for layer in FEW} == {3, 4, 5, 6}
    assert {"t" in layer.network.axes for layer in FEW} == {True, False}


def _row(ratio, interval, predicted=1.0, what="forward"):
    settings = {"interval": interval, "predicted": predicted}
    return {"case": f"random {ratio}", "what": what, "seconds": 1.0, "ratio": ratio, "settings": settings}


def test_a_loss_is_a_whole_interval_beyond_five_percent():
    rows = [_row(0.9, (0.85, 0.94)), _row(0.91, (0.85, 0.96)), _row(2.0, (1.9, 2.1), predicted=1.5)]
    text = " ".join(summary(rows))
    assert "3 networks" in text and "1 lose" in text and "least 0.90" in text and "median error 0 %" in text


def test_regret_of_the_only_tree_is_one_and_trees_are_ranked():
    network = tn.network("x: ... i, w: i r, v: r o -> ... o", dict(i=16, r=4, o=16), cores=("w", "v"))
    (row,) = regret_rows("small", network, 64, "forward", machine())
    assert row.settings["all_trees"] == 3 and row.settings["regret"] >= 1.0
    trees = {"trees": [[1.0, 2.0], [2.0, 4.0], [3.0, 8.0]], "regret": 1.5}
    text = " ".join(summary([{"case": "random 1", "what": "regret, forward", "seconds": 1.0, "settings": trees}]))
    assert "median 1.500" in text and "Spearman" in text and "median 1.00" in text


def test_rows_are_printed_and_stored(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    number = next(layer.number for layer in FEW if len(layer.network.names) == 3)
    assert main(["--only", "predicted", "--cells", f"{number}..{number}", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len(rows) == 6 and {row["what"] for row in rows} == {"step"}
    assert "6 steps alone, predicted against measured" in capsys.readouterr().out


@pytest.mark.parametrize(("words", "message"), [(["--cells", "3"], "expected first..last"), (["--only", "regrets"], "invalid choice")])
def test_wrong_flags_are_one_line(words, message, capsys):
    assert bench_main(["planner", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1
