"""Showing that a measurement is under way, beside whichever progress bar the trainer has."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm

if TYPE_CHECKING:
    from hessian_callback.algorithms.lanczos import LanczosProgress

__all__ = ["announce", "measuring"]

Report = Callable[["LanczosProgress"], None]


def announce(trainer: Trainer, text: str) -> None:
    """Print a line on rank zero, above the progress bar if one is drawn."""
    if not trainer.is_global_zero:
        return
    # Standard output may be a full disk, or closed: no reason to fail, least of all on one rank alone.
    with suppress(OSError, ValueError):
        if isinstance(trainer.progress_bar_callback, TQDMProgressBar):
            # Lightning's own `bar.print` says nothing while no bar of its own is open.
            Tqdm.write(text)
        else:
            print(text, flush=True)  # Rich, if it is drawing, takes standard output over.


@contextmanager
def measuring(trainer: Trainer, description: str, expected: int | None = None) -> Iterator[Report]:
    """Show progress while the context is open; yields the function that is told of each product.

    The bar is full at ``expected`` products; beyond them, at the most that may be spent.

    Nothing is shown where the trainer's progress bar is off, on ranks other than zero, and beside progress
    bars of unknown kind. A display that fails is given up, and the measurement goes on without it.
    """
    display: _Display | None = None

    def attempt(action: Callable[[], _Display | None]) -> _Display | None:
        try:
            return action()
        except Exception as error:
            warnings.warn(f"the progress display failed and is off for this measurement: {error}", stacklevel=2)
            return None

    def report(progress: LanczosProgress) -> None:
        nonlocal display
        if display is not None:
            shown = display
            display = attempt(lambda: shown.show(progress))

    display = attempt(lambda: _display(trainer, description, expected))
    try:
        yield report
    finally:
        if display is not None:
            shown = display
            attempt(lambda: shown.close())


class _Display:
    """A line beside the trainer's progress bar."""

    def show(self, progress: LanczosProgress) -> _Display:
        """Show where the computation stands; returns itself."""
        raise NotImplementedError

    def close(self) -> None:
        """Take the line away."""
        raise NotImplementedError


def _display(trainer: Trainer, description: str, expected: int | None) -> _Display | None:
    bar = trainer.progress_bar_callback
    if isinstance(bar, TQDMProgressBar) and bar.is_enabled:
        return _TqdmLine(bar, description, expected)
    if isinstance(bar, RichProgressBar) and bar.is_enabled:
        return _RichLine(bar, description, expected)
    return None


def _found(progress: LanczosProgress) -> str:
    """Say how many eigenvalues are known, and the slope of those that there are so far, known or not."""
    found = f"{progress.num_converged}/{progress.k} eigenvalues"
    values = progress.ritz_values
    if values is None or len(values) < progress.k or not bool((values > 0).all()):
        return found
    return f"{found}, slope about {float((values / values[-1]).log().mean()):.2f}"


def _end(progress: LanczosProgress, expected: int | None) -> int:
    """How many products it takes, as far as is known."""
    return expected if expected is not None and progress.num_matvecs <= expected else progress.max_matvecs


class _TqdmLine(_Display):
    def __init__(self, bar: TQDMProgressBar, description: str, expected: int | None) -> None:
        self._expected = expected
        self._line = Tqdm(
            desc=description,
            total=expected,
            unit=" products",
            position=2 * bar.process_position + 1,
            leave=False,
            file=sys.stdout,
        )

    def show(self, progress: LanczosProgress) -> _Display:
        self._line.total = _end(progress, self._expected)
        self._line.set_postfix_str(_found(progress), refresh=False)
        self._line.update(progress.num_matvecs - self._line.n)
        return self

    def close(self) -> None:
        self._line.close()


class _RichLine(_Display):
    def __init__(self, bar: RichProgressBar, description: str, expected: int | None) -> None:
        from rich.progress import Progress

        self._description = description
        self._expected = expected
        # Before the trainer's own bars are up, and after they are gone, it needs some of its own.
        shared: Any = bar.progress
        self._own: Any = None if shared is not None and shared.live.is_started else Progress(transient=True)
        self._bars: Any = shared if self._own is None else self._own
        if self._own is not None:
            self._own.start()
        # Hidden and shown again, never removed: Lightning before 2.6.1 takes a task's id for its place in the list.
        ours = [task.id for task in self._bars.tasks if task.fields.get("hessian")]
        self._task = ours[0] if ours else self._bars.add_task(description, total=1, hessian=True)
        self._bars.reset(self._task, description=description, total=1, visible=True)

    def show(self, progress: LanczosProgress) -> _Display:
        end = _end(progress, self._expected)
        text = f"{self._description}: {_found(progress)}, {progress.num_matvecs}/{end} products"
        self._bars.update(self._task, completed=progress.num_matvecs, total=end, description=text)
        return self

    def close(self) -> None:
        self._bars.update(self._task, visible=False)
        if self._own is not None:
            self._own.stop()
