"""What a training run left on disk: its measurements, and the losses that its loggers wrote."""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hessian_callback.measurement.history import FILE_NAME, HistoryError, history_from_state, read_histories
from hessian_callback.measurement.measurement import Measurement

__all__ = ["LoggedValue", "Run", "find_runs", "losses_at", "read_scalars"]

_EVENTS = "*tfevents*"


@dataclass(frozen=True)
class LoggedValue:
    """A number that a logger wrote.

    Attributes:
        step: the logger's step, which Lightning counts one back for what ends an epoch.
        value: the number.
        epoch: the epoch in which it was written, if the logger knows.
    """

    step: int
    value: float
    epoch: int | None = None


@dataclass(frozen=True)
class Run:
    """The measurements of one callback in one run.

    Attributes:
        name: the folder as it is shown, unique in a report.
        folder: the run's folder.
        prefix: what the callback's logged names begin with.
        history: the measurements in order of time.
        source: the file that they were read from.
        scalars: what the loggers wrote, by name.
        notes: what a reader should be told about the files.
    """

    name: str
    folder: Path
    prefix: str
    history: Sequence[Measurement]
    source: Path
    scalars: Mapping[str, Sequence[LoggedValue]] = field(default_factory=dict, repr=False)
    notes: Sequence[str] = ()


def find_runs(folders: Iterable[str | Path]) -> list[Run]:
    """Read the runs in some folders.

    A folder is a run if it holds ``hessian_history.jsonl``, or else a checkpoint (itself or in ``checkpoints/``) whose
    newest one has a history. Of any other folder, all runs below it are read.

    Args:
        folders: run folders, such as ``lightning_logs/version_0``, or folders of run folders.

    Returns:
        A `Run` for each run and callback prefix, in the order of the folders, those below one sorted by name.

    Raises:
        HistoryError: if a folder does not exist or holds no measurement; the message says what to do.
    """
    places: dict[Path, None] = {}
    for folder in map(Path, folders):
        places |= dict.fromkeys(_run_folders(folder))
    read = [(place, *_read_history(place)) for place in places]
    short = _short_names(list(places))
    runs = []
    for place, source, histories, notes in read:
        scalars = read_scalars(place)
        several = len(histories) > 1
        for prefix, history in histories.items():
            name = f"{short[place]} ({prefix})" if several else short[place]
            runs.append(Run(name, place, prefix, history, source, scalars, notes))
    return runs


def _run_folders(root: Path) -> list[Path]:
    if not root.exists():
        raise HistoryError(f"no such folder: {root}. Give the folder of a run, such as lightning_logs/version_0")
    if not root.is_dir():
        raise HistoryError(f"{root} is a file. Give the folder of the run that it belongs to")
    if (root / FILE_NAME).is_file():
        return [root]
    kept = {path.parent for path in root.rglob(FILE_NAME) if path.is_file()}
    for path in root.rglob("*.ckpt"):
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        if folder != root.parent and folder not in kept and (folder == root or _has_history(folder)):
            kept.add(folder)
    if root in kept and len(kept) > 1 and not _has_history(root):
        kept.discard(root)
    if not kept:
        logs = any(root.rglob(_EVENTS)) or any(root.rglob("metrics.csv"))
        raise HistoryError(
            f"{root} holds no measurement of the Hessian: neither {FILE_NAME} nor a checkpoint is in it or below it"
            + (", only files of a logger. " if logs else ". ")
            + "Train with PowerLawHessianCallback among the trainer's callbacks and with a TensorBoardLogger or "
            "CSVLogger, or give the folder of such a run"
        )
    return sorted(kept, key=_natural)


def _natural(path: Path) -> list[tuple[int, str]]:
    """A key that puts version_10 behind version_9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", str(path))]


def _short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Name folders by their last parts, as many as tell them apart, and two at the least."""
    whole = {folder: folder.absolute().parts for folder in folders}
    for length in range(2, 1 + max((len(parts) for parts in whole.values()), default=0)):
        names = {folder: "/".join(parts[-length:]) for folder, parts in whole.items()}
        if len(set(names.values())) == len(names):
            return names
    return {folder: str(folder) for folder in folders}


# -- measurements ----------------------------------------------------------------------------------


def _read_history(folder: Path) -> tuple[Path, Mapping[str, list[Measurement]], list[str]]:
    path = folder / FILE_NAME
    if path.is_file():
        stored = read_histories(path)
        if stored.histories:
            return path, stored.histories, list(stored.notes)
    checkpoint = _newest_checkpoint(folder)
    histories = {} if checkpoint is None else _histories_of(checkpoint)
    if checkpoint is None or not histories:
        where = path if checkpoint is None else checkpoint
        raise HistoryError(
            f"{where} holds no measurement of the Hessian. Train with PowerLawHessianCallback among the trainer's "
            "callbacks, or give the folder of such a run"
        )
    return checkpoint, histories, [f"the measurements are those up to the checkpoint {checkpoint.name}"]


