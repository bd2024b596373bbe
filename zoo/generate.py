"""Text from a model, one token after the other."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import Tensor

import tn
from zoo.cache import KVCache
from zoo.errors import GenerateError
from zoo.gpt import GPT
from zoo.sampling import Sampler
from zoo.tokenizers import Tokenizer

OVERFLOW = ("error", "slide")


def generate(
    model: GPT,
    tokens: Tensor | Sequence[int],
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = 0,
    cache: bool = True,
    stop: int | Collection[int] | None = None,
    overflow: str = "error",
) -> Tensor:
    """Continue one sequence of tokens, or a batch of them.

    Args: as `stream`.

    Returns:
        prompt and new tokens, int64: (seq,) for one sequence, (batch, seq) for a batch. It is shorter than prompt +
        length when every sequence met a stop token; one that met it earlier repeats it.

    Raises:
        GenerateError: see `stream`.

    Example:
        >>> import zoo
        >>> model = zoo.create("gpt-tiny", layers=1)
        >>> generate(model, [1, 2, 3], length=4).shape
        torch.Size([7])
    """
    prompt_BS = _prompt(model, tokens)
    new = list(
        stream(
            model,
            prompt_BS,
            length=length,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            seed=seed,
            cache=cache,
            stop=stop,
            overflow=overflow,
        )
    )
    out_BS = torch.cat([prompt_BS, torch.stack(new, dim=1)], dim=1) if new else prompt_BS
    return out_BS if isinstance(tokens, Tensor) and tokens.dim() == 2 else out_BS[0]


def stream(
    model: GPT,
    tokens: Tensor | Sequence[int],
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = 0,
    cache: bool = True,
    stop: int | Collection[int] | None = None,
    overflow: str = "error",
    vocab: int | None = None,
) -> Iterator[Tensor]:
    """The new tokens one step at a time, as they are made. The arguments are checked before the first step.

    Args:
        model: used in evaluation mode without gradients; its mode is restored after every step.
        tokens: the prompt: a list or a (seq,) tensor for one sequence, (batch, seq) for a batch.
        length: the most new tokens.
        temperature, top_k, top_p, min_p: see `Sampler`.
        seed: of the draws; None draws differently each time.
        cache: keep keys and values, and so compute only the new token at each step. False gives the same tokens.
        stop: token or tokens that end a sequence; they are part of the result.
        overflow: when prompt + length is longer than the context: "error" refuses; "slide" goes on from the last half
            of the context each time it is full.
        vocab: draw only from the first `vocab` tokens (a tokenizer smaller than the model's table).

    Returns:
        an iterator of (batch,) int64 tensors on the model's device.

    Raises:
        GenerateError: the prompt is empty or has tokens the model does not know, or a setting is not valid.
    """
    prompt_BS = _prompt(model, tokens)
    sampler = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    if length < 0:
        raise GenerateError(f"length={length} must be at least 0")
    if seed is not None and not 0 <= seed < 2**63:
        raise GenerateError(f"seed={seed} must be between 0 and {2**63 - 1}")
    if overflow not in OVERFLOW:
        raise GenerateError(tn.errors.unknown("way of overflow", overflow, OVERFLOW))
    total, context = prompt_BS.shape[1] + length, model.config.context
    if overflow == "error" and total > context:
        raise GenerateError(
            f"{prompt_BS.shape[1]} tokens of prompt and {length} new ones do not fit the model's context of {context}: "
            f"ask for at most {max(0, context - prompt_BS.shape[1])}, or use overflow='slide'"
        )
    window = _Window(model, prompt_BS, total) if cache else _Window(model, prompt_BS, None)
    return _steps(window, sampler, length=length, seed=seed, stop=_stops(stop), vocab=vocab)


def stream_text(
    model: GPT,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | None = 0,
    cache: bool = True,
    overflow: str = "error",
) -> Iterator[str]:
    """Pieces of text that continue a prompt; ends at the tokenizer's end of text.

    An empty prompt starts at the tokenizer's end-of-text token. A character that spans several tokens comes out whole.

    Raises:
        GenerateError: the tokenizer knows more tokens than the model, or see `stream`.
    """
    if tokenizer.vocab > model.config.vocab:
        raise GenerateError(
            f"the tokenizer has {tokenizer.vocab} tokens and the model only {model.config.vocab}: they do not belong together"
        )
    ids = [int(token) for token in tokenizer.encode(prompt)]
    if not ids and tokenizer.end_of_text is not None:
        ids = [tokenizer.end_of_text]
    steps = stream(
        model,
        ids,
        length=length,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        cache=cache,
        stop=tokenizer.end_of_text,
        overflow=overflow,
        vocab=tokenizer.vocab,
    )
    return _pieces(tokenizer, (int(step[0]) for step in steps))


class _Window:
    """The tokens the model sees: all of them until the context is full, then on from its last half."""

    def __init__(self, model: GPT, tokens_BS: Tensor, total: int | None) -> None:
        self.model, self.tokens_BS = model, tokens_BS
        self.context = model.config.context
        self.start = 0
        self.cache: KVCache | None = None
        if total is not None:
            self.cache = model.new_cache(tokens_BS.shape[0], min(total, self.context), dtype=_cache_dtype(model))

    def next_logits(self) -> Tensor:
        """Logits (batch, vocab) of the token after the last."""
        end = self.tokens_BS.shape[1]
        if end - self.start > self.context:
            self.start = end - max(1, self.context // 2)
            if self.cache is not None:
                self.cache.clear()
        held = 0 if self.cache is None else self.cache.length
        return _last_logits(self.model, self.tokens_BS[:, self.start + held :], self.cache)

    def push(self, token_B: Tensor) -> None:
        self.tokens_BS = torch.cat([self.tokens_BS, token_B[:, None]], dim=1)


def _steps(window: _Window, sampler: Sampler, *, length: int, seed: int | None, stop: Tensor, vocab: int | None) -> Iterator[Tensor]:
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        generator.manual_seed(seed)
    batch = window.tokens_BS.shape[0]
    done_B = torch.zeros(batch, dtype=torch.bool)
    last_B = torch.zeros(batch, dtype=torch.int64)
    for _ in range(length):
        drawn_B = sampler.draw(window.next_logits()[:, :vocab], generator)
        last_B = torch.where(done_B, last_B, drawn_B)
        done_B = done_B | torch.isin(last_B, stop)
        token_B = last_B.to(window.tokens_BS.device)
        window.push(token_B)
        yield token_B
        if done_B.all():
            return


@torch.no_grad()
def _last_logits(model: GPT, tokens_BS: Tensor, cache: KVCache | None) -> Tensor:
    training = model.training
    if training:
        model.eval()
    try:
        return model(tokens_BS, cache, last_only=True)[:, -1]
    finally:
        if training:
            model.train()


def _pieces(tokenizer: Tokenizer, tokens: Iterator[int]) -> Iterator[str]:
    """Text as soon as its characters are whole; each piece is decoded together with the one before it."""
    ids: list[int] = []
    before = shown = 0
    for token in tokens:
        if token == tokenizer.end_of_text:
            break
        ids.append(token)
        old, text = tokenizer.decode(ids[before:shown]), tokenizer.decode(ids[before:])
        if len(text) > len(old) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(old) :]
            before, shown = shown, len(ids)
    rest = tokenizer.decode(ids[before:])[len(tokenizer.decode(ids[before:shown])) :]
    if rest:
        yield rest


def _prompt(model: GPT, tokens: Tensor | Sequence[int]) -> Tensor:
    device = model.token_table.weight.device
    prompt = tokens if isinstance(tokens, Tensor) else torch.tensor([int(token) for token in tokens], dtype=torch.int64)
    if prompt.dtype.is_floating_point or prompt.dim() not in (1, 2):
        raise GenerateError(
            f"the prompt must be whole numbers of shape (seq,) or (batch, seq), got {prompt.dtype} of shape {tuple(prompt.shape)}"
        )
    prompt_BS = (prompt if prompt.dim() == 2 else prompt[None]).to(device=device, dtype=torch.int64)
    if not prompt_BS.numel():
        raise GenerateError("the prompt is empty: give at least one token")
    low, high = int(prompt_BS.min()), int(prompt_BS.max())
    if low < 0 or high >= model.config.vocab:
        raise GenerateError(f"token {low if low < 0 else high} of the prompt is not one of the model's 0 … {model.config.vocab - 1}")
    return prompt_BS


def _stops(stop: int | Collection[int] | None) -> Tensor:
    tokens = [] if stop is None else [stop] if isinstance(stop, int) else sorted(stop)
    return torch.tensor(tokens, dtype=torch.int64)


def _cache_dtype(model: GPT) -> torch.dtype:
    """Under autocast keys and values come in its dtype; a cache of that dtype is read without a cast at every step."""
    device = model.token_table.weight.device.type
    if torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return model.token_table.weight.dtype
