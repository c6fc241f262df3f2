"""Run a study: one folder and one process a run; finished runs are skipped, killed ones resume from checkpoints."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hessian_callback.studies.definition import PlannedRun, StudyError
from hessian_callback.studies.one_run import SETTINGS, TAKEN, complete_config, digest_in, finished, settings_text

__all__ = ["LOG", "Outcome", "check_folders", "run_all"]

LOG = "log.txt"

# Seconds that a run has to end by itself when the study is interrupted.
_GRACE = 30


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    Attributes:
        run: the run.
        folder: its folder.
        status: ``"finished"``, ``"finished before"``, ``"taken"`` (another process runs it), ``"failed"`` or
            ``"interrupted"``.
        last_lines: the last lines of the log of a failed run.
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
    """Run those runs that are not finished.

    Several calls at once, on one machine or on several that share the folder, take different runs. The others run even
    if one fails.

    Args:
        runs: the runs.
        folder: the folder of the study, in which each run has a folder of its name.
        processes: number of runs at a time.
        report: called as runs end, by several threads but one at a time.

    Returns:
        The outcomes, in the order of ``runs``.

    Raises:
        StudyError: before anything is run, if a folder holds a run of another configuration.
        KeyboardInterrupt: after SIGINT or SIGTERM, when the running ones have ended.
    """
    check_folders(runs, folder)
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
    """On SIGINT and SIGTERM, end the runs before this process; in the main thread only, which receives signals."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._before: dict[int, object] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: object) -> None:
        if not self._stop.is_set():
            print(f"ending the runs, which takes up to {_GRACE} s", file=sys.stderr, flush=True)
        self._stop.set()

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._stop.is_set() and error[0] is None:
            raise KeyboardInterrupt


def check_folders(runs: Sequence[PlannedRun], folder: Path) -> None:
    """Check that folders hold no runs of other configurations.

    Raises:
        StudyError: if one holds a run of another configuration.
    """
    for run in runs:
        place = folder / run.name
        if digest_in(place / SETTINGS) not in (None, run.digest):
            raise StudyError(
                f"{place} holds a run of another configuration than the study now describes, --set included; choose "
                "another --output, or move that folder away to have it run again"
            )


def _run(run: PlannedRun, folder: Path, stop: threading.Event) -> Outcome:
    if finished(folder) is not None and digest_in(folder / SETTINGS) == run.digest:
        return Outcome(run, folder, "finished before")
    if stop.is_set():
        return Outcome(run, folder, "interrupted")
    folder.mkdir(parents=True, exist_ok=True)
    wanted = folder / f"{SETTINGS}.{uuid.uuid4().hex}"
    wanted.write_text(settings_text(complete_config(run.config, folder.absolute()), run.digest), encoding="utf-8")
    command = [sys.executable, "-m", "hessian_callback.studies.one_run", str(folder.absolute()), str(wanted.absolute())]
    with (folder / LOG).open("ab") as log:
        # A session of its own, so that Ctrl-C reaches it through this process only.
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=_without_ranks(os.environ),
        )
        try:
            while process.poll() is None and not stop.wait(0.2):
                pass
        finally:
            _end(process)
            wanted.unlink(missing_ok=True)  # A process that ran has renamed it.
    if process.returncode == TAKEN:
        return Outcome(run, folder, "taken")
    if process.returncode == 0 and finished(folder) is not None:
        return Outcome(run, folder, "finished")
    lines = (folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    return Outcome(run, folder, "interrupted" if stop.is_set() else "failed", "\n".join(lines[-5:]))


def _without_ranks(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the rank of this process, since each run is a job of its own.

    Lightning would use that rank, and loggers write on rank 0 only.
    """
    ranks = ("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "JSM_NAMESPACE_RANK")
    return {name: value for name, value in environment.items() if name not in ranks and not name.startswith("SLURM_")}


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is not None:
        return
    process.terminate()
    try:
        process.wait(_GRACE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
