"""Kernels run on a GPU when there is one, otherwise on the CPU in Triton's interpreter; fresh memory is NaN.

Triton decides when it is imported whether kernels will be interpreted, and so do the modules that define them. So the switch is set while
they are imported (tests/conftest.py does it before others import triton), taken back for everyone else, and set again while a test of this
folder runs.
"""

import os

import pytest
import torch

from tests.kernels.interpreter import SWITCH, switch_on

switch_on()


@pytest.fixture(autouse=True)
def _interpreted(monkeypatch):
    if not torch.cuda.is_available():
        monkeypatch.setenv(SWITCH, "1")


@pytest.fixture(autouse=True)
def _poisoned(_leave_no_trace):
    """torch.empty gives NaN, so that a kernel which leaves something unwritten, or reads it, is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def environment_without_interpreter():
    return {name: value for name, value in os.environ.items() if name != SWITCH}
