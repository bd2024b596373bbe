"""python -m bench kernels, and what the compiler says about the kernels it times."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

from bench import kernels
from bench.kernel_cases import CASES
from tests.kernels.oracle import DEVICE

# Compiles every kernel of a forward and a backward pass for a GPU that is not here. A few words on the stack are no matter; accumulators
# that do not fit cost hundreds of bytes.
ALL_RESOURCES = """
import torch
from bench.kernel_cases import CASES
from bench.kernels import resources
for case in CASES:
    for dtype in (torch.bfloat16, torch.float32):
        for grid, blocks, used in resources(case, dtype):
            print(case.kernel, used.kernel, dtype, used.stack, used.programs, used.instructions, sep="\\t")
"""


@pytest.mark.slow
def test_no_kernel_spills_on_hopper(environment_without_interpreter):
    done = subprocess.run([sys.executable, "-c", ALL_RESOURCES], capture_output=True, text=True, env=environment_without_interpreter)
    assert done.returncode == 0, done.stderr
    rows = [line.split("\t") for line in done.stdout.splitlines()]
    assert {row[0] for row in rows} == {case.kernel for case in CASES}
    assert [row for row in rows if int(row[3]) > 64] == []
    assert [row for row in rows if int(row[4]) < 1] == []
    halves = [row for row in rows if row[2] == "torch.bfloat16" and row[1] != "join_kernel"]
    assert [row for row in halves if row[5] == "none"] == []  # tensor cores multiply


@pytest.mark.slow
def test_the_command(tmp_path, environment_without_interpreter):
    rows = tmp_path / "rows.jsonl"
    command = [sys.executable, "-m", "bench", "kernels", "--only", "gated", "--out", str(rows), "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment_without_interpreter)
    assert done.returncode == 0, done.stderr
    assert "2 cases agree with float64, forward and every gradient" in done.stdout
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert {row["settings"]["registers"] > 0 for row in found if "registers" in row["settings"]} == {True}
    if DEVICE == "cpu":
        assert kernels.NOT_MEASURED in done.stdout
        assert all(row["seconds"] is None for row in found)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.kernel} {case.name}")
def test_gate_is_green(case):
    assert kernels.gate([case], (torch.float32,), DEVICE) == []


def test_gate_fires():
    case = next(case for case in CASES if case.kernel == "gated")
    wrong = dataclasses.replace(case, run=lambda x, w, v: case.run(x, w, v) * 1.001)
    messages = kernels.gate([wrong], (torch.float32,), DEVICE)
    assert "result is off by" in messages[0]
    assert len(messages) == 4


def test_unknown_kernel_is_named(capsys):
    with pytest.raises(ValueError, match="unknown kernel 'chian': did you mean 'chain'"):
        kernels.main(["--only", "chian"])
