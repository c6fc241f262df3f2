r"""Decide whether a noisy slope has stopped improving: a rule on a sequence of numbers, without a trainer.

All measurements of a run use the same samples. An effect that these have on two slopes alike cancels in their
difference, so a change must be judged by the noise of the *difference* :math:`D = s_t - s_r`. The noise has two parts.

**Numerical.** The eigenvalues' error bounds leave an interval :math:`[l, u]` for each slope (`numerical_interval`). If
an increase counts as progress, it may be smaller than it looks by at most

.. math:: \nu = (s_t - l_t) + (u_r - s_r),

if a decrease does, by at most :math:`(u_t - s_t) + (s_r - l_r)`. This is a bound, so it is counted once.

**Sampling.** If the slopes :math:`s^{(1)}, s^{(2)}` on two halves of the samples were measured (`split_half`), the
halves are the same ones each time, and :math:`D^{(1)} - D^{(2)} = g_t - g_r` with the gap
:math:`g = s^{(1)} - s^{(2)}`. A constant difference between the halves cancels. As for a single slope,
:math:`(D^{(1)} - D^{(2)})^2 / 4` estimates the variance of D on all samples, with one degree of freedom, which is next
to nothing. So it is averaged over all pairs of the last n measurements; by the identity between squared differences and
variances that is

.. math:: \sigma_D^2 = \frac{1}{2 (n - 1)} \sum_{i=1}^{n} (g_i - \bar g)^2 .

A change is progress if it is larger than :math:`\nu + z \sigma_D`. The standard error of a fit, :math:`s / \sqrt K`, is
not included, because it is about other eigenvalues than these (at K = 50 it is 14 % of the slope). The wandering of the
weights under SGD is not included either: it is a change of the Hessian, not an error, and patience covers it.

The reference r is the last measurement that was progress, not the one before, so that small steps add up until they
exceed the noise.

**Waiting.** If the noise is large, a slow trend takes long to show, and a shorter patience proves nothing. With w
measurements since the reference, a trend of the relative size :math:`\delta` (``min_trend``) a measurement would have
amounted to :math:`w \delta |s_r|`. The rule stops when that is twice the required change, so that such a trend is
overlooked about as rarely as noise is taken for progress:

.. math:: w \ge \text{patience} \quad\text{and}\quad w \, \delta \, |s_r| \ge 2 (\nu + z \sigma_D) .
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Noise", "Plateau", "PlateauRule", "Reading", "noise_of_change"]

# Least and largest number of readings whose halves are pooled; in between it is patience + 1.
_MIN_POOLED = 6
_MAX_POOLED = 1000


@dataclass(frozen=True)
class Reading:
    """A measured number with its errors.

    Attributes:
        value: the number.
        low: smallest value that numerical errors allow; ``None``: the value itself.
        high: largest value that numerical errors allow; ``None``: the value itself.
        half_gap: the number on one half of the samples minus that on the other; ``None`` if it was not measured.

    Raises:
        ValueError: if a number is not finite, or the value lies outside its interval.

    Example:
        >>> Reading(0.8, low=0.79, high=0.8).low
        0.79
    """

    value: float
    low: float | None = None
    high: float | None = None
    half_gap: float | None = None

    def __post_init__(self) -> None:
        """Raise an error if a number is not finite or the value is outside its interval."""
        given = [x for x in (self.value, self.low, self.high, self.half_gap) if x is not None]
        if not np.isfinite(given).all():
            raise ValueError(f"{self} is not finite; leave out a measurement that failed")
        if not self.lowest <= self.value <= self.highest:
            raise ValueError(f"{self}: the value lies outside its interval; pass low <= value <= high")

    @property
    def lowest(self) -> float:
        """``low``, or the value."""
        return self.value if self.low is None else self.low

    @property
    def highest(self) -> float:
        """``high``, or the value."""
        return self.value if self.high is None else self.high


@dataclass(frozen=True)
class Noise:
    r"""Noise of the difference between two readings.

    Attributes:
        numerical: :math:`\nu`, a bound, in the readings' unit.
        sampling: :math:`\sigma_D`, a standard error, in the same unit; ``None`` if fewer than two readings have halves.
        num_sigmas: z.
        num_pooled: n, number of readings whose halves were used for :math:`\sigma_D`.

    Example:
        >>> Noise(numerical=0.01, sampling=0.02, num_sigmas=2.0, num_pooled=6).total
        0.05
    """

    numerical: float
    sampling: float | None
    num_sigmas: float
    num_pooled: int

    @property
    def total(self) -> float:
        r""":math:`\nu + z \sigma_D`."""
        return self.numerical + self.num_sigmas * (self.sampling or 0.0)


def noise_of_change(
    before: Reading,
    now: Reading,
    pooled: Sequence[Reading],
    *,
    mode: Literal["min", "max"],
    num_sigmas: float = 2.0,
) -> Noise:
    """Compute the noise of the difference between two readings on the same samples; the module has the formula.

    Args:
        before: the earlier reading.
        now: the later reading.
        pooled: readings whose halves are used for the sampling noise, these two among them.
        mode: whether a decrease or an increase is progress. Numerical errors count on the side that makes progress look
            larger.
        num_sigmas: z, the number of standard errors of the sampling noise.

    Returns:
        The noise, in the readings' unit.

    Example:
        >>> before, now = Reading(1.0, 0.99, 1.01, half_gap=0.30), Reading(0.9, 0.89, 0.92, half_gap=0.34)
        >>> noise = noise_of_change(before, now, [before, now], mode="min")
        >>> round(noise.numerical, 3), round(noise.sampling, 3), noise.num_pooled
        (0.03, 0.02, 2)
    """
    if mode == "max":
        numerical = (now.value - now.lowest) + (before.highest - before.value)
    else:
        numerical = (now.highest - now.value) + (before.value - before.lowest)
    gaps = [reading.half_gap for reading in pooled if reading.half_gap is not None]
    sampling = float(np.sqrt(np.var(gaps, ddof=1) / 2)) if len(gaps) > 1 else None
    return Noise(numerical, sampling, num_sigmas, len(gaps))


@dataclass(frozen=True)
class Plateau:
    """The verdict of `PlateauRule` at a reading.

    Attributes:
        stop: whether to stop.
        wait: number of readings since the last progress.
        best: index of the last progress; of the first reading if there was none.
        reference: index of the reading that this one was compared with: ``best``, or, if this one is progress, the
            previous best. ``None`` for a first reading.
        change: this reading minus the reference; ``None`` for a first reading.
        required: the change that had to be exceeded in the direction of ``mode``; ``None`` for a first reading.
        noise: the noise that ``required`` was computed from; ``None`` if it was a fixed number.
    """

    stop: bool
    wait: int
    best: int
    reference: int | None = None
    change: float | None = None
    required: float | None = None
    noise: Noise | None = None


class PlateauRule:
    """Decide reading by reading whether a quantity that is measured with noise has stopped improving.

    A reading is progress if it is better than the last progress by more than ``min_delta``. The verdict is to stop if
    ``patience`` readings in a row are not, and a trend of ``min_trend`` would have shown by now. A verdict depends on
    earlier readings only. Its cost does not depend on their number.

    Args:
        mode: ``"min"`` or ``"max"``, the direction of progress.
        patience: number of readings in a row without progress, at least 1.
        min_delta: ``"noise"``, or a fixed number that is at least 0.
        num_sigmas: number of standard errors of the sampling noise, with ``"noise"``.
        min_trend: relative change a reading that must not be overlooked, with ``"noise"``; 0: only patience decides.

    Attributes:
        verdict: the verdict at the last reading; ``None`` before the first.

    Example:
        >>> rule = PlateauRule(mode="max", patience=3)
        >>> for slope in (0.60, 0.70, 0.71, 0.72, 0.72, 0.71):
        ...     verdict = rule.add(Reading(slope, slope - 0.015, slope))
        >>> verdict.stop, verdict.wait, verdict.best  # 0.72 exceeds 0.70 by more than 0.015
        (False, 2, 3)
    """

    def __init__(
        self,
        *,
        mode: Literal["min", "max"],
        patience: int,
        min_delta: float | Literal["noise"] = "noise",
        num_sigmas: float = 2.0,
        min_trend: float = 0.02,
    ) -> None:
        self.mode: Literal["min", "max"] = mode
        self.patience = patience
        self.min_delta = min_delta
        self.num_sigmas = num_sigmas
        self.min_trend = min_trend
        self.verdict: Plateau | None = None
        self._num = 0
        self._best: Reading | None = None
        self._recent: deque[Reading] = deque(maxlen=min(max(patience + 1, _MIN_POOLED), _MAX_POOLED))

    def add(self, reading: Reading) -> Plateau:
        """Return the verdict at the next reading."""
        index, self._num = self._num, self._num + 1
        self._recent.append(reading)
        if self.verdict is None or self._best is None:
            self._best = reading
            self.verdict = Plateau(stop=False, wait=0, best=0)
            return self.verdict
        reference = self.verdict.best
        noise, required = self._required(reading, index - reference)
        change = reading.value - self._best.value
        progress = (change if self.mode == "max" else -change) > required
        wait = 0 if progress else self.verdict.wait + 1
        stop = wait >= self.patience
        if noise is not None and self.min_trend > 0:
            stop = stop and wait * self.min_trend * abs(self._best.value) >= 2 * noise.total
        if progress:
            self._best = reading
        self.verdict = Plateau(stop, wait, index if progress else reference, reference, change, required, noise)
        return self.verdict

    def _required(self, reading: Reading, distance: int) -> tuple[Noise | None, float]:
        """Return the change that counts as progress, and its noise; the reference is ``distance`` readings back."""
        if self.min_delta != "noise":
            return None, self.min_delta
        assert self._best is not None
        pooled = list(self._recent) if distance < len(self._recent) else [self._best, *self._recent]
        noise = noise_of_change(self._best, reading, pooled, mode=self.mode, num_sigmas=self.num_sigmas)
        return noise, noise.total
