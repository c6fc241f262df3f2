"""Running a study: one folder and one process a run, finished runs not again, killed ones from their checkpoint."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import yaml

from hessian_callback.study.definition import PlannedRun, StudyError
from hessian_callback.study.one_run import SETTINGS, TAKEN, complete_config, finished, write_whole

__all__ = ["LOG", "Outcome", "run_all"]

LOG = "log.txt"

_DIGEST = "# digest: "
# Seconds that a run has to end by itself when the study is interrupted.
_GRACE = 30


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: the run.
        folder: its folder.
        status: ``"finished"``, ``"finished before"``, ``"taken"`` (another process is at it), ``"failed"`` or
            ``"interrupted"``.
        last_lines: the end of what a failed run printed.
    """

    run: PlannedRun
    folder: Path
    status: Literal["finished", "finished before", "taken", "failed", "interrupted"]
    last_lines: str = ""


def run_all(
    runs: Sequence[PlannedRun],
    folder: Path,
    *,
    processes: int = 1,
    report: Callable[[Outcome], None] = lambda outcome: None,
) -> list[Outcome]:
    """Run what is not finished.

    Several calls at once, on one machine or on several that share the folder, take different runs. A run that fails
    does not keep the others from being made.

    Args:
        runs: the runs.
        folder: where each gets a folder of its name.
        processes: how many run at once.
        report: called as runs end, by several threads but one at a time.

    Returns:
        How each ended, in the order of ``runs``.

    Raises:
        StudyError: before anything is run, if a folder holds a run of another configuration.
        KeyboardInterrupt: after the running ones have been ended.
    """
    for run in runs:
        _check(run, folder / run.name)
    stop = threading.Event()
    reporting = threading.Lock()

    def one(run: PlannedRun) -> Outcome:
        outcome = _run(run, folder / run.name, stop)
        with reporting:
            report(outcome)
        return outcome

    with ThreadPoolExecutor(max_workers=processes) as pool, _interrupts(stop):
        return list(pool.map(one, runs))


class _interrupts:
    """Let SIGINT and SIGTERM end the runs before they end this process, where signals can be caught."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, lambda *_: self._stop.set())

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._stop.is_set() and error[0] is None:
            raise KeyboardInterrupt


def _check(run: PlannedRun, folder: Path) -> None:
    settings = folder / SETTINGS
    if not settings.exists():
        return
    first = settings.read_text(encoding="utf-8").partition("\n")[0]
    if first != _DIGEST + run.digest:
        raise StudyError(
            f"{folder} holds a run of another configuration than the study now describes; choose another --output, or "
            "move that folder away to have it run again"
        )


def _run(run: PlannedRun, folder: Path, stop: threading.Event) -> Outcome:
    if finished(folder) is not None:
        return Outcome(run, folder, "finished before")
    if stop.is_set():
        return Outcome(run, folder, "interrupted")
    folder.mkdir(parents=True, exist_ok=True)
    config = complete_config(run.config, folder.absolute())
    write_whole(folder / SETTINGS, f"{_DIGEST}{run.digest}\n" + yaml.safe_dump(config, sort_keys=False))
    command = [sys.executable, "-m", "hessian_callback.study.one_run", str(folder.absolute())]
    with (folder / LOG).open("ab") as log:
        # Its own group: Ctrl-C reaches it through this process only, once.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and not stop.wait(0.2):
                pass
        finally:
            _end(process)
    if process.returncode == TAKEN:
        return Outcome(run, folder, "taken")
    if process.returncode == 0 and finished(folder) is not None:
        return Outcome(run, folder, "finished")
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    return Outcome(run, folder, "interrupted" if stop.is_set() else "failed", "\n".join(lines[-5:]))


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
