r"""Is it a power law at all? Likelihood-ratio tests against other laws on the same eigenvalues.

Every law is fitted by maximum likelihood to the same K eigenvalues above the same cutoff, in
:math:`y_i = \ln(\lambda_i / \lambda_K) \ge 0`, where the power law is the exponential law with mean s.
The change of variable multiplies all densities alike, so the ratios are those of the eigenvalues.

With :math:`x = \lambda / \lambda_K \ge 1`, each density normalised on that range:

==========================  ==============================================  ==========================
law                         density in x, up to a constant                  contains the power law
==========================  ==============================================  ==========================
exponential                 :math:`e^{-r x}`                                no
lognormal                   :math:`x^{-1} e^{-(\ln x - \mu)^2/2\sigma^2}`   limit :math:`\mu \to -\infty`
stretched exponential       :math:`x^{b - 1} e^{-r x^b}`                    limit :math:`b \to 0`
truncated power law         :math:`x^{-\beta} e^{-r x}`                     :math:`r = 0`
==========================  ==============================================  ==========================

A law that contains the power law is never less likely than it, so against those three the power law cannot
win: the best it can do is not to lose. Lognormal and stretched exponential reach their limit exactly when
:math:`\overline{y^2} \ge 2\, \bar y^2`, which under a power law happens in about half of the samples.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from scipy import optimize, special

from hessian_callback.power_law.fit import Eigenvalues, FloatArray, fitted_log_ratios
from hessian_callback.power_law.truncated import fit_truncated_power_laws

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

# Beyond this -mu / sigma the lognormal differs from a power law by less than the rounding of its
# likelihood; the same for the stretched exponential below this b (relative to the mean of y).
_LOGNORMAL_LIMIT = 300.0
_STRETCHED_LIMIT = 1e-4
# exp(y) and the squares formed of it must stay finite.
_MAX_LOG_RATIO = 340.0


@dataclass(frozen=True)
class LikelihoodRatioTest:
    r"""A power law against another law, both fitted to the same K eigenvalues.

    .. math:: R = \sum_{i=1}^{K} \ln p(\lambda_i) - \ln q(\lambda_i)

    with the power law p and the alternative q.

    Attributes:
        alternative: the name of q.
        log_likelihood_ratio: R; above zero the power law is the more likely. At most zero for laws that
            contain the power law.
        test: ``"vuong"``: is R different from zero, given how the terms of R scatter; two-sided, for laws
            that are not nested. ``"boundary"``: can the power law be dropped for the larger family.
        statistic: Vuong's :math:`R / (\sqrt K \hat\sigma)`, standard normal; or :math:`-2 R` for the
            boundary test, half :math:`\chi^2_0` and half :math:`\chi^2_1`. None for a Vuong test in the
            limit case, where the two laws coincide and the statistic is 0 / 0.
        p_value: of ``statistic``; 1 in the limit case, because nothing speaks for either law.
        boundary_p_value: p-value of :math:`-2R` as a boundary test, for the laws that contain the power
            law as a member or as a limit; None for the exponential. It is the sharper of the two for
            lognormal and stretched exponential, where Vuong's supposes laws that never coincide.
        bootstrap_p_value: the same with the null simulated at the fitted slope, if that was asked for.
        limit_case: which limit the fitted law has run into, ``"power law"`` or None.
        parameters: of the fitted alternative, in :math:`x = \lambda / \lambda_K`; empty in a limit case.
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
        """Which law the test prefers at this level, by ``p_value``.

        Args:
            level: chance of preferring one although neither is closer, in (0, 1).

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
    """Test a power law against several laws; see `likelihood_ratio_test`.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        alternatives: names of the laws.
        num_eigenvalues: K, how many of the largest positive eigenvalues to fit; None for all of them.
        drop_first: how many of the largest to leave out as outliers.
        bootstrap_draws: as for `likelihood_ratio_test`; passes by the exponential.
        seed: of the bootstrap.

    Returns:
        One test for each name. Their p-values are not corrected for there being several.

    Raises:
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
    power law by the nested test whose null lies on the boundary. That null's half-and-half law supposes a
    finite variance of the eigenvalues, slope below 0.5; simulated, a nominal 5 % is 6 % at slope 0.4, 8 % at
    1 and 12 % at 3. ``bootstrap_draws`` gives the p-value that does not depend on it.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        alternative: ``"lognormal"``, ``"exponential"``, ``"truncated_power_law"`` or
            ``"stretched_exponential"``.
        num_eigenvalues: K, how many of the largest positive eigenvalues to fit; None for all of them.
        drop_first: how many of the largest to leave out as outliers.
        bootstrap_draws: power laws to simulate, at the fitted slope and K, for ``bootstrap_p_value``; 0 for
            none. Only for the laws that contain the power law. Some 2 ms a draw.
        seed: of the bootstrap.

    Returns:
        The test, see `LikelihoodRatioTest`.

    Raises:
        ValueError: if the name is unknown, the eigenvalues cannot be fitted (see `fit_power_law`), they
            span more than 147 orders of magnitude, or a bootstrap is asked for the exponential.

    Source:
        Vuong (1989) for the test; Clauset, Shalizi and Newman (2009) for its use on power laws; Self and
        Liang (1987) for the null on the boundary.

    Example:
        >>> spectrum = np.exp(-np.arange(100) / 10)
        >>> test = likelihood_ratio_test(spectrum, "stretched_exponential")
        >>> test.verdict(), test.limit_case
        ('stretched_exponential', None)
    """
    if alternative not in _FITTERS:
        raise ValueError(f"alternative is {alternative!r}; choose one of {', '.join(ALTERNATIVES)}")
    y = fitted_log_ratios(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    if y[0] > _MAX_LOG_RATIO:
        raise ValueError(
            f"the eigenvalues span {y[0] / math.log(10):.0f} orders of magnitude, so the smallest are "
            "numerical zeros; lower num_eigenvalues, or keep only converged eigenvalues"
        )
    slope = float(y.mean())
    fitted = _FITTERS[alternative](y)
    power_law = -math.log(slope) - y / slope
    terms = np.zeros_like(y) if fitted is None else power_law - fitted.log_density
    ratio = float(terms.sum())
    contains = alternative != "exponential"
    if contains:
        # True of the exact maxima; what is left above zero is rounding.
        ratio = min(ratio, 0.0)
    boundary_p_value = boundary_p(-2.0 * ratio) if contains else None

    statistic: float | None
    if alternative == "truncated_power_law":
        assert boundary_p_value is not None
        statistic, p_value = -2.0 * ratio, boundary_p_value
    elif fitted is None:
        statistic, p_value = None, 1.0
    else:
        statistic = ratio / (math.sqrt(y.size) * float(terms.std()))
        p_value = math.erfc(abs(statistic) / math.sqrt(2.0))

    bootstrap_p_value = None
    if bootstrap_draws:
        if not contains:
            raise ValueError(
                "bootstrap_draws needs a law that contains the power law; leave it 0 for the exponential, "
                "whose test is Vuong's"
            )
        bootstrap_p_value = _bootstrap_p(alternative, -2.0 * ratio, slope, y.size, bootstrap_draws, seed)
    return LikelihoodRatioTest(
        alternative=alternative,
        log_likelihood_ratio=ratio,
        test="boundary" if alternative == "truncated_power_law" else "vuong",
        statistic=statistic,
        p_value=p_value,
        boundary_p_value=boundary_p_value,
        bootstrap_p_value=bootstrap_p_value,
        limit_case="power law" if fitted is None else None,
        parameters={} if fitted is None else fitted.parameters,
        num_eigenvalues=int(y.size),
    )


def boundary_p(statistic: float) -> float:
    r"""p-value of a likelihood-ratio statistic whose null is on the boundary of one parameter.

    .. math:: P(\tfrac12 \chi^2_0 + \tfrac12 \chi^2_1 \ge T)

    Args:
        statistic: T = -2 R, not negative.

    Returns:
        1 for T = 0, else half the tail of chi squared with one degree of freedom.

    Example:
        >>> round(boundary_p(2.705543), 4), boundary_p(0.0)
        (0.05, 1.0)
    """
    return 0.5 * float(special.chdtrc(1, statistic)) if statistic > 0.0 else 1.0


@dataclass(frozen=True)
class _Fitted:
    """An alternative at its maximum: log density of each y, ``(K,)``, and parameters."""

    log_density: FloatArray
    parameters: dict[str, float]


# Each takes y, (K,), and returns None where its maximum is the power law itself.


def _fit_exponential(y: FloatArray) -> _Fitted:
    excess = np.expm1(y)
    rate = 1.0 / float(excess.mean())
    return _Fitted(math.log(rate) - rate * excess + y, {"rate": rate})


def _fit_lognormal(y: FloatArray) -> _Fitted | None:
    # With h = -mu / sigma, the second moment over the squared first depends on h alone and rises from 1 to 2.
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
    return _Fitted(log_density, {"mu": -h * sigma, "sigma": sigma})


def _inverse_mills(h: float) -> float:
    """phi(h) / (1 - Phi(h)), by the scaled complementary error function."""
    scaled = float(special.erfcx(h / math.sqrt(2.0)))
    return math.sqrt(2.0 / math.pi) / scaled


def _fit_stretched_exponential(y: FloatArray) -> _Fitted | None:
    # In y this is Gompertz' law, b r exp(b y - r (exp(b y) - 1)). For a given b the rate is explicit, and
    # the derivative of what is left has one root.
    mean, largest = float(y.mean()), float(y[0])

    def score(log_b: float) -> float:
        b = math.exp(log_b)
        # Over exp(b largest), so that nothing overflows.
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
    return _Fitted(log_density, {"stretching_exponent": b, "rate": math.exp(log_rate)})


def _fit_truncated_power_law(y: FloatArray) -> _Fitted | None:
    fits = fit_truncated_power_laws(y[None])
    exponent, rate, log_normaliser = (
        float(fits.exponent[0]),
        float(fits.rate[0]),
        float(fits.log_normaliser[0]),
    )
    if rate == 0.0:
        return None
    log_density = -exponent * y - rate * np.expm1(y) - log_normaliser
    return _Fitted(log_density, {"density_exponent": 1.0 + exponent, "rate": rate})


_FITTERS: dict[Alternative, Callable[[FloatArray], _Fitted | None]] = {
    "lognormal": _fit_lognormal,
    "exponential": _fit_exponential,
    "truncated_power_law": _fit_truncated_power_law,
    "stretched_exponential": _fit_stretched_exponential,
}


def _bootstrap_p(alternative: Alternative, statistic: float, slope: float, num: int, draws: int, seed: int) -> float:
    """Share of simulated power laws, refitted alike, whose statistic is as large."""
    rng = np.random.default_rng([seed, num])
    # The slope is low by (K - 1) / K, which is undone here.
    y = slope * num / (num - 1) * rng.standard_exponential((draws, num))
    y = np.sort(y, axis=1)[:, ::-1]
    y -= y[:, -1:]
    if alternative == "truncated_power_law":
        simulated = 2.0 * num * fit_truncated_power_laws(y).log_likelihood_gain
    else:
        simulated = np.array([_statistic(row, alternative) for row in y])
    return float((1 + np.count_nonzero(simulated >= statistic)) / (draws + 1))


def _statistic(y: FloatArray, alternative: Alternative) -> float:
    fitted = _FITTERS[alternative](y)
    if fitted is None:
        return 0.0
    mean = float(y.mean())
    return max(2.0 * float(fitted.log_density.sum() + y.size * (math.log(mean) + 1.0)), 0.0)
