"""The history of a run as a file beside its other logs, so that a report needs neither the process nor a checkpoint.

The file ``hessian_history.jsonl`` has one line of JSON for each measurement, appended as soon as it is made. A process
begins with a line that says so and then repeats the measurements of the checkpoint that it resumes from. Measurements
that an interrupted run made after that checkpoint stay in the file and no longer count. Every line has the id of the
run that wrote it, so that two runs in one folder can be distinguished.
"""

from __future__ import annotations

import json
import math
import os
import uuid
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hessian_callback.measurement.measurement import Measurement
from hessian_callback.measurement.stored_state import shortened

__all__ = [
    "FILE_NAME",
    "STATE_VERSION",
    "HistoryError",
    "HistoryWriter",
    "StoredHistories",
    "history_from_state",
    "read_histories",
]

FILE_NAME = "hessian_history.jsonl"

_VERSION = 1

# The version of the history in a callback's checkpoint state.
STATE_VERSION = 1

# Dtypes that a tensor of a measurement may have.
_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.bool, torch.int32, torch.int64, torch.float16, torch.bfloat16, torch.float32, torch.float64)
}

# Line numbers that a note lists before it only counts.
_MOST_LISTED = 5


class HistoryError(ValueError):
    """A stored history that can't be read; the message names the remedy."""


def history_from_state(state: Mapping[str, Any]) -> list[Measurement]:
    """Restore the history in a callback's checkpoint state.

    Args:
        state: the return value of the callback's ``state_dict``.

    Returns:
        The measurements in order of time.

    Raises:
        ValueError: if the state is of another version, or a name, type, shape or range in it is not that of a history.
    """
    remedy = "resume with another prefix, which starts a new history"
    version = state.get("version") if isinstance(state, Mapping) else None
    if type(version) is not int or version != STATE_VERSION:
        raise ValueError(
            f"the checkpoint holds a history of version {shortened(version)}, this release reads {STATE_VERSION}; "
            f"resume with the release that wrote it, or {remedy.removeprefix('resume ')}"
        )
    entries = state.get("history")
    if not isinstance(entries, Sequence) or isinstance(entries, (str, bytes)):
        raise ValueError(
            f"the checkpoint holds a history that cannot be read (history must be a list, got {shortened(entries)}); "
            f"{remedy}"
        )
    number = 0
    try:
        history = []
        for number, entry in enumerate(entries):  # noqa: B007 - the message names it.
            history.append(Measurement.from_state(entry))
        return history
    except ValueError as error:
        raise ValueError(
            f"the checkpoint holds a history that cannot be read (measurement {number}: {error}); {remedy}"
        ) from error


@dataclass
class HistoryWriter:
    """Appends the measurements of one callback to the history files of a run's folders.

    Args:
        prefix: the callback's prefix; callbacks with different ones share a file.
        run: id of the run, written into every line; random by default.

    Example:
        >>> import tempfile
        >>> failed = Measurement(epoch=0, step=12, when="epoch", spectrum=None, fit=None,
        ...                      reason="the loss is NaN", seconds=0.1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     HistoryWriter("hessian").write([folder], [failed])
        ...     read_histories(Path(folder) / FILE_NAME).histories["hessian"] == [failed]
        True
    """

    prefix: str
    run: str = field(default_factory=lambda: uuid.uuid4().hex[:12])
    # By folder: the last measurement in its file, and the file's identity and size after it was written.
    _last: dict[str, tuple[Measurement, tuple[int, int, int]]] = field(default_factory=dict, repr=False)

    def write(self, folders: Iterable[str | os.PathLike[str]], history: Sequence[Measurement]) -> None:
        """Append the last measurement, or the whole history if a file does not hold the earlier ones.

        Args:
            folders: the folders, which are made if they don't exist; each gets a file.
            history: the callback's history, whose last entry is new.

        Raises:
            OSError: if a file can't be written.
        """
        for folder in dict.fromkeys(os.fspath(folder) for folder in folders):
            path = Path(folder) / FILE_NAME
            continued = len(history) > 1 and self._continues(folder, path, history[-2])
            lines: list[dict[str, Any]] = [] if continued else [{"begins": True}]
            lines += [{"measurement": _encoded(m.to_state())} for m in (history[-1:] if continued else history)]
            # Forgotten first: after a failure, the next write repeats the whole history.
            self._last.pop(folder, None)
            head = {"version": _VERSION, "prefix": self.prefix, "run": self.run}
            self._last[folder] = (history[-1], _append(path, [{**head, **line} for line in lines]))

    def _continues(self, folder: str, path: Path, before: Measurement) -> bool:
        """Whether a folder's file is still the one that was written last, with nothing of it missing."""
        last, (device, inode, size) = self._last.get(folder, (None, (0, 0, 0)))
        try:
            found = path.stat()
        except FileNotFoundError:
            return False
        return last is before and (found.st_dev, found.st_ino) == (device, inode) and found.st_size >= size


