"""Text samples during training, written to samples.txt."""

import torch

import zoo
from train.config import RunConfig
from train.data import Corpus
from train.errors import ConfigError


def prompt(config: RunConfig, corpus: Corpus) -> str:
    """Return the text that samples continue: the config's, or the beginning of the held-out text.

    Raises:
        ConfigError: a prompt without tokens, or one that leaves no room in the context.
    """
    tokenizer, context = corpus.tokenizer, config.model.context
    if config.sample_prompt is None:
        return tokenizer.decode([int(token) for token in corpus.val[: max(1, min(16, context // 4))]])
    count = len(tokenizer.encode(config.sample_prompt))
    if not 0 < count < context:
        raise ConfigError(f"sample_prompt should have 1 to {context - 1} tokens; {config.sample_prompt!r} has {count}")
    return config.sample_prompt


def text(model: zoo.GPT, tokenizer: zoo.Tokenizer, start: str, *, length: int, seed: int) -> str:
    """Return the prompt and its continuation by at most `length` tokens; the model's mode and torch's random state are kept."""
    length = min(length, model.config.context - len(tokenizer.encode(start)))
    with torch.random.fork_rng():
        pieces = zoo.stream_text(model, tokenizer, start, length=max(0, length), temperature=0.8, seed=seed)
        return start + "".join(pieces)
