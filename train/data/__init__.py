"""Text to batches of token ids: sources, the token cache, batches that are a pure function of (seed, index)."""

from train.data.batches import Batch, Batches, sweep
from train.data.cache import Corpus, Summary, default_cache_dir, prepare, prepare_main
from train.data.documents import DataError, Source, split_documents
from train.data.hub import HubUnreachable, HuggingFaceSource
from train.data.sources import BinSource, FileSource, source, source_names

__all__ = [
    "Batch",
    "Batches",
    "BinSource",
    "Corpus",
    "DataError",
    "FileSource",
    "HubUnreachable",
    "HuggingFaceSource",
    "Source",
    "Summary",
    "default_cache_dir",
    "prepare",
    "prepare_main",
    "source",
    "source_names",
    "split_documents",
    "sweep",
]