@dataclass(frozen=True)
class StoredHistories:
    """The content of a history file.

    Attributes:
        histories: measurements in order of time, by the callback's prefix.
        notes: remarks for the reader, such as that a line is damaged or that two runs wrote into the file.
    """

    histories: Mapping[str, list[Measurement]]
    notes: Sequence[str] = ()


@dataclass
class _Session:
    """Consecutive measurements of one process.

    Attributes:
        run: the id of the run; ``None`` in files of releases without ids.
        measurements: in order of the file.
        mixed: whether another run of the same prefix wrote between this session's lines.
    """

    run: str | None
    measurements: list[Measurement] = field(default_factory=list)
    mixed: bool = False

    @property
    def trained(self) -> bool:
        return any(entry.when != "validate" for entry in self.measurements)

    def resumes(self, other: _Session) -> bool:
        """Whether this session repeats the first measurement of another one, as a resumed run does."""
        first = [(m.when, m.epoch, m.step, m.seconds) for s in (self, other) for m in s.measurements[:1]]
        return len(first) == 2 and first[0] == first[1]


def read_histories(path: str | os.PathLike[str]) -> StoredHistories:
    """Read a history file.

    If several processes wrote into the file, the last one that trained counts. Measurements of ``trainer.validate()``
    alone don't replace those of a training.

    Args:
        path: the file.

    Raises:
        HistoryError: if it is not a history file, or one of another version.
        OSError: if it can't be read.
    """
    path = Path(path)
    sessions: dict[str, list[_Session]] = {}
    newest: dict[tuple[str, str | None], _Session] = {}
    last_run: dict[str, str | None] = {}
    damaged: list[int] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            entry = _entry(line, f"{path}: line {number}")
            if entry is None:
                damaged.append(number)
                continue
            prefix, run = entry["prefix"], entry.get("run")
            own = newest.get((prefix, run))
            if own is None or entry.get("begins"):
                own = newest[prefix, run] = _Session(run)
                sessions.setdefault(prefix, []).append(own)
            elif last_run[prefix] != run:
                own.mixed = True
            last_run[prefix] = run
            if "measurement" in entry:
                own.measurements.append(_measurement(entry["measurement"], f"{path}: line {number}"))
    notes = [] if not damaged else [_damage(damaged, path.name)]
    histories = {}
    for prefix, parts in sessions.items():
        chosen = _latest(parts)
        histories[prefix] = chosen.measurements
        notes += _notes(parts, chosen, prefix if len(sessions) > 1 else None)
    return StoredHistories(histories, notes)


def _entry(line: bytes, where: str) -> Mapping[str, Any] | None:
    """Parse a line; ``None`` if it is damaged."""
    try:
        entry: Any = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):  # Too many digits, or too many brackets, are no JSONDecodeError.
        return None
    version = entry.get("version") if isinstance(entry, dict) else None
    if type(version) is not int or version != _VERSION:
        raise HistoryError(
            f"{where} has version {shortened(version)}, and this release reads {_VERSION}; "
            "read the folder with the release that wrote it"
        )
    if not isinstance(entry.get("prefix"), str) or not isinstance(entry.get("run"), str | None):
        return None
    parsed: Mapping[str, Any] = entry
    return parsed


def _measurement(value: object, where: str) -> Measurement:
    try:
        return Measurement.from_state(_decoded(value))
    except (ValueError, RecursionError) as error:
        raise HistoryError(
            f"{where} is not a measurement as this release reads it ({error}); "
            "read the folder with the release that wrote it"
        ) from error


