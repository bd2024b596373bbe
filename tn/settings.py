"""Everything this project reads from the environment, in one place."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Where caches live: $XDG_CACHE_HOME/tn-layers, or ~/.cache/tn-layers."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "tn-layers"
