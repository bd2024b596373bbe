"""Every public name exists, is documented where a reader looks, and its examples run."""

import dataclasses
import doctest
import importlib
import inspect
import types

import pytest

from tests.arch import rules

PACKAGES = ("tn", "zoo", "train", "bench")
# Constants and types that a docstring cannot be attached to.
PLAIN = (str, int, float, tuple, dict, types.GenericAlias, types.UnionType, types.MappingProxyType)


def _public():
    for package in PACKAGES:
        module = importlib.import_module(package)
        for name in module.__all__:
            yield f"{package}.{name}", getattr(module, name, None)


def _modules():
    for source in rules.sources(folders=("tn", "zoo", "train", "bench")):
        if not source.path.endswith("__main__.py"):
            yield source.path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def undocumented(name: str, value: object) -> bool:
    """Whether a reader who asks help(value) learns nothing: no docstring, or only the one that dataclass writes itself."""
    text = (value.__doc__ or "").strip()
    if dataclasses.is_dataclass(value) and text.startswith(f"{name.rsplit('.', 1)[-1]}("):
        return True
    return not text


@pytest.mark.parametrize("package", PACKAGES)
def test_names_are_listed_once_and_exist(package):
    module = importlib.import_module(package)
    assert len(set(module.__all__)) == len(module.__all__)
    assert [name for name in module.__all__ if not hasattr(module, name)] == []


def test_every_public_name_is_documented():
    assert [name for name, value in _public() if not isinstance(value, PLAIN) and undocumented(name, value)] == []


def test_public_methods_are_documented():
    missing = []
    for name, value in _public():
        if inspect.isclass(value) and not issubclass(value, BaseException):
            for attribute, member in vars(value).items():
                function = member.fget if isinstance(member, property) else getattr(member, "__func__", member)
                if not attribute.startswith("_") and inspect.isfunction(function) and not inspect.getdoc(getattr(value, attribute)):
                    missing.append(f"{name}.{attribute}")
    assert missing == []


def test_undocumented_fires():
    @dataclasses.dataclass
    class Bare:
        x: int

    def documented():
        """Says something."""

    assert undocumented("tn.Bare", Bare)
    assert undocumented("tn.f", lambda: None)
    assert not undocumented("tn.documented", documented)


@pytest.mark.parametrize("module", list(_modules()))
def test_examples_run(module):
    failed, _ = doctest.testmod(importlib.import_module(module), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert failed == 0


def test_there_are_examples():
    finder = doctest.DocTestFinder()
    assert sum(bool(test.examples) for module in _modules() for test in finder.find(importlib.import_module(module))) > 10
