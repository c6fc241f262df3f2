"""Showing that a measurement is under way, beside whichever progress bar the trainer has."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

if TYPE_CHECKING:
    from hessian_callback.lanczos import LanczosProgress

__all__ = ["announce", "measuring"]

Report = Callable[["LanczosProgress"], None]


def announce(trainer: Trainer, text: str) -> None:
    """Print a line on rank zero, above the progress bar if one is drawn."""
    if not trainer.is_global_zero:
        return
    if isinstance(trainer.progress_bar_callback, TQDMProgressBar):
        # Lightning's own `bar.print` says nothing while no bar of its own is open.
        Tqdm.write(text)
    else:
        print(text, flush=True)  # Rich, if it is drawing, takes standard output over.


def measuring(trainer: Trainer, description: str) -> AbstractContextManager[Report]:
    """Show progress while the context is open; yields the function that is told of each product.

    Nothing is shown where the trainer's progress bar is off, on ranks other than zero, and beside progress
    bars of unknown kind.
    """
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        return _with_tqdm(bar, description)
    if isinstance(bar, RichProgressBar) and bar.is_enabled:
        return _with_rich(bar, description)
    return nullcontext(_say_nothing)


def _say_nothing(_: LanczosProgress) -> None:
    return None


def _found(progress: LanczosProgress) -> str:
    return f"{progress.num_converged}/{progress.k} eigenvalues"


@contextmanager
def _with_tqdm(bar: TQDMProgressBar, description: str) -> Iterator[Report]:
    # How many products it takes is not known beforehand, so there is a count and a rate, but no end.
    position = 2 * bar.process_position + 1
    with Tqdm(desc=description, unit=" products", position=position, leave=False, file=sys.stdout) as line:

        def report(progress: LanczosProgress) -> None:
            line.set_postfix_str(_found(progress), refresh=False)
            line.update(progress.num_hvps - line.n)

        yield report


@contextmanager
def _with_rich(bar: RichProgressBar, description: str) -> Iterator[Report]:
    shared: Any = bar.progress
    if shared is None or not shared.live.is_started:
        # Before the trainer's own bar is up, and after it is gone.
        from rich.progress import Progress

        with Progress(transient=True) as own:
            yield _rich_report(own, description)
        return
    report = _rich_report(shared, description)
    task = shared.task_ids[-1]
    try:
        yield report
    finally:
        shared.remove_task(task)


def _rich_report(progress_bar: Any, description: str) -> Report:
    task = progress_bar.add_task(description, total=float("inf"))

    def report(progress: LanczosProgress) -> None:
        progress_bar.update(task, completed=progress.num_hvps, description=f"{description}: {_found(progress)}")

    return report
