"""What the README and the Makefile say can be typed, can be typed."""

import functools
import re
import subprocess
import sys

import pytest

from tests.arch.rules import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def _blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


def _commands() -> list[list[str]]:
    """Every shell line of the README as words, without comments and environment settings."""
    lines = [line.split("  #")[0].strip() for block in _blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    words = [line.split() for line in lines if line and not line.startswith("#")]
    return [[word for i, word in enumerate(line) if not ("=" in word and all("=" in before for before in line[:i]))] for line in words]


def _targets() -> set[str]:
    return set(re.findall(r"^([a-z][a-z-]*):", MAKEFILE, flags=re.MULTILINE))


@functools.lru_cache
def _help(*words: str) -> str:
    done = subprocess.run([sys.executable, "-m", *words, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_readme_has_commands():
    assert len(_commands()) >= 8
    assert ["make", "demo"] in _commands()
    assert ["make", "test"] in _commands()


def test_make_targets_exist():
    named = {words[1] for words in _commands() if words[0] == "make"}
    assert named <= _targets()
    assert {"demo", "test", "lint", "bench", "test-long"} <= _targets()


@pytest.mark.parametrize("words", [words for words in _commands() if words[0] != "make"], ids=" ".join)
def test_readme_command_exists(words):
    assert words[:2] == ["python", "-m"] or words[0] in ("git", "cd", "pip")
    if words[:2] != ["python", "-m"] or words[2] == "pip":
        return
    module, rest = words[2], words[3:]
    command = [rest[0]] if rest and not rest[0].startswith("-") else []
    text = _help(module, *command)
    for flag in (word.split("=")[0] for word in rest if word.startswith("--")):
        assert flag in text, f"{flag} is not in the help of python -m {module} {' '.join(command)}"


@pytest.mark.parametrize("number", range(len(_blocks("python"))))
def test_readme_example_runs(number, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    exec(compile(_blocks("python")[number], f"README.md example {number + 1}", "exec"), {"__name__": "__main__"})


def test_readme_has_an_example_for_every_kind_of_user():
    assert len(_blocks("python")) >= 3


def test_readme_pictures_exist():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file(), f"README.md shows {path}, which does not exist"


def test_ci_runs_what_a_person_runs():
    script = (ROOT / ".ci" / "run").read_text()
    assert re.findall(r"^make (\S+)", script, flags=re.MULTILINE) == ["lint", "test", "demo"]


def test_set_up_refuses_a_missing_python(tmp_path):
    done = subprocess.run(
        ["sh", str(ROOT / ".ci" / "setup")], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": str(tmp_path / "none")}
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "was not found on this machine" in done.stderr


def test_set_up_refuses_an_old_python(tmp_path):
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && { echo Python 3.9.1; exit 0; }\nexit 1\n')
    old.chmod(0o755)
    done = subprocess.run(
        ["sh", str(ROOT / ".ci" / "setup")], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": str(old)}
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "is Python 3.9.1, but Python 3.11 or newer is needed" in done.stderr


def test_set_up_refuses_a_python_without_venv(tmp_path):
    bare = tmp_path / "python3"
    bare.write_text(f'#!/bin/sh\ncase "$*" in *"import venv"*) exit 1;; esac\nexec "{sys.executable}" "$@"\n')
    bare.chmod(0o755)
    copy = tmp_path / "copy"
    (copy / ".ci").mkdir(parents=True)
    for name in ("pyproject.toml", "constraints.txt", ".ci/setup"):
        (copy / name).write_text((ROOT / name).read_text())
    done = subprocess.run(
        ["sh", str(copy / ".ci" / "setup")], capture_output=True, text=True, env={"PATH": "/usr/bin:/bin", "PYTHON": str(bare)}
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "has no venv module" in done.stderr
    assert not (copy / ".venv").exists()


def test_set_up_says_when_there_is_no_network(tmp_path):
    (tmp_path / ".ci").mkdir()
    for name in ("pyproject.toml", "constraints.txt", ".ci/setup"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    nowhere = {"PIP_CONFIG_FILE": "/dev/null", "PIP_INDEX_URL": "https://localhost:1/simple", "PIP_NO_CACHE_DIR": "1"}
    done = subprocess.run(
        ["sh", str(tmp_path / ".ci" / "setup")],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, **nowhere},
    )
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("set-up: no network")
    assert not (tmp_path / ".venv").exists()
