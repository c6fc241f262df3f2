"""Stopping in real training runs: cadences, order, failures, resume, ranks, the command line."""

from __future__ import annotations

import math
import re
import warnings
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from hessian_callback import (
    Density,
    FrobeniusNorm,
    OutlierRatio,
    PowerLawEarlyStopping,
    PublishedProtocol,
    Subspace,
    Trace,
)
from hessian_callback.callbacks.early_stopping import _ALWAYS
from hessian_callback.measurement.extras.registry import EXTRAS
from tests.helpers.toy_runs import loader, measure, seeded, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:a measurement of the Hessian took"),
    pytest.mark.filterwarnings("ignore:the noise of"),
    pytest.mark.filterwarnings("ignore:32 samples are few"),
]

NEVER = 1e6  # No change is that large, so patience alone decides.

# Trainer options, the callback's options, when a patience of 2 ends a run of at most 9 epochs: epoch and step.
CADENCES = {
    "every epoch": ({}, {}, (2, 18)),
    "every second epoch": ({}, {"every_n_epochs": 2}, (4, 30)),
    "no validation": ({"limit_val_batches": 0}, {}, (2, 18)),
    "half epochs": ({"val_check_interval": 0.5}, {}, (1, 9)),
    "validation every second epoch": ({"check_val_every_n_epoch": 2}, {}, (5, 36)),
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
    with pytest.warns(UserWarning, match="goes on without its slope"):
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


def test_noise_is_of_the_difference_and_named(tmp_path: Any) -> None:
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


@pytest.mark.parametrize("critical_value", ["fitted", "paper"])
def test_a_formed_power_law_stops_with_its_critical_value(critical_value: str, tmp_path: Any) -> None:
    callback = measure()
    stopper = PowerLawEarlyStopping(stop_when="formed", patience=2, critical_value=critical_value)
    run(tmp_path, callback, stopper)
    fit = callback.history[-1].fit
    expected = fit.critical_distance_fitted if critical_value == "fitted" else fit.critical_distance_paper
    assert f"critical value {expected:.4g} (critical_value={critical_value!r}" in str(stopper.stopping_reason_message)
    inside = [m.fit_error < expected for m in callback.history[1:]]
    assert inside[-2:] == [True, True]
    assert not any(inside[i] and inside[i + 1] for i in range(len(inside) - 2))


WRONG = {
    "none at all": (lambda: [], {}, "the trainer has none at all"),
    "another prefix": (lambda: [measure(prefix="other")], {}, "have the prefixes 'other'"),
    "an extra": (lambda: [measure()], {"monitor": "hessian/trace", "min_delta": 1}, r"it does with extras=\['trace'\]"),
    "a typo": (lambda: [measure()], {"monitor": "hessian/slop", "min_delta": 1}, "it logs density_exponent"),
    "a group": (lambda: [measure()], {"monitor": "hessian/slope/head"}, "its groups are: none"),
    "paper": (lambda: [measure(solver=PublishedProtocol(steps=6))], {}, "computes no error bounds"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_work_is_refused_before_training(case: str, tmp_path: Any) -> None:
    make, options, message = WRONG[case]
    with pytest.raises(MisconfigurationException, match=message):
        run(tmp_path, *make(), PowerLawEarlyStopping(mode="max", **options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "has no default"),
        ({"mode": "up"}, "'min' or 'max'"),
        ({"mode": "min", "patience": 0}, "at least 1"),
        ({"mode": "min", "min_delta": -1.0}, "not negative"),
        ({"mode": "min", "min_delta": "little"}, "'noise' or a number"),
        ({"mode": "min", "num_sigmas": -1.0}, "must not be negative"),
        ({"mode": "min", "monitor": "hessian/fit_error"}, "give min_delta as a number"),
        ({"stop_when": "never"}, "'plateau', 'formed' or 'lost'"),
        ({"stop_when": "formed", "mode": "min"}, "leave it out"),
        ({"stop_when": "lost", "monitor": "hessian/slope"}, "judges the fit error"),
        ({"stop_when": "lost", "critical_value": "mine"}, "'fitted' or 'paper'"),
    ],
    ids=str,
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PowerLawEarlyStopping(**options)


def test_known_keys_are_those_that_are_logged(tmp_path: Any) -> None:
    given = [Trace(num_hvps=8), FrobeniusNorm(num_hvps=8), Density(num_hvps=16), Subspace(dimension=2)]
    given.append(OutlierRatio(num_classes=2))
    chosen = EXTRAS.keys() - {extra.name for extra in given}
    callback = measure(extras=[*chosen, *given], num_samples=40)
    run(tmp_path, callback, max_epochs=2)
    logged = callback.history[-1].scalars()
    # The bound is not there where there is no gap.
    assert {key for extra in EXTRAS.values() for key in extra.keys} - {"subspace_sine_bound"} <= logged.keys()
    assert set(_ALWAYS) <= logged.keys()


def test_lightnings_own_burns_patience_and_is_warned_of(tmp_path: Any) -> None:
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
