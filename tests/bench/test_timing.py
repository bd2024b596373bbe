"""The interleaved timer, on a clock that the tests turn."""

import pytest

from bench.timing import Timing, interleaved


class Clock:
    """A clock that moves only when a function says it worked."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def work(self, name, seconds):
        def function():
            self.calls.append(name)
            self.now += seconds() if callable(seconds) else seconds

        return function

    def __call__(self):
        return self.now


def test_times_and_ratio():
    clock = Clock()
    timings = interleaved({"a": clock.work("a", 2.0), "b": clock.work("b", 6.0)}, rounds=4, warmup=1, clock=clock)
    assert timings["a"].samples == (2.0,) * 4
    assert timings["b"].median == 6.0
    assert timings["a"].faster_than(timings["b"]) == 3.0
    assert timings["b"].faster_than(timings["a"]) == pytest.approx(1 / 3)


def test_turns_are_reversed_every_round():
    clock = Clock()
    interleaved({"a": clock.work("a", 1.0), "b": clock.work("b", 1.0)}, rounds=2, warmup=0, clock=clock)
    assert clock.calls[2:] == ["a", "b", "b", "a"]  # the first two calls find out how long one takes


def test_short_functions_are_repeated():
    clock = Clock()
    timings = interleaved({"a": clock.work("a", 0.001)}, rounds=2, warmup=0, least_seconds=0.01, clock=clock)
    assert len(clock.calls) == 1 + 2 * 10
    assert timings["a"].median == pytest.approx(0.001)


def test_a_slow_minute_does_not_change_the_ratio():
    clock = Clock()
    slow = [1.0]
    turns = {"a": clock.work("a", lambda: slow[0]), "b": clock.work("b", lambda: 2 * slow[0])}
    first = interleaved(turns, rounds=3, warmup=0, clock=clock)
    slow[0] = 10.0
    second = interleaved(turns, rounds=3, warmup=0, clock=clock)
    assert first["a"].faster_than(first["b"]) == second["a"].faster_than(second["b"]) == 2.0


def test_quartiles():
    assert Timing((1.0, 2.0, 3.0, 4.0, 5.0)).quartiles == (2.0, 4.0)
    assert Timing((7.0,)).quartiles == (7.0, 7.0)


def test_rounds_are_checked():
    with pytest.raises(ValueError, match="at least 1, got 0"):
        interleaved({}, rounds=0)
