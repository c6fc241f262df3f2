r"""Prediction of a run's next validation loss or generalisation gap, and the predictive value of the spectrum.

The features of measurement t predict the target of measurement t + 1. All predictors use the same method with different
features: the spectrum's statistics on one side; the last value, log(step) and the training loss, which cost nothing,
and the classical sharpness (largest eigenvalue, trace) on the other. Each prediction is scored against the next target,
so a run itself shows whether the spectrum adds anything to log(step).

The method is small on purpose, because a run has some twenty measurements: least squares on the last `WINDOW` pairs, a
jackknife+ interval, and a factor on its width that adapts to the misses. The cost of one more observation does not
depend on the number of earlier ones.

Everything here is a function of the series of observations and uses no random numbers, so a resumed run replays it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from scipy import stats

from hessian_callback.power_law.validation import FloatArray

__all__ = [
    "FEATURES",
    "LEVEL",
    "MIN_OBSERVATIONS",
    "WINDOW",
    "Comparison",
    "Observation",
    "Prediction",
    "PredictionTrack",
    "Score",
    "compare_errors",
    "interval_score",
    "predict_next",
]

# Five observations make four pairs, the fewest that allow a distribution-free interval of 80 %.
MIN_OBSERVATIONS = 5
LEVEL = 0.8
WINDOW = 20

# Rate at which the width adapts: a miss widens the next interval by 49 %, a hit narrows it by 10 %.
_RATE = 0.5
_MIN_SCORED = 10
_SIGNIFICANCE = 0.05

#: Features of each predictor; ``last_value`` has none and repeats the target.
FEATURES: Mapping[str, tuple[str, ...]] = {
    "spectrum": ("slope", "fit_error"),
    "log_step_and_spectrum": ("log_step", "slope", "fit_error"),
    "last_value": (),
    "log_step": ("log_step",),
    "train_loss": ("train_loss",),
    "lambda_max": ("lambda_max",),
    "trace": ("trace",),
}

# Features with a unit enter by their logarithm, as the target does. The slope is an exponent, the fit error a distance.
_SCALES = ("train_loss", "lambda_max", "trace")

Verdict = Literal["adds", "adds nothing", "too few to say"]


@dataclass(frozen=True)
class Observation:
    """Target and features of one measurement.

    Attributes:
        target: the loss or the gap that is predicted.
        features: numbers by the names in `FEATURES`; unknown ones are left out.

    Raises:
        ValueError: if a number is not finite.

    Example:
        >>> Observation(0.3, {"log_step": 4.6, "slope": 0.8}).features["slope"]
        0.8
    """

    target: float
    features: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise an error if a number is not finite."""
        bad = [name for name, value in {"target": self.target, **self.features}.items() if not math.isfinite(value)]
        if bad:
            raise ValueError(f"{', '.join(bad)} of an observation must be finite; leave out unknown features")


