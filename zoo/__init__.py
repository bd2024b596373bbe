"""Models made of tensor-network layers, and what belongs to them: configurations, generation, saved forms."""

from zoo.cache import KVCache
from zoo.config import GPTConfig
from zoo.describe import Description, describe
from zoo.errors import CacheError, ConfigError, GenerateError, SavedModelError
from zoo.functional import functional
from zoo.generate import generate, stream, stream_text
from zoo.gpt import GPT
from zoo.huggingface import from_pretrained, to_pretrained
from zoo.registry import create, names
from zoo.sampling import Sampler
from zoo.saved import load, save
from zoo.tokenizers import Tokenizer, TokenizerError, load_tokenizer, tokenizer, tokenizer_names

__all__ = [
    "CacheError",
    "ConfigError",
    "Description",
    "GPT",
    "GPTConfig",
    "GenerateError",
    "KVCache",
    "Sampler",
    "SavedModelError",
    "Tokenizer",
    "TokenizerError",
    "create",
    "describe",
    "from_pretrained",
    "functional",
    "generate",
    "load",
    "load_tokenizer",
    "names",
    "save",
    "stream",
    "stream_text",
    "to_pretrained",
    "tokenizer",
    "tokenizer_names",
]
