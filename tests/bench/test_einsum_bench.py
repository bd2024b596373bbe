"""python -m bench einsum: runs with and without the generators, prints no number that is wrong, refuses wrong flags."""

import json

import pytest
import torch

import tn
from bench import einsum


def test_rows(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    assert einsum.main(["--family", "chain", "--seeds", "1", "--rounds", "1", "--out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {row["peer"] for row in rows if row["case"].startswith("tiny")} == {"two torch.mm", "torch.einsum", "opt_einsum"}
    assert all(row["ratio"] > 0 and row["seconds"] > 0 for row in rows)
    printed = capsys.readouterr().out
    assert "tiny 8 × 8" in printed and ("geometric mean" in printed or "is not installed" in printed)


def test_without_the_generators_only_the_tiny_case_runs(tmp_path, capsys, monkeypatch):
    def missing(*_):
        raise ModuleNotFoundError("No module named 'einsum_benchmark'", name="einsum_benchmark")

    monkeypatch.setattr(einsum, "cases", missing)
    assert einsum.main(["--rounds", "1", "--out", str(tmp_path / "rows.jsonl")]) == 0
    assert "einsum_benchmark is not installed" in capsys.readouterr().out


def test_a_given_case_is_measured_against_every_peer():
    case = einsum.Case("mine", "ab,bc,cd->ad", ((3, 4), (4, 5), (5, 6)))
    assert einsum.within(case)
    assert {row.peer for row in einsum.measure(case, 1)} == {"opt_einsum", "opt_einsum, planned", "torch.einsum"}


def test_a_wrong_value_stops_the_bench(monkeypatch):
    monkeypatch.setattr(tn, "einsum", lambda equation, *operands: torch.zeros(3, 6))
    with pytest.raises(RuntimeError, match="mine: wrong by"):
        list(einsum.measure(einsum.Case("mine", "ab,bc,cd->ad", ((3, 4), (4, 5), (5, 6))), 1))


@pytest.mark.parametrize("flags", [["--family", "lattices"], ["--rounds", "0"], ["--seeds", "0"]])
def test_wrong_flags(flags):
    with pytest.raises(ValueError):
        einsum.main(flags)
