"""Generation: the cache changes nothing, seeds decide everything, limits are clear."""

import importlib

import pytest
import torch

import zoo
from tests.zoo.models import SMALL, VARIANTS, small, tokens
from zoo import CacheError, GenerateError

generation = importlib.import_module("zoo.generate")  # the module; zoo.generate is the function


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_cached_logits_equal_uncached(fields):
    model, x = small(**fields), tokens(2, 20)
    cache = model.new_cache(2, 20)
    with torch.no_grad():
        parts = [model(chunk, cache) for chunk in x.split([7, 1, 1, 8, 3], dim=1)]
        torch.testing.assert_close(torch.cat(parts, 1), model(x), atol=1e-5, rtol=1e-5)
    assert cache.length == cache.capacity == 20


@pytest.mark.parametrize("fields", VARIANTS.values(), ids=VARIANTS)
def test_cached_generation_equals_uncached(fields):
    model, x = small(**fields), tokens(2, 5)
    cached = zoo.generate(model, x, length=15, temperature=0.7)
    assert cached.shape == (2, 20)
    assert torch.equal(cached[:, :5], x)
    assert torch.equal(cached, zoo.generate(model, x, length=15, temperature=0.7, cache=False))


@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_equals_uncached_under_autocast(qk_norm):
    model, x = small(qk_norm=qk_norm), tokens(2, 5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(zoo.generate(model, x, length=15), zoo.generate(model, x, length=15, cache=False))
        assert generation._Window(model, x, 20).cache.keys_LBHSD.dtype == torch.bfloat16


def test_a_cache_may_have_a_smaller_dtype_than_the_model():
    model, x = small(), tokens(2, 9)
    cache = model.new_cache(2, dtype=torch.bfloat16)
    with torch.no_grad():
        torch.testing.assert_close(model(x, cache), model(x), atol=0.1, rtol=0.1)
    assert cache.nbytes == model.new_cache(2).nbytes // 2


def test_sliding_past_the_context_is_the_same_with_and_without_cache():
    model, x = small(), tokens(1, 5)
    cached = zoo.generate(model, x, length=70, overflow="slide")
    assert cached.shape == (1, 75)
    assert torch.equal(cached, zoo.generate(model, x, length=70, overflow="slide", cache=False))
    # A prompt longer than the context is read from its last half context on.
    long = tokens(1, 60)
    tail = zoo.generate(model, long[:, -12:], length=3, overflow="slide")
    assert torch.equal(zoo.generate(model, long, length=3, overflow="slide")[:, -3:], tail[:, -3:])


def test_greedy_is_the_most_likely_token_each_time():
    model, x = small(), tokens(1, 4)
    for _ in range(10):
        x = torch.cat([x, model(x)[:, -1:].argmax(-1)], 1)
    assert torch.equal(zoo.generate(model, x[:, :4], length=10, temperature=0), x)
    assert torch.equal(zoo.generate(model, x[:, :4], length=10, top_k=1), x)


def test_a_seed_decides_the_draws():
    model, x = small(), tokens(2, 4)
    first = zoo.generate(model, x, length=12, seed=3)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    assert torch.equal(zoo.generate(model, x, length=12, seed=3), first)
    assert torch.equal(torch.get_rng_state(), state), "the global generator must not move"
    assert not torch.equal(zoo.generate(model, x, length=12, seed=4), first)


def test_stream_gives_the_tokens_of_generate():
    model, x = small(), tokens(2, 4)
    steps = list(zoo.stream(model, x, length=6))
    assert torch.equal(torch.stack(steps, 1), zoo.generate(model, x, length=6)[:, 4:])


def test_one_sequence_as_a_list_or_a_vector():
    model = small()
    out = zoo.generate(model, [1, 2, 3], length=2)
    assert out.shape == (5,)
    assert torch.equal(zoo.generate(model, torch.tensor([1, 2, 3]), length=2), out)
    assert torch.equal(zoo.generate(model, [1, 2, 3], length=0), torch.tensor([1, 2, 3]))


def test_stop_ends_a_sequence_and_the_batch():
    model, x = small(), tokens(2, 4)
    free = zoo.generate(model, x, length=15)[:, 4:]
    stop = int(free[0, 3])
    first = [row.tolist().index(stop) if stop in row else 15 for row in free]
    stopped = zoo.generate(model, x, length=15, stop=stop)[:, 4:]
    assert stopped.shape[1] == min(15, max(first) + 1)
    for row, end in zip(stopped, first, strict=True):
        assert (row[end:] == stop).all()
    free = zoo.generate(model, x[0], length=15)[4:].tolist()
    alone = zoo.generate(model, x[0], length=15, stop={free[5], free[2]})[4:].tolist()
    assert alone == free[: min(free.index(free[5]), free.index(free[2])) + 1]


def test_mode_is_restored_and_dropout_is_off():
    model = small(dropout=0.5).train()
    torch.manual_seed(0)
    first = zoo.generate(model, [1, 2], length=8)
    torch.manual_seed(1)
    assert torch.equal(zoo.generate(model, [1, 2], length=8), first)
    assert model.training
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize(
    "prompt, settings, message",
    [
        ([], {}, "the prompt is empty"),
        ([97], {}, "token 97 of the prompt is not one of the model's 0 … 96"),
        ([-1], {}, "token -1 of the prompt"),
        (torch.zeros(2), {}, "must be whole numbers"),
        ([1], {"length": -1}, "length=-1 must be at least 0"),
        ([1] * 10, {"length": 20}, "10 tokens of prompt and 20 new ones do not fit the model's context of 24: ask for at most 14"),
        ([1], {"overflow": "slid"}, "did you mean 'slide'"),
        ([1], {"temperature": -1.0}, "temperature=-1.0 must be 0"),
        ([1], {"top_k": 0}, "top_k=0 must be at least 1"),
        ([1], {"top_p": 0.0}, "top_p=0.0 must be above 0"),
        ([1], {"min_p": 1.5}, "min_p=1.5 must be between 0 and 1"),
    ],
)
def test_refused_before_the_first_step(prompt, settings, message):
    with pytest.raises(GenerateError, match=message):
        zoo.stream(small(), prompt, **{"length": 4, **settings})


def test_damaged_parameters_are_named():
    model = small()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    with pytest.raises(GenerateError, match="logits are not finite"):
        zoo.generate(model, [1], length=1)


def test_cache_refusals():
    model, x = small(), tokens(2, 5)
    with pytest.raises(CacheError, match=r"for inference: call the model under torch\.no_grad"):
        model(x, model.new_cache(2))
    with torch.no_grad():
        with pytest.raises(CacheError, match="holds 3 sequences, and the call has 2"):
            model(x, model.new_cache(3))
        cache = model.new_cache(2, 6)
        model(x, cache)
        with pytest.raises(CacheError, match=r"at most 6 tokens; 5 \+ 2 do not fit"):
            model(x[:, :2], cache)
        assert cache.length == 5
        cache.clear()
        torch.testing.assert_close(model(x, cache), model(x))
    assert cache.nbytes == 2 * 4 * SMALL["layers"] * 2 * 6 * SMALL["width"]


class _Letters:
    """Bytes as tokens; 256 ends a text."""

    vocab, end_of_text = 257, 256

    def encode(self, text):
        return list(text.encode())

    def decode(self, ids):
        return bytes(i for i in ids if i < 256).decode(errors="replace")


def _plays(monkeypatch, script):
    """Make the sampler draw this script, whatever the model says."""
    left = iter(script)
    monkeypatch.setattr(zoo.Sampler, "draw", lambda self, logits, generator: torch.tensor([next(left)]))


def test_text_comes_in_whole_characters_and_ends_at_end_of_text(monkeypatch):
    text = "né → 🙂!"
    _plays(monkeypatch, [*text.encode(), 256, 65])
    pieces = list(zoo.stream_text(small(vocab=300), _Letters(), "ab", length=20))
    assert pieces == list(text)


def test_a_broken_character_at_the_end_is_still_shown(monkeypatch):
    _plays(monkeypatch, [65, *"🙂".encode()[:2]])
    assert "".join(zoo.stream_text(small(vocab=300), _Letters(), "ab", length=3)) == "A\N{REPLACEMENT CHARACTER}"


def test_text_stays_inside_the_tokenizer():
    model = small(vocab=300)
    for step in zoo.stream(model, [1], length=20, temperature=50.0, vocab=3):
        assert int(step) < 3
    with pytest.raises(GenerateError, match="the tokenizer has 257 tokens and the model only 97"):
        zoo.stream_text(small(), _Letters(), "ab", length=3)


def test_an_empty_prompt_starts_a_document():
    model = small(vocab=300)
    assert "".join(zoo.stream_text(model, _Letters(), "", length=5, seed=1)) == "".join(
        zoo.stream_text(model, _Letters(), "", length=5, seed=1, cache=False)
    )
