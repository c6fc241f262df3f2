"""Figure of the overlaps between the top eigenspaces of a run's measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from hessian_callback.plots.style import SMALL, TEXT, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["overlap_figure"]

# More numbers on an axis are not legible in a card.
_MOST_LABELS = 8


def overlap_figure(overlaps: Tensor, labels: Sequence[str], *, dimension: int, axis: str = "epoch") -> Figure:
    r"""Draw the overlap of the top eigenspaces of every two measurements of a run.

    .. math:: \|U_i^T U_j\|_F^2 / k

    Args:
        overlaps: ``(n, n)``, between 0 and 1; see `SubspaceHistory`.
        labels: n names, one for each measurement.
        dimension: k.
        axis: the unit of the labels.

    Returns:
        A figure that no window shows and ``pyplot`` does not manage. Colours go from dark (overlap 0) to light
        (equal spaces), in a map that is uniform for colour-blind readers too.

    Raises:
        ModuleNotFoundError: if matplotlib is not installed.
        ValueError: if ``overlaps`` is not square, or the number of labels is not that of its rows.

    Example:
        >>> import torch
        >>> figure = overlap_figure(torch.eye(2), ["start", "0"], dimension=10)
        >>> figure.axes[0].get_title(loc="left")
        'overlap of the top-10 eigenspaces'
    """
    if overlaps.ndim != 2 or overlaps.shape != (len(labels), len(labels)):
        raise ValueError(
            f"expected overlaps of shape ({len(labels)}, {len(labels)}) for as many labels, got {tuple(overlaps.shape)}"
        )
    figure, axes = new_figure()
    picture = axes.imshow(overlaps.numpy(), cmap="cividis", vmin=0, vmax=1, origin="lower", interpolation="nearest")
    bar = figure.colorbar(picture, ax=axes, ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.tick_params(labelsize=SMALL)
    # Evenly spaced, from the newest backwards.
    shown = range(len(labels) - 1, -1, -max(1, -(-len(labels) // _MOST_LABELS)))
    for set_ticks in (axes.set_xticks, axes.set_yticks):
        set_ticks(shown, [labels[index] for index in shown])
    axes.tick_params(labelsize=SMALL)
    axes.set_xlabel(axis, fontsize=TEXT)
    axes.set_ylabel(axis, fontsize=TEXT)
    axes.set_title(f"overlap of the top-{dimension} eigenspaces", fontsize=TEXT, loc="left")
    return figure
