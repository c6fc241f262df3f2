"""Processes that are ended, with all their children, at a limit of their own."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Any


def run_limited(command: Sequence[str], limit: float, **options: Any) -> int | None:
    """Run a command; return its exit status, or ``None`` if it was ended after so many seconds.

    Args:
        command: the command.
        limit: seconds.
        options: further options of ``subprocess.Popen``.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    try:
        return process.wait(limit)
    except subprocess.TimeoutExpired:
        return None
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
