"""What the command line prints after a run: a table of the measurements, and why training stopped."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hessian_callback.callbacks.edge import EdgeOfStabilityMonitor
from hessian_callback.callbacks.lightning_packages import Trainer, is_a
from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.callbacks.trainer_state import callbacks_of
from hessian_callback.measurement.measurement import Measurement

__all__ = ["print_history", "print_report", "relative_path", "stop_messages", "table_row"]


def print_report(trainer: Trainer) -> None:
    """Print the measurements of a trainer's callbacks, why it stopped early, and the paths of its curves."""
    if not trainer.is_global_zero:
        return
    measuring = [one for one in callbacks_of(trainer) if isinstance(one, PowerLawHessianCallback)]
    for callback in measuring:
        print_history(callback)
    monitors = [one for one in callbacks_of(trainer) if isinstance(one, EdgeOfStabilityMonitor)]
    for monitor in monitors:
        _print_edge(monitor)
    if not measuring and not monitors:
        print(
            "Nothing was measured: no PowerLawHessianCallback is among the trainer's callbacks. Add it with\n"
            "  --trainer.callbacks+=hessian_callback.PowerLawHessianCallback"
        )
    for message in stop_messages(trainer):
        print(f"\n{message}")
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        if is_a(logger, "TensorBoardLogger"):
            print(f"\nTensorBoard files: {relative_path(logger.log_dir)}")
            print(f"Look at them with: {_tensorboard()} --logdir {relative_path(logger.root_dir)}")


def print_history(callback: PowerLawHessianCallback, history: Sequence[Measurement] | None = None) -> None:
    """Print a table of measurements, the reasons of those without a slope, and the critical fit error.

    Args:
        callback: the callback that made them.
        history: the measurements; ``None``: all of the callback.
    """
    history = callback.history if history is None else history
    print()
    if not history:
        print(f"{callback.prefix}: no measurement was made.")
        return
    header = ["when", "step", "loss", "slope", "fit error", "K", "HVPs", "seconds"]
    rows = [table_row(measurement) for measurement in history]
    title = f"Power law of the Hessian's largest eigenvalues ({callback.prefix}/*)"
    if find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(title)
        for row in [header, *rows]:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    else:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in table.columns:
            column.justify, column.no_wrap = "right", True
        for row in rows:
            table.add_row(*row)
        console = Console()
        # A log file counts as 80 columns wide, and rich would rather cut digits off than go beyond.
        needed = Console(width=1000).measure(table).maximum
        console.width = max(console.width, needed)
        console.print(table)
    for measurement in history:
        if measurement.reason is not None:
            print(f"{measurement.location}, step {measurement.step}: not logged, because {measurement.reason}")
    fits = [measurement.fit for measurement in history if measurement.fit is not None]
    if fits:
        last = fits[-1]
        print(
            f"At 5 % a power law is rejected above a fit error of {last.critical_distance_fitted:.3f} "
            f"(K = {last.num_eigenvalues}, exponent fitted; the paper has {last.critical_distance_paper:.3f})."
        )


def _print_edge(monitor: EdgeOfStabilityMonitor) -> None:
    measured = [(entry.ratio, entry) for entry in monitor.history if entry.ratio is not None]
    print(f"\n{monitor.prefix}: {len(monitor.history)} measurements, {len(measured)} of them with a ratio")
    if measured:
        print(f"the largest ratio: {max(measured, key=lambda one: one[0])[1].summary()}")
    if monitor.history:
        print(f"the last one: {monitor.history[-1].summary()}")


def table_row(measurement: Measurement) -> list[str]:
    """Return a measurement as the cells of the table; unknown values are dashes.

    Example:
        >>> failed = Measurement(epoch=3, step=120, when="epoch", spectrum=None, fit=None,
        ...                      reason="the loss is NaN", seconds=0.21)
        >>> table_row(failed)
        ['epoch 3', '120', '-', '-', '-', '-', '-', '0.2']
    """
    m = measurement
    return [
        m.location,
        str(m.step),
        "-" if m.loss is None else f"{m.loss:.4f}",
        "-" if m.slope is None else f"{m.slope:.3f} ± {m.slope_stderr:.3f}",
        "-" if m.fit_error is None else f"{m.fit_error:.3f}",
        "-" if m.num_fitted is None else str(m.num_fitted),
        "-" if m.num_hvps is None else str(m.num_hvps),
        f"{m.seconds:.1f}",
    ]


def stop_messages(trainer: Trainer) -> list[str]:
    """Describe which early stopping ended the training, at which value and epoch; empty if none did."""
    if not trainer.should_stop:
        return []
    messages = []
    stoppers: list[Any] = trainer.early_stopping_callbacks
    for stopper in stoppers:
        # Lightning before 2.6 stores no reason, and the epoch of a stopper that did not stop is 0.
        stopped = getattr(stopper, "stopping_reason_message", "unknown") is not None
        if not stopped or stopper.stopped_epoch != trainer.current_epoch - 1:
            continue
        if hasattr(stopper, "on_hessian_measured"):  # PowerLawEarlyStopping, whose message is complete.
            messages.append(
                f"{type(stopper).__name__} stopped the training at epoch {stopper.stopped_epoch}: "
                f"{stopper.stopping_reason_message}."
            )
            continue
        value, best = float(trainer.callback_metrics[stopper.monitor]), float(stopper.best_score)
        message = (
            f"{type(stopper).__name__} stopped the training at epoch {stopper.stopped_epoch}: "
            f"{stopper.monitor} = {value:.3f}"
        )
        if stopper.wait_count >= stopper.patience:
            message += f", not better than its best, {best:.3f}, at {stopper.wait_count} checks in a row"
        messages.append(f"{message} (mode={stopper.mode}, patience={stopper.patience}).")
    return messages


def relative_path(path: str) -> str:
    """Return a path relative to the current directory if it lies below it."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _tensorboard() -> str:
    """Return the command that starts TensorBoard, with its path if this environment's scripts are not on PATH."""
    own = Path(sys.executable).with_name("tensorboard")
    found = shutil.which("tensorboard")
    return relative_path(str(own)) if own.exists() and (found is None or Path(found) != own) else "tensorboard"
