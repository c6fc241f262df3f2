"""A position in a growing history, for results that are updated measurement by measurement."""

from __future__ import annotations

from collections.abc import Sequence

from hessian_callback.measurement.measurement import Measurement

__all__ = ["HistoryCursor"]


class HistoryCursor:
    """Return the measurements that were added to a history since the last call.

    A history is taken for the same one if it is at least as long as before and has the same object at the last
    processed position. So entries may be appended; after a removal, an insertion or a replacement of the whole list,
    for example by a checkpoint, everything is processed again. The cost does not depend on the history's length.

    Example:
        >>> cursor = HistoryCursor()
        >>> history = [Measurement(epoch=n, step=n, when="epoch", spectrum=None, fit=None, reason="no fit", seconds=0.1)
        ...            for n in range(3)]
        >>> [len(cursor.advance(history[:num])[1]) for num in (2, 3, 3)]
        [2, 1, 0]
        >>> cursor.advance(history[1:]) == (True, history[1:])
        True
    """

    def __init__(self) -> None:
        self._position = 0
        self._last: Measurement | None = None

    def advance(self, history: Sequence[Measurement]) -> tuple[bool, Sequence[Measurement]]:
        """Move to the end of a history.

        Args:
            history: the measurements in order of time.

        Returns:
            Whether the history is another one than at the last call, so that earlier results must be discarded, and the
            measurements that were not processed yet.
        """
        position = self._position
        restarted = position > len(history) or (position > 0 and history[position - 1] is not self._last)
        new = history if restarted else history[position:]
        self._position = len(history)
        self._last = history[-1] if history else None
        return restarted, new

    def reset(self) -> None:
        """Go back to the start, so that the next call returns the whole history."""
        self._position, self._last = 0, None
