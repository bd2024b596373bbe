"""A reader of our output that leaves early (head, less) is no error: no traceback, no complaint, whichever program it is."""

import os
import subprocess
import sys

import pytest

from zoo.pipes import STATUS, quiet_pipe

COMMANDS = (
    "zoo generate --help",
    "train --help",
    "train gpt --help",
    "train recipes",
    "bench flops --help",
    "bench flops --model.layers=1 --model.width=32 --model.heads=2 --out /dev/null",
    "tn doctor",
)


@pytest.mark.parametrize("words", COMMANDS)
def test_every_program_ends_quietly(words):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run([sys.executable, "-m", *words.split()], stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert done.stderr == ""
    # 0: argparse hides the error while it prints its help; 1: rich, which prints some tables, ends the program itself.
    assert done.returncode in (0, 1, STATUS)


def test_prepare_into_a_closed_pipe(tmp_path):
    (tmp_path / "text").write_text("the cat sat on a mat\n" * 200)
    reader, writer = os.pipe()
    os.close(reader)
    words = ["prepare", f"text:{tmp_path / 'text'}", "--tokenizer", "bytes", "--cache_dir", str(tmp_path / "cache")]
    with os.fdopen(writer, "w") as stdout:
        done = subprocess.run([sys.executable, "-m", "train", *words], stdout=stdout, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (STATUS, "")


def test_the_status_of_a_program_that_was_heard():
    assert quiet_pipe(lambda: 3) == 3
    with pytest.raises(SystemExit) as caught:
        quiet_pipe(lambda: sys.exit(2))
    assert caught.value.code == 2
