"""The filters against brute force, and the draws against their distribution."""

import math

import pytest
import torch

from zoo import Sampler


def _softmax(logits):
    top = max(logits)
    weights = [math.exp(x - top) for x in logits]
    return [w / sum(weights) for w in weights]


def _keep(p, kept):
    total = sum(p[i] for i in kept)
    return [p[i] / total if i in kept else 0.0 for i in range(len(p))]


def _brute(logits, temperature, top_k, top_p, min_p):
    """The definition, one token at a time."""
    p = _softmax([x / temperature for x in logits])
    order = sorted(range(len(p)), key=lambda i: -p[i])
    if top_k is not None:
        p = _keep(p, set(order[:top_k]))
    if top_p is not None:
        kept, mass = set(), 0.0
        for i in order:
            if mass >= top_p or p[i] == 0:
                break
            kept.add(i)
            mass += p[i]
        p = _keep(p, kept)
    if min_p is not None:
        p = _keep(p, {i for i in range(len(p)) if p[i] >= min_p * max(p)})
    return p


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("top_k", [None, 1, 5, 100])
@pytest.mark.parametrize("top_p", [None, 0.01, 0.7, 1.0])
@pytest.mark.parametrize("min_p", [None, 0.0, 0.1, 1.0])
def test_filters_equal_brute_force(temperature, top_k, top_p, min_p):
    logits = torch.randn(3, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    got = Sampler(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p).probabilities(logits)
    want = torch.tensor([_brute(row.tolist(), temperature, top_k, top_p, min_p) for row in logits], dtype=torch.float64)
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-9)


def test_top_p_keeps_the_token_that_reaches_p():
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    kept = [(Sampler(top_p=p).probabilities(logits) > 0).tolist() for p in (0.4, 0.6, 0.9)]
    assert kept == [[True, False, False], [True, True, False], [True, True, True]]


def test_top_k_keeps_ties():
    assert (Sampler(top_k=2).probabilities(torch.tensor([2.0, 1.0, 1.0, 0.0])) > 0).tolist() == [True, True, True, False]


def test_temperature_zero_and_tiny_take_the_largest():
    logits = torch.tensor([[1.0, 3.0, 2.0]])
    for temperature in (0.0, 1e-30):
        p = Sampler(temperature=temperature).probabilities(logits)
        assert p.tolist() == [[0.0, 1.0, 0.0]]


def test_half_precision_is_computed_in_single():
    logits = torch.randn(2, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    p = Sampler(top_p=0.9).probabilities(logits)
    assert p.dtype == torch.float32
    torch.testing.assert_close(p.sum(-1), torch.ones(2))


def test_draws_follow_the_distribution():
    p = torch.tensor([0.5, 0.25, 0.125, 0.125])
    n = 20_000
    draws = Sampler().draw(p.log().expand(n, 4), torch.Generator().manual_seed(0))
    counts = torch.bincount(draws, minlength=4) / n
    # Five standard deviations of a binomial share.
    assert ((counts - p).abs() < 5 * (p * (1 - p) / n).sqrt()).all()


def test_filtered_tokens_are_never_drawn():
    logits = torch.tensor([3.0, 2.9, -5.0]).expand(5000, 3)
    assert Sampler(min_p=0.5, temperature=1.5).draw(logits, torch.Generator().manual_seed(0)).max() == 1


@pytest.mark.parametrize("temperature", [1e-30, 1e-300, 5e-324])
def test_a_temperature_that_the_dtype_rounds_to_zero(temperature):
    """The limit is the most likely token, ties shared."""
    p = Sampler(temperature=temperature).probabilities(torch.tensor([[1.0, 3.0, 2.0], [3.0, 1.0, 3.0]]))
    assert p.tolist() == [[0.0, 1.0, 0.0], [0.5, 0.0, 0.5]]