@dataclass(frozen=True)
class Prediction:
    """A predicted target with its interval, in the target's units."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """Accuracy of the predictions whose targets are known by now.

    Attributes:
        num: number of scored predictions.
        mean_error: mean absolute error.
        coverage: share of the intervals that contained the target.
        mean_interval_score: mean of `interval_score`; smaller is better.
    """

    num: int
    mean_error: float
    coverage: float
    mean_interval_score: float


def interval_score(prediction: Prediction, actual: float, *, level: float = LEVEL) -> float:
    r"""Compute the interval score: the width, plus a penalty if the interval misses the target.

    .. math:: (u - l) + \frac{2}{1 - \text{level}} \big[(l - y)_+ + (y - u)_+\big]

    The score is proper (Winkler): its mean is smallest for the true quantiles, so wide and narrow intervals lose.

    Args:
        prediction: interval with the ends l and u.
        actual: the target y.
        level: nominal coverage of the interval.

    Returns:
        The score, in the target's units; smaller is better.

    Source:
        Gneiting and Raftery (2007), equation 43.

    Example:
        >>> round(interval_score(Prediction(1.0, 0.5, 1.5), 2.0, level=0.8), 6)  # 1 + 10 * 0.5
        6.0
    """
    beyond = max(prediction.low - actual, 0.0) + max(actual - prediction.high, 0.0)
    return prediction.high - prediction.low + 2 / (1 - level) * beyond


def predict_next(
    observations: Sequence[Observation],
    features: Sequence[str],
    *,
    level: float = LEVEL,
    stretch: float = 1.0,
    logarithms: bool = True,
) -> Prediction | None:
    r"""Predict the target of the observation after the last one.

    The pairs (features of observation i, target of i + 1) of the last `WINDOW` are fitted by least squares. Without
    features the last target is repeated. If all targets of the window are positive, their logarithms are fitted, and
    the logarithms of features that have a unit (losses, eigenvalues). A prediction is clipped to the range of the
    window's targets, extended by its own length on both sides, because a line through four points extrapolates poorly.

    The interval is the jackknife+ of :math:`\mu_{-i}`, fitted without pair i. For exchangeable pairs its coverage is at
    least :math:`2\,\text{level} - 1`, and about ``level`` in practice. The pairs of a training run drift and are not
    exchangeable, so `PredictionTrack` stretches the interval.

    Args:
        observations: in order of time.
        features: names of `Observation.features`; pairs that lack one are left out.
        level: nominal coverage, between 0 and 1.
        stretch: factor on the interval's width on both sides of the prediction, on the scale of the fit.
        logarithms: fit the logarithms of positive targets. Pass False for a difference such as the gap, whose
            logarithm is meaningless near 0.

    Returns:
        The prediction. ``None`` if there are fewer than `MIN_OBSERVATIONS` observations, fewer pairs than the line has
        coefficients plus one, too few pairs for the level, or a feature of the last observation is unknown.

    Raises:
        ValueError: if ``level`` is not between 0 and 1, or ``stretch`` negative.

    Source:
        Barber, Candes, Ramdas and Tibshirani (2021), "Predictive inference with the jackknife+".

    Example:
        >>> series = [Observation(2.0 - 0.1 * t, {"slope": float(t)}) for t in range(8)]
        >>> series = [Observation(one.target - 5.0, one.features) for one in series]  # negative: no logarithms
        >>> round(predict_next(series, ["slope"]).value, 6)
        -3.8
    """
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if stretch < 0:
        raise ValueError(f"stretch must not be negative, got {stretch}")
    known = [all(name in one.features for name in features) for one in observations]
    pairs = [i for i in range(len(observations) - 1) if known[i]][-WINDOW:]
    rank = math.ceil(level * (len(pairs) + 1) - 1e-9)
    enough = len(observations) >= MIN_OBSERVATIONS and rank <= len(pairs)
    if not enough or not known[-1] or (features and len(pairs) < len(features) + 2):
        return None
    value, others, errors, logarithmic = _fit(observations, pairs, features, logarithms)
    low, high = _jackknife_plus(others, errors, rank)
    low, high = value + stretch * min(low - value, 0.0), value + stretch * max(high - value, 0.0)
    if not logarithmic:
        return Prediction(value, low, high)
    if high > 700:  # The exponential would overflow; no loss is that large.
        return None
    return Prediction(math.exp(value), math.exp(low), math.exp(high))


def _jackknife_plus(others: FloatArray, errors: FloatArray, rank: int) -> tuple[float, float]:
    r"""Return the ends of the jackknife+ interval.

    .. math:: \big[\, q^-\{\mu_{-i}(x) - R_i\},\; q^+\{\mu_{-i}(x) + R_i\} \,\big]

    with the predictions :math:`\mu_{-i}(x)` without pair i, the errors :math:`R_i` at pair i, and the
    :math:`\lceil \text{level} (n + 1) \rceil`-th values :math:`q^\pm` counted from the inner side.
    """
    return float(np.sort(others - errors)[::-1][rank - 1]), float(np.sort(others + errors)[rank - 1])


def _fit(
    observations: Sequence[Observation], pairs: Sequence[int], features: Sequence[str], logarithms: bool
) -> tuple[float, FloatArray, FloatArray, bool]:
    """Fit the pairs; return prediction, leave-one-out predictions and errors, and whether they are logarithms."""
    targets = np.array([observations[i + 1].target for i in pairs])
    last = observations[-1].target
    logarithmic = logarithms and last > 0 and all(observations[j].target > 0 for i in pairs for j in (i, i + 1))
    if logarithmic:
        targets, last = np.log(targets), math.log(last)
    if features:
        rows = _design([observations[i] for i in (*pairs, len(observations) - 1)], features)
        return *_leave_one_out(rows[:-1], targets, rows[-1]), logarithmic
    before = np.array([observations[i].target for i in pairs])
    errors = np.abs(targets - (np.log(before) if logarithmic else before))
    return last, np.full(len(pairs), last), errors, logarithmic


def _design(observations: Sequence[Observation], features: Sequence[str]) -> FloatArray:
    """Return features as columns, ``(n, p)``, each with mean 0 and, unless constant, standard deviation 1."""
    columns = np.array([[one.features[name] for name in features] for one in observations], dtype=np.float64)
    for number, name in enumerate(features):
        if name in _SCALES and (columns[:, number] > 0).all():
            columns[:, number] = np.log(columns[:, number])
    columns -= columns.mean(axis=0)
    spread = columns.std(axis=0)
    scaled: FloatArray = columns / np.where(spread > 0, spread, 1.0)
    return scaled


def _leave_one_out(rows: FloatArray, targets: FloatArray, new: FloatArray) -> tuple[float, FloatArray, FloatArray]:
    """Return the prediction at ``new`` from all pairs, those without each pair, and the errors at left-out pairs."""
    num = len(targets)
    design = np.column_stack([np.ones(num), rows])
    point = np.concatenate([[1.0], new])
    spread = targets.max() - targets.min()
    floor, ceiling = targets.min() - spread, targets.max() + spread
    whole = np.linalg.pinv(design, rcond=1e-10) @ targets
    kept = np.array([[j for j in range(num) if j != i] for i in range(num)])
    # The pseudoinverse gives the shortest solution if a fit without one pair is not unique.
    others = np.einsum("ipk,ik->ip", np.linalg.pinv(design[kept], rcond=1e-10), targets[kept])
    missed = np.abs(targets - np.clip(np.einsum("ip,ip->i", design, others), floor, ceiling))
    return float(np.clip(point @ whole, floor, ceiling)), np.clip(others @ point, floor, ceiling), missed


class PredictionTrack:
    r"""Predictions of one predictor along a run, and their scores.

    The jackknife+ interval is stretched by a factor that starts at 1, grows after a miss and shrinks after a hit,

    .. math:: \ln m_{T+1} = \ln m_T + \gamma (\text{missed}_T - \alpha), \qquad
        \frac{1}{T} \sum \text{missed} - \alpha = \frac{\ln m_{T+1}}{\gamma T}

    with :math:`\alpha = 1 - \text{level}`, :math:`\gamma = 0.5`. The second equation is an identity for any series. If
    the factor stays bounded, the share of misses tends to :math:`\alpha`. This implies nothing about a single interval,
    and little about a few: at T = 20 a factor of 3 means that 31 % were missed instead of 20 %.

    Args:
        features: as in `predict_next`.
        level: nominal coverage of the intervals.
        logarithms: as in `predict_next`.

    Attributes:
        observations: all observations so far.
        made_for_last: the prediction of the last observation, made at the one before; ``None`` if there was none.
        next: the prediction of the next observation; ``None`` if there is none.
        stretch: the factor m.
        errors: absolute errors by the number of the observation that was predicted.

    Source:
        Adaptive conformal inference (Gibbs and Candes, 2021), here on the logarithm of the width, which stays positive
        and finite.

    Example:
        >>> track = PredictionTrack(["log_step"])
        >>> for step in (1, 2, 4, 8, 16, 32, 64):  # a power law of the step, observed at geometric steps
        ...     track.add(Observation(step**-0.5, {"log_step": math.log(step)}))
        >>> round(track.next.value * 128**0.5, 6), len(track.errors), round(track.score().mean_error, 6)
        (1.0, 2, 0.0)
    """

    def __init__(self, features: Sequence[str], *, level: float = LEVEL, logarithms: bool = True) -> None:
        self.features = tuple(features)
        self.level = level
        self.logarithms = logarithms
        self.observations: list[Observation] = []
        self.made_for_last: Prediction | None = None
        self.next: Prediction | None = None
        self.stretch = 1.0
        self.errors: dict[int, float] = {}
        # Sums, so that a score costs the same after any number of predictions.
        self._sum_of_errors = 0.0
        self._hits = 0
        self._sum_of_interval_scores = 0.0

    def add(self, observation: Observation) -> None:
        """Score the prediction of this observation, if there was one, and predict the next observation."""
        number = len(self.observations)
        self.observations.append(observation)
        self.made_for_last = self.next
        if self.next is not None:
            actual = observation.target
            # Exact predictions have intervals of zero width; rounding must not turn them into misses.
            rounding = 1e-12 * abs(actual)
            hit = self.next.low - rounding <= actual <= self.next.high + rounding
            self.errors[number] = abs(actual - self.next.value)
            self._sum_of_errors += self.errors[number]
            self._hits += hit
            self._sum_of_interval_scores += interval_score(self.next, actual, level=self.level)
            self.stretch *= math.exp(_RATE * ((not hit) - (1 - self.level)))
        # Older observations are among the last pairs only if features were missing.
        recent = self.observations[-3 * WINDOW :]
        self.next = predict_next(
            recent, self.features, level=self.level, stretch=self.stretch, logarithms=self.logarithms
        )

    def score(self) -> Score | None:
        """Return the score of the predictions so far; ``None`` before the first could be scored."""
        num = len(self.errors)
        if not num:
            return None
        return Score(num, self._sum_of_errors / num, self._hits / num, self._sum_of_interval_scores / num)


@dataclass(frozen=True)
class Comparison:
    """Comparison of two predictors on the measurements that both predicted.

    Attributes:
        num: number of these measurements.
        wins: number of measurements at which the first predictor was nearer.
        losses: number of measurements at which the second predictor was nearer.
        mean_error: mean absolute error of the first predictor.
        baseline_error: mean absolute error of the second predictor.
        p_better: one-sided p-value of the hypothesis that the first predictor is no better.
        p_worse: one-sided p-value of the hypothesis that the first predictor is no worse.
        verdict: ``"adds"`` or ``"adds nothing"``, about the first predictor, or ``"too few to say"``.
    """

    num: int
    wins: int
    losses: int
    mean_error: float
    baseline_error: float
    p_better: float
    p_worse: float
    verdict: Verdict


def compare_errors(errors: Mapping[int, float], baseline: Mapping[int, float]) -> Comparison | None:
    r"""Compare absolute errors in pairs by Wilcoxon's signed-rank test.

    For small n the test is exact, whatever the size of the errors, if each difference is equally likely to have either
    sign, independently of the others. One-step-ahead errors are nearly uncorrelated if a model fits, and less so if
    both predictors lag behind the same trend: for three independent random walks, one in ten verdicts is "adds" after
    20 comparisons (benchmarks/PREDICTION.md). "Adds" needs a p-value of at most 5 % and a smaller mean error. "Adds
    nothing" means that no gain can be told from chance in at least 10 comparisons, not that there is none. The level
    holds for one look, best at the end: anyone who looks after every measurement sees "adds" more often by chance.

    Args:
        errors: absolute errors of the predictor under test, by the number of the observation.
        baseline: absolute errors of the predictor to beat.

    Returns:
        The comparison on the numbers that both have; ``None`` if they share none.

    Example:
        >>> found = compare_errors(dict.fromkeys(range(12), 0.1), {n: 0.2 + 0.01 * n for n in range(12)})
        >>> found.wins, found.verdict, found.p_better < 0.001
        (12, 'adds', True)
    """
    shared = sorted(errors.keys() & baseline.keys())
    if not shared:
        return None
    first, second = (np.array([side[number] for number in shared]) for side in (errors, baseline))
    # Differences at rounding level are ties.
    gains = np.where(np.isclose(first, second, rtol=1e-9, atol=1e-12), 0.0, second - first)
    p_better = p_worse = 1.0
    if gains.any():
        decided = gains[gains != 0]
        p_better = float(stats.wilcoxon(decided, alternative="greater").pvalue)
        p_worse = float(stats.wilcoxon(decided, alternative="less").pvalue)
    verdict: Verdict = "too few to say"
    if len(shared) >= _MIN_SCORED:
        verdict = "adds" if p_better <= _SIGNIFICANCE and first.mean() < second.mean() else "adds nothing"
    return Comparison(
        num=len(shared),
        wins=int((gains > 0).sum()),
        losses=int((gains < 0).sum()),
        mean_error=float(first.mean()),
        baseline_error=float(second.mean()),
        p_better=p_better,
        p_worse=p_worse,
        verdict=verdict,
    )
