"""When measurements are due, and how many of them the time allows."""

from __future__ import annotations

import pytest

from hessian_callback.cadence import Cadence, TimeShare


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
