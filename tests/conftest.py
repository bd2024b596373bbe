"""Settings every test runs under: one thread, a deterministic hypothesis, no network."""

import os
from pathlib import Path

# Before torch is imported: pytest-xdist runs one worker per core, and child processes inherit the setting.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A test that needs a hub is a bug; these make it fail at once instead of waiting for a connection.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
# No display is needed to draw a curve.
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import pytest
import torch

# The same examples on every run and every machine; no deadline, because a first call may plan.
hypothesis.settings.register_profile("deterministic", derandomize=True, deadline=None, database=None, print_blob=True)
# Fresh random examples, for a person who hunts: HYPOTHESIS_PROFILE=search.
hypothesis.settings.register_profile("search", deadline=None, max_examples=1000, print_blob=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "deterministic"))

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_configure(config):
    """When tests of kernels are asked for, import the kernels before other tests import triton: it decides then whether it interprets."""
    kernels = Path(__file__).parent / "kernels"
    given = [Path(argument.split("::")[0]).resolve() for argument in config.args]
    if any(path == kernels or path in kernels.parents or kernels in path.parents for path in given):
        from tests.kernels.interpreter import switch_on

        switch_on()


@pytest.fixture(autouse=True)
def _leave_no_trace():
    """Every test starts from seed 0 and float32, and one that changes a torch-wide setting fails itself, not its neighbour."""
    torch.manual_seed(0)
    before = _torch_settings()
    yield
    after = _torch_settings()
    if after != before:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)
        pytest.fail(f"the test left torch-wide settings changed: {before} became {after}")


def _torch_settings() -> dict[str, object]:
    return {
        "default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "threads": torch.get_num_threads(),
        "float32 matmul precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
    }
