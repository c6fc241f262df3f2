"""Places that are due, owed and affordable: in simulated runs, and in runs of Lightning's Trainer."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hessian_callback.callbacks.schedule import Cadence, MeasurementSchedule, TimeShare
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.measurement.place import Place
from tests.helpers.calls import count_calls
from tests.helpers.lightning import Callback, ModelCheckpoint
from tests.helpers.toy_runs import loader, seeded, trainer


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
    """A simulated run whose epochs and measurements have given durations."""

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
            # The rest of the first measurement's debt is paid before another is allowed.
            debt = (1 - limit) * max(0.0, seconds - expected)
        else:
            assert run.share.spent > limit * run.share.elapsed - (1 - limit) * expected - tolerance
        assert run.share.spent <= limit * run.share.elapsed + debt + tolerance


@pytest.mark.parametrize("limit", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("last", [False, True], ids=["", "forced_end"])
@given(st.integers(0, 10**9))
def test_the_share_of_a_long_run_of_varying_speed_is_near_its_limit(limit: float, last: bool, seed: int) -> None:
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


def test_one_slow_measurement_does_not_change_the_expected_duration() -> None:
    run = Run(0.1)
    for seconds in (1.0, 1.1, 50.0, 0.9):
        run.measure(seconds)
    assert run.share.expected == pytest.approx(1.05)
    assert Run(0.1, run.share.state()).share.expected == run.share.expected
    assert Run(0.1, {"spent": 1.0, "elapsed": 2.0, "last": 0.5}).share.expected == 0.5


# -- the schedule --------------------------------------------------------------------------------


def measured(place: Place) -> Measurement:
    return Measurement(
        epoch=place.epoch, step=place.step, when=place.when, spectrum=None, fit=None, reason="none", seconds=1.0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_n_epochs": 0}, "every_n_epochs must be an integer of at least 1"),
        ({"every_n_epochs": 1.5}, "every_n_epochs must be an integer"),
        ({"every_n_epochs": None}, "every_n_epochs must be an integer"),
        ({"every_n_train_steps": 0}, "every_n_train_steps must be None or an integer of at least 1"),
        ({"every_n_train_steps": math.nan}, "every_n_train_steps must be None or an integer"),
        ({"every_n_train_steps": 2, "at_steps": [1]}, "not both"),
        ({"at_steps": []}, "at least one number"),
        ({"at_steps": [1, -1]}, r"at_steps\[1\] must be an integer of at least 0"),
        ({"at_steps": [1.5]}, r"at_steps\[0\] must be an integer"),
        ({"at_steps": 5}, "at_steps must be a list"),
        ({"at_steps": "10"}, "at_steps must be a list"),
        ({"at_end": "no"}, "at_end must be True or False"),
        ({"max_overhead": 0}, "max_overhead must be None or a finite number above 0"),
        ({"max_overhead": 1.1}, "max_overhead must be None or a finite number"),
        ({"max_overhead": math.nan}, "max_overhead must be None or a finite number"),
        ({"max_overhead": "10%"}, "max_overhead must be None or a finite number"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MeasurementSchedule(**options)


def test_at_steps_may_be_empty_with_the_end() -> None:
    schedule = MeasurementSchedule(at_steps=[], at_end=True)
    assert schedule.at_train_start(epoch=0, step=0, history=[]) is None
    assert schedule.at_train_end(epoch=3, step=9, history=[]) == Place(3, 9, "fit_end")
    assert schedule.at_train_end(epoch=3, step=9, history=[measured(Place(2, 9, "epoch"))]) is None


class Scheduled(Callback):
    """A callback whose measurements are entries in a history, at the places of a schedule."""

    def __init__(self, give_up: Callable[[Place], bool] = lambda place: False, **options: Any) -> None:
        self.schedule = MeasurementSchedule(**options)
        self.history: list[Measurement] = []
        self.give_up = give_up

    def measure(self, run: Any, place: Place | None) -> None:
        if place is None:
            return
        self.schedule.begin(place)
        if self.give_up(place):
            run.should_stop = True
            return
        self.history.append(measured(place))
        self.schedule.finish(1.0)

    def numbers(self, run: Any) -> dict[str, Any]:
        return {"epoch": run.current_epoch, "step": run.global_step, "history": self.history}

    def on_train_start(self, run: Any, module: Any) -> None:
        simple = run.val_check_interval == 1.0 and run.check_val_every_n_epoch == 1
        late = not simple and run.enable_validation
        self.measure(run, self.schedule.at_train_start(**self.numbers(run), after_validation=late))

    def on_train_batch_end(self, run: Any, *others: Any) -> None:
        self.measure(run, self.schedule.at_batch_end(**self.numbers(run)))

    def on_validation_epoch_end(self, run: Any, module: Any) -> None:
        if not run.sanity_checking:
            self.measure(run, self.schedule.at_validation_end(**self.numbers(run)))

    def on_train_epoch_end(self, run: Any, module: Any) -> None:
        last = run.current_epoch + 1 == run.max_epochs
        self.measure(run, self.schedule.at_epoch_end(**self.numbers(run), is_last=last))

    def on_train_end(self, run: Any, module: Any) -> None:
        if not run.should_stop:
            self.measure(run, self.schedule.at_train_end(**self.numbers(run)))

    def state_dict(self) -> dict[str, Any]:
        return {"history": [one.to_state() for one in self.history], "time": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = [Measurement.from_state(one) for one in state["history"]]
        self.schedule.load_state_dict(state["time"])


class AfterValidation(Callback):
    """Record the places at which callbacks that monitor a metric look, and the measurements there."""

    def __init__(self, scheduled: Scheduled) -> None:
        self.scheduled = scheduled
        self.seen: list[tuple[int, int]] = []

    def on_validation_end(self, run: Any, module: Any) -> None:
        if not run.sanity_checking:
            self.seen.append((run.global_step, self.scheduled.history[-1].step))


def fit(tmp_path: Path, *callbacks: Any, epochs: int = 7, path: Any = None, **options: Any) -> Any:
    run = trainer(tmp_path, *callbacks, max_epochs=epochs, **options)
    run.fit(seeded(), loader(num=24), loader(num=8, seed=1), ckpt_path=path)
    return run


def places(callback: Scheduled) -> list[tuple[str, int, int]]:
    return [(one.when, one.epoch, one.step) for one in callback.history]


@pytest.mark.parametrize("every_n_epochs", [1, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"check_val_every_n_epoch": 2},
        {"check_val_every_n_epoch": 3},
        {"check_val_every_n_epoch": 1000},
        {"limit_val_batches": 0},
        {"check_val_every_n_epoch": None, "val_check_interval": 4},
        {"val_check_interval": 2, "check_val_every_n_epoch": 2},
    ],
    ids=str,
)
def test_epochs_are_measured_as_asked_whatever_validation_does(
    options: dict[str, Any], every_n_epochs: int, tmp_path: Path
) -> None:
    callback = Scheduled(every_n_epochs=every_n_epochs)
    fit(tmp_path, callback, **options)
    epochs = [one.epoch for one in callback.history if one.when == "epoch"]
    assert sorted(set(epochs)) == list(range(0, 7, every_n_epochs))
    assert len(epochs) == len(set(epochs)) or "val_check_interval" in options
    assert places(callback)[0] == ("fit_start", 0, 0)


def test_every_validation_of_a_due_epoch_is_measured_before_monitors_look(tmp_path: Path) -> None:
    callback = Scheduled()
    after = AfterValidation(callback)
    fit(tmp_path, callback, after, epochs=2, val_check_interval=0.34)
    assert after.seen == [(step, step) for step in range(1, 7)]
    assert places(callback)[1:] == [("epoch", (step - 1) // 3, step) for step in range(1, 7)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"every_n_train_steps": 4}, [0, 4, 8, 12, 16, 20]),
        ({"at_steps": [0, 1, 5]}, [0, 1, 5]),
        ({"at_steps": [5], "at_end": True}, [5, 21]),
        ({"every_n_epochs": 4, "at_end": True}, [0, 3, 15, 21]),
        ({"every_n_epochs": 6, "at_end": True}, [0, 3, 21]),
    ],
    ids=str,
)
def test_steps_and_ends_are_measured_once(options: dict[str, Any], expected: list[int], tmp_path: Path) -> None:
    callback = Scheduled(**options)
    fit(tmp_path, callback)
    assert [one.step for one in callback.history] == expected


@pytest.mark.parametrize("options", [{}, {"every_n_train_steps": 3}, {"every_n_epochs": 3}], ids=str)
def test_a_measurement_that_was_given_up_is_made_first_after_the_resume(options: Any, tmp_path: Path) -> None:
    whole = Scheduled(**options)
    fit(tmp_path, whole)
    stopped = Scheduled(lambda place: place.step == 12, **options)
    saving = ModelCheckpoint(tmp_path, filename="last", save_top_k=-1, every_n_epochs=1, enable_version_counter=False)
    fit(tmp_path, stopped, saving, enable_checkpointing=True)
    assert places(stopped) == [place for place in places(whole) if place[2] < 12]
    path = tmp_path / "last.ckpt"
    state = torch.load(path, weights_only=True)["callbacks"]["Scheduled"]["time"]
    assert state["owed"][1] == 12
    resumed = Scheduled(**options)
    first: list[int] = []
    resumed.give_up = lambda place: bool(first.append(place.step))
    fit(tmp_path, resumed, path=path)
    assert first[0] == 12
    assert places(resumed) == places(whole)


def test_an_owed_place_is_dropped_when_its_weights_are_gone() -> None:
    place = Place(2, 12, "epoch")
    for step, history, expected in ((12, [], place), (13, [], None), (12, [measured(place)], None)):
        schedule = MeasurementSchedule()
        schedule.begin(place)
        later = MeasurementSchedule()
        later.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
        assert later.at_train_start(epoch=3, step=step, history=history) == expected
        assert later.owed is None
    schedule.reset()
    assert schedule.state_dict()["owed"] is None


@settings(max_examples=60)
@given(
    st.fixed_dictionaries({"every_n_epochs": st.integers(1, 4)})
    | st.fixed_dictionaries({"every_n_train_steps": st.integers(1, 9)})
    | st.fixed_dictionaries({"at_steps": st.lists(st.integers(0, 30), min_size=1)}),
    st.booleans(),
    st.integers(1, 4),
    st.sets(st.integers(0, 29), max_size=6),
)
def test_interrupted_runs_measure_the_same_places(
    options: dict[str, Any], at_end: bool, validated: int, interrupted: set[int]
) -> None:
    def run(cuts: set[int]) -> list[Measurement]:
        """Ten epochs of three steps; before the measurement at a cut the process ends and resumes there."""
        history: list[Measurement] = []
        schedule = MeasurementSchedule(**options, at_end=at_end)
        start: Any = {"epoch": 0, "step": 0, "history": history, "after_validation": validated > 1}

        def measure(place: Place | None) -> None:
            nonlocal schedule
            if place is None:
                return
            schedule.begin(place)
            if place.step in cuts:
                state = schedule.state_dict()
                schedule = MeasurementSchedule(**options, at_end=at_end)
                schedule.load_state_dict(state)
                owed = schedule.at_train_start(**{**start, "epoch": place.epoch, "step": place.step})
                assert owed == place
            history.append(measured(place))
            schedule.finish(1.0)

        measure(schedule.at_train_start(**start))
        for epoch in range(10):
            for step in range(3 * epoch + 1, 3 * epoch + 4):
                measure(schedule.at_batch_end(epoch=epoch, step=step, history=history))
            if (epoch + 1) % validated == 0:
                measure(schedule.at_validation_end(epoch=epoch, step=step, history=history))
            measure(schedule.at_epoch_end(epoch=epoch, step=step, history=history, is_last=epoch == 9))
        measure(schedule.at_train_end(epoch=10, step=30, history=history))
        return history

    found = [(one.when, one.epoch, one.step) for one in run(interrupted)]
    assert found == [(one.when, one.epoch, one.step) for one in run(set())]
    assert len(found) == len(set(found))
    if at_end:
        assert found[-1][2] == 30


def test_the_limit_of_time_applies_to_the_schedule() -> None:
    now = 0.0
    schedule = MeasurementSchedule(max_overhead=0.1, clock=lambda: now)
    start = schedule.at_train_start(epoch=0, step=0, history=[])
    assert start is not None
    schedule.begin(start)
    now = 5.0
    schedule.finish(5.0)
    history = [measured(start)]
    assert schedule.is_affordable(history)  # The first after the start.
    history.append(measured(Place(0, 3, "epoch")))
    now = 94.0
    assert not schedule.is_affordable(history)
    assert schedule.is_affordable(history, is_last=True)
    now = 95.0
    assert schedule.is_affordable(history)
    schedule.add_overhead(0.1)
    assert not schedule.is_affordable(history)
    assert schedule.at_train_end(epoch=5, step=15, history=history) == Place(5, 15, "fit_end")


@pytest.mark.parametrize(
    "change",
    [
        {"spent": None},
        {"spent": "1"},
        {"elapsed": -1.0},
        {"elapsed": math.nan},
        {"recent": 3.0},
        {"recent": ["x"]},
        {"owed": "epoch"},
        {"owed": [1, 2]},
        {"owed": [1, 2, "noon"]},
        {"owed": [1, -2, "epoch"]},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_when_it_is_loaded(change: dict[str, Any]) -> None:
    schedule = MeasurementSchedule()
    state = schedule.state_dict()
    with pytest.raises(ValueError, match=f"cannot be used: {next(iter(change))}.* must be .*; resume from another"):
        schedule.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="must be a dictionary"):
        schedule.load_state_dict(None)  # type: ignore[arg-type]
    schedule.load_state_dict({"spent": 1.0, "elapsed": 2.0, "last": 0.5})  # The first version.
    assert (schedule.time.expected, schedule.owed) == (0.5, None)


def test_a_place_costs_the_same_after_any_number_of_measurements() -> None:
    schedule = MeasurementSchedule()
    calls = []
    for num in (100, 10_000):
        history = [measured(Place(epoch, 3 * (epoch + 1), "epoch")) for epoch in range(num)]

        def end(num: int = num, history: list[Measurement] = history) -> None:
            assert schedule.at_epoch_end(epoch=num, step=3 * num + 3, history=history) is not None
            assert schedule.is_affordable(history)

        calls.append(count_calls(end))
    assert calls[0] == calls[1]
