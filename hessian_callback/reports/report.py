"""The report of one run or of several: one HTML file that needs nothing else, and a CSV beside it."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hessian_callback._version import __version__
from hessian_callback.measurement.atomic_files import write_atomically
from hessian_callback.measurement.history import HistoryError
from hessian_callback.reports.edge import EdgeRun, find_edge_runs
from hessian_callback.reports.run_files import Run, find_runs
from hessian_callback.reports.run_tables import Correlation, RunTable, across_runs, correlations, csv_text, tabulate

__all__ = ["ReportFiles", "main", "write_report"]

# Limits that keep a page readable: sections of single runs, each with four figures; rows of a table; characters of a
# text that a file contains; notes about a run.
_MOST_SECTIONS = 12
_MOST_ROWS = 500
_MOST_CHARACTERS = 600
_MOST_NOTES = 20


@dataclass(frozen=True)
class ReportFiles:
    """The files that `write_report` wrote.

    Attributes:
        html: the report.
        csv: all measurements, one a row.
        num_runs: runs in it.
        num_measurements: measurements of the power law in it.
        left_out: why runs that were found are not in it.
    """

    html: Path
    csv: Path
    num_runs: int
    num_measurements: int
    left_out: Sequence[str] = ()


def write_report(
    folders: Iterable[str | Path],
    output: str | Path | None = None,
    *,
    val_loss: str | None = None,
    train_loss: str | None = None,
) -> ReportFiles:
    """Write the report of one run or of several.

    The HTML file contains its figures and styles, has no external references and runs no script. A run that can't be
    read is left out, and the page says so. Existing files are replaced as a whole; a symbolic link at the output is
    replaced and not followed.

    Args:
        folders: run folders, such as ``lightning_logs/version_0``, or folders of run folders; see
            `run_files.find_runs`.
        output: the HTML file; default: ``hessian_report.html`` in the run's folder, or in the current one for several
            folders. The CSV has its name, with another ending.
        val_loss: the name of the validation loss in the logger; default: the usual ones, or the loss on the held-out
            samples if none was logged.
        train_loss: the name of the training loss likewise.

    Raises:
        HistoryError: if a folder does not exist, or no run in the folders can be read.
        ModuleNotFoundError: if jinja2 or matplotlib is missing.
        OSError: if a file can't be written.
    """
    for module in ("jinja2", "matplotlib"):
        if find_spec(module) is None:
            raise ModuleNotFoundError(
                f"a report needs {module}, which is not installed: pip install 'hessian-callback[report]'"
            )
    given = list(map(Path, folders))
    left_out: list[str] = []
    runs, edges = _find(given, left_out)
    tables = [tabulate(run, val_loss=val_loss, train_loss=train_loss) for run in runs]
    if output is None:
        places = {run.folder for run in runs} or {run.folder for run in edges}
        output = (places.pop() if len(places) == 1 else given[0] if len(given) == 1 else Path()) / "hessian_report.html"
    html = Path(output)
    if html.suffix.lower() not in (".html", ".htm"):
        raise HistoryError(f"the output {html} must end in .html; the CSV gets the same name with .csv")
    csv = html.with_suffix(".csv")
    write_atomically(csv, csv_text(tables))
    write_atomically(html, _render(tables, csv.name, left_out, edges))
    num_runs = len(runs) or len({run.folder for run in edges})
    return ReportFiles(html, csv, num_runs, sum(len(run.history) for run in runs), left_out)


def _find(folders: Sequence[Path], left_out: list[str]) -> tuple[list[Run], list[EdgeRun]]:
    """Find the runs with measurements of the power law, and those in which the edge of stability was monitored."""
    try:
        runs = find_runs(folders, on_unreadable=lambda error: left_out.append(str(error)))
        return runs, find_edge_runs(folders, runs)
    except HistoryError:
        edges = find_edge_runs(folders)
        others = [folder for folder in folders if not any(run.folder.is_relative_to(folder) for run in edges)]
        if not edges:
            raise
    runs = find_runs(others, on_unreadable=lambda error: left_out.append(str(error))) if others else []
    return runs, edges


def _render(tables: Sequence[RunTable], csv_name: str, left_out: Sequence[str], edges: Sequence[EdgeRun] = ()) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"number": _number, "correlation": _correlation, "cut": _cut}
    template = environment.from_string(
        files("hessian_callback.reports").joinpath("report_template.html").read_text(encoding="utf-8")
    )

    def figure(svg: str | None) -> Markup | None:
        return None if svg is None else Markup(svg)

    return template.render(
        version=__version__,
        csv_name=csv_name,
        rows=[_row(table) for table in tables],
        several=len(tables) > 1,
        edges=[_as_markup(_edge_section(run), figure) for run in edges[:_MOST_SECTIONS]],
        num_edges_left_out=max(0, len(edges) - _MOST_SECTIONS),
        groups=[_as_markup(group, figure) for group in _groups(tables)] if len(tables) > 1 else [],
        left_out=_limited([f"left out: {reason}" for reason in left_out]),
        warnings=_not_compared(tables),
        sections=[_as_markup(_section(table), figure) for table in tables[:_MOST_SECTIONS]],
        num_left_out=max(0, len(tables) - _MOST_SECTIONS),
    )


def _limited(notes: Sequence[str]) -> list[str]:
    """The first notes, and how many more there are."""
    more = len(notes) - _MOST_NOTES
    return [*notes[:_MOST_NOTES], *([f"{more} more remarks of this kind are not shown"] if more > 0 else [])]


def _as_markup(context: Mapping[str, Any], figure: Any) -> dict[str, Any]:
    """Mark the drawings as markup; everything else is escaped."""
    return {**context, "figures": {name: figure(svg) for name, svg in context["figures"].items()}}


# -- the values of the template -----------------------------------------------------------------------------


def _row(table: RunTable) -> dict[str, Any]:
    """A run in one line."""
    history, last = table.run.history, table.last
    return {
        "name": table.run.name,
        "prefix": table.run.prefix,
        "last": None if last is None else history[last],
        "num_fitted": table.num_fitted,
        "mode": table.mode,
        "num_measurements": len(history),
        "num_logged": sum(table.comparable),
        "validation": None if last is None else table.validation[last],
        "validation_label": table.validation_label,
        "training": None if last is None else table.training[last],
        "seconds": sum(m.seconds for m in history),
        "num_hvps": sum(m.num_hvps or 0 for m in history),
        "why": next((m.reason for m in reversed(history) if m.reason), "no measurement was logged"),
    }


def _section(table: RunTable) -> dict[str, Any]:
    """Everything about a run."""
    from hessian_callback.reports import figures

    measured = [
        {"m": m, "validation": validation, "training": training, "comparable": comparable}
        for m, validation, training, comparable in zip(
            table.run.history, table.validation, table.training, table.comparable, strict=True
        )
    ]
    return {
        "row": _row(table),
        "folder": str(table.run.folder),
        "source": table.run.source.name,
        "notes": _limited([*table.run.notes, *_notes(table)]),
        "measured": measured[-_MOST_ROWS:],
        "num_not_shown": max(0, len(measured) - _MOST_ROWS),
        "validation_name": table.validation_name,
        "training_name": table.training_name,
        "correlations": correlations(table),
        "figures": {
            "spectra": figures.spectra(table),
            "timeline": figures.timeline(table),
            "scatter": figures.losses_against(table),
            "cost": figures.cost(table),
        },
    }


def _edge_section(run: EdgeRun) -> dict[str, Any]:
    """Everything about a run in which the edge of stability was monitored."""
    from hessian_callback.reports import figures

    last = run.ratios[-1]
    return {
        "run": run,
        "last": last,
        "error": run.errors.get(last.step),
        "max_lr": run.max_lrs.get(last.step),
        "highest": max(run.ratios, key=lambda ratio: ratio.value),
        "figures": {"stability": figures.stability(run)},
    }


def _notes(table: RunTable) -> list[str]:
    notes = []
    if table.validation_name is None:
        notes.append(
            "No validation loss was found among the logged curves, so the mean loss over the held-out samples "
            "is used. Choose another curve with --val_loss"
        )
    others = sum(m.logged and m.num_fitted != table.num_fitted for m in table.run.history)
    if others:
        notes.append(
            f"{others} measurement(s) have another K than {table.num_fitted}. Slopes are comparable at equal K only. "
            "These are in the last table but not in the figures of the slope"
        )
    failed = sum(not m.logged for m in table.run.history)
    if failed:
        notes.append(f"{failed} measurement(s) have no slope; the last table has the reasons")
    if len({m.num_samples for m in table.run.history if m.num_samples is not None}) > 1:
        notes.append("The number of held-out samples changed during the run, which changes the spectrum")
    return notes


def _by_kind(tables: Sequence[RunTable]) -> dict[tuple[str, int, str], list[RunTable]]:
    kinds: dict[tuple[str, int, str], list[RunTable]] = {}
    for table in tables:
        if table.last is not None and table.num_fitted is not None:
            kinds.setdefault((table.run.prefix, table.num_fitted, table.mode), []).append(table)
    return kinds


def _not_compared(tables: Sequence[RunTable]) -> list[str]:
    """Say which runs of a report must not be compared, and why."""
    warnings = []
    kinds = _by_kind(tables)
    if len(tables) > 1 and len(kinds) > 1:
        words = [
            f"{', '.join(table.run.name for table in members)} ({prefix}, K = {number}"
            + (", paper protocol)" if mode == "paper" else ")")
            for (prefix, number, mode), members in kinds.items()
        ]
        warnings.append(
            "These runs cannot be compared with each other, because the slope of a spectrum depends on the number K of "
            "fitted eigenvalues, and different prefixes are different Hessians: "
            f"{'; '.join(words)}. To compare them, measure all with the same num_eigenvalues. The figures below are "
            "separate for each kind"
        )
    for (_, number, _), members in kinds.items():
        samples = sorted({m.num_samples for t in members for m in t.run.history if m.num_samples is not None})
        if len(members) > 1 and len(samples) > 1:
            warnings.append(
                f"The runs with K = {number} used different numbers of held-out samples ({_list(samples)}), "
                "and a small sample makes the slope steeper"
            )
        if len(members) > 1 and len({table.validation_label for table in members}) > 1:
            names = _list(sorted({table.validation_label for table in members}))
            warnings.append(f"The runs with K = {number} have different validation losses ({names}): choose --val_loss")
    return warnings


def _list(values: Iterable[object]) -> str:
    return ", ".join(map(str, values))


def _groups(tables: Sequence[RunTable]) -> list[dict[str, Any]]:
    """What may be compared: runs of one prefix, K and mode."""
    from hessian_callback.reports import figures

    groups = []
    for (prefix, number, mode), members in _by_kind(tables).items():
        if len(members) < 2:
            continue
        step, indices, found = across_runs(members)
        groups.append(
            {
                "prefix": prefix,
                "num_fitted": number,
                "mode": mode,
                "num_runs": len(members),
                "step": step,
                "matched": [
                    {"name": t.run.name, "m": t.run.history[index], "validation": t.validation[index]}
                    for t, index in zip(members, indices, strict=True)
                ],
                "validation_label": members[0].validation_label,
                "correlations": found,
                "figures": {name: figures.overlay(members, name) for name in _OVERLAYS},
            }
        )
    return groups


_OVERLAYS = ("slope", "fit_error", "validation")


def _number(value: float | None, digits: int = 3) -> str:
    """Format a number for a table; an unknown one is a dash."""
    if value is None:
        return "–"
    if value != 0 and not 1e-3 <= abs(value) < 1e5:
        return f"{value:.{digits}g}"
    return f"{value:.{digits}f}"


def _cut(text: str) -> str:
    """Limit the length of a text that a file contains."""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_MOST_CHARACTERS]}… ({len(text)} characters)"


def _correlation(found: Correlation, which: str) -> str:
    value, interval = getattr(found, which), getattr(found, f"{which}_interval")
    if value is None:
        return "–"
    shown = f"{value:+.2f}"
    return shown if interval is None else f"{shown} [{interval[0]:+.2f}, {interval[1]:+.2f}]"


# -- the command -----------------------------------------------------------------------------------------

_DESCRIPTION = """\
Write one HTML file about the measurements of PowerLawHessianCallback: the spectra over time, slope and fit error
against the losses, rank correlations beside those of log(step), and the cost; and a CSV with every measurement.
The file opens from disk, needs no network and runs no script. A run that can't be read is left out and named.
"""

_EPILOG = """\
examples:
  hessian-callback report runs/digits_cnn/version_0
  hessian-callback report runs/digits_cnn                   # every version, side by side
  hessian-callback report runs/a runs/b --output compared.html --val_loss valid/nll

