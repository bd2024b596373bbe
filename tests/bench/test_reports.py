"""The two reports: right numbers, rows with everything in them, and no number when a check is red."""

import json

import pytest
import torch

import tn
import zoo
from bench import __main__ as command
from bench import flops, models, throughput
from bench.models import Case
from bench.row import Row, append

SMALL = zoo.GPTConfig(vocab=64, context=16, layers=2, width=32, heads=4, structure="btt", rank=1)
CASE = Case(config=SMALL, batch=2, sequence=16)
FLAGS = [f"--model.{name}={getattr(SMALL, name)}" for name in ("vocab", "context", "layers", "width", "heads")]


def test_dense_flops_are_what_torch_counts():
    assert flops.cost(CASE.dense()).forward == flops.counted(CASE)


def test_dense_training_is_three_forwards():
    cost = flops.cost(CASE.dense())
    assert cost.backward == 2 * cost.forward  # no gradient is skipped but the tokens', which no product needs


def test_planned_and_as_written_agree_where_factors_pay():
    wide = Case(config=SMALL.override(width=512, layers=1), batch=8, sequence=16)
    assert flops.cost(wide).forward == flops.cost(wide, search="left_to_right").forward < flops.cost(wide.dense()).forward


def test_small_layers_may_be_merged_for_time():
    written, planned, dense = flops.cost(CASE, search="left_to_right"), flops.cost(CASE), flops.cost(CASE.dense())
    assert written.forward < dense.forward
    # the planner minimises time, and for some of the small layers a dense product can be the faster one
    assert written.forward <= planned.forward <= dense.forward


def test_planned_is_what_the_model_runs():
    wide = Case(config=SMALL.override(width=512, layers=1), batch=64, sequence=16)
    model = zoo.GPT(wide.config, device="meta")
    assert flops.cost(wide).forward == tn.trace(model, torch.empty(64, 16, dtype=torch.int64, device="meta")).flops


def test_attention_is_a_part_of_forward():
    cost = flops.cost(CASE)
    assert cost.attention == 2 * 2 * CASE.tokens * CASE.sequence * SMALL.width * SMALL.layers


def test_flops_refuse_to_print_when_the_check_is_red(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(flops, "counted", lambda case: 1)
    assert command.main(["flops", *FLAGS, "--out", str(tmp_path / "rows.jsonl")]) == 1
    assert "torch counts 1: no table" in capsys.readouterr().err
    assert not (tmp_path / "rows.jsonl").exists()


def test_flops_command(capsys, tmp_path):
    assert command.main(["flops", *FLAGS, "--out", str(tmp_path / "rows.jsonl")]) == 0
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["case"] for row in rows[::2]] == ["btt rank 1, planned", "btt rank 1, as written", "dense twin"]
    assert {"device", "versions", "commit", "time", "flops", "bytes", "settings"} <= rows[0].keys()
    assert "dense twin" in capsys.readouterr().out


def test_throughput_rows(tmp_path):
    rows = throughput.rows(CASE, rounds=2, memory=False)
    assert {(row.what, row.case) for row in rows} == {
        (kind, name) for kind in throughput.KINDS for name in ("btt rank 1", "dense twin", "plain torch")
    }
    assert all(row.seconds > 0 and row.low <= row.seconds <= row.high and row.tokens_per_second > 0 for row in rows)
    assert all(row.ratio == 1.0 for row in rows if row.case == "plain torch")
    decode = next(row for row in rows if row.what == "decode")
    assert decode.tokens == CASE.batch
    append(rows, tmp_path / "rows.jsonl")
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == len(rows)


def test_decoding_flops_are_one_tokens():
    cost = flops.cost(CASE)
    expected = (cost.forward - cost.attention) // CASE.sequence + cost.attention * 9 // CASE.sequence // CASE.sequence
    assert throughput._flops("decode", CASE, cost) == expected


def test_throughput_gate():
    named = throughput.build(CASE, torch.device("cpu"))
    tokens, targets = (torch.randint(0, SMALL.vocab, (2, 16)) for _ in range(2))
    assert throughput.gate(named, tokens, targets) == []
    with torch.no_grad():
        named["plain torch"].blocks[0].fc_in.weight.mul_(1.5)
    wrong = throughput.gate(named, tokens, targets)
    assert any("the dense twin and plain torch differ" in line for line in wrong)
    with torch.no_grad():
        named["plain torch"].tokens.weight.mul_(3.0)
    assert any("dense twin's loss" in line for line in throughput.gate(named, tokens, targets))


def test_gate_notices_wrong_plans(monkeypatch):
    named = throughput.build(CASE, torch.device("cpu"))
    tokens, targets = (torch.randint(0, SMALL.vocab, (2, 16)) for _ in range(2))
    real = tn.StructuredLinear.forward

    def wrong(self, x):
        return real(self, x) * (1.01 if tn.contraction._forced.get() is None else 1.0)

    monkeypatch.setattr(tn.StructuredLinear, "forward", wrong)
    assert any("pairwise einsum" in line for line in throughput.gate(named, tokens, targets))


def test_peak_memory_is_measured_in_another_process():
    assert throughput.peak(CASE, "dense twin") > 50e6  # a process with torch in it is at least that large


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["flopz"], "did you mean 'flops'"),
        (["flops", "--model.structur", "btt"], "did you mean '--model.structure'"),
        (["flops", "--model.rank"], "--model.rank needs a value"),
        (["flops", "--sequence", "9999"], "between 1 and the model's context"),
        (["flops", "--batch", "0"], "--batch 0 must be at least 1"),
        (["throughput", "--model.structure", "bbt"], "did you mean 'btt'"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, capsys):
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_listing(capsys):
    assert command.main([]) == 0
    listing = capsys.readouterr().out
    assert all(name in listing for name in command.BENCHES)


def test_zoo_models_can_be_named():
    options = models.argparse.Namespace(name="gpt2-small", batch=1, sequence=8)
    case = models.case(options, ["--model.rank", "2"])
    assert (case.config.width, case.config.structure, case.config.rank) == (768, "btt", 2)


def test_row_without_a_time():
    assert Row(bench="b", case="c", what="w").tokens_per_second is None


@pytest.mark.parametrize("bench", ["flops", "throughput"])
@pytest.mark.parametrize(
    "words, message",
    [
        (["--name", "gpt2-smal"], "did you mean 'gpt2-small'?"),
        (["--batch", "x"], "argument --batch: invalid int value: 'x'"),
    ],
)
def test_a_wrong_value_is_one_line(capsys, bench, words, message):
    assert command.main([bench, *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
