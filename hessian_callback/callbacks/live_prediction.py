"""The predictions of a run: what `prediction` makes of the measurements in a callback's history."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

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

__all__ = ["HELD_OUT", "LivePrediction", "observations_of"]

#: Stands for the mean loss over the samples that the Hessian is taken on.
HELD_OUT = "held_out"

STATISTICS = ("slope", "fit_error", "lambda_max", "trace", "train_loss", "log_step")

Target = Literal["loss", "gap"]


class LivePrediction:
    """Follows a history, and says what comes next and what the spectrum is worth.

    All of it is a function of the history: after a resume, and on every rank, it is the same. Measurements before the
    first step are outliers and left out, those of ``trainer.validate()`` and those without a loss are too. Slopes that
    were not logged are not used, as they are of another number of eigenvalues.

    Args:
        predict: ``"held_out"`` for the loss on the Hessian's own samples, else a name: then `Measurement.val_loss`.
        on_training_data: the Hessian's samples are training samples, and their loss the training loss of the gap.

    Attributes:
        tracks: by target (``"loss"``; ``"gap"``: that loss minus the training loss) and by the name of the predictor
            in `prediction.FEATURES`, a `PredictionTrack`.

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
        self._begin()

    def _begin(self) -> None:
        self.tracks: dict[Target, dict[str, PredictionTrack]] = {
            "loss": {name: PredictionTrack(features) for name, features in FEATURES.items()},
            "gap": {name: PredictionTrack(features, logarithms=False) for name, features in FEATURES.items()},
        }
        self._followed: list[Measurement] = []
        self._observed: list[Observation] = []

    def follow(self, history: Sequence[Measurement]) -> None:
        """Take in what a history has in addition, or, if it is another one, all of it."""
        known = self._followed
        if len(history) < len(known) or any(a is not b for a, b in zip(known, history, strict=False)):
            self._begin()
        for measurement in history[len(self._followed) :]:
            self._followed.append(measurement)
            for target in ("loss", "gap"):
                for observation in observations_of(
                    [measurement], target, predict=self.predict, on_training_data=self.on_training_data
                ):
                    for track in self.tracks[target].values():
                        track.add(observation)
                    if target == "loss":
                        self._observed.append(observation)

    # -- what is known ---------------------------------------------------------------------------

    def correlations(self, kind: Literal["kendall", "spearman"] = "kendall") -> dict[str, RankCorrelation]:
        """Correlate each statistic with the loss of the same measurement, by its name.

        Args:
            kind: as in `rank_correlation`, whose intervals are nominal 95 %.

        Returns:
            Those that are defined: known in at least 5 measurements, and not constant.
        """
        found = {}
        for name in STATISTICS:
            pairs = [(one.features[name], one.target) for one in self._observed if name in one.features]
            x, y = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
            if len(pairs) >= MIN_OBSERVATIONS and len(set(x)) > 1 and len(set(y)) > 1:
                found[name] = rank_correlation(x, y, kind=kind)
        return found

    def scores(self, target: Target = "loss") -> dict[str, Score]:
        """Return the score of each predictor that has one, by its name.

        Args:
            target: ``"loss"`` or ``"gap"``.
        """
        scores = {name: track.score() for name, track in self.tracks[target].items()}
        return {name: score for name, score in scores.items() if score is not None}

    def comparison(
        self, predictor: str = "spectrum", baseline: str = "log_step", target: Target = "loss"
    ) -> Comparison | None:
        """Compare two predictors on what both predicted; ``None`` before that is anything.

        Args:
            predictor: a name in `prediction.FEATURES`.
            baseline: the one that it is to beat.
            target: ``"loss"`` or ``"gap"``.
        """
        tracks = self.tracks[target]
        return compare_errors(tracks[predictor].errors, tracks[baseline].errors)

    def verdict(self, target: Target = "loss") -> str | None:
        """Say whether the spectrum adds anything to log(step): with it, are predictions better than by log(step) alone?

        Args:
            target: ``"loss"`` or ``"gap"``.

        Returns:
            ``"adds to log(step)"``, ``"adds nothing over log(step)"`` or ``"too few to say"``; ``None`` before the
            first prediction from both was scored.
        """
        found = self.comparison("log_step_and_spectrum", "log_step", target)
        if found is None:
            return None
        words = {"adds": "adds to log(step)", "adds nothing": "adds nothing over log(step)"}
        return words.get(found.verdict, found.verdict)

    # -- words -----------------------------------------------------------------------------------

    def expectation(self) -> str:
        """Return what is expected next, as words to end a line with; empty while nothing is."""
        coming = self.tracks["loss"]["spectrum"].next
        return "" if coming is None else f"; next loss {coming.value:.3g} ({coming.low:.3g} to {coming.high:.3g})"

    def summary(self) -> str | None:
        """Return in one line how the spectrum fared against log(step); ``None`` before that is known."""
        found = self.comparison()
        if found is None:
            return None
        better = found.wins > found.losses
        what = "was nearer than" if better else "lost to"
        text = (
            f"prediction of the next loss: the spectrum {what} log(step) in {max(found.wins, found.losses)} of "
            f"{found.num} (mean error {found.mean_error:.2g} against {found.baseline_error:.2g})"
        )
        joint = self.comparison("log_step_and_spectrum")
        if joint is None:
            return text
        return f"{text}; with log(step) it {self._joint_words(joint)}"

    def _joint_words(self, joint: Comparison) -> str:
        if joint.verdict == "too few to say":
            return f"was scored {joint.num} time(s), too few to say"
        adds = "adds" if joint.verdict == "adds" else "adds nothing that can be told from chance"
        return (
            f"{adds} (mean error {joint.mean_error:.2g} against {joint.baseline_error:.2g}, p = {joint.p_better:.2g})"
        )

    # -- the logger ------------------------------------------------------------------------------

    def scalars(self) -> dict[str, float]:
        """Return what is logged with the newest measurement, by its name behind the prefix.

        ``predicted_loss``, ``predicted_loss_low`` and ``predicted_loss_high`` were predicted from the measurement
        before, and stand beside ``loss``, which came; ``predicted_loss_baseline/NAME`` likewise. ``next_loss``,
        ``next_loss_low`` and ``next_loss_high`` are predicted now. ``prediction_error/NAME`` is the mean absolute
        error of each predictor so far, ``prediction_coverage`` the share of the spectrum's intervals that held.
        ``gap``, ``predicted_gap``, ``predicted_gap_low`` and ``predicted_gap_high`` are the same for the gap.
        ``rank_correlation/NAME`` is Kendall's tau with the loss, ``rank_correlation_low/NAME`` and
        ``rank_correlation_high/NAME`` its interval, ``spearman/NAME`` Spearman's rho.

        Nothing is in it before there are 5 measurements with a loss, or if the newest has none.
        """
        values: dict[str, float] = {}
        for target in ("loss", "gap"):
            track = self.tracks[target]["spectrum"]
            fresh = bool(self._followed) and observations_of(
                self._followed[-1:], target, predict=self.predict, on_training_data=self.on_training_data
            )
            if not fresh or len(track.observations) < MIN_OBSERVATIONS:
                continue
            values[target] = track.observations[-1].target
            values |= _named(f"predicted_{target}", track.made_for_last)
            if target == "gap":
                continue
            values |= _named("next_loss", track.next)
            for name, other in self.tracks["loss"].items():
                if name != "spectrum" and other.made_for_last is not None:
                    values[f"predicted_loss_baseline/{name}"] = other.made_for_last.value
            scores = self.scores()
            values |= {f"prediction_error/{name}": score.mean_error for name, score in scores.items()}
            if "spectrum" in scores:
                values["prediction_coverage"] = scores["spectrum"].coverage
            for name, found in self.correlations().items():
                values[f"rank_correlation/{name}"] = found.value
                values[f"rank_correlation_low/{name}"] = found.low
                values[f"rank_correlation_high/{name}"] = found.high
            values |= {f"spearman/{name}": found.value for name, found in self.correlations("spearman").items()}
        return values


