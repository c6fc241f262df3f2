"""Modules run as processes of their own, which start ranks: none outlives its time, whatever goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

TIMEOUT = 280


def launch(module: str, *arguments: Any) -> subprocess.Popen[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE")}
    return subprocess.Popen(
        [sys.executable, "-m", module, *map(str, arguments)],
        cwd=Path(__file__).parents[2],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # So that the ranks it starts can be ended with it.
    )


def finish(process: subprocess.Popen[str], timeout: float = TIMEOUT) -> str:
    try:
        output, _ = process.communicate(timeout=timeout)
        return output
    finally:
        kill_group(process)


def kill_group(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session of its own, and all it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
