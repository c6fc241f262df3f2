"""Run folders: which there are, and the measurements in each."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hessian_callback.measurement.history import FILE_NAME, HistoryError, history_from_state, read_histories
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.reports.logged_scalars import LoggedValue, read_scalars

__all__ = ["Run", "find_runs"]


@dataclass(frozen=True)
class Run:
    """The measurements of one callback in one run.

    Attributes:
        name: short name of the folder, unique in a report.
        folder: the run's folder.
        prefix: prefix of the callback's logged names.
        history: the measurements in order of time.
        source: the file that they were read from.
        scalars: the numbers that loggers wrote, by name.
        notes: remarks about the files for the reader.
    """

    name: str
    folder: Path
    prefix: str
    history: Sequence[Measurement]
    source: Path
    scalars: Mapping[str, Sequence[LoggedValue]] = field(default_factory=dict, repr=False)
    notes: Sequence[str] = ()


def find_runs(
    folders: Iterable[str | Path], *, on_unreadable: Callable[[HistoryError], None] | None = None
) -> list[Run]:
    """Read the runs in some folders.

    A folder is a run if it holds ``hessian_history.jsonl``, or else a checkpoint (itself or in ``checkpoints/``) with a
    history. In any other folder, all runs below it are read.

    Args:
        folders: run folders, such as ``lightning_logs/version_0``, or folders of run folders.
        on_unreadable: called with the error of each run that can't be read, which is then left out; ``None``: the
            error is raised.

    Returns:
        A `Run` for each run and callback prefix, in the order of the folders, those below one sorted by name.

    Raises:
        HistoryError: if a folder does not exist, if no run can be read, or if one can't and ``on_unreadable`` is
            ``None``; the message names the remedy.
    """
    errors: list[HistoryError] = []

    def failed(error: HistoryError) -> None:
        if on_unreadable is None:
            raise error
        errors.append(error)
        on_unreadable(error)

    places: dict[Path, None] = {}
    for folder in map(Path, folders):
        places |= dict.fromkeys(_run_folders(folder, failed))
    read = []
    for place in places:
        try:
            read.append((place, *_read_history(place)))
        except HistoryError as error:  # noqa: PERF203 - reading takes longer.
            failed(error)
    if not read and errors:
        raise errors[0]
    short = _short_names(list(places))
    runs = []
    for place, source, histories, notes in read:
        scalars = read_scalars(place)
        for prefix, history in histories.items():
            name = f"{short[place]} ({prefix})" if len(histories) > 1 else short[place]
            runs.append(Run(name, place, prefix, history, source, scalars.values, [*notes, *scalars.notes]))
    return runs


def _run_folders(root: Path, failed: Callable[[HistoryError], None]) -> list[Path]:
    if not root.exists():
        raise HistoryError(f"no such folder: {root}. Give the folder of a run, such as lightning_logs/version_0")
    if not root.is_dir():
        raise HistoryError(f"{root} is a file. Give the folder of the run that it belongs to")
    if (root / FILE_NAME).is_file():
        return [root]
    kept = {path.parent for path in root.rglob(FILE_NAME) if path.is_file()}
    seen = set(kept)
    unreadable = 0
    for path in root.rglob("*.ckpt"):
        folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        if folder == root.parent or folder in seen:
            continue
        seen.add(folder)
        try:
            if _checkpoint_states(folder) is not None:
                kept.add(folder)
        except HistoryError as error:
            unreadable += 1
            failed(error)
    if not kept and not unreadable:
        logs = any(root.rglob("*tfevents*")) or any(root.rglob("metrics.csv"))
        raise HistoryError(
            f"{root} holds no measurement of the Hessian: neither {FILE_NAME} nor a checkpoint with a history is in it "
            "or below it" + (", only files of a logger. " if logs else ". ") + _ADVICE
        )
    return sorted(kept, key=_natural)


_ADVICE = (
    "Train with PowerLawHessianCallback among the trainer's callbacks and with a TensorBoardLogger or CSVLogger, or "
    "give the folder of such a run"
)


def _natural(path: Path) -> list[tuple[int, str]]:
    """Sort key that puts version_10 behind version_9."""
    parts = re.split(r"([0-9]{1,18})", str(path))
    return [(int(part), "") if index % 2 else (-1, part) for index, part in enumerate(parts)]


def _short_names(folders: Sequence[Path]) -> dict[Path, str]:
    """Name folders by their last parts: as many as distinguish them, at least two.

    Bytes that are not UTF-8 are shown as replacement characters.
    """
    whole = {folder: os.fsencode(folder.absolute()).decode(errors="replace").split(os.sep) for folder in folders}
    for length in range(2, 1 + max((len(parts) for parts in whole.values()), default=0)):
        names = {folder: "/".join(parts[-length:]) for folder, parts in whole.items()}
        if len(set(names.values())) == len(names):
            return names
    return {folder: f"{'/'.join(parts)} ({number})" for number, (folder, parts) in enumerate(whole.items())}


# -- measurements ----------------------------------------------------------------------------------


def _read_history(folder: Path) -> tuple[Path, Mapping[str, list[Measurement]], list[str]]:
    """Read the history file of a run, or its newest checkpoint with a history."""
    path = folder / FILE_NAME
    notes: list[str] = []
    if path.is_file():
        try:
            stored = read_histories(path)
        except OSError as error:
            raise HistoryError(f"{path} can't be read ({error.strerror}). Check its permissions") from error
        found = {prefix: history for prefix, history in stored.histories.items() if history}
        if found:
            return path, found, list(stored.notes)
        notes += stored.notes
    states = _checkpoint_states(folder)
    histories = {} if states is None else _histories_of(*states)
    if states is None or not histories:
        where = path if states is None else states[0]
        raise HistoryError(f"{where} holds no measurement of the Hessian. {_ADVICE}")
    return states[0], histories, [*notes, f"the measurements are those up to the checkpoint {states[0].name}"]


def _checkpoint_states(folder: Path) -> tuple[Path, dict[str, Mapping[str, Any]]] | None:
    """The newest checkpoint of a run that has a history, and the states of the measuring callbacks in it, by prefix.

    Raises:
        HistoryError: if no checkpoint has a history, and the newest one can't be read.
    """
    paths = [path for place in (folder, folder / "checkpoints") for path in place.glob("*.ckpt") if path.is_file()]
    first_error = None
    for path in sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            if states := _states_of(path):
                return path, states
        except HistoryError as error:  # noqa: PERF203 - reading takes longer.
            first_error = first_error or error
    if first_error is not None:
        raise first_error
    return None


def _states_of(checkpoint: Path) -> dict[str, Mapping[str, Any]]:
    """The states of the measuring callbacks in a checkpoint, by prefix."""
    try:
        # Mapped, so that the weights are not read.
        content = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # Unpickling and unzipping document no exceptions for damaged files.
        reason = " ".join(str(error).split())[:200]
        raise HistoryError(
            f"{checkpoint} can't be read as a checkpoint ({type(error).__name__}: {reason}). Move it out of the "
            "folder, or train with a TensorBoardLogger or CSVLogger, beside which the history is kept as a file"
        ) from error
    callbacks = content.get("callbacks") if isinstance(content, Mapping) else None
    states = {}
    for key, state in callbacks.items() if isinstance(callbacks, Mapping) else ():
        if isinstance(key, str) and isinstance(state, Mapping) and {"version", "history", "time"} <= state.keys():
            states[_prefix_in(key)] = state
    return states


def _prefix_in(state_key: str) -> str:
    """The prefix in a callback's state key, ``PowerLawHessianCallback{'prefix': 'hessian'}``."""
    _, brace, options = state_key.partition("{")
    try:
        found = ast.literal_eval(brace + options)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return "hessian"
    return str(found.get("prefix", "hessian")) if isinstance(found, dict) else "hessian"


def _histories_of(checkpoint: Path, states: Mapping[str, Mapping[str, Any]]) -> dict[str, list[Measurement]]:
    histories = {}
    for prefix, state in states.items():
        try:
            history = history_from_state(state)
        except ValueError as error:
            raise HistoryError(
                f"the history in {checkpoint} can't be read: {error}. Make the report with the release that wrote it"
            ) from error
        if history:
            histories[prefix] = history
    return histories
