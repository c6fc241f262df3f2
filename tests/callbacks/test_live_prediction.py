"""Predictions in real runs: what is logged and when, resumed runs, ranks, and runs that lack what is predicted."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hessian_callback.callbacks.live_prediction import LivePrediction
from hessian_callback.linalg.distributed import PeerError
from hessian_callback.measurement.measurement import Measurement
from tests.helpers.losses_on_rank import losses_on_rank
from tests.helpers.ranks import run_ranks
from tests.helpers.toy_runs import loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings(
    "ignore:a measurement of the Hessian took", "ignore:.*samples are few", "ignore:.*LeafSpec"
)
EPOCHS = 9


class Seen(Callback):
    """Notes the losses that Lightning ends each epoch with."""

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


def test_the_losses_kept_are_those_of_the_run(whole: Any) -> None:
    _, callback, seen, _ = whole
    kept = [{"val_loss": one.val_loss, "train_loss": one.train_loss} for one in callback.history[1:]]
    assert kept == [pytest.approx(row, rel=1e-6) for row in seen.rows]
    assert callback.history[0].when == "fit_start"
    assert callback.history[0].val_loss is callback.history[0].train_loss is None


def test_nothing_is_logged_before_the_fifth_and_then_beside_what_came(whole: Any) -> None:
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


def test_it_says_in_a_line_how_it_went(whole: Any, capsys: Any, tmp_path: Path) -> None:
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


def test_a_resumed_run_predicts_as_if_nothing_had_been(whole: Any, tmp_path: Path) -> None:
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


def test_weights_are_those_of_a_run_without_predictions(tmp_path: Path) -> None:
    one, other = (fit(tmp_path, measure(predict=predict), epochs=6) for predict in ("val_loss", None))
    for a, b in zip(one.model.parameters(), other.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not any("loss_" in name or "predict" in name for name in other.callback_metrics if "hessian" in name)


def test_the_loss_on_the_hessians_own_samples_is_the_default_at_any_cadence(tmp_path: Path) -> None:
    callback = measure(every_n_train_steps=4, train_loss=None)
    run = fit(tmp_path, callback, epochs=4)
    values = callback.prediction.scalars()
    assert values["loss"] == callback.history[-1].loss
    assert {"predicted_loss", "next_loss"} <= values.keys()
    assert "gap" not in values
    assert float(run.callback_metrics["hessian/next_loss"]) == pytest.approx(values["next_loss"])


def test_on_training_samples_they_are_the_training_loss_of_the_gap(tmp_path: Path) -> None:
    assert measure(dataloader="train").prediction is None
    callback = measure(dataloader="train", predict="val_loss")
    fit(tmp_path, callback, epochs=5)
    last = callback.history[-1]
    assert callback.prediction.scalars()["gap"] == pytest.approx(last.val_loss - last.loss)


def test_a_validation_loss_of_other_weights_is_not_taken(tmp_path: Path) -> None:
    callback = measure(predict="val_loss")
    fit(tmp_path, callback, epochs=4, check_val_every_n_epoch=2)
    assert [one.val_loss is None for one in callback.history] == [True, False, False]
    with pytest.raises(MisconfigurationException, match="every_n_epochs"):
        fit(tmp_path, measure(predict="val_loss", every_n_train_steps=2), epochs=1)


def test_a_name_that_nothing_logs_is_said_once_and_training_goes_on(tmp_path: Path) -> None:
    callback = measure(predict="no_such_loss")
    with pytest.warns(UserWarning, match="no finite metric of that name") as caught:
        fit(tmp_path, callback, epochs=6)
    assert sum("no finite metric" in str(one.message) for one in caught) == 1
    assert all(one.logged for one in callback.history)
    assert callback.prediction.scalars() == {}
    with pytest.raises(ValueError, match="names of metrics"):
        measure(predict="")


def test_ranks_agree_on_the_losses_and_fail_together() -> None:
    one, other = (outcome.value for outcome in run_ranks(losses_on_rank, 2))
    assert one[0] == other[0] == [1.5, 3.0, None, None, None]
    assert (one[1], other[1]) == (PeerError.__name__, "RuntimeError")


def test_what_is_no_part_of_the_series_is_left_out() -> None:
    def entry(number: int, **options: Any) -> Measurement:
        defaults = {"when": "epoch", "loss": 0.5**number, "reason": "no fit"}
        return Measurement(epoch=number, step=number, spectrum=None, fit=None, seconds=0.1, **{**defaults, **options})

    plain = [entry(number) for number in range(1, 9)]
    disturbed = [entry(0, when="fit_start", loss=9.0), *plain[:3], entry(4, when="validate"), entry(4, loss=None)]
    disturbed += [entry(4, loss=math.nan), *plain[3:]]
    one, other = LivePrediction(), LivePrediction()
    one.follow(plain)
    other.follow(disturbed)
    assert one.scalars() == other.scalars() != {}
    other.follow([*disturbed, entry(10, loss=None)])
    assert other.scalars() == {}
    # Another history begins anew.
    other.follow(plain)
    assert one.scalars() == other.scalars()
