"""Figure of the density of all eigenvalues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from hessian_callback.measurement.measurement import Measurement
from hessian_callback.plots.style import (
    BLUE,
    TEXT,
    VERMILLION,
    check_num_earlier,
    faded,
    label_axes,
    location,
    new_figure,
    spaced_indices,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hessian_callback.algorithms.density import SpectralDensity

__all__ = ["density_figure"]

# Share of the range of eigenvalues that a node of the quadrature is spread over.
_SPREAD = 0.01


def density_figure(history: Sequence[Measurement], *, num_earlier: int = 3) -> Figure:
    r"""Draw the last measurement's density of all eigenvalues, negative ones included.

    With nodes :math:`\theta_{lj}` and weights :math:`w_{lj}` of n random vectors, the curve is

    .. math:: N(x) = \frac{P}{n} \sum_{l=1}^n \sum_j w_{lj}\, e^{-(x - \theta_{lj})^2 / 2\sigma^2}.

    An isolated eigenvalue has a peak of height 1, up to the scatter of the random vectors. The width
    :math:`\sigma` is a hundredth of the range of the nodes. The vertical axis is logarithmic and begins below one
    eigenvalue. The band is the range of the n curves. Grey curves are earlier measurements, which fade with age.

    Args:
        history: measurements in order of time; the last has a ``density``.
        num_earlier: the largest number of earlier measurements to draw, spaced evenly over the run.

    Returns:
        A figure that no window shows and ``pyplot`` does not manage.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if the last measurement has no density, or ``num_earlier`` is negative.

    Source:
        The curve of Ghorbani, Krishnan and Xiao (2019), in numbers of eigenvalues instead of normalised.

    Example:
        >>> import torch
        >>> from hessian_callback.algorithms.density import SpectralDensity
        >>> density = SpectralDensity(nodes=torch.tensor([[3.0, 0.0]] * 2).double(),
        ...                           weights=torch.tensor([[0.25, 0.75]] * 2).double(),
        ...                           size=4, rounding=0.0, num_matvecs=4)
        >>> measured = Measurement(epoch=0, step=0, when="epoch", spectrum=None, fit=None, reason="no fit",
        ...                        seconds=0.1, density=density)
        >>> axes = density_figure([measured]).axes[0]
        >>> round(float(axes.lines[0].get_ydata().max()), 4)
        3.0
    """
    if not history or history[-1].density is None:
        raise ValueError("the last measurement has no density to draw; ask for it with extras=['density']")
    check_num_earlier(num_earlier)
    figure, axes = new_figure()
    *earlier, current = history
    density = current.density
    assert density is not None
    before = [m.density for m in earlier if m.density is not None]
    chosen = [before[index] for index in spaced_indices(len(before), num_earlier)]
    low, high = _reach([density, *chosen])
    width = _SPREAD * (high - low)
    # Ten points for a standard deviation, so that no peak falls between two points.
    along = np.linspace(low - 5 * width, high + 5 * width, 1101)
    tops = []
    for age, old in enumerate(reversed(chosen)):
        counts = _counts(old, along, width).mean(0)
        tops.append(counts.max())
        axes.plot(along, counts, **faded(age))
    counts = _counts(density, along, width)
    mean = counts.mean(0)
    axes.fill_between(along, counts.min(0), counts.max(0), color=BLUE, alpha=0.25, linewidth=0, zorder=2)
    positive = along >= 0
    axes.plot(along, mean, color=BLUE, linewidth=2.2, zorder=3, label="positive")
    # The line at zero separates the two for readers who do not see colours.
    if not positive.all():
        axes.plot(along[~positive], mean[~positive], color=VERMILLION, linewidth=2.6, zorder=4, label="negative")
    axes.axvline(0, color="black", linewidth=1.0, zorder=2)
    axes.set_yscale("log")
    axes.set_ylim(0.1, 2 * max(10.0, counts.max(), *tops))
    axes.set_xlim(along[0], along[-1])
    label_axes(axes, rf"eigenvalue, spread over $\sigma$ = {width:.1g}", "number of eigenvalues", legend="upper right")
    axes.set_title(f"{location(current)}:  {_negative_mass(density)}", fontsize=TEXT, loc="left")
    return figure


def _reach(densities: Sequence[SpectralDensity]) -> tuple[float, float]:
    """Return the smallest and the largest node with a weight, zero included; the two differ."""
    nodes = np.concatenate([[0.0], *(d.nodes[d.weights > 0].numpy() for d in densities)])
    low, high = float(nodes.min()), float(nodes.max())
    return (low, high) if high > low else (-1.0, 1.0)


def _negative_mass(density: SpectralDensity) -> str:
    if not bool(density.nodes[density.weights > 0].any()):
        return "all eigenvalues are zero"
    if len(density.nodes) == 1:
        return "one random vector"  # The scatter of one is unknown.
    mass = density.negative_mass
    return f"negative mass {mass.value:.3f} ± {mass.stderr:.3f}"


def _counts(density: SpectralDensity, along: npt.NDArray[np.float64], width: float) -> npt.NDArray[np.float64]:
    """Compute the smoothed number of eigenvalues, ``(n, len(along))``, one row for each random vector."""
    distances = (along[:, None] - density.nodes.numpy()[:, None, :]) / width
    weighted = np.exp(-(distances**2) / 2) * density.weights.numpy()[:, None, :]
    counts: npt.NDArray[np.float64] = density.size * weighted.sum(-1)
    return counts
