r"""When a noisy slope has stopped moving: a rule on a sequence of numbers, without a trainer.

All measurements of a run use the same samples. What these do to two slopes alike cancels in their difference, so a
change must be judged by the noise of the *difference* :math:`D = s_t - s_r`. It has two parts.

**Numerical.** The eigenvalues' error bounds leave an interval :math:`[l, u]` to each slope
(`numerical_interval`). Where an increase counts as progress, it may be smaller than it looks by at most

.. math:: \nu = (s_t - l_t) + (u_r - s_r),

where a decrease does, by :math:`(u_t - s_t) + (s_r - l_r)`. That is a bound, so it is taken once.

**Sampling.** Where the slopes :math:`s^{(1)}, s^{(2)}` on two halves of the samples were measured (`halves`), the
halves are the same ones each time, and :math:`D^{(1)} - D^{(2)} = g_t - g_r` with the gap
:math:`g = s^{(1)} - s^{(2)}`. What sets the halves apart at all times cancels. As for a single slope,
:math:`(D^{(1)} - D^{(2)})^2 / 4` estimates the variance of D on all samples, with one degree of freedom, which is
next to nothing. So it is averaged over all pairs of the last n measurements; by the identity between squared
differences and variances that is

.. math:: \sigma_D^2 = \frac{1}{2 (n - 1)} \sum_{i=1}^{n} (g_i - \bar g)^2 .

A change is progress if it is larger than :math:`\nu + z \sigma_D`. The standard error of a fit, :math:`s / \sqrt K`, is
not in it: that is about other eigenvalues than these (at K = 50 it is 14 % of the slope). Nor is the wandering of the
weights under SGD, which is a change of the Hessian and no error in measuring it: patience is for that.

The reference r is the last measurement that was progress, not the one before, so that steps too small to be seen one
by one add up until they are.

**How long to wait.** Where the noise is large, a slow trend takes long to be seen, and a patience that is shorter
proves nothing. With w measurements since the reference, a trend of the relative size :math:`\delta` (``min_trend``)
a measurement would have come to :math:`w \delta |s_r|`. It is time to stop when that would have been twice what is
required, so that it would be overlooked about as rarely as noise is taken for progress:

.. math:: w \ge \text{patience} \quad\text{and}\quad w \, \delta \, |s_r| \ge 2 (\nu + z \sigma_D) .
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

__all__ = ["Crossing", "Noise", "Plateau", "Reading", "crossing", "noise_of_change", "plateau"]

# Halves of so many measurements are pooled at the least, if there are so many: as patience + 1 may be as few as 2.
_POOLED = 6


@dataclass(frozen=True)
class Reading:
    """One measured number and what is known of its error.

    Attributes:
        value: the number.
        low: smallest value that numerical errors leave open; ``None``: the value itself.
        high: largest, likewise.
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
        """Check the numbers."""
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
    r"""What a change between two readings must exceed.

    Attributes:
        numerical: :math:`\nu`, a bound, in the readings' unit.
        sampling: :math:`\sigma_D`, a standard error, in the same; ``None`` where fewer than two readings have halves.
        num_sigmas: z.
        num_pooled: n, how many readings' halves :math:`\sigma_D` rests on.

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
    readings: Sequence[Reading],
    reference: int,
    current: int,
    *,
    mode: Literal["min", "max"],
    num_sigmas: float = 2.0,
    num_pooled: int = _POOLED,
) -> Noise:
    """Noise of the difference between two readings on the same samples; the module has the formula.

    Args:
        readings: in order of time.
        reference: index of the earlier one.
        current: index of the later one.
        mode: whether a decrease or an increase is progress: numerical errors count on the side that flatters it.
        num_sigmas: z, how many standard errors of the sampling noise count.
        num_pooled: of how many readings up to the current one the halves are pooled, besides the reference.

    Returns:
        The noise, in the readings' unit.

    Example:
        >>> readings = [Reading(1.0, 0.99, 1.01, half_gap=0.30), Reading(0.9, 0.89, 0.92, half_gap=0.34)]
        >>> noise = noise_of_change(readings, 0, 1, mode="min")
        >>> round(noise.numerical, 3), round(noise.sampling, 3), noise.num_pooled
        (0.03, 0.02, 2)
    """
    before, now = readings[reference], readings[current]
    if mode == "max":
        numerical = (now.value - now.lowest) + (before.highest - before.value)
    else:
        numerical = (now.highest - now.value) + (before.value - before.lowest)
    pooled = {reference, *range(max(0, current + 1 - num_pooled), current + 1)}
    gaps = [gap for gap in (readings[i].half_gap for i in sorted(pooled)) if gap is not None]
    sampling = float(np.sqrt(np.var(gaps, ddof=1) / 2)) if len(gaps) > 1 else None
    return Noise(numerical, sampling, num_sigmas, len(gaps))


@dataclass(frozen=True)
class Plateau:
    """Whether a sequence of readings has stopped getting better, at its last one.

    Attributes:
        stop: whether it is time to stop.
        wait: readings since the last progress.
        best: index of the last progress, the first reading if there was none.
        reference: index of the reading that the last one was compared with: ``best``, or where the last one is
            progress itself, the one that was best before. ``None`` for a first reading.
        change: last reading minus the reference; ``None`` for a first reading.
        required: what the change had to exceed, towards ``mode``; ``None`` likewise.
        noise: how that came about; ``None`` if it was a fixed number.
    """

    stop: bool
    wait: int
    best: int
    reference: int | None = None
    change: float | None = None
    required: float | None = None
    noise: Noise | None = None


def plateau(
    readings: Sequence[Reading],
    *,
    mode: Literal["min", "max"],
    patience: int,
    min_delta: float | Literal["noise"] = "noise",
    num_sigmas: float = 2.0,
    min_trend: float = 0.02,
) -> Plateau:
    """Judge whether a quantity that is measured with noise has stopped getting better.

    A reading is progress if it is better than the last progress by more than ``min_delta``. Where ``patience``
    readings in a row are not, and a trend of ``min_trend`` would have shown by now, it is time to stop. What came
    before decides, never what comes after.

    Args:
        readings: in order of time, at least one.
        mode: ``"min"`` or ``"max"``, what is better.
        patience: how many readings in a row may be without progress, at least 1.
        min_delta: ``"noise"``, or a fixed number that is at least 0.
        num_sigmas: how many standard errors of the sampling noise count, with ``"noise"``.
        min_trend: relative change a reading that must not be overlooked, with ``"noise"``; 0: patience alone decides.

    Returns:
        The verdict at the last reading.

    Raises:
        ValueError: if there is no reading.

    Example:
        >>> slopes = [0.60, 0.70, 0.71, 0.72, 0.72, 0.71]
        >>> verdict = plateau([Reading(s, s - 0.015, s) for s in slopes], mode="max", patience=3)
        >>> verdict.stop, verdict.wait, verdict.best  # 0.72 is above 0.70 by more than 0.015
        (False, 2, 3)
        >>> plateau([Reading(s) for s in slopes], mode="max", patience=3, min_delta=0.05).stop
        True
    """
    if not readings:
        raise ValueError("no reading; there is no verdict before the first one")
    verdict = Plateau(stop=False, wait=0, best=0)
    for current in range(1, len(readings)):
        best = verdict.best
        noise = None
        required = min_delta
        if required == "noise":
            pooled = max(patience + 1, _POOLED)
            noise = noise_of_change(readings, best, current, mode=mode, num_sigmas=num_sigmas, num_pooled=pooled)
            required = noise.total
        change = readings[current].value - readings[best].value
        progress = (change if mode == "max" else -change) > required
        wait = 0 if progress else verdict.wait + 1
        enough = wait >= patience
        if noise is not None and min_trend > 0:
            enough = enough and wait * min_trend * abs(readings[best].value) >= 2 * noise.total
        verdict = Plateau(enough, wait, current if progress else best, best, change, required, noise)
    return verdict


@dataclass(frozen=True)
class Crossing:
    """Whether fit errors have crossed their critical values for good, at the last of them.

    Attributes:
        stop: whether they have.
        wait: how many in a row, up to the last, lie on the side that is waited for.
        formed: index at which they had been below for the first time for as many in a row as patience asks;
            ``None`` if they have not.
    """

    stop: bool
    wait: int
    formed: int | None


def crossing(
    fit_errors: Sequence[float],
    critical_values: Sequence[float],
    *,
    stop_when: Literal["formed", "lost"],
    patience: int,
) -> Crossing:
    """Judge whether a power law has formed, or has been lost again.

    Formed: ``patience`` fit errors in a row lie below their critical values, at which a power law is rejected. Lost: it
    had formed, and ``patience`` in a row are no longer below. A single crossing proves little: of true power laws
    one in twenty is rejected at 5 %.

    Args:
        fit_errors: Kolmogorov-Smirnov distances, in order of time.
        critical_values: of each.
        stop_when: ``"formed"`` or ``"lost"``.
        patience: how many in a row it takes, at least 1.

    Returns:
        The verdict at the last one.

    Raises:
        ValueError: if there are not as many critical values as fit errors.

    Example:
        >>> errors = [0.20, 0.12, 0.11, 0.16, 0.17, 0.18]
        >>> crossing(errors, [0.15] * 6, stop_when="formed", patience=2).formed
        2
        >>> crossing(errors, [0.15] * 6, stop_when="lost", patience=2)
        Crossing(stop=True, wait=3, formed=2)
    """
    if len(fit_errors) != len(critical_values):
        raise ValueError(f"{len(fit_errors)} fit errors, {len(critical_values)} critical values; pass one for each")
    below = above = 0
    formed: int | None = None
    for index, (fit_error, critical) in enumerate(zip(fit_errors, critical_values, strict=True)):
        inside = fit_error < critical
        below, above = (below + 1, 0) if inside else (0, above + 1)
        if formed is None and below >= patience:
            formed = index
    wait = below if stop_when == "formed" else above if formed is not None else 0
    return Crossing(wait >= patience, wait, formed)
