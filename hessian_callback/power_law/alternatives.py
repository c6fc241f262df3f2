r"""Likelihood-ratio tests of a power law against other laws on the same eigenvalues.

Every law is fitted by maximum likelihood to the same K eigenvalues above the same cutoff, in
:math:`y_i = \ln(\lambda_i / \lambda_K) \ge 0`. There the power law is the exponential law with mean s. The change of
variable multiplies all densities by the same factor, so the likelihood ratios are those of the eigenvalues.

With :math:`x = \lambda / \lambda_K \ge 1`, each density normalised on that range:

==========================  ==============================================  ==========================
law                         density in x, up to a constant                  contains the power law
==========================  ==============================================  ==========================
exponential                 :math:`e^{-r x}`                                no
lognormal                   :math:`x^{-1} e^{-(\ln x - \mu)^2/2\sigma^2}`   limit :math:`\mu \to -\infty`
stretched exponential       :math:`x^{b - 1} e^{-r x^b}`                    limit :math:`b \to 0`
truncated power law         :math:`x^{-\beta} e^{-r x}`                     :math:`r = 0`
==========================  ==============================================  ==========================

A law that contains the power law is at least as likely as it, so a test can reject the power law against these
three but not prefer it. Lognormal and stretched exponential reach their limit if and only if
:math:`\overline{y^2} \ge 2\, \bar y^2`. That happens in about half of the samples of a power law.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy import optimize, special

from hessian_callback.power_law.truncated_power_law import fit_truncated_power_laws, scaled_excess
from hessian_callback.power_law.validation import (
    Eigenvalues,
    FloatArray,
    checked_draws,
    checked_integer,
    fitted_log_ratios,
)

__all__ = [
    "ALTERNATIVES",
    "Alternative",
    "LikelihoodRatioTest",
    "compare_alternatives",
    "likelihood_ratio_test",
]

Alternative: TypeAlias = Literal["lognormal", "exponential", "truncated_power_law", "stretched_exponential"]

ALTERNATIVES: tuple[Alternative, ...] = (
    "lognormal",
    "exponential",
    "truncated_power_law",
    "stretched_exponential",
)

# Beyond this -mu / sigma the lognormal differs from a power law by less than the rounding of its likelihood. So does
# the stretched exponential below this b (relative to the mean of y).
_LOGNORMAL_LIMIT = 300.0
_STRETCHED_LIMIT = 1e-4
# exp(y) and its square must be finite.
_MAX_LOG_RATIO = 340.0


@dataclass(frozen=True)
class LikelihoodRatioTest:
    r"""Result of a test of a power law against another law, both fitted to the same K eigenvalues.

    .. math:: R = \sum_{i=1}^{K} \ln p(\lambda_i) - \ln q(\lambda_i)

    with the power law p and the alternative q.

    Attributes:
        alternative: the name of q.
        log_likelihood_ratio: R; the power law is the more likely if R > 0. R is at most zero for laws that
            contain the power law.
        test: ``"vuong"`` for the two-sided test whether R differs from zero, given the scatter of its terms, for
            laws that are not nested. ``"boundary"`` for the test of the power law within a larger family.
        statistic: :math:`R / (\sqrt K \hat\sigma)` for Vuong's test, standard normal; :math:`-2 R` for the
            boundary test, with the null law half :math:`\chi^2_0` and half :math:`\chi^2_1`. None for Vuong's
            test in the limit case, where the laws coincide and the statistic is 0 / 0.
        p_value: of ``statistic``; 1 in the limit case.
        boundary_p_value: p-value of :math:`-2R` as a boundary test, for the laws that contain the power law as a
            member or as a limit; None for the exponential. For lognormal and stretched exponential it has more
            power than Vuong's test, which assumes laws that never coincide.
        bootstrap_p_value: p-value of :math:`-2R` with the null law simulated at the fitted slope; None unless
            requested.
        limit_case: ``"power law"`` if the fitted law is that limit, else None.
        parameters: of the fitted alternative, in :math:`x = \lambda / \lambda_K`; empty in the limit case.
        num_eigenvalues: K.

    Example:
        >>> test = likelihood_ratio_test([1 / k for k in range(1, 201)], "exponential")
        >>> test.log_likelihood_ratio > 0, test.verdict(0.05)
        (True, 'power_law')
    """

    alternative: Alternative
    log_likelihood_ratio: float
    test: Literal["vuong", "boundary"]
    statistic: float | None
    p_value: float
    boundary_p_value: float | None
    bootstrap_p_value: float | None
    limit_case: Literal["power law"] | None
    parameters: dict[str, float]
    num_eigenvalues: int

    def verdict(self, level: float = 0.05) -> str:
        """Return which law the test prefers at this level, by ``p_value``.

        Args:
            level: probability of preferring one law although neither is closer, in (0, 1).

        Returns:
            ``"power_law"``, the alternative's name, or ``"undecided"``.

        Raises:
            ValueError: if ``level`` is outside (0, 1).

        Example:
            >>> likelihood_ratio_test([1 / k for k in range(1, 11)], "lognormal").verdict()
            'undecided'
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level is {level}; give a fraction between 0 and 1, such as 0.05")
        if self.p_value >= level:
            return "undecided"
        return "power_law" if self.log_likelihood_ratio > 0 else self.alternative