A run folder is one that a TensorBoardLogger or CSVLogger wrote while the callback measured: hessian_history.jsonl
in it has the spectra. Without that file the newest checkpoint is read.
"""


def main(args: Sequence[str] | None = None) -> None:
    """Run ``hessian-callback report``.

    Args:
        args: the arguments behind ``report``; ``None`` for those of the process.

    Raises:
        SystemExit: with status 2 and one sentence, if the arguments or files are not usable.
    """
    parser = argparse.ArgumentParser(
        prog="hessian-callback report",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folders", nargs="+", metavar="RUN_DIR", help="a run's folder, or one with runs below it")
    parser.add_argument(
        "--output", "-o", metavar="FILE.html", help="default: hessian_report.html in the folder of the run or runs"
    )
    parser.add_argument("--val_loss", metavar="NAME", help="the validation loss's name in the logger")
    parser.add_argument("--train_loss", metavar="NAME", help="the training loss's name in the logger")
    chosen = parser.parse_args(args)
    try:
        written = write_report(chosen.folders, chosen.output, val_loss=chosen.val_loss, train_loss=chosen.train_loss)
    except (HistoryError, ModuleNotFoundError, OSError) as error:
        parser.exit(2, f"{parser.prog}: {error}\n")
    lines = [f"left out: {reason}" for reason in _limited(written.left_out)]
    lines += [f"{written.num_runs} run(s), {written.num_measurements} measurements"]
    lines += [f"report: {written.html}", f"table:  {written.csv}"]
    # Paths may hold bytes that are no text, which a stream in UTF-8 refuses.
    print("\n".join(lines).encode(errors="backslashreplace").decode())
