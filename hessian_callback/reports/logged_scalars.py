"""The numbers that TensorBoardLogger and CSVLogger wrote beside the measurements of a run."""

from __future__ import annotations

import csv
import math
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hessian_callback.measurement.measurement import Measurement
from hessian_callback.measurement.stored_state import MAX_INTEGER

__all__ = ["LoggedScalars", "LoggedValue", "losses_at", "read_scalars"]

_EVENTS = "*tfevents*"
_TABLE = "metrics.csv"
# Written by TensorBoardLogger at step 0 of every process, also of a resumed one.
_PLACEHOLDER = "hp_metric"


@dataclass(frozen=True)
class LoggedValue:
    """A number that a logger wrote.

    Attributes:
        step: the logger's step. At the end of an epoch Lightning logs one step less than the number of steps taken.
        value: the number.
        epoch: the epoch in which it was written; ``None`` if the logger did not write it.
    """

    step: int
    value: float
    epoch: int | None = None


@dataclass(frozen=True)
class LoggedScalars:
    """All numbers that loggers wrote to a folder.

    Attributes:
        values: by name, in order of time, with ascending steps.
        notes: remarks for the reader, such as how many cells could not be read.
    """

    values: Mapping[str, Sequence[LoggedValue]] = field(default_factory=dict, repr=False)
    notes: Sequence[str] = ()


def read_scalars(folder: Path) -> LoggedScalars:
    """Read the numbers that TensorBoardLogger and CSVLogger wrote to a folder.

    A name that both wrote is read from TensorBoard. If the run was interrupted and resumed in its folder, values that
    the resumed process wrote again are those that count. The order is that of files and positions, not of wall times,
    since clocks may be set back.

    Args:
        folder: the folder of the run.
    """
    table, events = _from_csv(folder / _TABLE), _from_events(folder)
    values = {name: _without_replaced(written) for name, written in {**table.values, **events.values}.items()}
    return LoggedScalars(values, [*table.notes, *events.notes])


def _without_replaced(values: Sequence[LoggedValue]) -> list[LoggedValue]:
    """Drop values that were written again later, since a resumed run continues at the step of its checkpoint."""
    kept: list[LoggedValue] = []
    for value in values:
        while kept and kept[-1].step >= value.step:
            kept.pop()
        kept.append(value)
    return kept


# -- TensorBoard -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _EventFile:
    name: str
    scalars: Mapping[str, Sequence[tuple[int, float]]]

    @property
    def first_step(self) -> int:
        """The smallest first step of a curve."""
        return min(values[0][0] for name, values in self.scalars.items() if name != _PLACEHOLDER)


def _from_events(folder: Path) -> LoggedScalars:
    notes = []
    files = []
    for path in sorted(path for path in folder.glob(_EVENTS) if path.is_file()):
        try:
            file = _read_event_file(path)
        except Exception as error:  # TensorBoard and protobuf document no exceptions for damaged files.
            notes.append(f"{path.name} can't be read ({type(error).__name__}), and was left out")
            continue
        if file.scalars.keys() - {_PLACEHOLDER}:
            files.append(file)
    if not files:
        return LoggedScalars(notes=notes)
    # A resumed process starts at a later step than the first one. Names begin with the time of creation, so files
    # that precede the one with the smallest step come from a machine whose clock is behind.
    first = min(range(len(files)), key=lambda index: files[index].first_step)
    notes += [
        f"{file.name} starts at a later step than {files[first].name}, which is named later: it was read as its "
        "continuation, by a machine whose clock is behind"
        for file in files[:first]
    ]
    files = [files[first], *files[:first], *files[first + 1 :]]
    written: dict[str, list[LoggedValue]] = {}
    for file in files:
        for name, values in file.scalars.items():
            written.setdefault(name, []).extend(LoggedValue(step, value) for step, value in values)
    epochs = {entry.step: entry.value for entry in _without_replaced(written.pop("epoch", []))}
    return LoggedScalars(
        {
            name: [LoggedValue(v.step, v.value, _whole(epochs.get(v.step))) for v in values]
            for name, values in written.items()
        },
        notes,
    )


def _read_event_file(path: Path) -> _EventFile:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # 0 keeps all scalars; 1 keeps one of every other kind, which is not used.
    guidance = {"scalars": 0, "images": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1, "tensors": 1}
    events = EventAccumulator(str(path), size_guidance=guidance, purge_orphaned_data=False)
    events.Reload()
    scalars = {name: [(e.step, float(e.value)) for e in events.Scalars(name)] for name in events.Tags()["scalars"]}
    return _EventFile(path.name, {name: values for name, values in scalars.items() if values})