def compare_alternatives(
    eigenvalues: Eigenvalues,
    alternatives: Sequence[Alternative] = ALTERNATIVES,
    *,
    num_eigenvalues: int | None = None,
    drop_first: int = 0,
    bootstrap_draws: int = 0,
    seed: int = 0,
) -> dict[Alternative, LikelihoodRatioTest]:
    r"""Test a power law against several laws; see `likelihood_ratio_test`.

    .. math:: R = \sum_{i=1}^{K} \ln p(\lambda_i) - \ln q(\lambda_i)

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        alternatives: names of the laws.
        num_eigenvalues: K, how many of the largest positive eigenvalues to fit; None for all of them.
        drop_first: how many of the largest to leave out as outliers.
        bootstrap_draws: as for `likelihood_ratio_test`; not used for the exponential.
        seed: of the bootstrap, at least 0.

    Returns:
        One test for each name. The p-values are not corrected for multiple tests.

    Raises:
        TypeError: as `likelihood_ratio_test`.
        ValueError: as `likelihood_ratio_test`.

    Example:
        >>> tests = compare_alternatives(np.exp(-np.linspace(0, 1, 200) ** 2))
        >>> sorted({test.verdict() for test in tests.values()} - set(tests))
        []
    """
    return {
        name: likelihood_ratio_test(
            eigenvalues,
            name,
            num_eigenvalues=num_eigenvalues,
            drop_first=drop_first,
            bootstrap_draws=0 if name == "exponential" else bootstrap_draws,
            seed=seed,
        )
        for name in alternatives
    }


