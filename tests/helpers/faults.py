"""Faults that tests inject into a run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from itertools import count

from hessian_callback.algorithms.lanczos import LanczosProgress


class Killed(BaseException):
    """Ends a run as a signal does: no handler catches it."""


def dying(after: int) -> Callable[[LanczosProgress], None]:
    """Return a progress function that ends the run after ``after`` products of this process."""
    left = count(after - 1, -1)

    def progress(_: LanczosProgress) -> None:
        if next(left) == 0:
            raise Killed

    return progress


def full_disk(left: Iterator[int], _: int) -> None:
    """Fail like ``os.fsync`` on a full disk, once the counter has reached 0."""
    if next(left) <= 0:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
