"""Progress of a measurement, beside the progress bar of the trainer."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from hessian_callback.callbacks.lightning_packages import Trainer, is_a, sibling

if TYPE_CHECKING:
    from hessian_callback.algorithms.lanczos import LanczosProgress

__all__ = ["announce", "measuring"]

Report = Callable[["LanczosProgress"], None]


def announce(trainer: Trainer, text: str) -> None:
    """Print a line on rank zero, above the progress bar if one is drawn."""
    if not trainer.is_global_zero:
        return
    # Standard output may be closed or on a full disk. That must not end a run, least of all on one rank alone.
    with suppress(OSError, ValueError):
        if is_a(trainer.progress_bar_callback, "TQDMProgressBar"):
            # Lightning's own `bar.print` prints nothing if none of its bars is open.
            _tqdm_of(trainer.progress_bar_callback).write(text)
        else:
            print(text, flush=True)  # While Rich draws, it redirects standard output.


@contextmanager
def measuring(trainer: Trainer, description: str, expected: int | None = None) -> Iterator[Report]:
    """Show progress inside a block, whose value is the function to call after each product.

    The bar is full at ``expected`` products, and beyond them at the largest number that may be spent. Nothing is shown
    if the trainer's progress bar is off or of an unknown kind, and on ranks other than zero. A display that fails is
    closed with a warning, and the measurement continues without it.

    Args:
        trainer: the trainer.
        description: text before the bar.
        expected: expected number of products; ``None`` if it is unknown.

    Yields:
        The function that shows the progress.
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


def _tqdm_of(bar: object) -> Any:
    """Return the class of the bars of a TQDMProgressBar."""
    return sibling(bar, "callbacks.progress.tqdm_progress", "Tqdm")


class _Display:
    """A line beside the trainer's progress bar."""

    def show(self, progress: LanczosProgress) -> _Display:
        """Show the progress, and return the display itself."""
        raise NotImplementedError

    def close(self) -> None:
        """Remove the line."""
        raise NotImplementedError


def _display(trainer: Trainer, description: str, expected: int | None) -> _Display | None:
    bar: Any = trainer.progress_bar_callback
    if is_a(bar, "TQDMProgressBar") and bar.is_enabled:
        return _TqdmLine(bar, description, expected)
    if is_a(bar, "RichProgressBar") and bar.is_enabled:
        return _RichLine(bar, description, expected)
    return None


def _found(progress: LanczosProgress) -> str:
    """Return the number of converged eigenvalues, and the slope of the present estimates, as text."""
    found = f"{progress.num_converged}/{progress.k} eigenvalues"
    values = progress.ritz_values
    if values is None or len(values) < progress.k or not bool((values > 0).all()):
        return found
    return f"{found}, slope about {float((values / values[-1]).log().mean()):.2f}"


def _end(progress: LanczosProgress, expected: int | None) -> int:
    """Return the number of products at which the bar is full."""
    return expected if expected is not None and progress.num_matvecs <= expected else progress.max_matvecs


class _TqdmLine(_Display):
    def __init__(self, bar: Any, description: str, expected: int | None) -> None:
        self._expected = expected
        self._line = _tqdm_of(bar)(
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
    def __init__(self, bar: Any, description: str, expected: int | None) -> None:
        from rich.progress import Progress

        self._description = description
        self._expected = expected
        # Before the trainer's own bars are started, and after they are stopped, the line needs a display of its own.
        shared: Any = bar.progress
        self._own: Any = None if shared is not None and shared.live.is_started else Progress(transient=True)
        self._bars: Any = shared if self._own is None else self._own
        if self._own is not None:
            self._own.start()
        # Tasks are hidden, never removed, because Lightning before 2.6.1 uses a task's id as its index in the list.
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
