"""Stopping in training runs: schedules, order of callbacks, failures, resume, options, long histories."""

from __future__ import annotations

import math
import re
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch

from hessian_callback import (
    Density,
    FrobeniusNorm,
    Lanczos,
    OutlierRatio,
    PowerLawEarlyStopping,
    PublishedProtocol,
    Subspace,
    Trace,
)
from hessian_callback.callbacks import early_stopping
from hessian_callback.measurement.extras.registry import EXTRAS
from hessian_callback.power_law.fit import critical_distance
from tests.helpers.calls import count_calls
from tests.helpers.lightning import EarlyStopping, MisconfigurationException, ModelCheckpoint
from tests.helpers.toy_runs import NUM_EIGENVALUES, loader, measure, seeded, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:a measurement of the Hessian took"),
    pytest.mark.filterwarnings("ignore:the noise of"),
    pytest.mark.filterwarnings("ignore:32 held-out samples are few"),
]

NEVER = 1e6  # No change is that large, so only patience decides.

# Trainer options, the callback's options, when a patience of 2 ends a run of at most 9 epochs: epoch and step.
CADENCES = {
    "every epoch": ({}, {}, (2, 18)),
    "every second epoch": ({}, {"every_n_epochs": 2}, (4, 30)),
    "no validation": ({"limit_val_batches": 0}, {}, (2, 18)),
    "half epochs": ({"val_check_interval": 0.5}, {}, (1, 9)),
    "validation every second epoch": ({"check_val_every_n_epoch": 2}, {}, (2, 18)),
    "steps": ({}, {"every_n_train_steps": 4}, (1, 12)),
    "steps by number": ({}, {"at_steps": [0, 1, 3, 7, 8]}, (1, 7)),
}


def run(tmp_path: Any, *callbacks: Any, ckpt_path: Any = None, **options: Any) -> Any:
    fitted = trainer(tmp_path, *callbacks, **{"max_epochs": 9, **options})
    # Nothing random: a resumed run would draw other numbers.
    fitted.fit(seeded(dropout=0.0), loader(), loader(seed=1), ckpt_path=ckpt_path)
    return fitted


@pytest.mark.parametrize("first", [True, False], ids=["stopper first", "callback first"])
@pytest.mark.parametrize("cadence", CADENCES)
def test_patience_counts_measurements(cadence: str, first: bool, tmp_path: Any) -> None:
    options, choice, (epoch, step) = CADENCES[cadence]
    callback, stopper = measure(**choice), PowerLawEarlyStopping(mode="max", min_delta=NEVER, patience=2)
    fitted = run(tmp_path, *([stopper, callback] if first else [callback, stopper]), **options)
    assert (stopper.stopped_epoch, fitted.global_step) == (epoch, step)
    counted = [m for m in callback.history if m.when in ("epoch", "step")]
    assert len(counted) == 3
    assert stopper.wait_count == 2
    assert float(stopper.best_score) == counted[0].slope
    assert "(patience=2, mode='max')" in str(stopper.stopping_reason_message)


def test_failed_measurements_do_not_count(tmp_path: Any) -> None:
    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        loss = torch.nn.functional.cross_entropy(module(batch[0]), batch[1])
        return loss * (math.nan if module.trainer.global_step in (6, 18, 24) else 1)

    callback, stopper = measure(loss_fn=loss_fn), PowerLawEarlyStopping(mode="max", min_delta=NEVER, patience=2)
    with pytest.warns(UserWarning, match="continues without its slope"):
        run(tmp_path, callback, stopper)
    assert [m.logged for m in callback.history[1:]] == [False, True, False, False, True, True]
    assert stopper.stopped_epoch == 5


def test_resuming_decides_as_if_never_interrupted(tmp_path: Any) -> None:
    def callbacks() -> list[Any]:
        return [measure(), PowerLawEarlyStopping(mode="max", min_delta=NEVER, patience=4)]

    whole = callbacks()
    run(tmp_path, *whole)
    part = callbacks()
    checkpoint = ModelCheckpoint(tmp_path, filename="here", save_top_k=-1, every_n_epochs=3)
    run(tmp_path, *part, checkpoint, max_epochs=3, enable_checkpointing=True)
    assert part[1].stopping_reason_message is None
    path = tmp_path / "here.ckpt"
    states = torch.load(path, weights_only=True)["callbacks"]
    (state,) = [states[key] for key in states if key.startswith("PowerLawEarlyStopping")]
    assert state["wait_count"] == 2
    resumed = callbacks()
    run(tmp_path, *resumed, ckpt_path=path)
    assert resumed[1].stopped_epoch == whole[1].stopped_epoch == 4
    assert resumed[1].stopping_reason_message == whole[1].stopping_reason_message
    # Going on from a stop takes what has been measured as it is, and counts nothing twice.
    longer = [measure(), PowerLawEarlyStopping(mode="max", min_delta=NEVER, patience=6)]
    run(tmp_path, *longer, ckpt_path=path)
    assert longer[1].stopped_epoch == 6


