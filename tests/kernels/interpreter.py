"""Importing the kernels so that Triton interprets them, where there is no GPU to compile them for."""

import sys

import pytest
import torch

SWITCH = "TRITON_INTERPRET"


def switch_on() -> None:
    """Import the kernels under the switch, and take it back. Has to run before anything else imports triton; twice does no harm."""
    if torch.cuda.is_available():
        return
    if "triton" in sys.modules and "tn_kernels" not in sys.modules:
        raise pytest.UsageError("triton was imported before tests/kernels could switch its interpreter on")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(SWITCH, "1")
        from tn_kernels import launch

    # Otherwise every test here would quietly compare torch with torch.
    assert launch.INTERPRETED
