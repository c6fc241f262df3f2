r"""Terms of the maximum-entropy argument for the power law, and a test of it.

The paper maximises

.. math:: S = -\int p \ln p\, d\lambda - \beta_{vol} \int p \ln\lambda\, d\lambda
    - \beta_{norm} \Big(\int p\, d\lambda - 1\Big)

and finds :math:`p^* = e^{-\beta_{norm}} \lambda^{-\beta_{vol}}`. Among all densities with a given mean
logarithm (the volume of the valley), the power law has the largest entropy. The argument does not predict
:math:`\beta`. It can be tested by the difference between that entropy and the entropy of the eigenvalues.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.power_law.validation import Eigenvalues, FloatArray, checked_draws, fitted_log_ratios

__all__ = ["EntropyDeficit", "MaximumEntropyTerms", "entropy_deficit", "maximum_entropy_terms"]


# The estimate uses spacings of about sqrt(K) steps on both sides of a value. Fewer values do not have them.
_MIN_FOR_ENTROPY = 5


@dataclass(frozen=True)
class MaximumEntropyTerms:
    r"""Terms of the maximum-entropy functional at the fitted power law, on :math:`\lambda \ge \lambda_K`.

    Entropies are in nats. They shift with the logarithm of the eigenvalues' unit, so compare them for equal
    units only. ``volume_multiplier`` has no unit.

    Attributes:
        entropy: :math:`-\int p \ln p = \ln \hat s + \ln\lambda_K + \hat s + 1`.
        mean_log_eigenvalue: :math:`\int p \ln\lambda = \ln\lambda_K + \hat s`, which equals
            the mean of :math:`\ln\lambda_i` at the maximum-likelihood fit.
        volume_multiplier: :math:`\beta_{vol} = \hat\beta`.
        normalisation_multiplier: :math:`\beta_{norm} = \ln Z_c = \ln\hat s - \ln\lambda_K / \hat s`.

    Example:
        >>> terms = maximum_entropy_terms([4.0, 2.0, 1.0])
        >>> total = terms.volume_multiplier * terms.mean_log_eigenvalue + terms.normalisation_multiplier
        >>> math.isclose(terms.entropy, total)
        True
    """

    entropy: float
    mean_log_eigenvalue: float
    volume_multiplier: float
    normalisation_multiplier: float


def maximum_entropy_terms(
    eigenvalues: Eigenvalues, *, num_eigenvalues: int | None = None, drop_first: int = 0
) -> MaximumEntropyTerms:
    r"""Compute entropy, log-volume and multipliers of the power law fitted to eigenvalues.

    The terms satisfy :math:`-\int p \ln p = \beta_{vol} \int p \ln\lambda + \beta_{norm}`.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        num_eigenvalues: K, how many of the largest positive eigenvalues to fit; None for all of them.
        drop_first: how many of the largest to leave out as outliers.

    Returns:
        The terms, see `MaximumEntropyTerms`.

    Raises:
        TypeError: as `fit_power_law`.
        ValueError: as `fit_power_law`.

    Source:
        Tang et al., ICML 2025.

    Example:
        >>> terms = maximum_entropy_terms([1 / k for k in range(1, 51)])
        >>> round(terms.volume_multiplier, 2), round(terms.mean_log_eigenvalue, 2), round(terms.entropy, 2)
        (2.06, -2.97, -2.03)
    """
    fit = fit_power_law(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    log_cutoff, log_slope = math.log(fit.cutoff), math.log(fit.slope)
    return MaximumEntropyTerms(
        entropy=log_slope + log_cutoff + fit.slope + 1.0,
        mean_log_eigenvalue=log_cutoff + fit.slope,
        volume_multiplier=fit.density_exponent,
        normalisation_multiplier=log_slope - log_cutoff / fit.slope,
    )


@dataclass(frozen=True)
class EntropyDeficit:
    r"""Difference between the entropy of the fitted power law and the entropy of the eigenvalues.

    Attributes:
        deficit: entropy of the fitted power law less the estimated entropy of the eigenvalues, which have the
            same mean logarithm. It is in nats and does not depend on the eigenvalues' unit. It estimates the
            Kullback-Leibler divergence of their density from the law.
        expected_deficit: mean of ``deficit`` over simulated power laws of the same K, the bias of the
            estimate.
        p_value: share of simulated power laws with at least this deficit (bootstrap with refitted exponent).

    Example:
        >>> entropy_deficit([1 / k for k in range(1, 101)]).p_value > 0.5
        True
    """

    deficit: float
    expected_deficit: float
    p_value: float


def entropy_deficit(
    eigenvalues: Eigenvalues,
    *,
    num_eigenvalues: int | None = None,
    drop_first: int = 0,
    draws: int = 1000,
    seed: int = 0,
) -> EntropyDeficit:
    r"""Test whether eigenvalues attain the entropy of the fitted power law, the maximum.

    .. math:: \ln\hat s + 1 - \hat h(y), \qquad y_i = \ln(\lambda_i / \lambda_K)

    with Ebrahimi's estimate of the entropy h from spacings (`scipy.stats.differential_entropy`). The change to
    logarithms shifts both entropies by the same amount.

    Args:
        eigenvalues: ``(n,)``, as for `fit_power_law`.
        num_eigenvalues: K, how many of the largest positive eigenvalues to fit; None for all of them.
        drop_first: how many of the largest to leave out as outliers.
        draws: number of power laws to simulate, once for each K.
        seed: of the simulation, at least 0.

    Returns:
        The deficit with its null distribution, see `EntropyDeficit`.

    Raises:
        TypeError: as `fit_power_law`, or if ``draws`` or ``seed`` is not an integer.
        ValueError: as `fit_power_law`; if ``draws`` is below 1 or ``seed`` negative; if there are fewer than 5
            eigenvalues, or so many equal ones that the estimate of the entropy is not finite.

    Source:
        Tang et al., ICML 2025, for the argument; Ebrahimi, Pflughoeft and Soofi (1994) for the estimate.

    Example:
        Exponential decay has less entropy than the power law with the same volume:

        >>> entropy_deficit(np.exp(-np.arange(100) / 10)).p_value < 0.01
        True
    """
    draws, seed = checked_draws(draws, seed)
    y = fitted_log_ratios(eigenvalues, num_eigenvalues=num_eigenvalues, drop_first=drop_first)
    if y.size < _MIN_FOR_ENTROPY:
        raise ValueError(
            f"{y.size} eigenvalues are too few to estimate an entropy, which needs {_MIN_FOR_ENTROPY}; compute more "
            "eigenvalues"
        )
    deficit = float(_deficits(y[None])[0])
    if not math.isfinite(deficit):
        raise ValueError(
            f"too many of the {y.size} eigenvalues are equal to estimate their entropy; compute more eigenvalues, "
            "or in a higher precision if rounding made them equal"
        )
    null = _null_deficits(y.size, draws, seed)
    return EntropyDeficit(
        deficit=deficit,
        expected_deficit=float(null.mean()),
        p_value=(1 + int(np.count_nonzero(null >= deficit))) / (1 + null.size),
    )


def _deficits(log_ratios: FloatArray) -> FloatArray:
    # Imported here because scipy.stats takes half a second.
    from scipy.stats import differential_entropy

    with np.errstate(divide="ignore"):
        entropy = differential_entropy(log_ratios, axis=1, method="ebrahimi")
    deficits: FloatArray = np.log(log_ratios.mean(axis=1)) + 1.0 - entropy
    return deficits


@lru_cache(maxsize=64)
def _null_deficits(num_eigenvalues: int, draws: int, seed: int) -> FloatArray:
    y = np.random.default_rng([seed, num_eigenvalues]).standard_exponential((draws, num_eigenvalues))
    null = _deficits(y - y.min(axis=1, keepdims=True))
    null.setflags(write=False)
    return null