def observations_of(
    history: Sequence[Measurement], target: Target = "loss", *, predict: str = HELD_OUT, on_training_data: bool = False
) -> list[Observation]:
    """Take from a history what predictions are made from.

    Args:
        history: the measurements in order of time.
        target: ``"loss"``, or ``"gap"`` for the loss minus the training loss where both are known.
        predict: as in `LivePrediction`.
        on_training_data: as in `LivePrediction`.

    Returns:
        An observation for each measurement of training whose target is known.

    Example:
        >>> one = Measurement(epoch=0, step=0, when="epoch", spectrum=None, fit=None, reason="no fit", seconds=0.1,
        ...                   loss=0.5, train_loss=0.3)
        >>> [round(observation.target, 6) for observation in observations_of([one], "gap")]
        [0.2]
    """
    observations = []
    for measurement in history:
        if measurement.when not in ("epoch", "step", "fit_end"):
            continue
        loss = measurement.loss if predict == HELD_OUT else measurement.val_loss
        train_loss = measurement.loss if on_training_data else measurement.train_loss
        goal = loss if target == "loss" else None if loss is None or train_loss is None else loss - train_loss
        if goal is None or not math.isfinite(goal):
            continue
        features = {
            "log_step": math.log(measurement.step) if measurement.step else None,
            "train_loss": train_loss,
            "lambda_max": measurement.lambda_max,
            "trace": measurement.comparisons.get("trace"),
        }
        if measurement.logged:
            features |= {"slope": measurement.slope, "fit_error": measurement.fit_error}
        known = {name: value for name, value in features.items() if value is not None and math.isfinite(value)}
        observations.append(Observation(goal, known))
    return observations


def _named(name: str, prediction: Prediction | None) -> dict[str, float]:
    if prediction is None:
        return {}
    return {name: prediction.value, f"{name}_low": prediction.low, f"{name}_high": prediction.high}
