r"""torchmetrics classes over `power_law`: the slope and the fit error as metrics.

Eigenvalues of a Hessian are global already: every rank holds the same ones. So these metrics do not
synchronise in ``compute`` (W copies of a spectrum would pass for W times as many eigenvalues), and an
explicit ``sync`` checks that the ranks agree and keeps one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from hessian_callback.power_law import Eigenvalues, PowerLawFit, as_float64, fit_power_law

__all__ = ["PowerLawFitError", "PowerLawSlope", "SpectrumMetric", "take_first_if_equal"]


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


def _has_float64(device: torch.device) -> bool:
    return device.type != "mps"


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
        ...         return float(eigenvalues.max())
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

    @property
    def _state_dtype(self) -> torch.dtype:
        return torch.float64 if _has_float64(self.device) else torch.float32

    def update(self, eigenvalues: Eigenvalues) -> None:
        """Replace the spectrum by ``eigenvalues``, ``(n,)``."""
        values = as_float64(eigenvalues)
        if not values.size:
            raise ValueError(
                "eigenvalues are empty; pass a spectrum of shape (n,) with at least one eigenvalue"
            )
        self.eigenvalues = torch.tensor(values, dtype=self._state_dtype, device=self.device)

    def compute(self) -> Tensor:
        """The metric of the latest spectrum, a scalar."""
        if not self.eigenvalues.numel():
            raise RuntimeError(
                f"{type(self).__name__} holds no eigenvalues; call update(eigenvalues) before compute(), and "
                "after every reset()"
            )
        dtype = self.eigenvalues.dtype
        return torch.tensor(self.evaluate(self.eigenvalues), dtype=dtype, device=self.device)

    def evaluate(self, eigenvalues: Tensor) -> float:
        """The metric as a plain number. Override this.

        Args:
            eigenvalues: ``(n,)``, in the order given.

        Returns:
            The metric.
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
            gathered = dist_sync_fn(state.to(self._state_dtype), group=group)
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
        if self.eigenvalues.dtype == torch.float64 and not _has_float64(target):
            self.eigenvalues = self.eigenvalues.float()
            for name in ("_computed", "_forward_cache"):
                cached = getattr(self, name)
                if isinstance(cached, Tensor):
                    setattr(self, name, cached.float())
        return super()._apply(fn, exclude_state)


class _PowerLawMetric(SpectrumMetric):
    """Base of metrics that are an attribute of a `PowerLawFit`."""

    def __init__(self, *, num_eigenvalues: int | None = None, drop_first: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_eigenvalues = num_eigenvalues
        self.drop_first = drop_first

    def fit(self, eigenvalues: Tensor) -> PowerLawFit:
        """The fit that the metric is read from."""
        return fit_power_law(eigenvalues, num_eigenvalues=self.num_eigenvalues, drop_first=self.drop_first)


class PowerLawSlope(_PowerLawMetric):
    r"""Maximum-likelihood power-law slope of a spectrum; larger is steeper.

    .. math:: \hat s = \frac{1}{K} \sum_{i=1}^{K} \ln\frac{\lambda_i}{\lambda_K}

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out. Hessian, covariance and weight spectra all serve.

    As output of ``forward`` and ``compute`` it returns

    - ``slope`` (Tensor): a scalar. It has no universally good direction, see `fit_power_law`.

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

    plot_lower_bound = 0.0

    def evaluate(self, eigenvalues: Tensor) -> float:
        """The slope."""
        return self.fit(eigenvalues).slope


class PowerLawFitError(_PowerLawMetric):
    r"""Two-sided Kolmogorov-Smirnov distance of a spectrum to its fitted power law.

    .. math:: d_{ks} = \sup_{\lambda \ge \lambda_K} |F^*(\lambda) - \hat F(\lambda)|

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``fit_error`` (Tensor): a scalar in (0, 1). In the paper it falls with the test loss of language
      models. Compare it with `critical_distance` at the same K.

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
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0

    def evaluate(self, eigenvalues: Tensor) -> float:
        """The distance."""
        return self.fit(eigenvalues).fit_error
