"""The execution bench: cases save what they say, the yardstick is right, and a wrong program is never timed."""

import json

import pytest
import torch

import tn
from bench import counts
from bench.__main__ import main as bench_main
from bench.cases import LAYERS
from bench.execution import check, main
from bench.handwritten import TiledBTT
from bench.libraries import einsum_peers


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
def test_cases_have_the_width_and_about_the_saving_they_say(layer):
    sizes = dict(layer.sizes)
    for term in (layer.network.term("x"), layer.network.output):
        width = 1
        for axis in term.axes[1:]:
            width *= sizes[axis]
        assert width == layer.width
    assert 0.6 < layer.saving_of(4096) / layer.saving < 1.6


def test_the_hand_written_function_has_the_right_gradients():
    operands = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((7, 12), (3, 4, 2, 5), (5, 3, 2, 4))]
    assert torch.autograd.gradcheck(lambda *t: TiledBTT.apply(*t, 3), operands)


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.width == 512], ids=lambda layer: layer.name)
def test_peers_agree(layer):
    network = layer.network
    operands = [torch.randn(5, 512), *(torch.randn(network.shape(core)) / 8 for core in network.cores)]
    for name, peer in einsum_peers(network, 5).items():
        check(name, peer, tn.compile(network), operands)


def test_a_wrong_program_is_not_timed():
    with pytest.raises(RuntimeError, match="nothing is timed"):
        check("broken", lambda x: x * 1.1, lambda x: x * 1.0, [torch.ones(3)])


def test_rows_are_printed_and_stored(tmp_path, capsys):
    out = tmp_path / "rows.jsonl"
    words = ["--family", "CP", "--width", "512", "--rows", "16", "--rounds", "1", "--out", str(out)]
    assert main(words) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert {(row["case"], row["what"]) for row in rows} == {
        (f"CP 512 /{saving}", what) for saving in (4, 16) for what in ("forward", "forward + backward")
    }
    assert "geometric mean" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--family", "Tuker"], "unknown family 'Tuker': did you mean 'Tucker'?"),
        (["--rows", "0"], "rows and rounds are counts of at least 1"),
        (["--rounds", "x"], "--rounds"),
    ],
)
def test_wrong_flags_are_one_line(words, message, capsys):
    assert bench_main(["execution", *words]) == 2
    shown = capsys.readouterr().err
    assert message in shown and shown.count("\n") == 1


def test_copies_count_the_large_ones_inside_other_operators():
    x = torch.randn(32, 16, 8)
    assert counts.copies(lambda: x.mT.reshape(-1), elements=x.numel()) == 1
    assert counts.copies(lambda: x.mT.reshape(-1), elements=x.numel() + 1) == 0
    assert counts.copies(lambda: x.reshape(-1), elements=1) == 0


def test_graphs_and_overhead_give_rows():
    rows = [*counts.graph_rows(1), *counts.overhead_rows(2)]
    assert [row.settings["graphs"] for row in rows[:2]] == [3, 3] and len(rows) == 8
    assert all(row.ratio and row.ratio < 1.5 for row in rows[2:])
