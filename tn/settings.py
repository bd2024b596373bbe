"""Everything this project reads from the environment, in one place."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where caches live: $XDG_CACHE_HOME/tn-layers, or ~/.cache/tn-layers."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tn-layers"


def plan_store() -> Path | None:
    """Where plans are kept on disk without being asked for in code: the folder $TN_PLAN_STORE, or nowhere."""
    folder = os.environ.get("TN_PLAN_STORE")
    return Path(folder) if folder else None


def interpreting() -> bool:
    """Whether Triton kernels run in its interpreter, on CPU tensors: $TRITON_INTERPRET is 1, true, yes or on, as Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "yes", "y", "on")


def interpreted() -> dict[str, str]:
    """The environment for a child process in which Triton kernels run in its interpreter."""
    return {**os.environ, "TRITON_INTERPRET": "1"}
