"""The structures bench: it runs, says what it measured, names a wrong family, and times nothing that is wrong."""

import json

import pytest
import torch

import tn
from bench import projection
from bench.__main__ import main as bench_main
from bench.structures import OPTIONS, check, main


def test_it_writes_rows_and_a_plot(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert main(["--family", "btt", "tt", "btt_moe", "--width", "16", "--rows", "3", "--rounds", "1", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    ours = [row for row in rows if not row["case"].startswith("tltorch")]
    assert [row["case"] for row in ours] == ["nn.Linear 16", "btt 16", "tt 16", "btt_moe 16"] * 2
    assert all(row["seconds"] > 0 and row["flops"] > 0 and row["ratio"] > 0 for row in ours)
    assert ours[1]["bytes"] == 4 * sum(p.numel() for p in tn.StructuredLinear(16, 16, structure="btt", bias=False).parameters())
    assert (tmp_path / "rows.png").read_bytes()[1:4] == b"PNG"
    assert "times faster" in capsys.readouterr().out


def test_projections_are_put_beside_fits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(projection, "SHAPE", (12, 18))
    out = tmp_path / "rows.jsonl"
    projection.main(["--family", "btt", "--kind", "gaussian", "--matrices", "1", "--steps", "50", "--out", str(out)])
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["settings"]["error"] <= row["settings"]["adam_error"] + 1e-5 and row["ratio"] > 0
    assert bench_main(["projection", "--family", "bbt"]) == 2
    assert "unknown family 'bbt'" in capsys.readouterr().err


def test_fits_come_near_what_has_a_closed_form():
    weight = projection.matrix("gaussian", 0, (12, 18))
    found = tn.project(weight, structure="btt", rank=2)
    fits = projection.AdamFits(found.built, weight, (1e-1, 1e-2), seed=0)
    fits.run(600)
    error = float((fits.least.min() / weight.square().sum()).sqrt())
    assert found.error * (1 - 1e-5) <= error <= 1.05 * found.error


def test_every_family_is_in_it():
    assert set(tn.structures.names()) - {"dense"} == {case.split(" ")[0] for case in OPTIONS}


def test_wrong_words_are_one_line(capsys):
    assert bench_main(["structures", "--family", "bbt"]) == 2
    assert "unknown family 'bbt': did you mean 'btt'" in capsys.readouterr().err


def test_a_wrong_layer_is_not_timed(monkeypatch):
    layer = tn.StructuredLinear(8, 8, structure="btt", bias=False)
    monkeypatch.setattr(layer, "to_dense", lambda: torch.zeros(8, 8))
    with pytest.raises(RuntimeError, match="nothing is timed"):
        check("btt", layer, torch.randn(2, 8))
