"""The history as a file beside a run's other logs, so that a report needs neither the process nor a checkpoint.

The file ``hessian_history.jsonl`` has one line of JSON for each measurement, appended as soon as it is made. A process
that begins to write says so with a line of its own and then repeats what it took over from a checkpoint: whatever an
interrupted run had measured beyond that checkpoint stays in the file, and no longer counts.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hessian_callback.measurement.measurement import Measurement

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


class HistoryError(ValueError):
    """A stored history that can't be read; the message says what to do."""


def history_from_state(state: Mapping[str, Any]) -> list[Measurement]:
    """Restore the history in a callback's checkpoint state.

    Args:
        state: what the callback's ``state_dict`` returned.

    Returns:
        The measurements in order of time.

    Raises:
        ValueError: if the state is of another version, or not the state of a history.
    """
    if state.get("version") != STATE_VERSION:
        raise ValueError(
            f"the checkpoint holds a history of version {state.get('version')}, this release reads "
            f"{STATE_VERSION}; resume with the release that wrote it, or with another prefix"
        )
    try:
        return [Measurement.from_state(entry) for entry in state["history"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"the checkpoint holds a history that cannot be read ({type(error).__name__}: {error}); resume with "
            "another prefix, which starts a new history"
        ) from error


@dataclass
class HistoryWriter:
    """Appends the measurements of one callback to the history files of a run's folders.

    Args:
        prefix: the callback's prefix; callbacks with different ones share a file.

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
    _last: dict[str, Measurement] = field(default_factory=dict, repr=False)

    def write(self, folders: Iterable[str | os.PathLike[str]], history: Sequence[Measurement]) -> None:
        """Append what the files lack: the last measurement, or the whole history where it is not continued.

        Args:
            folders: the folders, which are made where they don't exist; each gets a file.
            history: the callback's history, whose last entry is new.

        Raises:
            OSError: if a file can't be written.
        """
        for folder in dict.fromkeys(os.fspath(folder) for folder in folders):
            continued = len(history) > 1 and self._last.get(folder) is history[-2]
            lines: list[dict[str, Any]] = [] if continued else [{"begins": True}]
            lines += [{"measurement": _encoded(m.to_state())} for m in (history[-1:] if continued else history)]
            # Known as written only afterwards: what failed is made up for by the next write, with all of the history.
            self._last.pop(folder, None)
            _append(Path(folder) / FILE_NAME, [{"version": _VERSION, "prefix": self.prefix, **line} for line in lines])
            self._last[folder] = history[-1]


@dataclass(frozen=True)
class StoredHistories:
    """What a history file holds.

    Attributes:
        histories: measurements in order of time, by the callback's prefix.
        notes: what a reader should be told, such as a line that was cut off; empty if there is nothing.
    """

    histories: Mapping[str, list[Measurement]]
    notes: Sequence[str] = ()


def read_histories(path: str | os.PathLike[str]) -> StoredHistories:
    """Read a history file.

    Of several processes that wrote into one file the last one that trained counts; measurements of
    ``trainer.validate()`` alone don't displace those of a training.

    Args:
        path: the file.

    Raises:
        HistoryError: if it is not a history file, or one of another version.
        OSError: if it can't be read.
    """
    path = Path(path)
    sessions: dict[str, list[list[Measurement]]] = {}
    notes = []
    text = path.read_bytes().decode("utf-8", errors="replace")
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            notes.append(f"line {number} of {path.name} is cut off or damaged, and was left out")
            continue
        version = entry.get("version") if isinstance(entry, dict) else None
        if version != _VERSION:
            raise HistoryError(
                f"{path}: line {number} has version {version!r}, and this release reads {_VERSION}; "
                "read the folder with the release that wrote it"
            )
        parts = sessions.setdefault(entry["prefix"], [])
        if entry.get("begins") or not parts:
            parts.append([])
        if "measurement" in entry:
            try:
                parts[-1].append(Measurement.from_state(_decoded(entry["measurement"])))
            except (KeyError, TypeError, ValueError) as error:
                raise HistoryError(
                    f"{path}: line {number} is not a measurement as this release knows it ({error}); "
                    "read the folder with the release that wrote it"
                ) from error
    return StoredHistories({prefix: _latest(parts) for prefix, parts in sessions.items()}, notes)


def _latest(sessions: Sequence[list[Measurement]]) -> list[Measurement]:
    trained = [session for session in sessions if any(entry.when != "validate" for entry in session)]
    return (trained or sessions)[-1]


def _append(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
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


def _encoded(value: Any) -> Any:
    """Turn a measurement's state into what JSON can hold without loss."""
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
    if isinstance(value, list):
        return [_decoded(part) for part in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return torch.tensor(_decoded(value["tensor"]), dtype=getattr(torch, value["dtype"]))
    if "float" in value:
        return float(value["float"])
    return {name: _decoded(part) for name, part in value["mapping"].items()}