def _newest_checkpoint(folder: Path) -> Path | None:
    found = [path for place in (folder, folder / "checkpoints") for path in place.glob("*.ckpt") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _has_history(folder: Path) -> bool:
    checkpoint = _newest_checkpoint(folder)
    return checkpoint is not None and bool(_states_of(checkpoint))


def _states_of(checkpoint: Path) -> dict[str, dict[str, Any]]:
    """The states of the measuring callbacks in a checkpoint, by prefix."""
    try:
        # Mapped, so that the weights are not read.
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # Pickle and zip raise what they like at a damaged file.
        reason = " ".join(str(error).split())[:200]
        raise HistoryError(
            f"{checkpoint} can't be read as a checkpoint ({type(error).__name__}: {reason}). Move it out of the "
            "folder, or train with a TensorBoardLogger or CSVLogger, beside which the history is kept as a file"
        ) from error
    states = {}
    for key, state in (content.get("callbacks") or {}).items():
        if isinstance(state, dict) and {"version", "history", "time"} <= state.keys():
            states[_prefix_in(key)] = state
    return states


def _prefix_in(state_key: str) -> str:
    """The prefix in a callback's state key, ``PowerLawHessianCallback{'prefix': 'hessian'}``."""
    _, brace, options = state_key.partition("{")
    return str(ast.literal_eval(brace + options).get("prefix", "hessian")) if brace else "hessian"


def _histories_of(checkpoint: Path) -> dict[str, list[Measurement]]:
    histories = {}
    for prefix, state in _states_of(checkpoint).items():
        try:
            history = history_from_state(state)
        except ValueError as error:
            raise HistoryError(
                f"the history in {checkpoint} can't be read: {error}. Make the report with the release that wrote it"
            ) from error
        if history:
            histories[prefix] = history
    return histories


# -- what the loggers wrote --------------------------------------------------------------------------


def read_scalars(folder: Path) -> dict[str, list[LoggedValue]]:
    """Read the numbers that TensorBoardLogger and CSVLogger wrote to a folder, by name.

    Where both wrote one, TensorBoard's is taken. Of a run that was interrupted and resumed in its folder, what came
    after the place of resumption for the first time is left out.
    """
    return _from_csv(folder / "metrics.csv") | _from_events(folder)


def _from_events(folder: Path) -> dict[str, list[LoggedValue]]:
    if not any(folder.glob(_EVENTS)):
        return {}
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    # Of everything but scalars one is enough; of scalars all are wanted.
    guidance = {"scalars": 0, "images": 1, "histograms": 1, "compressedHistograms": 1, "audio": 1, "tensors": 1}
    events = EventAccumulator(str(folder), size_guidance=guidance, purge_orphaned_data=False)
    events.Reload()
    names = [name for name in events.Tags()["scalars"] if name != "epoch"]
    written = {name: _timed(events.Scalars(name)) for name in names}
    epochs = {}
    if "epoch" in events.Tags()["scalars"]:
        epochs = {step: int(epoch) for _, step, epoch in _continued(_timed(events.Scalars("epoch")))}
    return {
        name: [LoggedValue(step, value, epochs.get(step)) for _, step, value in _continued(values)]
        for name, values in written.items()
    }


def _timed(events: Iterable[Any]) -> list[tuple[float, int, float]]:
    return [(event.wall_time, event.step, float(event.value)) for event in events]


def _continued(values: Iterable[tuple[float, int, float]]) -> list[tuple[float, int, float]]:
    """Drop what was written again later: a resumed run goes back to the step of its checkpoint."""
    kept: list[tuple[float, int, float]] = []
    for entry in sorted(values, key=lambda entry: entry[0]):
        while kept and kept[-1][1] >= entry[1]:
            kept.pop()
        kept.append(entry)
    return kept


def _from_csv(path: Path) -> dict[str, list[LoggedValue]]:
    if not path.is_file():
        return {}
    scalars: dict[str, list[LoggedValue]] = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            step, epoch = row.get("step"), row.get("epoch")
            if not step:
                continue
            for name, text in row.items():
                if name not in ("step", "epoch") and text:
                    number = LoggedValue(int(step), float(text), int(float(epoch)) if epoch else None)
                    scalars.setdefault(name, []).append(number)
    return scalars


def losses_at(history: Sequence[Measurement], values: Sequence[LoggedValue]) -> list[float | None]:
    """Find the logged value that belongs to each measurement.

    That is the last one that was logged at its step or before, in the same epoch for a measurement at an epoch's end,
    and else since the measurement before; ``None`` where there is none. A value of an earlier time is never taken for
    a later one.

    Args:
        history: the measurements in order of time.
        values: what a logger wrote under one name, in order of time.

    Example:
        >>> at_end = dict(spectrum=None, fit=None, reason="failed", seconds=0.1, when="epoch")
        >>> history = [Measurement(epoch=0, step=75, **at_end), Measurement(epoch=2, step=225, **at_end)]
        >>> losses_at(history, [LoggedValue(74, 0.9, 0), LoggedValue(149, 0.8, 1), LoggedValue(224, 0.7, 2)])
        [0.9, 0.7]
    """
    found: list[float | None] = []
    before = -1
    for measurement in history:
        fitting = [value for value in values if value.step <= measurement.step]
        if measurement.when == "epoch" and any(value.epoch is not None for value in values):
            fitting = [value for value in fitting if value.epoch == measurement.epoch]
        else:
            fitting = [v for v in fitting if v.step > before and (v.epoch is None or v.epoch <= measurement.epoch)]
        found.append(fitting[-1].value if fitting else None)
        before = measurement.step
    return found
