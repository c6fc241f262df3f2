"""Forks of a clean process that has imported what they need.

An import of Lightning takes a process ten seconds, a fork 0.1. A fork has a state of its own. Unlike a fork of pytest's
process, it inherits no threads and nothing that a test left behind.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


@cache
def context() -> Any:
    """Start the clean process, if it does not run, and return the context whose processes are its forks."""
    forks = multiprocessing.get_context("forkserver")
    forks.set_forkserver_preload(["tests.helpers.preloaded"])
    before = Path.cwd()
    os.chdir(ROOT)  # Where it finds the helpers.
    try:
        forkserver.ensure_running()
    finally:
        os.chdir(before)
    return forks


class ForkedModule:
    """A module that runs as by ``python -m MODULE ARGUMENTS``, with the interface of ``subprocess.Popen``.

    It leads a session of its own. Its output and its errors are appended to files.
    """

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdout: Path,
        stderr: Path | None = None,
    ) -> None:
        streams = [str(stdout), str(stderr or stdout)]
        self._process = context().Process(target=_run_module, args=(module, [*arguments], str(cwd), dict(env), streams))
        self._process.start()
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired([str(self.pid)], timeout or 0.0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def kill_group(self) -> None:
        """End it and all it started."""
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def run_module(
    module: str, *arguments: str, cwd: Path = ROOT, env: Mapping[str, str] | None = None, timeout: float = 280
) -> subprocess.CompletedProcess[str]:
    """Run a module in a fork to its end, like ``subprocess.run``."""
    with tempfile.TemporaryDirectory() as folder:
        streams = {name: Path(folder) / name for name in ("stdout", "stderr")}
        process = ForkedModule(module, arguments, cwd=cwd, env=os.environ if env is None else env, **streams)
        try:
            status = process.wait(timeout)
        finally:
            process.kill_group()
        return subprocess.CompletedProcess(arguments, status, *(path.read_text() for path in streams.values()))


def run_code(code: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a program in a fork to its end, like ``python -c``, with Lightning imported already."""
    return run_module("tests.helpers.code", code, **options)


def _run_module(module: str, arguments: list[str], cwd: str, environment: dict[str, str], streams: list[str]) -> None:
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    sys.path.insert(0, cwd)
    for number, path in zip((0, 1, 2), (os.devnull, *streams), strict=True):
        file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(file, number)
        os.close(file)
    sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", buffering=1, closefd=False)  # noqa: SIM115
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    finally:
        # Processes of multiprocessing end without these.
        atexit._run_exitfuncs()
