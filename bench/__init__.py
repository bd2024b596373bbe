"""Reports on what the layers cost and how fast they run.  python -m bench lists them."""

from bench.peers import TorchGPT
from bench.row import Row, append
from bench.timing import Timing, interleaved

__all__ = ["Row", "Timing", "TorchGPT", "append", "interleaved"]
