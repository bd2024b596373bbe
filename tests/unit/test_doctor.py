"""python -m tn doctor: says what is wrong and what to do, and ends with 1."""

import importlib
import importlib.metadata
import subprocess
import sys
import time

import pytest
import torch

import tn
from tn import __main__ as command
from tn import doctor


def test_healthy_installation():
    begun = time.monotonic()
    done = subprocess.run([sys.executable, "-m", "tn", "doctor"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert time.monotonic() - begun < 60  # 20 s on a quiet machine; the suite shares its cores
    for word in ("python", "torch", "cpu", "triton", "btt on cpu", "caches", "all required parts work"):
        assert word in done.stdout


def test_every_broken_line_says_what_to_do(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["numpy>=2.0", "pyyaml>=6"])
    monkeypatch.setattr(importlib.metadata, "version", missing)
    broken = [check for check in doctor._packages() if check.status == "broken"]
    assert [check.name for check in broken] == ["numpy", "pyyaml"]
    assert all("pip install" in check.remedy and "→" in str(check) for check in broken)


def test_an_old_package_is_broken(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "1.26.4")
    check = doctor._package("numpy>=2.0")
    assert (check.status, check.detail) == ("broken", "1.26.4, but 2.0 or newer is needed")


def test_a_package_that_does_not_import_is_broken(monkeypatch):
    def fails(name):
        raise OSError("libfoo.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fails)
    check = doctor._package("numpy>=2.0")
    assert check.status == "broken"
    assert "libfoo.so" in check.detail
    assert check.remedy.startswith("pip install --force-reinstall --no-deps numpy==")


def test_other_platforms_packages_are_left_out(monkeypatch):
    lines = ['numpy>=2.0; sys_platform == "win32"', 'ruff>=0.1; extra == "test"', "torch>=2.11"]
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: lines)
    assert [check.name for check in doctor._packages()] == ["torch"]


def test_wrong_numbers_are_broken(monkeypatch):
    real = tn.StructuredLinear.forward
    wrong = lambda self, x: real(self, x) + (1e-6 if tn.contraction._forced.get() is None else 0.0)
    monkeypatch.setattr(tn.StructuredLinear, "forward", wrong)
    check = doctor._layer(torch.device("cpu"))
    assert check.status == "broken"
    assert "do not trust" in check.remedy


def test_broken_parts_end_with_one(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "checks", lambda: iter([doctor.Check(group="g", name="n", status="broken", detail="d", remedy="do this")]))
    assert doctor.main() == 1
    assert "→ do this" in capsys.readouterr().out


@pytest.mark.parametrize("version, numbers", [("2.13.0+cpu", (2, 13, 0)), ("3.8", (3, 8)), ("2.0rc1", (2, 0))])
def test_version_numbers(version, numbers):
    assert doctor._numbers(version) == numbers


def test_unknown_command(capsys):
    assert command.main(["docter"]) == 2
    assert "did you mean 'doctor'" in capsys.readouterr().err


def test_help_lists_commands(capsys):
    assert command.main([]) == 0
    assert "doctor" in capsys.readouterr().out
