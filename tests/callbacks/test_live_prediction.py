"""Predictions in training runs: logged values, resumed runs, ranks, missing losses, long histories."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import kendalltau, spearmanr
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hessian_callback.callbacks import live_prediction
from hessian_callback.callbacks.live_prediction import LivePrediction
from hessian_callback.linalg.distributed import PeerError
from hessian_callback.measurement.measurement import Measurement
from tests.helpers.calls import count_calls
from tests.helpers.lightning import Callback, MisconfigurationException, ModelCheckpoint, TensorBoardLogger
from tests.helpers.losses_on_rank import losses_on_rank
from tests.helpers.ranks import run_ranks
from tests.helpers.toy_runs import loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:a measurement of the Hessian took", "ignore:.*samples are few", "ignore:.*LeafSpec"
)
EPOCHS = 9


class Seen(Callback):
    """Record the losses that Lightning has at the end of each epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        if trainer.current_epoch:
            self.note(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.note(trainer)

    def note(self, trainer: Any) -> None:
        metrics = trainer.callback_metrics
        self.rows.append({name: float(metrics[name]) for name in ("val_loss", "train_loss")})


def fit(tmp_path: Path, callback: Any, *others: Any, path: Any = None, epochs: int = EPOCHS, **options: Any) -> Any:
    run = trainer(tmp_path, callback, *others, max_epochs=epochs, **options)
    # Nothing is random in the steps, so that a resumed run takes the same ones.
    run.fit(seeded(dropout=0.0), loader(), loader(seed=1), ckpt_path=path)
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("whole")
    callback, seen = measure(predict="val_loss"), Seen()
    logger = TensorBoardLogger(folder, name="run", version="")
    saving = ModelCheckpoint(folder, filename="{epoch}", save_top_k=-1)
    run = fit(folder, callback, seen, saving, logger=logger, enable_checkpointing=True)
    return folder, callback, seen, run


def test_the_history_has_the_losses_of_the_run(whole: Any) -> None:
    _, callback, seen, _ = whole
    kept = [{"val_loss": one.val_loss, "train_loss": one.train_loss} for one in callback.history[1:]]
    assert kept == [pytest.approx(row, rel=1e-6) for row in seen.rows]
    assert callback.history[0].when == "fit_start"
    assert callback.history[0].val_loss is callback.history[0].train_loss is None


def test_predictions_are_logged_from_the_fifth_measurement_beside_the_loss(whole: Any) -> None:
    folder, callback, seen, run = whole
    curves = EventAccumulator(str(folder / "run"))
    curves.Reload()

    def curve(name: str) -> list[float]:
        return [point.value for point in curves.Scalars(f"hessian/{name}")]

    came = [row["val_loss"] for row in seen.rows]
    assert curve("loss") == pytest.approx(came[4:], rel=1e-5)
    gaps = [row["val_loss"] - row["train_loss"] for row in seen.rows]
    assert curve("gap") == pytest.approx(gaps[4:], rel=1e-4, abs=1e-6)
    # Predicted at one measurement, and drawn beside the next.
    assert curve("predicted_loss") == pytest.approx(curve("next_loss")[:-1], rel=1e-5)
    assert curve("predicted_loss_baseline/last_value") == pytest.approx(came[4:-1], rel=1e-5)
    errors = [abs(a - b) for a, b in zip(curve("predicted_loss"), came[5:], strict=True)]
    assert curve("prediction_error/spectrum")[-1] == pytest.approx(sum(errors) / len(errors), rel=1e-3)
    for name in ("rank_correlation", "rank_correlation_low", "rank_correlation_high", "spearman"):
        for statistic in ("slope", "fit_error", "lambda_max", "train_loss", "log_step"):
            assert len(curve(f"{name}/{statistic}")) == EPOCHS - 4
    assert all(
        low < p < high for low, p, high in zip(*(curve(f"next_loss{e}") for e in ("_low", "", "_high")), strict=True)
    )
    assert float(run.callback_metrics["hessian/next_loss"]) == pytest.approx(callback.prediction.scalars()["next_loss"])


def test_a_line_of_text_summarises_the_predictions(whole: Any, capsys: Any, tmp_path: Path) -> None:
    callback = whole[1]
    found = callback.prediction.comparison()
    assert found.num == EPOCHS - 5
    line = callback.prediction.summary()
    assert f"in {max(found.wins, found.losses)} of {found.num} (mean error" in line
    assert line.endswith("too few to say")
    assert callback.prediction.verdict() == "too few to say"
    fit(tmp_path, measure(verbose=True), epochs=7)
    told = capsys.readouterr()
    text = told.out + told.err
    assert "hessian: prediction of the next loss: the spectrum" in text
    assert text.count("; next loss") == 3


def test_a_resumed_run_predicts_as_an_uninterrupted_one(whole: Any, tmp_path: Path) -> None:
    folder, callback, *_ = whole
    resumed = measure(predict="val_loss")
    fit(tmp_path, resumed, path=folder / "epoch=5.ckpt")
    assert len(resumed.history) == len(callback.history)
    assert resumed.prediction.scalars() == pytest.approx(callback.prediction.scalars(), rel=1e-6)
    assert resumed.prediction.summary() == callback.prediction.summary()
    # From the state alone, and from a state of before there were predictions.
    again = measure(predict="val_loss")
    again.load_state_dict(callback.state_dict())
    assert again.prediction.scalars() == callback.prediction.scalars()
    state = callback.history[3].to_state()
    del state["val_loss"], state["train_loss"]
    assert Measurement.from_state(state).val_loss is None


def test_weights_are_those_of_a_run_without_predictions(whole: Any, tmp_path: Path) -> None:
    one, other = whole[3], fit(tmp_path, measure(predict=None))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any("loss_" in name or "predict" in name for name in other.callback_metrics if "hessian" in name)


def test_the_loss_on_the_hessians_own_samples_is_the_default_for_any_schedule(tmp_path: Path) -> None:
    callback = measure(every_n_train_steps=4, train_loss=None)
    run = fit(tmp_path, callback, epochs=4)
    values = callback.prediction.scalars()
    assert values["loss"] == callback.history[-1].loss
    assert {"predicted_loss", "next_loss"} <= values.keys()
    assert "gap" not in values
    assert float(run.callback_metrics["hessian/next_loss"]) == pytest.approx(values["next_loss"])


def test_on_training_samples_the_gap_uses_their_loss(tmp_path: Path) -> None:
    assert measure(dataloader="train").prediction is None
    callback = measure(dataloader="train", predict="val_loss")
    fit(tmp_path, callback, epochs=5)
    last = callback.history[-1]
    assert callback.prediction.scalars()["gap"] == pytest.approx(last.val_loss - last.loss)


def test_a_validation_loss_of_other_weights_is_not_used(tmp_path: Path) -> None:
    callback = measure(predict="val_loss")
    fit(tmp_path, callback, epochs=4, check_val_every_n_epoch=2)
    assert [one.val_loss is None for one in callback.history] == [True, True, False, True, False]
    with pytest.raises(MisconfigurationException, match="every_n_epochs"):
        fit(tmp_path, measure(predict="val_loss", every_n_train_steps=2), epochs=1)


def test_a_metric_that_nothing_logs_is_warned_of_once(tmp_path: Path) -> None:
    callback = measure(predict="no_such_loss")
    with pytest.warns(UserWarning, match="no finite metric of that name") as caught:
        fit(tmp_path, callback, epochs=6)
    assert sum("no finite metric" in str(one.message) for one in caught) == 1
    assert all(one.logged for one in callback.history)
    assert callback.prediction.scalars() == {}
    with pytest.raises(ValueError, match="a string that is not empty"):
        measure(predict="")


def test_ranks_agree_on_the_losses_and_fail_together() -> None:
    one, other = (outcome.value for outcome in run_ranks(losses_on_rank, 2))
    assert one[0] == other[0] == [1.5, 3.0, None, None, None]
    assert (one[1], other[1]) == (PeerError.__name__, "RuntimeError")


def entry(number: int, **options: Any) -> Measurement:
    defaults = {"when": "epoch", "loss": 0.5**number, "reason": "no fit"}
    return Measurement(epoch=number, step=number, spectrum=None, fit=None, seconds=0.1, **{**defaults, **options})


def noisy(num: int) -> list[Measurement]:
    """Measurements with a loss, a training loss and a trace that are drawn without a trend."""
    draws = np.random.default_rng(0).uniform(0.5, 1.5, (num, 3))
    return [
        entry(n, loss=loss, train_loss=train_loss, comparisons={"trace": trace})
        for n, (loss, train_loss, trace) in enumerate(draws.tolist(), 1)
    ]


def test_measurements_outside_the_series_are_left_out() -> None:
    plain = [entry(number) for number in range(1, 9)]
    disturbed = [entry(0, when="fit_start", loss=9.0), *plain[:3], entry(4, when="validate"), entry(4, loss=None)]
    disturbed += [entry(4, loss=math.nan), *plain[3:]]
    one, other = LivePrediction(), LivePrediction()
    one.follow(plain)
    other.follow(disturbed)
    assert one.scalars() == other.scalars() != {}
    other.follow([*disturbed, entry(10, loss=None)])
    assert other.scalars() == {}


@pytest.mark.parametrize("change", ["shorter", "longer", "same length", "first removed", "empty"])
def test_another_history_is_followed_from_its_beginning(change: str) -> None:
    history = noisy(12)
    live, expected = LivePrediction(), LivePrediction()
    live.follow(history[:9])
    others = {
        "shorter": history[:6],
        "longer": noisy(11),
        "same length": noisy(9),
        "first removed": history[1:10],
        "empty": [],
    }
    live.follow(others[change])
    expected.follow(others[change])
    assert live.scalars() == expected.scalars()
    assert (live.scalars() == {}) == (change == "empty")


def test_the_order_of_calls_does_not_matter() -> None:
    history = noisy(12)
    one, other = LivePrediction(), LivePrediction()
    one.follow(history)
    for num in (0, 3, 3, 7, 12):
        other.follow(history[:num])
    assert one.scalars() == other.scalars()


def test_rank_correlations_are_those_of_the_latest_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_prediction, "CORRELATION_WINDOW", 20)
    history = noisy(50)
    live = LivePrediction()
    for num in (20, 21, 50):
        live.follow(history[:num])
        latest = history[num - 20 : num]
        for name, values in {
            "trace": [one.comparisons["trace"] for one in latest],
            "train_loss": [one.train_loss for one in latest],
            "log_step": [one.step for one in latest],
        }.items():
            tau = kendalltau(values, [one.loss for one in latest]).statistic
            rho = spearmanr(values, [one.loss for one in latest]).statistic
            assert live.scalars()[f"rank_correlation/{name}"] == pytest.approx(tau, abs=1e-12)
            assert live.scalars()[f"spearman/{name}"] == pytest.approx(rho, abs=1e-12)


def test_a_measurement_costs_the_same_after_any_number_of_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_prediction, "CORRELATION_WINDOW", 20)
    history = noisy(242)
    live = LivePrediction()

    def one_more(num: int) -> None:
        live.follow(history[:num])
        live.scalars()

    calls = []
    for num in (80, 240):
        one_more(num)
        calls.append(count_calls(lambda num=num: one_more(num + 1)))
        one_more(num + 2)
    assert calls[1] == pytest.approx(calls[0], rel=0.02)