def _damage(lines: Sequence[int], name: str) -> str:
    if len(lines) == 1:
        return f"line {lines[0]} of {name} is cut off or damaged, and was left out"
    listed = ", ".join(map(str, lines[:_MOST_LISTED]))
    more = f" and {len(lines) - _MOST_LISTED} more" if len(lines) > _MOST_LISTED else ""
    return f"{len(lines)} lines of {name} are cut off or damaged, and were left out: {listed}{more}"


def _latest(sessions: Sequence[_Session]) -> _Session:
    return ([session for session in sessions if session.trained] or sessions)[-1]


def _notes(sessions: Sequence[_Session], chosen: _Session, prefix: str | None) -> list[str]:
    """Describe the sessions of one prefix that don't count, and repeated measurements in the one that does."""
    notes = []
    # A session of the chosen run itself was written before its file was damaged or removed.
    others = [part for part in sessions if part is not chosen and part.trained]
    others = [part for part in others if part.run is None or part.run != chosen.run]
    foreign = [part for part in others if not chosen.resumes(part)]
    if any(part.mixed for part in sessions):
        notes.append(
            "two runs wrote into this folder at the same time, and the one that began last is shown; give each run a "
            "folder of its own"
        )
    elif foreign:
        counts = ", ".join(str(len(part.measurements)) for part in foreign[:_MOST_LISTED])
        notes.append(
            f"the folder also holds {len(foreign)} earlier run(s), with {counts} measurement(s), and the last run is "
            "shown; give each run a folder of its own"
        )
    lost = max((len(part.measurements) for part in others if part not in foreign), default=0)
    if lost > len(chosen.measurements):
        notes.append(
            f"an earlier process of this run made {lost} measurements, and the last one, which resumed it from a "
            f"checkpoint, has {len(chosen.measurements)}; those after the checkpoint are not shown"
        )
    places = [(entry.when, entry.epoch, entry.step) for entry in chosen.measurements]
    if repeated := len(places) - len(set(places)):
        notes.append(f"{repeated} measurement(s) are at the same place of the run as another one")
    return notes if prefix is None else [f"{prefix}: {note}" for note in notes]


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> tuple[int, int, int]:
    """Append lines to a file, and return its device, inode and size."""
    data = "".join(json.dumps(line, allow_nan=False, separators=(",", ":")) + "\n" for line in lines).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b", buffering=0) as file:
        size = file.seek(0, os.SEEK_END)
        if size:
            file.seek(size - 1)
            if file.read(1) != b"\n":  # A process was killed, or a disk was full, within a line.
                data = b"\n" + data
        while data:
            data = data[file.write(data) or 0 :]
        found = os.fstat(file.fileno())
        return found.st_dev, found.st_ino, found.st_size


def _encoded(value: Any) -> Any:
    """Convert a measurement's state to values that JSON stores without loss."""
    if isinstance(value, torch.Tensor):
        return {"tensor": _encoded(value.tolist()), "dtype": str(value.dtype).removeprefix("torch.")}
    if isinstance(value, Mapping):
        return {"mapping": {name: _encoded(part) for name, part in value.items()}}
    if isinstance(value, (list, tuple)):
        return [_encoded(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}  # JSON has no number for it.
    return value


def _decoded(value: Any) -> Any:
    """Invert `_encoded`.

    Raises:
        ValueError: if it did not make the value.
    """
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {"tensor", "dtype"}:
        return _decoded_tensor(value["tensor"], value["dtype"])
    if value.keys() == {"float"} and value["float"] in ("nan", "inf", "-inf"):
        return float(value["float"])
    if value.keys() == {"mapping"} and isinstance(value["mapping"], dict):
        return {name: _decoded(part) for name, part in value["mapping"].items()}
    raise ValueError(f"a value must be a mapping, a tensor or a number, got {shortened(value)}")


def _decoded_tensor(values: Any, dtype: Any) -> torch.Tensor:
    if not isinstance(dtype, str) or dtype not in _DTYPES:
        raise ValueError(f"the dtype of a tensor must be one of {', '.join(_DTYPES)}, got {shortened(dtype)}")
    try:
        return torch.tensor(_decoded(values), dtype=_DTYPES[dtype])
    except (TypeError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{shortened(values)} is no tensor of {dtype}") from error