def test_noise_is_that_of_the_difference(tmp_path: Any) -> None:
    callback = measure(extras=["split_half"], num_samples=40)
    stopper = PowerLawEarlyStopping(mode="min", num_sigmas=1.5)
    run(tmp_path, callback, stopper, max_epochs=3)
    counted = callback.history[1:]
    gaps = [m.comparisons["slope_half_1"] - m.comparisons["slope_half_2"] for m in counted]
    noise = stopper.verdict.noise  # type: ignore[union-attr]
    pairs = [(a - b) ** 2 / 4 for i, a in enumerate(gaps) for b in gaps[:i]]
    assert noise.sampling == pytest.approx(math.sqrt(sum(pairs) / len(pairs)))
    assert 0 < noise.numerical < 0.2 * counted[-1].slope
    assert noise.total == pytest.approx(noise.numerical + 1.5 * noise.sampling)


def test_the_remedy_for_the_removed_formed_stops_at_the_first_power_law(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="stop_when='formed' was removed") as raised:
        PowerLawEarlyStopping(stop_when="formed", critical_value="fitted")
    (call,) = re.findall(r"use (EarlyStopping\(.*\)) of Lightning", str(raised.value))
    names = {"EarlyStopping": EarlyStopping, "critical_distance": critical_distance, "num_eigenvalues": NUM_EIGENVALUES}
    callback = measure()
    run(tmp_path, callback, eval(call, names))
    below = [m.fit_error < critical_distance(NUM_EIGENVALUES) for m in callback.history[1:]]
    assert below == [False] * (len(below) - 1) + [True]
    assert len(below) < 9


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"stop_when": "lost"}, r"on_hessian_measured\(trainer, pl_module, source\) instead$"),
        ({"stop_when": "never"}, r"on_hessian_measured\(trainer, pl_module, source\) instead$"),
        ({"critical_value": "paper", "mode": "min"}, "leave it out$"),
    ],
    ids=str,
)
def test_removed_options_raise_one_sentence_with_the_remedy(options: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ValueError, match=remedy) as raised:
        PowerLawEarlyStopping(**options)
    assert "was removed" in str(raised.value)
    assert "\n" not in str(raised.value)
    assert PowerLawEarlyStopping(mode="min", stop_when="plateau").state_key == (
        "PowerLawEarlyStopping{'monitor': 'hessian/slope', 'mode': 'min', 'stop_when': 'plateau'}"
    )


