"""Pictures in loggers that show them, and a layout of the curves in TensorBoard."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hessian_callback.callbacks.lightning_packages import is_a

__all__ = [
    "CHARTS",
    "Chart",
    "Layout",
    "LoggerError",
    "curve_layout",
    "name_start",
    "show_layout",
    "show_picture",
    "shows_pictures",
]

Layout = dict[str, dict[str, list[Any]]]


class LoggerError(RuntimeError):
    """An error of a logger, which is independent of the measurement that it should show."""


@dataclass(frozen=True)
class Chart:
    """A chart of logged curves.

    Attributes:
        category: heading under which TensorBoard shows the chart.
        title: title of the chart.
        curves: names behind the prefix; a final ``*`` stands for the names of groups or predictors. Those of a band are
            the value, its lower and its upper end.
        is_band: whether the chart is one curve with a band, shown only if all three curves were logged.
        min_curves: number of logged curves from which the chart is shown.
    """

    category: str
    title: str
    curves: tuple[str, ...]
    is_band: bool = False
    min_curves: int = 1


#: Charts of the curves that do not depend on extras, and of those that do by their names.
CHARTS: tuple[Chart, ...] = (
    Chart("slope", "slope with its 95 % interval", ("slope", "slope_low", "slope_high"), is_band=True),
    Chart(
        "slope",
        "slope with what the eigenvalues' error bounds leave open",
        ("slope", "slope_numerical_low", "slope_numerical_high"),
        is_band=True,
    ),
    Chart("slope", "slope over groups of parameters", ("slope", "slope/*"), min_curves=2),
    Chart("slope", "slope on two halves of the samples", ("slope", "slope_half_1", "slope_half_2"), min_curves=2),
    Chart(
        "fit error",
        "fit error and its 5 % critical values",
        ("fit_error", "critical_distance", "critical_distance_paper"),
    ),
    Chart(
        "prediction",
        "loss with what was predicted of it",
        ("loss", "predicted_loss_low", "predicted_loss_high"),
        is_band=True,
    ),
    Chart("prediction", "next loss with its interval", ("next_loss", "next_loss_low", "next_loss_high"), is_band=True),
    Chart("prediction", "predictions of the next loss", ("predicted_loss", "predicted_loss_baseline/*")),
    Chart("prediction", "mean error of the predictions", ("prediction_error/*",)),
    Chart("prediction", "rank correlation with the loss", ("rank_correlation/*",)),
    Chart("sharpness", "largest eigenvalue", ("lambda_max",)),
    Chart("sharpness", "trace and Frobenius norm", ("trace", "frobenius_norm")),
    Chart("sharpness", "overlap with the last eigenspace", ("subspace_overlap",)),
    Chart("edge of stability", "curvature over its threshold; 1 is the edge", ("ratio",)),
    Chart("edge of stability", "largest stable learning rate", ("max_lr",)),
    Chart("edge of stability", "sharpness", ("sharpness", "preconditioned_sharpness")),
    Chart("cost", "Hessian-vector products", ("num_hvps", "num_extra_hvps")),
    Chart("cost", "seconds that training stood still", ("seconds",)),
    Chart("cost", "share of the wall time", ("overhead",)),
)


def curve_layout(
    prefix: str, names: Collection[str], *, charts: Iterable[Chart] = CHARTS, logger_prefix: str = ""
) -> Layout:
    """Group logged curves into charts, in the form that ``SummaryWriter.add_custom_scalars`` takes.

    Args:
        prefix: prefix of the logged names.
        names: the logged names behind the prefix. Charts without logged curves are left out.
        charts: the charts, in the order in which they are shown; for example `CHARTS` and those of extras.
        logger_prefix: prefix that the logger adds to every name, its separator included.

    Returns:
        ``{category: {title: ["Multiline" or "Margin", tags]}}``. The tags of a margin chart are value, low and high;
        those of a multiline chart are regular expressions that match one tag each.

    Example:
        >>> curve_layout("hessian", ["slope", "slope_low", "slope_high", "seconds"])["hessian: cost"]
        {'seconds that training stood still': ['Multiline', ['hessian/seconds$']]}
        >>> curve_layout("hessian", ["kurtosis"], charts=[Chart("moments", "kurtosis", ("kurtosis",))])
        {'hessian: moments': {'kurtosis': ['Multiline', ['hessian/kurtosis$']]}}
    """
    layout: Layout = {}
    full = f"{logger_prefix}{prefix}/"
    for chart in charts:
        found = [name for pattern in chart.curves for name in sorted(names) if _matches(pattern, name)]
        if len(found) < (len(chart.curves) if chart.is_band else max(1, chart.min_curves)):
            continue
        shown = layout.setdefault(f"{prefix}: {chart.category}", {})
        if chart.is_band:
            shown[chart.title] = ["Margin", [full + name for name in found]]
        else:
            shown[chart.title] = ["Multiline", [re.escape(full + name) + "$" for name in found]]
    return layout


def _matches(pattern: str, name: str) -> bool:
    return name.startswith(pattern[:-1]) if pattern.endswith("*") else name == pattern


def show_layout(
    loggers: Iterable[Any], curves: Mapping[str, Collection[str]], *, charts: Collection[Chart] = CHARTS
) -> None:
    """Write the layout of all curves to the TensorBoard loggers; TensorBoard shows the one written last.

    Args:
        loggers: the loggers of a trainer.
        curves: the logged names by the prefix of their callback; a run has one layout for all.
        charts: as in `curve_layout`.

    Raises:
        LoggerError: if a logger fails to write it.
    """
    for logger in loggers:
        # By type, because the logger of fast_dev_run has every attribute.
        if not is_a(logger, "TensorBoardLogger"):
            continue
        start = name_start(logger)
        layouts = [curve_layout(prefix, names, charts=charts, logger_prefix=start) for prefix, names in curves.items()]
        merged = {category: charts for layout in layouts for category, charts in layout.items()}
        if not merged:
            continue
        try:
            logger.experiment.add_custom_scalars(merged)
        except Exception as error:
            raise LoggerError(_failure(logger, "write the layout of the curves", error)) from error


def name_start(logger: Any) -> str:
    """Return the prefix that a logger adds to every name, its separator included."""
    return f"{logger._prefix}{logger.LOGGER_JOIN_CHAR}" if logger._prefix else ""


def shows_pictures(logger: Any) -> bool:
    """Return whether a logger can show pictures: those of TensorBoard, Weights & Biases and MLflow can.

    Raises:
        LoggerError: if the logger fails to start.
    """
    return _kind(logger) is not None


def _kind(logger: Any) -> str | None:
    # By attributes of types, because an instance may have every attribute.
    if hasattr(type(logger), "log_image"):
        return "logger"
    try:
        experiment = type(getattr(logger, "experiment", None))
    except Exception as error:
        raise LoggerError(_failure(logger, "start", error)) from error
    if hasattr(experiment, "add_image"):
        return "writer"
    return "client" if hasattr(type(logger), "run_id") and hasattr(experiment, "log_image") else None


def show_picture(logger: Any, tag: str, image: npt.NDArray[np.uint8], step: int) -> None:
    """Pass a picture to a logger that can show it; see `shows_pictures`.

    Args:
        logger: a logger of a trainer.
        tag: name of the picture.
        image: ``(height, width, 3)``, RGB.
        step: step of the measurement's scalars.

    Raises:
        TypeError: if the logger cannot show pictures, or the image is not such an array.
        LoggerError: if the logger fails to show it.
    """
    if not isinstance(image, np.ndarray) or image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        found = f"{image.dtype} of shape {image.shape}" if isinstance(image, np.ndarray) else type(image).__name__
        raise TypeError(f"picture {tag!r} must be an array of uint8 of shape (height, width, 3), got {found}")
    kind = _kind(logger)
    if kind is None:
        raise TypeError(f"{type(logger).__name__} cannot show pictures; call shows_pictures before")
    try:
        if kind == "writer":
            logger.experiment.add_image(tag, image, step, dataformats="HWC")
        elif kind == "logger":
            logger.log_image(key=tag, images=[image], step=step)
        else:
            logger.experiment.log_image(logger.run_id, image, key=tag, step=step)
    except Exception as error:
        raise LoggerError(_failure(logger, f"show the picture {tag!r}", error)) from error


def _failure(logger: Any, action: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(logger).__name__} failed to {action}: {type(error).__name__}: {text}"
