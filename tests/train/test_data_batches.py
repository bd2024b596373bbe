"""Batches: a pure function of (seed, index), every row once an epoch, real tokens counted as such."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train.data import Batches, DataError, sweep

END = 0
DOCUMENTS = st.lists(st.lists(st.integers(1, 50), max_size=12), min_size=1, max_size=12)


def joined(documents: list[list[int]]) -> np.ndarray:
    return np.array([token for document in documents for token in (*document, END)], dtype=np.uint16)


def rows_of(batches: Batches, epoch: int, batch: int) -> list[tuple[list[int], list[int]]]:
    """Inputs and targets of each row of an epoch, in the order they come."""
    places = range(epoch * batches.rows, (epoch + 1) * batches.rows)
    found = {place // batch: batches[place // batch] for place in places}
    return [(found[p // batch].inputs[p % batch].tolist(), found[p // batch].targets[p % batch].tolist()) for p in places]


# Packed


@given(
    length=st.integers(2, 200), context=st.integers(1, 20), batch=st.integers(1, 7), seed=st.integers(0, 2**64 - 1), epoch=st.integers(0, 5)
)
def test_packed_rows_come_once_an_epoch(length, context, batch, seed, epoch):
    tokens = np.arange(length, dtype=np.uint16)
    try:
        batches = Batches(tokens, context=context, batch=batch, seed=seed)
    except DataError:
        assert length < (batch + 1) * context
        return
    rows = rows_of(batches, epoch, batch)
    assert all(targets == [token + 1 for token in inputs] for inputs, targets in rows)
    starts = sorted(inputs[0] for inputs, _ in rows)
    assert len(starts) == batches.rows
    assert all(later - sooner == context for sooner, later in itertools.pairwise(starts))
    assert starts[0] >= 0
    assert starts[-1] + context < length
    # What an epoch leaves out is less than two rows, and another epoch has it.
    assert length - 1 - batches.rows * context < 2 * context


def test_packed_epochs_differ_in_order_and_offset():
    tokens = np.arange(1000, dtype=np.uint16)
    batches = Batches(tokens, context=10, batch=1, seed=0)
    first, second = rows_of(batches, 0, 1), rows_of(batches, 1, 1)
    assert [inputs[0] // 10 for inputs, _ in first] != [inputs[0] // 10 for inputs, _ in second]
    offsets = {min(inputs[0] for inputs, _ in rows_of(batches, epoch, 1)) for epoch in range(60)}
    assert offsets == set(range(10))
    seen = {token for epoch in range(60) for inputs, _ in rows_of(batches, epoch, 1) for token in inputs}
    assert seen == set(range(999))


@given(seed=st.integers(0, 2**32), order=st.permutations(range(12)), context=st.integers(1, 6), batch=st.integers(1, 5))
def test_a_batch_depends_on_seed_and_index_only(seed, order, context, batch):
    tokens = np.arange(60, dtype=np.uint32)
    one, two = (Batches(tokens, context=context, batch=batch, seed=seed) for _ in range(2))
    expected = [one[index] for index in range(12)]
    for index in order:
        assert torch.equal(two[index].inputs, expected[index].inputs)
        assert torch.equal(two[index].targets, expected[index].targets)


def test_seeds_give_different_orders_and_the_order_is_kept_for_good():
    tokens = np.arange(2000, dtype=np.uint16)
    orders = {tuple(Batches(tokens, context=10, batch=8, seed=seed)[0].inputs[:, 0].tolist()) for seed in range(10)}
    assert len(orders) == 10
    # Recorded once: another order would change every run that resumes.
    batches = Batches(np.arange(100, dtype=np.uint16), context=7, batch=3, seed=1234)
    assert [batches[index].inputs[:, 0].tolist() for index in (0, 1, 1000)] == [[85, 8, 78], [92, 43, 64], [43, 22, 71]]


def test_large_indices_are_cheap_and_exact():
    tokens = np.arange(500, dtype=np.uint16)
    batches = Batches(tokens, context=4, batch=2, seed=0)
    assert torch.equal(batches[10**9].inputs, Batches(tokens, context=4, batch=2, seed=0)[10**9].inputs)
    assert batches.epoch(batches.rows) == 2.0


def test_types_and_counts():
    token_bytes = np.array([0, 1, 2, 3, 4])
    batch = Batches(np.array([1, 2, 3, 4, 0, 1], dtype=np.uint16), context=2, batch=2, seed=0, token_bytes=token_bytes)[0]
    assert batch.inputs.dtype == batch.targets.dtype == torch.int64
    assert batch.inputs.shape == batch.targets.shape == (2, 2)
    assert batch.tokens == 4
    assert batch.bytes == sum(token_bytes[token] for token in batch.targets.flatten().tolist())
    assert Batches(np.arange(9, dtype=np.uint16), context=2, batch=2, seed=0)[0].bytes is None


# Padded


@given(documents=DOCUMENTS, context=st.integers(1, 8), batch=st.integers(1, 4), seed=st.integers(0, 99), ended=st.booleans())
def test_padded_rows_are_the_documents(documents, context, batch, seed, ended):
    tokens = joined(documents)
    if not ended:  # a last document that nothing ends
        tokens = tokens[:-1]
    full = [[*document, END] for document in documents]
    full[-1] = full[-1] if ended else full[-1][:-1]
    expected = sorted(row[: context + 1] for row in full if len(row) >= 2)
    arguments = {"context": context, "batch": batch, "mode": "padded", "end_of_text": END}
    if len(expected) < batch:
        with pytest.raises(DataError, match="documents of 2 tokens or more"):
            Batches(tokens, seed=seed, **arguments)
        return
    batches = Batches(tokens, seed=seed, **arguments)
    found = []
    for inputs, targets in rows_of(batches, 1, batch):
        real = sum(token != -100 for token in targets)
        assert targets[real:] == [-100] * (context - real)
        assert inputs[real:] == [0] * (context - real)
        assert inputs[1:real] == targets[: real - 1]
        found.append([inputs[0], *targets[:real]])
    assert sorted(found) == expected
    assert sum(batch.tokens for batch in sweep(tokens, **arguments)) == sum(len(row) - 1 for row in expected)
    order = [[row[0], *(token for token in targets if token >= 0)] for b in sweep(tokens, **arguments) for row, targets in pairs(b)]
    assert sorted(order) == expected


def pairs(batch) -> list[tuple[list[int], list[int]]]:
    return list(zip(batch.inputs.tolist(), batch.targets.tolist(), strict=True))


# Evaluation


@given(length=st.integers(2, 120), context=st.integers(1, 20), batch=st.integers(1, 6))
def test_sweep_makes_every_token_a_target_once(length, context, batch):
    tokens = np.arange(length, dtype=np.uint16)
    found = list(sweep(tokens, context=context, batch=batch))
    targets = [token for b in found for token in b.targets.flatten().tolist() if token != -100]
    assert targets == list(range(1, length))
    assert sum(b.tokens for b in found) == length - 1
    assert all(b.inputs.shape == (batch, context) for b in found[:-1])
    again = list(sweep(tokens, context=context, batch=batch))
    assert all(torch.equal(a.inputs, b.inputs) and torch.equal(a.targets, b.targets) for a, b in zip(found, again, strict=True))


def test_sweep_limited_is_spread_over_the_data():
    tokens = np.arange(1001, dtype=np.uint16)
    found = list(sweep(tokens, context=10, batch=2, batches=5))
    assert [b.inputs[:, 0].tolist() for b in found] == [[0, 100], [200, 300], [400, 500], [600, 700], [800, 900]]
    assert len(list(sweep(tokens, context=10, batch=2, batches=10**6))) == 50
    tiny = list(sweep(tokens[:5], context=10, batch=8, batches=3, token_bytes=np.ones(1001)))
    assert [(b.inputs.shape, b.tokens, b.bytes) for b in tiny] == [((1, 10), 4, 4)]


# Refusals


TOKENS = np.arange(100, dtype=np.uint16)


@pytest.mark.parametrize(
    "changes, match",
    [
        ({"tokens": TOKENS[:10]}, r"too little data for a batch of 4: 10 tokens make 1 rows of context 8 \+ 1; use a smaller batch"),
        ({"tokens": TOKENS[:0]}, "too little data for a batch of 4: 0 tokens make 0 rows"),
        ({"tokens": TOKENS[:0], "mode": "padded", "end_of_text": 0}, "there are 0 documents"),
        ({"mode": "padded"}, "end_of_text is None: use mode 'packed'"),
        ({"mode": "paded"}, "unknown mode 'paded': did you mean 'padded'\\? One of: packed, padded"),
        ({"context": 0}, "context must be a whole number of 1 or more, got 0"),
        ({"batch": 2.5}, "batch must be a whole number of 1 or more, got 2.5"),
        ({"batch": True}, "got True"),
        ({"vocab": 0}, "vocab must be"),
        ({"seed": -1}, "seed must be a whole number of 0 or more, got -1"),
        ({"tokens": TOKENS.reshape(10, 10)}, r"flat array of integers, got uint16 of shape \(10, 10\)"),
        ({"tokens": TOKENS.astype(np.float32)}, "got float32"),
    ],
)
def test_bad_arguments(changes, match):
    with pytest.raises(DataError, match=match):
        Batches(**{"tokens": TOKENS, "context": 8, "batch": 4, "seed": 0, **changes})


def test_bad_sweeps():
    with pytest.raises(DataError, match="nothing to evaluate on: 1 tokens make no row in packed mode"):
        sweep(TOKENS[:1], context=4, batch=2)
    with pytest.raises(DataError, match="nothing to evaluate on: 0 tokens"):
        sweep(TOKENS[:0], context=4, batch=2)
    with pytest.raises(DataError, match="batches must be a whole number"):
        sweep(TOKENS, context=4, batch=2, batches=0)


@pytest.mark.parametrize("index", [-1, 0.5])
def test_bad_indices(index):
    with pytest.raises(DataError, match=f"index of a batch must be a whole number of 0 or more, got {index}"):
        Batches(TOKENS, context=8, batch=4, seed=0)[index]


def test_batches_are_endless_and_say_so():
    with pytest.raises(TypeError, match="not iterable"):
        iter(Batches(TOKENS, context=8, batch=4, seed=0))


@pytest.mark.parametrize("limit", [{"vocab": 99}, {"token_bytes": np.ones(99)}])
def test_tokens_outside_the_vocabulary_are_refused(limit):
    with pytest.raises(DataError, match="the data has token 99, but the model's vocabulary has only 99 ids"):
        list(sweep(TOKENS, context=8, batch=4, **limit))
    assert Batches(TOKENS, context=8, batch=4, seed=0, vocab=100)[0].tokens == 32
    last = TOKENS[-9:]  # the largest token is the last target
    with pytest.raises(DataError, match="token 99"):
        Batches(last, context=8, batch=1, seed=0, **limit)[0]
