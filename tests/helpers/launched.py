"""Modules run as processes of their own: none outlives its time, whatever goes wrong."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.helpers.forks import ROOT, ForkedModule

TIMEOUT = 280


class Launched:
    """A module that runs, on each rank if there are several.

    Attributes:
        processes: a process for each rank.
    """

    def __init__(self, module: str, arguments: Sequence[str], ranks: Sequence[dict[str, str]]) -> None:
        ours = ("LOCAL_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE")
        environment = {name: value for name, value in os.environ.items() if name not in ours}
        descriptor, name = tempfile.mkstemp(prefix="output-")
        os.close(descriptor)
        self._output = Path(name)
        self.processes = [
            ForkedModule(
                module, arguments, cwd=ROOT, env={**environment, "OMP_NUM_THREADS": "1", **rank}, stdout=self._output
            )
            for rank in ranks
        ]

    @property
    def returncode(self) -> int | None:
        """The exit status: of the first rank, if there are several."""
        return self.processes[0].returncode

    def finish(self, timeout: float = TIMEOUT) -> str:
        """Wait for the end; return what was printed."""
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.wait(max(0.0, deadline - time.monotonic()))
        finally:
            for process in self.processes:
                process.kill_group()
            output = self._output.read_text(errors="replace")
            self._output.unlink()
        return output


def launch(module: str, *arguments: Any) -> Launched:
    """Run a module in one process, which may start ranks."""
    return Launched(module, [*map(str, arguments)], [{}])


def launch_ranks(world_size: int, module: str, *arguments: Any) -> Launched:
    """Run a module on ranks, as a scheduler starts them: Lightning finds that it need not start any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": str(world_size)}
    return Launched(module, [*map(str, arguments)], [{**common, "LOCAL_RANK": str(rank)} for rank in range(world_size)])


def kill_group(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session of its own, and all it started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
