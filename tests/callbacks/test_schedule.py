"""When measurements are due, and how many of them the time allows."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hessian_callback.callbacks.schedule import Cadence, TimeShare


def test_the_share_of_time_survives_a_resume() -> None:
    now = 0.0
    share = TimeShare(0.1, clock=lambda: now)
    share.start()
    now = 100.0
    share.add(5.0)
    later = TimeShare(0.1, clock=lambda: now)
    later.restore(share.state())
    now = 1000.0
    later.start()
    assert later.elapsed == 100.0
    assert later.allows_another() is (10.0 <= 0.1 * 105.0)
    now = 1050.0
    assert later.fraction == pytest.approx(5 / 150)


def test_cadence_crosses_several_steps_at_once() -> None:
    assert Cadence.checked(1, 10, None).at_step(9, 11)
    assert not Cadence.checked(1, 10, None).at_step(10, 19)
    assert Cadence.checked(1, None, [5, 50]).at_step(3, 7)
    assert not Cadence.checked(1, None, [5, 50]).at_start
    assert Cadence.checked(3, None, None).at_epoch(0, None)
    assert [epoch for epoch in range(1, 7) if Cadence.checked(3, None, None).at_epoch(epoch, 0)] == [3, 4, 5, 6]


class Run:
    """A simulated run: epochs and measurements take what they are told to."""

    def __init__(self, limit: float, state: Any = None) -> None:
        self.now = 0.0
        self.share = TimeShare(limit, clock=lambda: self.now)
        if state is not None:
            self.share.restore(state)
        self.share.start()

    def train(self, seconds: float) -> None:
        self.now += seconds

    def measure(self, seconds: float) -> None:
        self.now += seconds
        self.share.add(seconds)


duration = st.floats(1e-3, 1e3)


@given(st.floats(0.01, 0.9), duration, st.lists(st.tuples(duration, duration), max_size=40), st.integers(0, 39))
def test_the_share_is_never_further_from_its_limit_than_one_measurement(
    limit: float, first: float, points: list[tuple[float, float]], resumed: int
) -> None:
    run = Run(limit)
    run.measure(first)  # at the start, unasked
    debt = (1 - limit) * first
    for number, (epoch, seconds) in enumerate(points):
        if number == resumed:
            run = Run(limit, run.share.state())
        run.train(epoch)
        expected = run.share.expected
        tolerance = 1e-9 * run.share.elapsed
        if run.share.allows_another():
            run.measure(seconds)
            # What is left of the first measurement's debt is paid before another is allowed.
            debt = (1 - limit) * max(0.0, seconds - expected)
        else:
            assert run.share.spent > limit * run.share.elapsed - (1 - limit) * expected - tolerance
        assert run.share.spent <= limit * run.share.elapsed + debt + tolerance


@pytest.mark.parametrize("limit", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("last", [False, True], ids=["", "forced_end"])
@given(st.integers(0, 10**9))
def test_a_long_run_of_varying_speed_gets_what_was_asked_for(limit: float, last: bool, seed: int) -> None:
    random = Random(seed)
    run = Run(limit)
    run.measure(6.0)  # the first is cold
    measured, speed = 1, 1.0
    while measured < 30:
        speed = min(4.0, max(0.25, speed * random.uniform(0.8, 1.25)))
        run.train(random.uniform(0.3, 0.7) / limit / 10 * speed)
        if run.share.allows_another():
            run.measure(random.uniform(0.7, 1.3) * random.choice([1.0, 1.0, 1.0, 1.0, 2.0]))
            measured += 1
    if last:
        run.measure(1.0)
    assert 0.9 * limit <= run.share.fraction <= 1.1 * limit


def test_one_slow_measurement_does_not_decide_what_the_next_is_expected_to_take() -> None:
    run = Run(0.1)
    for seconds in (1.0, 1.1, 50.0, 0.9):
        run.measure(seconds)
    assert run.share.expected == pytest.approx(1.05)
    assert Run(0.1, run.share.state()).share.expected == run.share.expected
    assert Run(0.1, {"spent": 1.0, "elapsed": 2.0, "last": 0.5}).share.expected == 0.5
