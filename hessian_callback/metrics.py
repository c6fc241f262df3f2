r"""torchmetrics classes for spectra: the slope, the fit error and what they are compared with.

Eigenvalues of a Hessian are global already: every rank holds the same ones. So these metrics do not
synchronise in ``compute`` (W copies of a spectrum would pass for W times as many eigenvalues), and an
explicit ``sync`` checks that the ranks agree and keeps one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities.distributed import gather_all_tensors

from hessian_callback.power_law import functional
from hessian_callback.power_law.fit import Eigenvalues, as_float64

__all__ = [
    "EffectiveRank",
    "EigengapExponent",
    "IntrinsicDimension",
    "LargestEigenvalue",
    "MaximumEntropyDeficit",
    "OutlierRatio",
    "ParticipationRatio",
    "PowerLawDensityExponent",
    "PowerLawFitError",
    "PowerLawNumFitted",
    "PowerLawPValue",
    "PowerLawRSquared",
    "PowerLawSlope",
    "PowerLawSlopeStderr",
    "SpectrumMetric",
    "power_law_metrics",
    "take_first_if_equal",
]


def take_first_if_equal(gathered: Tensor) -> Tensor:
    """Reduce replicated states: one copy, after a check that all are equal.

    Args:
        gathered: ``(W, K)``, the state of each of W ranks.

    Returns:
        ``(K,)``, the first.

    Raises:
        ValueError: if a rank's state differs from the first's.

    Example:
        >>> take_first_if_equal(torch.tensor([[2.0, 1.0], [2.0, 1.0]]))
        tensor([2., 1.])
    """
    first = gathered[0]
    for rank, other in enumerate(gathered):
        if not torch.equal(first, other):
            raise ValueError(
                f"rank {rank} holds other eigenvalues than rank 0, where one replicated spectrum is meant; "
                "compute the spectrum over all ranks together, or do not sync and read each rank's own value"
            )
    return first


class SpectrumMetric(Metric):
    r"""Base of metrics that are a function of one spectrum, replicated on all ranks.

    A subclass implements `evaluate`. As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor, array or sequence): one spectrum of shape ``(n,)``, in any order.

    As output of ``forward`` and ``compute`` it returns

    - ``value`` (Tensor): a scalar on the metric's device, in float64, or float32 where the device has
      no float64.

    ``update`` replaces the spectrum: a metric speaks of the latest measurement, and spectra do not average.

    Args:
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        TypeError: by ``update``, if the eigenvalues are complex, boolean or not numbers.
        ValueError: by ``update``, if they are not one-dimensional, empty, NaN or infinite; by ``sync``,
            if the ranks hold different ones.

    Example:
        >>> class Largest(SpectrumMetric):
        ...     def evaluate(self, eigenvalues):
        ...         return eigenvalues.max()
        >>> metric = Largest()
        >>> metric.update([1.0, 3.0])
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    is_differentiable = False
    higher_is_better: bool | None = None
    # Update replaces the state, so `forward` cannot merge a batch's state into the global one.
    full_state_update = True

    eigenvalues: Tensor

    def __init__(self, **kwargs: Any) -> None:
        kwargs.setdefault("sync_on_compute", False)
        super().__init__(**kwargs)
        # float32, so that the empty default can move to any device.
        self.add_state("eigenvalues", default=torch.empty(0), dist_reduce_fx=take_first_if_equal)

    def update(self, eigenvalues: Eigenvalues) -> None:
        """Replace the spectrum by ``eigenvalues``, ``(n,)``."""
        values = as_float64(eigenvalues)
        if not values.size:
            raise ValueError("eigenvalues are empty; pass a spectrum of shape (n,) with at least one eigenvalue")
        self.eigenvalues = torch.tensor(values, dtype=functional.widest_float(self.device), device=self.device)

    def compute(self) -> Tensor:
        """The metric of the latest spectrum, a scalar."""
        if not self.eigenvalues.numel():
            raise RuntimeError(
                f"{type(self).__name__} holds no eigenvalues; call update(eigenvalues) before compute(), and "
                "after every reset()"
            )
        return self.evaluate(self.eigenvalues)

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """The metric of one spectrum. Override this.

        Args:
            eigenvalues: ``(n,)``, on the metric's device, in the order given.

        Returns:
            A scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement evaluate(eigenvalues)")

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or a series of them with matplotlib.

        Args:
            val: a result of ``forward`` or ``compute``, or a list of such; None for the present value.
            ax: matplotlib axes to draw into; None for a new figure.

        Returns:
            The figure and the axes.

        Raises:
            ModuleNotFoundError: if matplotlib is not installed.
        """
        return self._plot(val, ax)

    def _sync_dist(
        self,
        dist_sync_fn: Callable[..., list[Tensor]] = gather_all_tensors,
        process_group: Any | None = None,
    ) -> None:
        def gather(state: Tensor, group: Any | None = None) -> list[Tensor]:
            # A rank without a spectrum holds the float32 default, and ranks that send different numbers of
            # bytes end the process.
            gathered = dist_sync_fn(state.to(functional.widest_float(self.device)), group=group)
            sizes = [other.numel() for other in gathered]
            if len(set(sizes)) > 1:
                raise ValueError(
                    f"the ranks hold {sizes} eigenvalues, where one replicated spectrum is expected; call "
                    "update on every rank with the spectrum that was computed over all ranks together"
                )
            return gathered

        super()._sync_dist(gather, process_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        # A device without float64 refuses the move, so the state gives up its precision first.
        target = fn(torch.empty(0, device=self.device)).device
        if self.eigenvalues.dtype == torch.float64 and functional.widest_float(target) != torch.float64:
            self.eigenvalues = self.eigenvalues.float()
            for name in ("_computed", "_forward_cache"):
                cached = getattr(self, name)
                if isinstance(cached, Tensor):
                    setattr(self, name, cached.float())
        return super()._apply(fn, exclude_state)


class _PowerLawMetric(SpectrumMetric):
    """Base of metrics that speak of the eigenvalues that a power law is fitted to."""

    plot_lower_bound: float | None = 0.0

    def __init__(self, *, num_eigenvalues: int | None = None, drop_first: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_eigenvalues = num_eigenvalues
        self.drop_first = drop_first

    @property
    def _chosen(self) -> dict[str, Any]:
        return {"num_eigenvalues": self.num_eigenvalues, "drop_first": self.drop_first}


class PowerLawSlope(_PowerLawMetric):
    r"""Maximum-likelihood power-law slope of a spectrum; larger is steeper.

    .. math:: \hat s = \frac{1}{K} \sum_{i=1}^{K} \ln\frac{\lambda_i}{\lambda_K}

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``slope`` (Tensor): a scalar. It has no universally good direction: in the paper a smaller one goes with
      a lower test error of convolutional networks. Slopes compare at equal K only.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no power law can be fitted; see `fit_power_law`. Never NaN instead.

    Source:
        Tang et al., ICML 2025.

    Example:
        >>> metric = PowerLawSlope()
        >>> metric.update(1 / torch.arange(1, 1001))
        >>> metric.compute()
        tensor(0.9956, dtype=torch.float64)
    """

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.power_law_slope`."""
        return functional.power_law_slope(eigenvalues, **self._chosen)


class PowerLawFitError(_PowerLawMetric):
    r"""Two-sided Kolmogorov-Smirnov distance of a spectrum to its fitted power law.

    .. math:: d_{ks} = \sup_{\lambda \ge \lambda_K} |F^*(\lambda) - \hat F(\lambda)|

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``fit_error`` (Tensor): a scalar in (0, 1). In the paper it falls with the test loss of language models.
      Compare it with `critical_distance` at the same K.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no power law can be fitted; see `fit_power_law`. Never NaN instead.

    Source:
        Tang et al., ICML 2025.

    Example:
        >>> metric = PowerLawFitError()
        >>> metric.update(torch.exp(-torch.arange(1, 51) / 10))
        >>> metric.compute()
        tensor(0.1604, dtype=torch.float64)
    """

    higher_is_better = False
    plot_upper_bound = 1.0

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.power_law_fit_error`."""
        return functional.power_law_fit_error(eigenvalues, **self._chosen)


class PowerLawSlopeStderr(_PowerLawMetric):
    r"""Standard error of the power-law slope.

    .. math:: \hat s / \sqrt K

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``slope_stderr`` (Tensor): a scalar. It speaks of the fit, not of the eigenvalues' own errors.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no power law can be fitted; see `fit_power_law`. Never NaN instead.

    Example:
        >>> metric = PowerLawSlopeStderr()
        >>> metric.update(1 / torch.arange(1, 1001))
        >>> metric.compute()
        tensor(0.0315, dtype=torch.float64)
    """

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.power_law_slope_stderr`."""
        return functional.power_law_slope_stderr(eigenvalues, **self._chosen)


class PowerLawDensityExponent(_PowerLawMetric):
    r"""Exponent of the power-law density of eigenvalues.

    .. math:: \hat\beta = 1 + 1 / \hat s

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``density_exponent`` (Tensor): a scalar above 1.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no power law can be fitted; see `fit_power_law`. Never NaN instead.

    Source:
        Tang et al., ICML 2025.

    Example:
        >>> metric = PowerLawDensityExponent()
        >>> metric.update(1 / torch.arange(1, 1001))
        >>> metric.compute()
        tensor(2.0044, dtype=torch.float64)
    """

    plot_lower_bound = 1.0

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.power_law_density_exponent`."""
        return functional.power_law_density_exponent(eigenvalues, **self._chosen)


class PowerLawRSquared(_PowerLawMetric):
    r"""Coefficient of determination of log eigenvalue on log rank.

    .. math:: R^2 = 1 - \sum_k r_k^2 \Big/ \sum_k (\ln\lambda_k - \overline{\ln\lambda})^2

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``r_squared`` (Tensor): a scalar, at most 1. It hardly tells a power law from a lognormal.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no power law can be fitted; see `fit_power_law`. Never NaN instead.

    Example:
        >>> metric = PowerLawRSquared()
        >>> metric.update(torch.exp(-torch.arange(1, 51) / 10))
        >>> metric.compute()
        tensor(0.8260, dtype=torch.float64)
    """

    higher_is_better = True
    plot_upper_bound = 1.0

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.power_law_r_squared`."""
        return functional.power_law_r_squared(eigenvalues, **self._chosen)


class PowerLawPValue(_PowerLawMetric):
    r"""Parametric-bootstrap p-value of the fit error, with the exponent refitted.

    .. math:: p = \frac{1 + \#\{d^*_b \ge d_{ks}\}}{1 + B}

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``p_value`` (Tensor): a scalar in (0, 1]; small where a power law would seldom fit so badly.

    Args:
        draws: B, the number of power laws simulated, once for each K.
        seed: of the simulation.
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no power law can be fitted; see `fit_power_law`. Never NaN instead.

    Source:
        Clauset, Shalizi and Newman (2009).

    Example:
        >>> metric = PowerLawPValue()
        >>> metric.update(torch.linspace(2, 1, 1000))
        >>> metric.compute()
        tensor(0.0010, dtype=torch.float64)
    """

    plot_upper_bound = 1.0

    def __init__(self, *, draws: int = 1000, seed: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.draws = draws
        self.seed = seed

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.power_law_p_value`."""
        return functional.power_law_p_value(eigenvalues, draws=self.draws, seed=self.seed, **self._chosen)


class PowerLawNumFitted(_PowerLawMetric):
    r"""Number of eigenvalues that the power law is fitted to.

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``num_fitted`` (Tensor): K, a scalar. Slopes with different K do not compare.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no power law can be fitted; see `fit_power_law`. Never NaN instead.

    Example:
        >>> metric = PowerLawNumFitted()
        >>> metric.update([4.0, 2.0, 1.0, 0.0, -1.0])
        >>> metric.compute()
        tensor(3., dtype=torch.float64)
    """

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.power_law_num_fitted`."""
        return functional.power_law_num_fitted(eigenvalues, **self._chosen)


class LargestEigenvalue(_PowerLawMetric):
    r"""The largest eigenvalue fitted, a common measure of sharpness.

    .. math:: \lambda_1

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``lambda_max`` (Tensor): a scalar in the unit of the eigenvalues.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if fewer than 3 eigenvalues are positive. Never NaN instead.

    Example:
        >>> metric = LargestEigenvalue()
        >>> metric.update([1.0, 4.0, 2.0])
        >>> metric.compute()
        tensor(4., dtype=torch.float64)
    """

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.largest_eigenvalue`."""
        return functional.largest_eigenvalue(eigenvalues, **self._chosen)


class EigengapExponent(_PowerLawMetric):
    r"""Exponent of the eigengaps sorted by size, which theory puts at s + 1.

    .. math:: \delta_k = \lambda_k - \lambda_{k + 1}, \qquad \delta_{(k)} \propto k^{-(s + 1)}

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``exponent`` (Tensor): a scalar without unit.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if the gaps cannot be fitted; see `fit_eigengaps`. Never NaN instead.

    Source:
        Tang et al., ICML 2025.

    Example:
        >>> metric = EigengapExponent()
        >>> metric.update(1 / torch.arange(1, 1001, dtype=torch.float64))
        >>> metric.compute()
        tensor(1.9820, dtype=torch.float64)
    """

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.eigengap_exponent`."""
        return functional.eigengap_exponent(eigenvalues, **self._chosen)


class MaximumEntropyDeficit(_PowerLawMetric):
    r"""How far the entropy of eigenvalues falls short of the fitted power law's.

    .. math:: \ln\hat s + 1 - \hat h(\ln(\lambda / \lambda_K))

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``deficit`` (Tensor): a scalar in nats; near zero for a power law.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no entropy can be estimated; see `entropy_deficit`. Never NaN instead.

    Source:
        Tang et al., ICML 2025, for the argument.

    Example:
        >>> metric = MaximumEntropyDeficit()
        >>> metric.update(torch.exp(-torch.arange(100) / 10))
        >>> metric.compute()
        tensor(0.2968, dtype=torch.float64)
    """

    higher_is_better = False
    plot_lower_bound = None

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.maximum_entropy_deficit`."""
        return functional.maximum_entropy_deficit(eigenvalues, **self._chosen)


class EffectiveRank(SpectrumMetric):
    r"""Exponential of the entropy of the eigenvalues' shares.

    .. math:: \exp\Big(-\sum_i p_i \ln p_i\Big), \qquad p_i = \lambda_i / \sum_j \lambda_j

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``rank`` (Tensor): a scalar between 1 and the number of positive eigenvalues.

    Args:
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no eigenvalue is positive.

    Source:
        Roy and Vetterli (2007).

    Example:
        >>> metric = EffectiveRank()
        >>> metric.update([4.0, 2.0, 1.0, 1.0])
        >>> metric.compute()
        tensor(3.3636, dtype=torch.float64)
    """

    plot_lower_bound = 1.0

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.effective_rank`."""
        return functional.effective_rank(eigenvalues)


class IntrinsicDimension(SpectrumMetric):
    r"""Trace over the largest eigenvalue.

    .. math:: \sum_i \lambda_i / \lambda_1

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``dimension`` (Tensor): a scalar between 1 and the number of positive eigenvalues.

    Args:
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no eigenvalue is positive.

    Source:
        Tropp (2015).

    Example:
        >>> metric = IntrinsicDimension()
        >>> metric.update([4.0, 2.0, 2.0])
        >>> metric.compute()
        tensor(2., dtype=torch.float64)
    """

    plot_lower_bound = 1.0

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.intrinsic_dimension`."""
        return functional.intrinsic_dimension(eigenvalues)


class ParticipationRatio(SpectrumMetric):
    r"""Squared trace over squared Frobenius norm.

    .. math:: \Big(\sum_i \lambda_i\Big)^2 / \sum_i \lambda_i^2

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``ratio`` (Tensor): a scalar between 1 and the number of positive eigenvalues.

    Args:
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no eigenvalue is positive.

    Example:
        >>> metric = ParticipationRatio()
        >>> metric.update([2.0, 1.0, 1.0])
        >>> metric.compute()
        tensor(2.6667, dtype=torch.float64)
    """

    plot_lower_bound = 1.0

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.participation_ratio`."""
        return functional.participation_ratio(eigenvalues)


class OutlierRatio(SpectrumMetric):
    r"""How far the outliers that come from C classes stand above the bulk.

    .. math:: \lambda_1 / \lambda_{C + 1}

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``ratio`` (Tensor): a scalar, at least 1.

    Args:
        num_classes: C, at least 1.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: if ``num_classes`` is below 1; by ``compute``, if fewer than C + 1 eigenvalues are positive.

    Example:
        >>> metric = OutlierRatio(num_classes=2)
        >>> metric.update([8.0, 6.0, 2.0, 1.0])
        >>> metric.compute()
        tensor(4., dtype=torch.float64)
    """

    plot_lower_bound = 1.0

    def __init__(self, num_classes: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; give the number of classes, at least 1")
        self.num_classes = num_classes

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """See `functional.outlier_ratio`."""
        return functional.outlier_ratio(eigenvalues, self.num_classes)


def power_law_metrics(
    *,
    num_eigenvalues: int | None = None,
    drop_first: int = 0,
    num_classes: int | None = None,
    theory: bool = False,
    prefix: str | None = None,
    **kwargs: Any,
) -> MetricCollection:
    """All metrics of a spectrum, in one collection that keeps the eigenvalues once.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out of the fits as outliers.
        num_classes: C, for ``outlier_ratio``; None leaves it out.
        theory: whether to add ``eigengap_exponent`` and ``entropy_deficit``, which need eigenvalues more
            precise than a slope does and raise where several are equal.
        prefix: put before every name.
        kwargs: for each metric, see ``torchmetrics.Metric``.

    Returns:
        The collection, with ``slope``, ``fit_error``, ``slope_stderr``, ``density_exponent``, ``r_squared``,
        ``p_value``, ``num_fitted``, ``lambda_max``, ``effective_rank``, ``intrinsic_dimension``,
        ``participation_ratio`` and what the options add.

    Example:
        >>> metrics = power_law_metrics(num_eigenvalues=50, prefix="hessian/")
        >>> metrics.update(1 / torch.arange(1, 101))
        >>> values = metrics.compute()
        >>> values["hessian/slope"], values["hessian/num_fitted"]
        (tensor(0.9425, dtype=torch.float64), tensor(50., dtype=torch.float64))
    """
    chosen: dict[str, Any] = {"num_eigenvalues": num_eigenvalues, "drop_first": drop_first, **kwargs}
    metrics: dict[str, Metric | MetricCollection] = {
        "slope": PowerLawSlope(**chosen),
        "fit_error": PowerLawFitError(**chosen),
        "slope_stderr": PowerLawSlopeStderr(**chosen),
        "density_exponent": PowerLawDensityExponent(**chosen),
        "r_squared": PowerLawRSquared(**chosen),
        "p_value": PowerLawPValue(**chosen),
        "num_fitted": PowerLawNumFitted(**chosen),
        "lambda_max": LargestEigenvalue(**chosen),
        "effective_rank": EffectiveRank(**kwargs),
        "intrinsic_dimension": IntrinsicDimension(**kwargs),
        "participation_ratio": ParticipationRatio(**kwargs),
    }
    if theory:
        metrics["eigengap_exponent"] = EigengapExponent(**chosen)
        metrics["entropy_deficit"] = MaximumEntropyDeficit(**chosen)
    if num_classes is not None:
        metrics["outlier_ratio"] = OutlierRatio(num_classes, **kwargs)
    return MetricCollection(metrics, prefix=prefix)
