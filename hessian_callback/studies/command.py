"""The command ``hessian-callback study``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hessian_callback.measurement.atomic_files import write_atomically
from hessian_callback.measurement.history import HistoryError
from hessian_callback.measurement.stored_state import shortened
from hessian_callback.studies.correlations import correlation_report
from hessian_callback.studies.definition import PlannedRun, Study, StudyError, load_study
from hessian_callback.studies.one_run import finished
from hessian_callback.studies.results import csv_of, markdown_table, rows_of, setting_table
from hessian_callback.studies.runner import LOG, Outcome, check_folders, run_all
from hessian_callback.studies.safe_yaml import read_yaml

__all__ = ["main", "write_tables"]

_DESCRIPTION = """\
Run a grid of trainings, measure each, and write a table of the results beside published figures. Each run is a process
with a folder of its own. Finished runs are not run again, and killed ones resume from their checkpoints if the same
command is given again.
"""

_EPILOG = """\
examples:
  hessian-callback study example_configs/studies/mnist_width.yaml --list
  hessian-callback study example_configs/studies/mnist_width.yaml --processes 2
  hessian-callback study example_configs/studies/mnist_width.yaml --seeds 0 --set trainer.max_epochs=2 --output runs/try
  hessian-callback study example_configs/studies/mnist_width.yaml --tables     # of the finished runs, without running

several machines that share a folder, each taking runs that no other one runs:
  srun --ntasks 8 hessian-callback study STUDY.yaml --output SHARED/FOLDER
or a job for each run, by its name:
  hessian-callback study STUDY.yaml --list | parallel --sshloginfile HOSTS hessian-callback study STUDY.yaml --only {}

The folder has study.yaml, results and correlations (.md, .csv), and for each run NAME/settings.yaml (what was run),
log.txt, hessian_history.jsonl, TensorBoard's events, checkpoints/last.ckpt and, at the end, finished.json.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run ``hessian-callback study``.

    Args:
        args: the arguments behind ``study``; ``None`` for those of the process.

    Raises:
        SystemExit: with status 0 if all runs are complete, 1 if one failed, 2 and one sentence if the arguments or
            files are not usable, and 130 if the study was interrupted.
    """
    parser = argparse.ArgumentParser(
        prog="hessian-callback study",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("study", metavar="STUDY.yaml", type=Path, help="the study; example_configs/studies has some")
    parser.add_argument("--output", "-o", metavar="FOLDER", type=Path, help="default: runs/studies/NAME")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="runs at a time; default 1")
    parser.add_argument(
        "--only", action="append", default=[], metavar="NAME", help="runs of that name; * stands for any"
    )
    parser.add_argument("--seeds", metavar="N,N,...", help="other seeds than the study's")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a setting of all runs by its dotted key, unless a level sets it too",
    )
    parser.add_argument("--list", action="store_true", help="print the names of the runs, and run nothing")
    parser.add_argument("--tables", action="store_true", help="write the tables of the finished runs, and run nothing")
    chosen = parser.parse_args(args)
    try:
        sys.exit(_study(chosen))
    except (StudyError, HistoryError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: interrupted. The same command resumes the runs.\n")


def _study(chosen: argparse.Namespace) -> int:
    if chosen.processes < 1:
        raise StudyError(f"--processes must be at least 1, got {shortened(chosen.processes)}")
    study = load_study(chosen.study, dict(map(_setting, chosen.set)))
    seeds = _seeds(chosen.seeds)
    runs = study.runs(chosen.only, seeds)
    if chosen.list:
        print("\n".join(run.name for run in runs))
        return 0
    folder: Path = chosen.output or Path("runs", "studies", study.name)
    check_folders(runs, folder)
    failed = 0
    if not chosen.tables:
        folder.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / "study.yaml", chosen.study.read_text(encoding="utf-8"))
        outcomes = run_all(runs, folder, processes=chosen.processes, report=_Reporter(len(runs)))
        failed = sum(outcome.status == "failed" for outcome in outcomes)
    # Of all runs, since several jobs may each run a part of the study.
    every = study.runs(seeds=seeds)
    check_folders(every, folder)
    print(write_tables(study, folder, every))
    if failed:
        print(f"{failed} of {len(runs)} runs failed; the tables are of the others", file=sys.stderr)
    return 1 if failed else 0


class _Reporter:
    """Prints a line for each run that has ended."""

    def __init__(self, total: int) -> None:
        self._total, self._ended = total, 0

    def __call__(self, outcome: Outcome) -> None:
        self._ended += 1
        line = f"[{self._ended}/{self._total}] {outcome.run.name}: {outcome.status}"
        if outcome.status == "finished":
            ending = finished(outcome.folder) or {}
            line += f" in {ending.get('seconds', 0):.0f} s" + (" more" if ending.get("resumed") else "")
        if outcome.status == "failed":
            line += f"; {outcome.folder / LOG} ends with\n{outcome.last_lines}"
        print(line, flush=True)


def _setting(text: str) -> tuple[str, Any]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise StudyError(f"--set takes KEY=VALUE, as in trainer.max_epochs=2; got {shortened(text)}")
    try:
        return key, read_yaml(value)
    except ValueError as error:
        raise StudyError(f"--set {text:.200}: the value can't be read: {error}") from error


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not all(part.strip().isdecimal() and len(part) < 20 for part in text.split(",")):
        raise StudyError(f"--seeds takes whole numbers with commas between, as in 0,1,2; got {shortened(text)}")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def write_tables(study: Study, folder: Path, runs: Sequence[PlannedRun]) -> str:
    """Write ``results`` of the finished runs, and ``correlations`` where the study asks for them, as .md and .csv.

    Args:
        study: the study.
        folder: where its runs are.
        runs: the runs to read.

    Returns:
        Text for the user: the table, and the paths of the files.
    """
    rows = rows_of(study, folder, runs)
    num_finished = sum(finished(folder / run.name) is not None for run in runs)
    message = f"{num_finished} of {len(runs)} runs are finished"
    if missing := len({(row.run, row.step, row.part) for row in rows if row.num_hvps is None}):
        message += f"; {missing} of their measurements failed, and results.csv has the reasons"
    if not rows:
        return f"{message}; there is no table yet"
    write_atomically(folder / "results.csv", csv_of(row.as_dict() for row in rows))
    table = markdown_table(setting_table(study, rows))
    write_atomically(folder / "results.md", f"# {study.title}\n\n{message}.\n\n{table}\n")
    files = ["results.md", "results.csv"]
    if study.predict:
        text, lines = correlation_report(rows)
        write_atomically(folder / "correlations.md", f"# {study.title}: correlations with the test loss\n\n{text}")
        write_atomically(folder / "correlations.csv", csv_of(lines))
        files += ["correlations.md", "correlations.csv"]
    return f"\n{table}\n\n{message}. Tables: {', '.join(str(folder / name) for name in files)}"
