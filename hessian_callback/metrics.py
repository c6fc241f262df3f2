r"""Slope and fit error of a spectrum as torchmetrics classes.

Every rank holds the same eigenvalues of a Hessian. Therefore these metrics do not synchronise in ``compute``,
because W copies of a spectrum would count as W times as many eigenvalues. An explicit ``sync`` checks that the
ranks agree and keeps one copy.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities.distributed import gather_all_tensors

from hessian_callback.power_law.fit import PowerLawFit, fit_power_law
from hessian_callback.power_law.validation import Eigenvalues, as_float64

__all__ = ["PowerLawFitError", "PowerLawSlope", "SpectrumMetric", "take_first_if_equal", "widest_float"]


def widest_float(device: torch.device) -> torch.dtype:
    """Return the most precise floating-point type of a device.

    Args:
        device: any.

    Returns:
        float64, or float32 if the device has no float64.

    Example:
        >>> widest_float(torch.device("cpu")), widest_float(torch.device("mps"))
        (torch.float64, torch.float32)
    """
    return torch.float32 if device.type == "mps" else torch.float64


def take_first_if_equal(gathered: Tensor) -> Tensor:
    """Return one of several replicated states, after a check that all are equal.

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
                f"rank {rank} holds other eigenvalues than rank 0, but one replicated spectrum is expected; "
                "compute the spectrum over all ranks together, or read each rank's value without sync"
            )
    return first


class SpectrumMetric(Metric):
    r"""Base class of metrics of one spectrum that is replicated on all ranks.

    .. math:: m = f(\lambda_1, \ldots, \lambda_n)

    A subclass implements f as `evaluate`. As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor, array or sequence): one spectrum of shape ``(n,)``, in any order.

    As output of ``forward`` and ``compute`` it returns

    - ``value`` (Tensor): a scalar on the metric's device, in float64, or in float32 if the device has
      no float64.

    ``update`` replaces the spectrum, because spectra do not average. The value is that of the latest spectrum.

    Args:
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        TypeError: by ``update``, if the eigenvalues are complex, boolean, sparse or not numbers.
        ValueError: by ``update``, if they are not one-dimensional, empty, NaN or infinite; by ``sync``,
            if the ranks hold different eigenvalues.

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
        """Replace the spectrum with ``eigenvalues``, ``(n,)``."""
        values = as_float64(eigenvalues)
        if not values.size:
            raise ValueError("eigenvalues are empty; pass a spectrum of shape (n,) with at least one eigenvalue")
        self.eigenvalues = torch.tensor(values, dtype=widest_float(self.device), device=self.device)

    def compute(self) -> Tensor:
        """Compute the metric of the latest spectrum, a scalar."""
        if not self.eigenvalues.numel():
            raise RuntimeError(
                f"{type(self).__name__} holds no eigenvalues; call update(eigenvalues) before compute(), and "
                "after every reset()"
            )
        return self.evaluate(self.eigenvalues)

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """Compute the metric of one spectrum. Subclasses override this method.

        Args:
            eigenvalues: ``(n,)``, on the metric's device, in the order given.

        Returns:
            A scalar.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement evaluate(eigenvalues)")

    def plot(self, val: Tensor | Sequence[Tensor] | None = None, ax: Any = None) -> Any:
        """Plot one value or a series of them with matplotlib.

        Args:
            val: a result of ``forward`` or ``compute``, or a list of them; None for the current value.
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
            gathered = dist_sync_fn(state.to(widest_float(self.device)), group=group)
            sizes = [other.numel() for other in gathered]
            if len(set(sizes)) > 1:
                raise ValueError(
                    f"the ranks hold {sizes} eigenvalues, but one replicated spectrum is expected; call "
                    "update on every rank with the spectrum that was computed over all ranks together"
                )
            return gathered

        super()._sync_dist(gather, process_group)

    def _apply(self, fn: Callable[[Tensor], Tensor], exclude_state: Sequence[str] = "") -> torch.nn.Module:
        # Moving float64 to a device without it raises, so the state is cast to float32 first.
        target = fn(torch.empty(0, device=self.device)).device
        if self.eigenvalues.dtype == torch.float64 and widest_float(target) != torch.float64:
            self.eigenvalues = self.eigenvalues.float()
            for name in ("_computed", "_forward_cache"):
                cached = getattr(self, name)
                if isinstance(cached, Tensor):
                    setattr(self, name, cached.float())
        return super()._apply(fn, exclude_state)


class _PowerLawMetric(SpectrumMetric):
    """Base class of metrics that are an attribute of the power law fitted to a spectrum."""

    plot_lower_bound: float | None = 0.0

    def __init__(self, *, num_eigenvalues: int | None = None, drop_first: int = 0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.num_eigenvalues = num_eigenvalues
        self.drop_first = drop_first

    def _attribute(self, fit: PowerLawFit) -> float:
        raise NotImplementedError

    def evaluate(self, eigenvalues: Tensor) -> Tensor:
        """Fit the power law and return the metric's attribute of the fit, a scalar tensor."""
        fit = fit_power_law(eigenvalues, num_eigenvalues=self.num_eigenvalues, drop_first=self.drop_first)
        device = eigenvalues.device
        return torch.tensor(self._attribute(fit), dtype=widest_float(device), device=device)


class PowerLawSlope(_PowerLawMetric):
    r"""Maximum-likelihood power-law slope of a spectrum; larger is steeper.

    .. math:: \hat s = \frac{1}{K} \sum_{i=1}^{K} \ln\frac{\lambda_i}{\lambda_K}

    As input to ``forward`` and ``update`` the metric accepts

    - ``eigenvalues`` (Tensor): one spectrum of shape ``(n,)``, in any order; those that are zero or
      negative are left out.

    As output of ``forward`` and ``compute`` it returns

    - ``slope`` (Tensor): a scalar without unit. Neither direction is better in general: in the paper a smaller
      slope goes with a lower test error of convolutional networks. Compare slopes at equal K only.

    Args:
        num_eigenvalues: K, how many of the largest to fit; None for all positive ones.
        drop_first: how many of the largest to leave out as outliers.
        kwargs: see ``torchmetrics.Metric``. ``sync_on_compute`` is False unless given.

    Raises:
        RuntimeError: by ``compute``, if ``update`` was not called before.
        ValueError: by ``compute``, if no power law can be fitted; see `fit_power_law`.

    Source:
        Tang et al., ICML 2025.

    Example:
        >>> metric = PowerLawSlope()
        >>> metric.update(1 / torch.arange(1, 1001))
        >>> metric.compute()
        tensor(0.9956, dtype=torch.float64)
    """

    def _attribute(self, fit: PowerLawFit) -> float:
        return fit.slope


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
        ValueError: by ``compute``, if no power law can be fitted; see `fit_power_law`.

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

    def _attribute(self, fit: PowerLawFit) -> float:
        return fit.fit_error
