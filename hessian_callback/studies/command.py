"""The command ``hessian-callback study``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from hessian_callback.measurement.history import HistoryError
from hessian_callback.studies.correlations import correlation_report
from hessian_callback.studies.definition import PlannedRun, Study, StudyError, load_study
from hessian_callback.studies.one_run import finished, write_whole
from hessian_callback.studies.results import csv_of, markdown_table, rows_of, setting_table
from hessian_callback.studies.runner import LOG, Outcome, check_folders, run_all

__all__ = ["main", "write_tables"]

_DESCRIPTION = """\
Run a grid of trainings that are measured, and write a table of what was found beside the figures that were printed.
Each run is a process with a folder of its own. What is finished is not run again, and what was killed goes on from its
checkpoint: give the same command once more.
"""

_EPILOG = """\
examples:
  hessian-callback study example_configs/studies/mnist_width.yaml --list
  hessian-callback study example_configs/studies/mnist_width.yaml --processes 2
  hessian-callback study example_configs/studies/mnist_width.yaml --seeds 0 --set trainer.max_epochs=2 --output runs/try
  hessian-callback study example_configs/studies/mnist_width.yaml --tables     # of what is there, without running

several machines that share a folder, each taking what no other is at:
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
    parser.add_argument("--tables", action="store_true", help="write the tables of what is finished, and run nothing")
    chosen = parser.parse_args(args)
    try:
        sys.exit(_study(chosen))
    except (StudyError, HistoryError, OSError) as error:
        sys.exit(f"hessian-callback study: {error}")
    except KeyboardInterrupt:
        sys.exit("hessian-callback study: interrupted. The same command goes on where this one ended.")


def _study(chosen: argparse.Namespace) -> int:
    if chosen.processes < 1:
        raise StudyError(f"--processes must be at least 1, got {chosen.processes}")
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
        write_whole(folder / "study.yaml", chosen.study.read_text(encoding="utf-8"))
        outcomes = run_all(runs, folder, processes=chosen.processes, report=_Reporter(len(runs)))
        failed = sum(outcome.status == "failed" for outcome in outcomes)
    # Of all that is there: one of several jobs that each make a run would leave its own alone.
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
        raise StudyError(f"--set takes KEY=VALUE, as in trainer.max_epochs=2; got {text!r}")
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise StudyError(f"--set {text}: the value is no YAML: {' '.join(str(error).split())}") from error


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise StudyError(f"--seeds takes whole numbers with commas between, as in 0,1,2; got {text!r}")
    return list(dict.fromkeys(int(part) for part in text.split(",")))


def write_tables(study: Study, folder: Path, runs: Sequence[PlannedRun]) -> str:
    """Write ``results`` of the finished runs, and ``correlations`` where the study asks for them, as .md and .csv.

    Args:
        study: the study.
        folder: where its runs are.
        runs: the runs to read.

    Returns:
        What to tell the user: the table, and where the files are.
    """
    rows = rows_of(study, folder, runs)
    num_finished = sum(finished(folder / run.name) is not None for run in runs)
    told = f"{num_finished} of {len(runs)} runs are finished"
    if missing := len({(row.run, row.step, row.part) for row in rows if row.num_hvps is None}):
        told += f"; {missing} of their measurements failed, and results.csv has the reasons"
    if not rows:
        return f"{told}; there is no table yet"
    write_whole(folder / "results.csv", csv_of(row.as_dict() for row in rows))
    table = markdown_table(setting_table(study, rows))
    write_whole(folder / "results.md", f"# {study.title}\n\n{told}.\n\n{table}\n")
    files = ["results.md", "results.csv"]
    if study.predict:
        text, lines = correlation_report(rows)
        write_whole(folder / "correlations.md", f"# {study.title}: correlations with the test loss\n\n{text}")
        write_whole(folder / "correlations.csv", csv_of(lines))
        files += ["correlations.md", "correlations.csv"]
    return f"\n{table}\n\n{told}. Tables: {', '.join(str(folder / name) for name in files)}"
