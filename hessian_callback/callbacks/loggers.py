"""What a run's loggers show beside curves: pictures where they can, and in TensorBoard a layout of the curves."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from lightning.pytorch.loggers import TensorBoardLogger

__all__ = ["Layout", "curve_layout", "name_start", "show_layout", "show_picture", "shows_pictures"]

Layout = dict[str, dict[str, list[Any]]]

# Titles, and the curves on one chart; "*" stands for the names of groups and predictors.
_CHARTS: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "slope": {
        "slope over groups of parameters": ("slope", "slope/*"),
        "slope on two halves of the samples": ("slope", "slope_half_1", "slope_half_2"),
    },
    "fit error": {
        "fit error and its 5 % critical values": ("fit_error", "critical_distance", "critical_distance_paper"),
    },
    "prediction": {
        "predictions of the next loss": ("predicted_loss", "predicted_loss_baseline/*"),
        "mean error of the predictions": ("prediction_error/*",),
        "rank correlation with the loss": ("rank_correlation/*",),
    },
    "sharpness": {
        "largest eigenvalue": ("lambda_max",),
        "trace and Frobenius norm": ("trace", "frobenius_norm"),
        "overlap with the last eigenspace": ("subspace_overlap",),
    },
    "cost": {
        "Hessian-vector products": ("num_hvps", "num_extra_hvps"),
        "seconds that training stood still": ("seconds",),
        "share of the wall time": ("overhead",),
    },
}
# A curve with a band: the value, the lower and the upper end.
_BANDS: Mapping[str, Mapping[str, tuple[str, str, str]]] = {
    "slope": {
        "slope with its 95 % interval": ("slope", "slope_low", "slope_high"),
        "slope with what the eigenvalues' error bounds leave open": (
            "slope",
            "slope_numerical_low",
            "slope_numerical_high",
        ),
    },
    "prediction": {
        "loss with what was predicted of it": ("loss", "predicted_loss_low", "predicted_loss_high"),
        "next loss with its interval": ("next_loss", "next_loss_low", "next_loss_high"),
    },
}
# Charts of one curve are worth their place; of these only with something to compare.
_NEED_COMPANY = {"slope over groups of parameters", "slope on two halves of the samples"}


def curve_layout(prefix: str, names: Collection[str], *, logger_prefix: str = "") -> Layout:
    """Group logged curves into charts, as ``SummaryWriter.add_custom_scalars`` takes them.

    Args:
        prefix: what the logged names begin with.
        names: the names behind the prefix that have been logged. Charts of others are left out.
        logger_prefix: what the logger puts before every name, its separator included.

    Returns:
        ``{category: {title: ["Multiline" or "Margin", tags]}}``. A margin chart names its tags, value, low and high;
        a multiline chart has regular expressions that match one tag each.

    Example:
        >>> curve_layout("hessian", ["slope", "slope_low", "slope_high", "seconds"])["hessian: cost"]
        {'seconds that training stood still': ['Multiline', ['hessian/seconds$']]}
    """
    layout: Layout = {}
    full = f"{logger_prefix}{prefix}/"
    for category in _CHARTS:
        charts: dict[str, list[Any]] = {}
        for title, curves in _BANDS.get(category, {}).items():
            if set(curves) <= set(names):
                charts[title] = ["Margin", [full + name for name in curves]]
        for title, wanted in _CHARTS[category].items():
            found = [name for pattern in wanted for name in sorted(names) if _is_meant(pattern, name)]
            if found and not (title in _NEED_COMPANY and len(found) == 1):
                charts[title] = ["Multiline", [re.escape(full + name) + "$" for name in found]]
        if charts:
            layout[f"{prefix}: {category}"] = charts
    return layout


def _is_meant(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def show_layout(loggers: Iterable[Any], curves: Mapping[str, Collection[str]]) -> None:
    """Write the layout of all curves to the loggers that are TensorBoard's; the last one written is shown.

    Args:
        loggers: of a trainer.
        curves: the names that have been logged, by the prefix of their callback: a run has one layout for all.
    """
    for logger in loggers:
        # Not asked of the logger itself: the one of fast_dev_run claims to have everything.
        if isinstance(logger, TensorBoardLogger):
            start = name_start(logger)
            layouts = [curve_layout(prefix, names, logger_prefix=start) for prefix, names in curves.items()]
            merged = {category: charts for layout in layouts for category, charts in layout.items()}
            if merged:
                logger.experiment.add_custom_scalars(merged)


def name_start(logger: TensorBoardLogger) -> str:
    """Return what a logger puts before every name, its separator included."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def shows_pictures(logger: Any) -> bool:
    """Whether a logger can show a picture: those of TensorBoard, Weights & Biases and MLflow can, a CSV file not."""
    return _kind(logger) is not None


def _kind(logger: Any) -> str | None:
    # By what the types have: an instance may claim to have everything.
    if hasattr(type(getattr(logger, "experiment", None)), "add_image"):
        return "writer"
    if hasattr(type(logger), "log_image"):
        return "logger"
    if hasattr(type(logger), "run_id") and hasattr(type(getattr(logger, "experiment", None)), "log_image"):
        return "client"
    return None


def show_picture(logger: Any, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
    """Give a picture to a logger that can show it; see `shows_pictures`.

    Args:
        logger: of a trainer.
        tag: its name.
        image: ``(height, width, 3)``, RGB.
        step: the step that the scalars of the measurement have.

    Raises:
        TypeError: if the logger can't show pictures.
    """
    kind = _kind(logger)
    if kind == "writer":
        logger.experiment.add_image(tag, image, step, dataformats="HWC")
    elif kind == "logger":
        logger.log_image(key=tag, images=[image], step=step)
    elif kind == "client":
        logger.experiment.log_image(logger.run_id, image, key=tag, step=step)
    else:
        raise TypeError(f"{type(logger).__name__} can't show pictures; ask shows_pictures before")
