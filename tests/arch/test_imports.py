"""`import tn` is light: none of the heavy packages is loaded, no environment is read into switches, no file is touched."""

import subprocess
import sys

import pytest

HEAVY = (
    "triton",
    "cotengra",
    "quimb",
    "opt_einsum",
    "transformers",
    "datasets",
    "matplotlib",
    "pandas",
    "tokenizers",
    "tiktoken",
    "tyro",
    "rich",
    "hypothesis",
)


def _loaded(statement: str) -> set[str]:
    code = f"{statement}; import sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.split(".")[0] for name in done.stdout.split()}


def test_import_tn_is_light():
    assert _loaded("import tn") & set(HEAVY) - _loaded("import torch") == set()


@pytest.mark.parametrize("package", ["zoo", "train", "bench"])
def test_other_packages_leave_the_slow_ones_out(package):
    slow = {"triton", "quimb", "transformers", "datasets", "matplotlib", "pandas"}
    assert _loaded(f"import {package}") & slow - _loaded("import torch") == set()


def test_the_check_can_fail():
    assert "opt_einsum" in _loaded("import tn, opt_einsum")