WRONG = {
    "none at all": (lambda: [], {}, "the trainer has none at all"),
    "another prefix": (lambda: [measure(prefix="other")], {}, "have the prefixes 'other'"),
    "an extra": (lambda: [measure()], {"monitor": "hessian/trace", "min_delta": 1}, r"they do with extras=\['trace'\]"),
    "a typo": (lambda: [measure()], {"monitor": "hessian/slop", "min_delta": 1}, "they have critical_distance,"),
    "the share of time": (
        lambda: [measure(max_overhead=0.5)],
        {"monitor": "hessian/overhead", "min_delta": 1},
        "the measurements of .* do not have",
    ),
    "a group": (lambda: [measure()], {"monitor": "hessian/slope/head"}, "its groups are: none"),
    "paper": (lambda: [measure(solver=PublishedProtocol(steps=6))], {}, "computes no error bounds"),
    "an interval that the protocol lacks": (
        lambda: [measure(solver=PublishedProtocol(steps=6))],
        {"monitor": "hessian/slope_low", "min_delta": 1},
        "they have critical_distance, density_exponent,",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_monitors_are_refused_before_training(case: str, tmp_path: Any) -> None:
    make, options, message = WRONG[case]
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, *make(), PowerLawEarlyStopping(mode="max", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no default"),
        ({"mode": "up"}, "'min' or 'max'"),
        ({"mode": "min", "patience": 0}, "at least 1"),
        ({"mode": "min", "patience": 1.5}, "an integer"),
        ({"mode": "min", "patience": math.nan}, "an integer"),
        ({"mode": "min", "patience": "4"}, "an integer"),
        ({"mode": "min", "patience": True}, "an integer"),
        ({"mode": "min", "min_delta": -1.0}, "'noise' or a finite number of at least 0"),
        ({"mode": "min", "min_delta": math.nan}, "'noise' or a finite number"),
        ({"mode": "min", "min_delta": "little"}, "'noise' or a finite number"),
        ({"mode": "min", "num_sigmas": -1.0}, "num_sigmas must be a finite number of at least 0"),
        ({"mode": "min", "num_sigmas": math.inf}, "num_sigmas must be a finite number"),
        ({"mode": "min", "min_trend": math.nan}, "min_trend must be a finite number"),
        ({"mode": "min", "verbose": "no"}, "verbose must be True or False"),
        ({"mode": "min", "monitor": ""}, "monitor must be a string"),
        ({"mode": "min", "monitor": None}, "monitor must be a string"),
        ({"mode": "min", "monitor": "hessian/fit_error"}, "give min_delta as a number"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PowerLawEarlyStopping(**options)


def test_known_keys_are_the_logged_ones(tmp_path: Any) -> None:
    given = [Trace(num_hvps=8), FrobeniusNorm(num_hvps=8), Density(num_hvps=16), Subspace(dimension=2)]
    given.append(OutlierRatio(num_classes=2))
    chosen = EXTRAS.keys() - {extra.name for extra in given}
    callback = measure(extras=[*chosen, *given], num_samples=40)
    run(tmp_path, callback, max_epochs=2)
    logged = callback.history[-1].scalars()
    # The bound is not there where there is no gap.
    assert {key for extra in EXTRAS.values() for key in extra.keys} - {"subspace_sine_bound"} <= logged.keys()


@pytest.mark.parametrize("solver", [Lanczos(), PublishedProtocol(steps=6)], ids=lambda solver: solver.mode)
def test_every_key_of_a_measurement_can_be_monitored(solver: Any, tmp_path: Any) -> None:
    callback = measure(solver=solver, groups={"part": "weight"}, extras=["norms"])
    run(tmp_path, callback)
    keys = {f"hessian/{key}" for key in callback.history[-1].scalars()}
    assert {"hessian/slope", "hessian/critical_distance", "hessian/critical_distance/part"} < keys
    stoppers = [PowerLawEarlyStopping(key, mode="max", min_delta=1.0) for key in sorted(keys)]
    callback = measure(solver=solver, groups={"part": "weight"}, extras=["norms"])
    run(tmp_path, callback, *stoppers)
    for stopper in stoppers:
        name = stopper.monitor.removeprefix("hessian/")
        assert float(stopper.best_score) in {entry.scalars().get(name) for entry in callback.history}, stopper.monitor


def test_lightnings_own_counts_unmeasured_epochs_and_is_warned_of(tmp_path: Any) -> None:
    def text(*stoppers: Any) -> str:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(tmp_path, measure(every_n_epochs=3), *stoppers)
        return "\n".join(str(warning.message) for warning in caught)

    plain = EarlyStopping("hessian/slope", mode="max", min_delta=NEVER, patience=2, strict=False)
    assert re.search("sees the last value again.*PowerLawEarlyStopping counts measurements instead", text(plain))
    assert plain.stopped_epoch == 2  # Measured once.
    ours = PowerLawEarlyStopping(mode="max", min_delta=NEVER, patience=2)
    assert "counts measurements instead" not in text(ours)
    assert ours.stopped_epoch == 6


def stopper_after(num: int, tmp_path: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Return a stopper whose callback has a history of some measurements, the callback, and the trainer."""
    source = measure(extras=["split_half"], num_samples=40)
    stopper = PowerLawEarlyStopping(mode="max", **options)
    fitted = run(tmp_path, source, stopper, max_epochs=1)
    (last,) = source.history[1:]
    source.history = [replace(last, epoch=n, step=6 * (n + 1)) for n in range(num)]
    return stopper, source, fitted


def test_only_new_measurements_are_processed(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    stopper, source, fitted = stopper_after(150, tmp_path, patience=10**6)
    computed: list[Any] = []
    interval = early_stopping.numerical_interval_of
    monkeypatch.setattr(early_stopping, "numerical_interval_of", lambda *a: computed.append(a) or interval(*a))
    calls = []
    for num in (50, 149):
        history, source.history = source.history, source.history[:num]
        stopper.on_hessian_measured(fitted, None, source)
        computed.clear()
        source.history = history[: num + 1]
        calls.append(count_calls(lambda: stopper.on_hessian_measured(fitted, None, source)))
        assert len(computed) == 1
        source.history = history
    assert calls[1] == pytest.approx(calls[0], rel=0.02)
    assert stopper.verdict.wait == 149


def test_another_history_is_judged_from_its_beginning(tmp_path: Any) -> None:
    stopper, source, fitted = stopper_after(9, tmp_path, patience=20)
    for history in (source.history, source.history[:5], [replace(one) for one in source.history]):
        source.history = history
        stopper.on_hessian_measured(fitted, None, source)
        assert stopper.verdict.wait == len(history) - 1
    stopper.setup(fitted, None, "fit")
    stopper.on_hessian_measured(fitted, None, source)
    assert stopper.verdict.wait == 8


@pytest.mark.parametrize(
    "change",
    [
        {"wait_count": "2"},
        {"wait_count": -1},
        {"best_score": "low"},
        {"best_score": None},
        {"stopped_epoch": 1.5},
        {"stopping_reason_message": 3},
    ],
    ids=str,
)
def test_a_damaged_state_is_refused_when_it_is_loaded(change: dict[str, Any]) -> None:
    state = PowerLawEarlyStopping(mode="min").state_dict()
    stopper = PowerLawEarlyStopping(mode="min")
    with pytest.raises(ValueError, match=f"cannot be used: {next(iter(change))} must be .*; remove its entry"):
        stopper.load_state_dict({**state, **change})
    with pytest.raises(ValueError, match="cannot be used: wait_count"):
        stopper.load_state_dict({})
    stopper.load_state_dict(state)
    del state["stopping_reason_message"]  # As in checkpoints of earlier versions.
    stopper.load_state_dict(state)
    assert stopper.state_dict() == PowerLawEarlyStopping(mode="min").state_dict()