def likelihood_ratio_test(
    eigenvalues: Eigenvalues,
    alternative: Alternative,
    *,
    num_eigenvalues: int | None = None,
    drop_first: int = 0,
    bootstrap_draws: int = 0,
    seed: int = 0,
) -> LikelihoodRatioTest:
    r"""Test a power law against one other law on the same eigenvalues above the same cutoff.

    .. math:: R = \sum_{i=1}^{K} \ln p(\lambda_i) - \ln q(\lambda_i)

    Lognormal, exponential and stretched exponential are compared by Vuong's two-sided test, the truncated
    power law by the nested test whose null is on the boundary.

    Proven: the asymptotic null laws for independent eigenvalues. Assumed: independence, and for the boundary test a
    finite variance of the eigenvalues, which means a slope below 0.5. Measured: the boundary test at a nominal 5 %
    rejects 6 % at slope 0.4, 8 % at 1 and 12 % at 3. The bootstrap p-value does not assume a finite variance.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        alternative: ``"lognormal"``, ``"exponential"``, ``"truncated_power_law"`` or
            ``"stretched_exponential"``.
        num_eigenvalues: K, how many of the largest positive eigenvalues to fit; None for all of them.
        drop_first: how many of the largest to leave out as outliers.
        bootstrap_draws: number of power laws to simulate, at the fitted slope and K, for
            ``bootstrap_p_value``; 0 for none. Only for the laws that contain the power law. About 2 ms a draw.
        seed: of the bootstrap, at least 0.

    Returns:
        The test, see `LikelihoodRatioTest`.

    Raises:
        TypeError: as `fit_power_law`, or if ``bootstrap_draws`` or ``seed`` is not an integer.
        ValueError: as `fit_power_law`; if the name is unknown, the eigenvalues span more than 147 orders of
            magnitude, ``bootstrap_draws`` or ``seed`` is negative, or a bootstrap is requested for the exponential.

    Source:
        Vuong (1989) for the test, Clauset, Shalizi and Newman (2009) for its use on power laws, Self and
        Liang (1987) for the null on the boundary.

    Example:
        >>> spectrum = np.exp(-np.arange(100) / 10)
        >>> test = likelihood_ratio_test(spectrum, "stretched_exponential")
        >>> test.verdict(), test.limit_case
        ('stretched_exponential', None)
    """
    if alternative not in _FITTERS:
        raise ValueError(f"alternative is {alternative!r}; choose one of {', '.join(ALTERNATIVES)}")
    contains_power_law = alternative != "exponential"
    bootstrap_draws = checked_integer(
        bootstrap_draws, "bootstrap_draws", minimum=0, remedy="give a number of power laws to simulate, or 0"
    )
    if bootstrap_draws and not contains_power_law:
        raise ValueError(
            "bootstrap_draws needs a law that contains the power law; leave it 0 for the exponential, "
            "which is compared by Vuong's test"
        )
    y = fitted_log_ratios(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    if y[0] > _MAX_LOG_RATIO:
        raise ValueError(
            f"the eigenvalues span {y[0] / math.log(10):.0f} orders of magnitude, so the smallest are "
            "numerical zeros; lower num_eigenvalues, or keep only converged eigenvalues"
        )
    fitted = _FITTERS[alternative](y)
    ratio = 0.0 if fitted is None else float(fitted.log_ratios.sum())
    if contains_power_law:
        # R is at most 0 at the exact maxima. A positive value is rounding.
        ratio = min(ratio, 0.0)
    boundary_p_value = boundary_p(-2.0 * ratio) if contains_power_law else None
    statistic: float | None
    if boundary_p_value is not None and alternative == "truncated_power_law":
        statistic, p_value = -2.0 * ratio, boundary_p_value
    elif fitted is None:
        statistic, p_value = None, 1.0
    else:
        statistic = ratio / (math.sqrt(y.size) * float(fitted.log_ratios.std()))
        p_value = math.erfc(abs(statistic) / math.sqrt(2.0))
    return LikelihoodRatioTest(
        alternative=alternative,
        log_likelihood_ratio=ratio,
        test="boundary" if alternative == "truncated_power_law" else "vuong",
        statistic=statistic,
        p_value=p_value,
        boundary_p_value=boundary_p_value,
        bootstrap_p_value=_bootstrap_p(alternative, -2.0 * ratio, y, bootstrap_draws, seed)
        if bootstrap_draws
        else None,
        limit_case="power law" if fitted is None else None,
        parameters={} if fitted is None else fitted.parameters,
        num_eigenvalues=int(y.size),
    )


def boundary_p(statistic: float) -> float:
    r"""Compute the p-value of a likelihood-ratio statistic whose null is on the boundary of one parameter.

    .. math:: P(\tfrac12 \chi^2_0 + \tfrac12 \chi^2_1 \ge T)

    Args:
        statistic: T = -2 R, at least 0.

    Returns:
        1 for T = 0, else half the tail of the chi-squared law with one degree of freedom.

    Source:
        Self and Liang (1987), case 5.

    Example:
        >>> round(boundary_p(2.705543), 4), boundary_p(0.0)
        (0.05, 1.0)
    """
    return 0.5 * float(special.chdtrc(1, statistic)) if statistic > 0.0 else 1.0


@dataclass(frozen=True)
class _Fitted:
    """An alternative at its maximum: ln p - ln q of each eigenvalue, ``(K,)``, and the parameters of q."""

    log_ratios: FloatArray
    parameters: dict[str, float]


# Each takes y, (K,), and returns None if its maximum is the power law itself.


def _fit_exponential(y: FloatArray) -> _Fitted:
    # In u = y / m with h of `truncated_power_law`, where the ratio keeps its digits as m vanishes.
    mean = y.mean()
    u = y / mean
    excess = mean * scaled_excess(u, mean)
    mean_excess = float(excess.mean())
    log_ratios = math.log1p(mean_excess) + (excess - mean_excess * u) / (1.0 + mean_excess) - y
    return _Fitted(log_ratios, {"rate": 1.0 / (float(mean) * (1.0 + mean_excess))})


def _fit_lognormal(y: FloatArray) -> _Fitted | None:
    # With h = -mu / sigma, the ratio of the second moment to the squared first depends on h only. It rises from 1 to 2.
    mean = float(y.mean())
    ratio = float((y**2).mean()) / mean**2

    def excess_ratio(h: float) -> float:
        distance = _inverse_mills(h) - h
        return (1.0 - h * distance) / distance**2 - ratio

    if excess_ratio(_LOGNORMAL_LIMIT) <= 0.0:
        return None
    lowest = -2.0 / math.sqrt(ratio - 1.0) - 1.0
    h = float(optimize.brentq(excess_ratio, lowest, _LOGNORMAL_LIMIT, xtol=1e-10))
    sigma = mean / (_inverse_mills(h) - h)
    z = y / sigma + h
    log_density = -math.log(sigma) - 0.5 * math.log(2.0 * math.pi) - 0.5 * z**2 - float(special.log_ndtr(-h))
    return _Fitted(_log_power_law(y) - log_density, {"mu": -h * sigma, "sigma": sigma})


def _inverse_mills(h: float) -> float:
    """Compute phi(h) / (1 - Phi(h)) of the standard normal law, with the scaled complementary error function."""
    scaled = float(special.erfcx(h / math.sqrt(2.0)))
    return math.sqrt(2.0 / math.pi) / scaled


def _fit_stretched_exponential(y: FloatArray) -> _Fitted | None:
    # In y this is Gompertz' law, b r exp(b y - r (exp(b y) - 1)). The best rate for a given b is explicit, and the
    # derivative of the profile over b has one root.
    mean, largest = float(y.mean()), float(y[0])

    def score(log_b: float) -> float:
        b = math.exp(log_b)
        # Divided by exp(b largest), so that nothing overflows.
        grown = np.exp(b * (y - largest))
        mean_growth = float((grown - math.exp(-b * largest)).mean())
        return 1.0 / b - float((y * grown).mean()) / mean_growth + mean

    low = math.log(_STRETCHED_LIMIT / mean)
    if score(low) <= 0.0:
        return None
    high = math.log(1.0 / mean)
    while score(high) > 0.0:
        high += 1.0
    b = math.exp(float(optimize.brentq(score, low, high, xtol=1e-10)))
    grown = np.exp(b * (y - largest))
    smallest = math.exp(-b * largest)
    scaled = (grown - smallest) / float((grown - smallest).mean())
    log_rate = -math.log(float((grown - smallest).mean())) - b * largest
    log_density = math.log(b) + log_rate + b * y - scaled
    parameters = {"stretching_exponent": b, "rate": math.exp(log_rate)}
    return _Fitted(_log_power_law(y) - log_density, parameters)


def _fit_truncated_power_law(y: FloatArray) -> _Fitted | None:
    fits = fit_truncated_power_laws(y[None])
    if fits.scaled_rate[0] == 0.0:
        return None
    parameters = {"density_exponent": 1.0 + float(fits.exponent[0]), "rate": float(fits.rate[0])}
    return _Fitted(_log_power_law(y) - fits.log_density(y[None])[0], parameters)


def _log_power_law(y: FloatArray) -> FloatArray:
    """Compute the log density in y of the fitted power law."""
    mean = y.mean()
    log_density: FloatArray = -np.log(mean) - y / mean
    return log_density


_FITTERS: dict[Alternative, Callable[[FloatArray], _Fitted | None]] = {
    "lognormal": _fit_lognormal,
    "exponential": _fit_exponential,
    "truncated_power_law": _fit_truncated_power_law,
    "stretched_exponential": _fit_stretched_exponential,
}


def _bootstrap_p(alternative: Alternative, statistic: float, y: FloatArray, draws: int, seed: int) -> float:
    """Return the share of simulated power laws, fitted in the same way, with at least this statistic."""
    draws, seed = checked_draws(draws, seed, name="bootstrap_draws")
    num = y.size
    rng = np.random.default_rng([seed, num])
    # The factor removes the bias (K - 1) / K of the slope.
    simulated = y.mean() * num / (num - 1) * rng.standard_exponential((draws, num))
    simulated = np.sort(simulated, axis=1)[:, ::-1]
    simulated -= simulated[:, -1:]
    if alternative == "truncated_power_law":
        statistics = 2.0 * num * fit_truncated_power_laws(simulated).log_likelihood_gain
    else:
        statistics = np.array([_statistic(row, alternative) for row in simulated])
    return float((1 + np.count_nonzero(statistics >= statistic)) / (draws + 1))


def _statistic(y: FloatArray, alternative: Alternative) -> float:
    fitted = _FITTERS[alternative](y)
    return 0.0 if fitted is None else max(-2.0 * float(fitted.log_ratios.sum()), 0.0)