def _whole(value: float | None) -> int | None:
    """An epoch as an integer; ``None`` if it is unknown or none."""
    return int(value) if value is not None and math.isfinite(value) and 0 <= value <= MAX_INTEGER else None


# -- CSV -------------------------------------------------------------------------------------------


def _from_csv(path: Path) -> LoggedScalars:
    if not path.is_file():
        return LoggedScalars()
    try:
        text = _decoded(path.read_bytes())
    except OSError as error:
        return LoggedScalars(notes=[f"{path.name} can't be read ({error.strerror})"])
    # Each line is parsed by itself, so that a damaged quotation mark does not swallow the lines behind it.
    header, *lines = re.split(r"\r\n|\n|\r", text)
    names = _cells(header)
    if names is None:
        return LoggedScalars(notes=[f"the header of {path.name} is damaged, and the file was left out"])
    scalars: dict[str, list[LoggedValue]] = {}
    bad_rows = bad_cells = 0
    # The last line has no end: it is empty, or was cut off and may hold half a number.
    for number, line in enumerate(lines):
        if not line:
            continue
        cells = _cells(line)
        row = dict(zip(names, cells, strict=True)) if cells is not None and len(cells) == len(names) else {}
        step = _step(row.get("step", ""))
        if number == len(lines) - 1 or (step is None and row.get("step", "damaged")):
            bad_rows += 1
            continue
        if step is None:
            continue
        epoch = _whole(_number(row.pop("epoch", "")))
        for name, cell in row.items():
            if name in ("step", "") or not cell:
                continue
            value = _number(cell)
            if value is None:
                bad_cells += 1
            else:
                scalars.setdefault(name, []).append(LoggedValue(step, value, epoch))
    if "step" not in names:
        return LoggedScalars()
    counts = ((bad_rows, "row(s)", "are damaged"), (bad_cells, "cell(s)", "hold no number"))
    notes = [f"{num} {what} of {path.name} {fault}, and were left out" for num, what, fault in counts if num]
    return LoggedScalars(scalars, notes)


def _decoded(data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", errors="replace")
    return data.decode("utf-8-sig", errors="replace")


def _cells(line: str) -> list[str] | None:
    """The cells of a line; ``None`` if it is damaged."""
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:  # A NUL, an open quotation mark, or a cell longer than the reader's limit.
        return None


def _number(cell: str) -> float | None:
    # Python's literals also have underscores and the digits of other scripts, which no logger writes.
    if not cell.isascii() or "_" in cell:
        return None
    try:
        return float(cell)
    except ValueError:
        return None


def _step(cell: str) -> int | None:
    if not (cell.isascii() and cell.isdecimal() and len(cell) < len(str(MAX_INTEGER))):
        return None
    return int(cell)


# -- beside the measurements -------------------------------------------------------------------------


def losses_at(history: Sequence[Measurement], values: Sequence[LoggedValue]) -> list[float | None]:
    """Find the logged value that belongs to each measurement.

    That is the last one that was logged at its step or before: for a measurement at an epoch's end in the same epoch,
    otherwise since the previous measurement. It is ``None`` if there is none.

    Args:
        history: the measurements in order of time.
        values: the values that a logger wrote under one name, with ascending steps.

    Example:
        >>> at_end = dict(spectrum=None, fit=None, reason="failed", seconds=0.1, when="epoch")
        >>> history = [Measurement(epoch=0, step=75, **at_end), Measurement(epoch=2, step=225, **at_end)]
        >>> losses_at(history, [LoggedValue(74, 0.9, 0), LoggedValue(149, 0.8, 1), LoggedValue(224, 0.7, 2)])
        [0.9, 0.7]
    """
    steps = [value.step for value in values]
    has_epochs = any(value.epoch is not None for value in values)
    found: list[float | None] = []
    before = -1
    for measurement in history:
        latest = (values[index] for index in range(bisect_right(steps, measurement.step) - 1, -1, -1))
        if measurement.when == "epoch" and has_epochs:
            found.append(_first_in_epoch(latest, measurement.epoch))
        else:
            found.append(_first_after(latest, before, measurement.epoch))
        before = measurement.step
    return found


def _first_in_epoch(latest_first: Iterable[LoggedValue], epoch: int) -> float | None:
    for value in latest_first:
        if value.epoch == epoch:
            return value.value
        if value.epoch is not None and value.epoch < epoch:  # Epochs ascend.
            return None
    return None


def _first_after(latest_first: Iterable[LoggedValue], step: int, epoch: int) -> float | None:
    for value in latest_first:
        if value.step <= step:
            return None
        if value.epoch is None or value.epoch <= epoch:
            return value.value
    return None
