"""Predictions of a run, made from the measurements in a callback's history."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Literal

from hessian_callback.callbacks.history_cursor import HistoryCursor
from hessian_callback.callbacks.prediction import (
    FEATURES,
    MIN_OBSERVATIONS,
    Comparison,
    Observation,
    Prediction,
    PredictionTrack,
    Score,
    compare_errors,
)
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.reports.running_correlations import RankCorrelation, rank_correlation

__all__ = ["CORRELATION_WINDOW", "HELD_OUT", "LivePrediction"]

#: Name of the mean loss over the samples of the Hessian.
HELD_OUT = "held_out"

#: Number of latest measurements that rank correlations are computed from.
CORRELATION_WINDOW = 1000

STATISTICS = ("slope", "fit_error", "lambda_max", "trace", "train_loss", "log_step")

Target = Literal["loss", "gap"]


class LivePrediction:
    """Predict the next loss from a history, and compare the spectrum with baselines.

    Everything is a function of the history, so it is the same after a resume and on every rank. Measurements before the
    first step are outliers and are left out, and so are those of ``trainer.validate()`` and those without a loss.
    Slopes that were not logged belong to another number of eigenvalues and are not used.

    The cost of one more measurement does not depend on the length of the history: predictions use the last `WINDOW`
    pairs, rank correlations the latest `CORRELATION_WINDOW` measurements.

    Args:
        predict: ``"held_out"`` for the loss on the Hessian's own samples; any other name stands for
            `Measurement.val_loss`.
        on_training_data: whether the Hessian's samples are training samples, so that their loss is the training loss of
            the gap.

    Attributes:
        tracks: a `PredictionTrack` by target (``"loss"``, or ``"gap"`` for that loss minus the training loss) and name
            of the predictor in `prediction.FEATURES`.

    Example:
        >>> live = LivePrediction()
        >>> live.follow([Measurement(epoch=n, step=2**n, when="epoch", spectrum=None, fit=None, reason="no fit",
        ...                          seconds=0.1, loss=0.5**n) for n in range(16)])
        >>> round(live.tracks["loss"]["log_step"].next.value * 2**16, 6)
        1.0
        >>> live.verdict() is None  # without a slope
        True
    """

    def __init__(self, predict: str = HELD_OUT, *, on_training_data: bool = False) -> None:
        self.predict = predict
        self.on_training_data = on_training_data
        self._cursor = HistoryCursor()
        self._clear()

    def _clear(self) -> None:
        self.tracks: dict[Target, dict[str, PredictionTrack]] = {
            "loss": {name: PredictionTrack(features) for name, features in FEATURES.items()},
            "gap": {name: PredictionTrack(features, logarithms=False) for name, features in FEATURES.items()},
        }
        # Targets that the newest measurement has.
        self._fresh: set[Target] = set()
        self._correlated: deque[Observation] = deque(maxlen=CORRELATION_WINDOW)

    def follow(self, history: Sequence[Measurement]) -> None:
        """Process the measurements that were added to a history; all of them if it is another history.

        Args:
            history: the measurements in order of time.
        """
        restarted, new = self._cursor.advance(history)
        if restarted:
            self._clear()
        for measurement in new:
            self._fresh = set()
            for target, tracks in self.tracks.items():
                observation = _observation(
                    measurement, target, predict=self.predict, on_training_data=self.on_training_data
                )
                if observation is None:
                    continue
                self._fresh.add(target)
                for track in tracks.values():
                    track.add(observation)
                if target == "loss":
                    self._correlated.append(observation)

    # -- results ---------------------------------------------------------------------------------

    def correlations(self, kind: Literal["kendall", "spearman"] = "kendall") -> dict[str, RankCorrelation]:
        """Correlate each statistic with the loss of the same measurement, over the latest `CORRELATION_WINDOW`.

        Args:
            kind: as in `rank_correlation`, whose intervals have a nominal level of 95 %.

        Returns:
            The correlation by the statistic's name, if it is defined: known in at least 5 measurements, not constant.
        """
        found = {}
        for name in STATISTICS:
            pairs = [(one.features[name], one.target) for one in self._correlated if name in one.features]
            x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            if len(pairs) >= MIN_OBSERVATIONS and len(set(x)) > 1 and len(set(y)) > 1:
                found[name] = rank_correlation(x, y, kind=kind)
        return found

    def scores(self, target: Target = "loss") -> dict[str, Score]:
        """Return the score by the predictor's name, for those that have one.

        Args:
            target: ``"loss"`` or ``"gap"``.
        """
        scores = {name: track.score() for name, track in self.tracks[target].items()}
        return {name: score for name, score in scores.items() if score is not None}

    def comparison(
        self, predictor: str = "spectrum", baseline: str = "log_step", target: Target = "loss"
    ) -> Comparison | None:
        """Compare two predictors on the measurements that both predicted; return ``None`` if there are none.

        Args:
            predictor: a name in `prediction.FEATURES`.
            baseline: name of the predictor to beat.
            target: ``"loss"`` or ``"gap"``.
        """
        tracks = self.tracks[target]
        return compare_errors(tracks[predictor].errors, tracks[baseline].errors)

    def verdict(self, target: Target = "loss") -> str | None:
        """Return whether log(step) and the spectrum together predict better than log(step) alone.

        Args:
            target: ``"loss"`` or ``"gap"``.

        Returns:
            ``"adds to log(step)"``, ``"adds nothing over log(step)"`` or ``"too few to say"``; ``None`` before a
            prediction of both was scored.
        """
        found = self.comparison("log_step_and_spectrum", "log_step", target)
        if found is None:
            return None
        words = {"adds": "adds to log(step)", "adds nothing": "adds nothing over log(step)"}
        return words.get(found.verdict, found.verdict)

    # -- text ------------------------------------------------------------------------------------

    def expectation(self) -> str:
        """Return the predicted next loss as the end of a line of text; empty if there is no prediction."""
        coming = self.tracks["loss"]["spectrum"].next
        return "" if coming is None else f"; next loss {coming.value:.3g} ({coming.low:.3g} to {coming.high:.3g})"

    def summary(self) -> str | None:
        """Return a line of text that compares the spectrum with log(step); ``None`` before a prediction was scored."""
        found = self.comparison()
        if found is None:
            return None
        relation = "was nearer than" if found.wins > found.losses else "lost to"
        text = (
            f"prediction of the next loss: the spectrum {relation} log(step) in {max(found.wins, found.losses)} of "
            f"{found.num} (mean error {found.mean_error:.2g} against {found.baseline_error:.2g})"
        )
        joint = self.comparison("log_step_and_spectrum")
        if joint is None:
            return text
        return f"{text}; with log(step) it {_joint_words(joint)}"

    # -- the logger ------------------------------------------------------------------------------

    def scalars(self) -> dict[str, float]:
        """Return the logged values of the newest measurement, by their names behind the prefix.

        ``predicted_loss``, ``predicted_loss_low`` and ``predicted_loss_high`` were predicted at the measurement before,
        to be compared with ``loss``; ``predicted_loss_baseline/NAME`` likewise. ``next_loss``, ``next_loss_low`` and
        ``next_loss_high`` are predicted now. ``prediction_error/NAME`` is the mean absolute error of each predictor so
        far, ``prediction_coverage`` the share of the spectrum's intervals that contained the loss. ``gap``,
        ``predicted_gap``, ``predicted_gap_low`` and ``predicted_gap_high`` are the same for the gap.
        ``rank_correlation/NAME`` is Kendall's tau with the loss over the latest `CORRELATION_WINDOW` measurements,
        ``rank_correlation_low/NAME`` and ``rank_correlation_high/NAME`` its interval, ``spearman/NAME`` Spearman's rho
        over the same measurements.

        The result is empty if there are fewer than 5 measurements with a loss, or the newest has none.
        """
        values: dict[str, float] = {}
        if self._is_logged("loss"):
            values |= self._scalars_of("loss")
            values |= _named("next_loss", self.tracks["loss"]["spectrum"].next)
            for name, track in self.tracks["loss"].items():
                if name != "spectrum" and track.made_for_last is not None:
                    values[f"predicted_loss_baseline/{name}"] = track.made_for_last.value
            scores = self.scores()
            values |= {f"prediction_error/{name}": score.mean_error for name, score in scores.items()}
            if "spectrum" in scores:
                values["prediction_coverage"] = scores["spectrum"].coverage
            for name, found in self.correlations().items():
                values[f"rank_correlation/{name}"] = found.value
                values[f"rank_correlation_low/{name}"] = found.low
                values[f"rank_correlation_high/{name}"] = found.high
            values |= {f"spearman/{name}": found.value for name, found in self.correlations("spearman").items()}
        if self._is_logged("gap"):
            values |= self._scalars_of("gap")
        return values

    def _is_logged(self, target: Target) -> bool:
        return target in self._fresh and len(self.tracks[target]["spectrum"].observations) >= MIN_OBSERVATIONS

    def _scalars_of(self, target: Target) -> dict[str, float]:
        track = self.tracks[target]["spectrum"]
        return {target: track.observations[-1].target, **_named(f"predicted_{target}", track.made_for_last)}


def _observation(
    measurement: Measurement, target: Target, *, predict: str, on_training_data: bool
) -> Observation | None:
    """Return target and features of a measurement during training; ``None`` if the target is unknown."""
    if measurement.when not in ("epoch", "step", "fit_end"):
        return None
    loss = measurement.loss if predict == HELD_OUT else measurement.val_loss
    train_loss = measurement.loss if on_training_data else measurement.train_loss
    goal = loss if target == "loss" else None if loss is None or train_loss is None else loss - train_loss
    if goal is None or not math.isfinite(goal):
        return None
    features = {
        "log_step": math.log(measurement.step) if measurement.step else None,
        "train_loss": train_loss,
        "lambda_max": measurement.lambda_max,
        "trace": measurement.comparisons.get("trace"),
    }
    if measurement.logged:
        features |= {"slope": measurement.slope, "fit_error": measurement.fit_error}
    known = {name: value for name, value in features.items() if value is not None and math.isfinite(value)}
    return Observation(goal, known)


def _named(name: str, prediction: Prediction | None) -> dict[str, float]:
    if prediction is None:
        return {}
    return {name: prediction.value, f"{name}_low": prediction.low, f"{name}_high": prediction.high}


def _joint_words(joint: Comparison) -> str:
    if joint.verdict == "too few to say":
        return f"was scored {joint.num} time(s), too few to say"
    adds = "adds" if joint.verdict == "adds" else "adds nothing that can be told from chance"
    return f"{adds} (mean error {joint.mean_error:.2g} against {joint.baseline_error:.2g}, p = {joint.p_better:.2g})"
