"""The doctor checks what the project is built on, whatever the installed list of requirements says."""

import importlib.metadata

from tn import doctor


def test_a_stale_list_hides_no_package(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name == "quimb":
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: ["torch>=2.11", "opt-einsum>=3.4"])
    monkeypatch.setattr(importlib.metadata, "version", version)
    found = {check.name: check.status for check in doctor.checks() if check.group == "packages"}
    assert set(doctor.CORE) - {"opt_einsum", "triton"} <= found.keys()
    assert found["quimb"] == "broken"
    assert found[doctor.DISTRIBUTION] == "note"


def test_a_full_list_adds_nothing(monkeypatch):
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [f"{core.replace('_', '-')}>=1" for core in doctor.CORE])
    assert list(doctor._unlisted()) == []


def test_without_a_list_everything_is_checked(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert {"torch", "quimb", "hypothesis"} <= {check.name for check in doctor._unlisted()}
