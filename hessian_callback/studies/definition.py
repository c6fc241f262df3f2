"""The definition of a study: a configuration, the factors that are varied, and published figures to compare with."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from hessian_callback.measurement.stored_state import shortened
from hessian_callback.studies.safe_yaml import read_yaml

__all__ = ["RESERVED", "PlannedRun", "Published", "Study", "StudyError", "load_study", "with_overrides"]

_KEYS = {"title", "base", "set", "seeds", "factors", "fitted", "fit_rtol", "rows", "predict", "published"}
_PUBLISHED_KEYS = {"at", "fit_error", "slope", "holds", "gap_exponent"}
# Types of the keys, and the words for them.
_KINDS: dict[str, tuple[type[Any], str]] = {
    "title": (str, "a text"),
    "set": (dict, "a mapping"),
    "factors": (dict, "a mapping"),
    "fitted": (list, "a list of numbers of eigenvalues"),
    "predict": (bool, "true or false"),
    "published": (list, "a list"),
}
# Keys of earlier releases, and their names now.
_RENAMED = {"known_to": "fit_rtol", "printed": "published"}
_MAX_RUNS = 10_000
_MAX_NAME = 200  # File names have at most 255 bytes, and files beside the folder have longer ones.
_MAX_SEED = 2**32 - 1  # The largest seed of numpy's global generator.
_MAX_PARTS = 30  # Of a dotted key.
_ROWS = ("last", "first and last", "all")
#: Columns of the results, whose names a factor cannot have.
RESERVED = frozenset(
    [
        "run",
        "when",
        "seed",
        "part",
        "step",
        "K",
        "d_ks",
        "s_hat",
        "s_hat_stderr",
        "beta",
        "beta_stderr",
        "critical_paper",
        "critical_fitted",
        "holds_paper",
        "holds_fitted",
        "lambda_1",
        "lambda_K",
        "least_squares_slope",
        "r_squared",
        "gap_exponent",
        "test_loss",
        "test_error",
        "train_loss",
        "samples",
        "parameters",
        "known",
        "largest_bound",
        "negative",
        "missed_probability",
        "products",
        "seconds",
        "device",
        "reason",
    ]
)


class StudyError(ValueError):
    """A study that can't be read or run; the message names the remedy."""


@dataclass(frozen=True)
class Published:
    """Figures of a publication for one setting.

    Attributes:
        at: the setting: a level for some of the factors, and ``when`` for the place in the run.
        fit_error: d_ks.
        slope: s_hat; ``None`` if none is published.
        holds: whether the power law was accepted there.
        gap_exponent: exponent of the eigengaps.
    """

    at: Mapping[str, str]
    fit_error: float | None = None
    slope: float | None = None
    holds: bool | None = None
    gap_exponent: float | None = None

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a setting is the one that these figures are of."""
        return all(labels.get(name) == level for name, level in self.at.items())


@dataclass(frozen=True)
class PlannedRun:
    """One run of a study.

    Attributes:
        name: made of the levels and the seed; also the name of its folder.
        labels: the level of each factor.
        seed: seed of the run.
        config: configuration for ``hessian-callback fit``, without the settings that depend on the folder. Runs of a
            study share parts of it.
    """

    name: str
    labels: Mapping[str, str]
    seed: int
    config: Mapping[str, Any] = field(repr=False)

    @property
    def digest(self) -> str:
        """Checksum of the configuration."""
        try:
            text = json.dumps(self.config, sort_keys=True, default=str)
        except TypeError:  # Keys of several types have no order, and some are no keys in JSON.
            text = repr(self.config)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Study:
    """A grid of runs; `load_study` reads one from a file.

    Attributes:
        name: the file's name without its ending.
        title: heading of the tables.
        base: the configuration that all runs share.
        factors: levels by factor; of each level its settings, by dotted key.
        seeds: one run each, for every combination of levels.
        fitted: numbers K of eigenvalues that power laws are fitted to; empty: as many as were measured.
        fit_rtol: relative error bound up to which an eigenvalue is fitted; ``None``: the ``rtol`` of its measurement.
        rows: which measurements the table shows: ``"last"``, ``"first and last"`` or ``"all"``.
        predict: whether the statistics are correlated with the test loss.
        published: figures to compare with.
    """

    name: str
    title: str
    base: Mapping[str, Any] = field(repr=False)
    factors: Mapping[str, Mapping[str, Mapping[str, Any]]]
    seeds: Sequence[int]
    fitted: Sequence[int] = ()
    fit_rtol: float | None = None
    rows: str = "last"
    predict: bool = False
    published: Sequence[Published] = ()

    def runs(self, only: Sequence[str] = (), seeds: Sequence[int] | None = None) -> list[PlannedRun]:
        """Plan the runs, seed by seed, so that an interrupted study has runs of every setting.

        Args:
            only: patterns for the names, with ``*``; empty: all.
            seeds: other seeds than the study's own.

        Raises:
            StudyError: if a pattern matches no run, a seed is out of range, or there are too many runs.
        """
        seeds = self.seeds if seeds is None else seeds
        if wrong := [seed for seed in seeds if not 0 <= seed <= _MAX_SEED]:
            raise StudyError(f"a seed lies between 0 and {_MAX_SEED}, got {shortened(wrong[0])}")
        number = len(seeds) * math.prod(len(levels) for levels in self.factors.values())
        if number > _MAX_RUNS:
            raise StudyError(f"{self.name} has {number} runs; at most {_MAX_RUNS} are possible, so vary fewer factors")
        combinations = list(itertools.product(*[levels.items() for levels in self.factors.values()]))
        planned = []
        for combination in combinations:
            labels = {factor: level for factor, (level, _) in zip(self.factors, combination, strict=True)}
            config: dict[str, Any] = dict(self.base)
            for _, settings in combination:
                config = with_overrides(config, settings)
            _check_config(config, self.name)
            planned += [
                PlannedRun(_run_name(labels, seed), labels, seed, {**config, "seed_everything": seed}) for seed in seeds
            ]
        planned = [run for first in range(len(seeds)) for run in planned[first :: len(seeds)]]
        for pattern in only:
            if not any(fnmatchcase(run.name, pattern) for run in planned):
                raise StudyError(f"no run of {self.name} is called {shortened(pattern)}; --list shows the names")
        return [run for run in planned if not only or any(fnmatchcase(run.name, pattern) for pattern in only)]

    def published_for(self, labels: Mapping[str, str]) -> Published | None:
        """Return the published figures for a setting, or ``None``."""
        return next((entry for entry in self.published if entry.matches(labels)), None)


def _run_name(labels: Mapping[str, str], seed: int) -> str:
    parts = [f"{factor} {level}" for factor, level in labels.items()] + [f"seed {seed}"]
    return "_".join(re.sub(r"[^\w.+]+", "-", part).strip("-") for part in parts)


def load_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study.

    The file is YAML with the keys

    - ``title``;
    - ``base``: a configuration for ``hessian-callback fit``, in place or as a file's path relative to the study;
    - ``set``: settings for all runs, by dotted key, as in ``trainer.callbacks.0.init_args.num_eigenvalues: 50``;
    - ``factors``: for each factor either ``{key: DOTTED.KEY, values: [...]}``, or ``{levels: {NAME: {DOTTED.KEY:
      VALUE, ...}, ...}}``; every combination of levels is a setting;
    - ``seeds``: a run for each of them in every setting;
    - ``fitted``: the numbers of eigenvalues that laws are fitted to, such as ``[50, 200]``;
    - ``fit_rtol``: relative error bound up to which eigenvalues are fitted, instead of the measurement's own ``rtol``;
    - ``rows``: the measurements in the table, ``last``, ``first and last`` or ``all``;
    - ``predict``: ``true`` for correlations with the test loss;
    - ``published``: a list of ``{at: {FACTOR: LEVEL, when: ...}, fit_error: ..., slope: ..., holds: ...}``.

    Args:
        path: the file.
        overrides: settings by dotted key, applied after ``set`` and before the factors.

    Raises:
        StudyError: if it can't be read, has unknown keys or values, or is too large.
    """
    path = Path(path)
    content = _read_mapping(path)
    for old, new in _RENAMED.items():
        if old in content:
            raise StudyError(f"{path}: {old} is called {new} now; rename it")
    if unknown := content.keys() - _KEYS:
        raise StudyError(f"{path}: unknown {_listed(unknown)}; a study has {_listed(_KEYS)}")
    if missing := {"title", "base", "seeds"} - content.keys():
        raise StudyError(f"{path}: {_listed(missing)} is missing")
    for key, (kind, words) in _KINDS.items():
        given = content.get(key)
        if not isinstance(given, kind) and (given is not None or key == "title"):
            raise StudyError(f"{path}: {key} must be {words}, got {shortened(given)}")
    base = _base(path, content["base"])
    base = with_overrides(with_overrides(base, content.get("set") or {}), overrides or {})
    factors = _unique((content.get("factors") or {}).items(), f"{path}: two factors")
    levels = {name: _levels(path, name, entry) for name, entry in factors.items()}
    if taken := RESERVED & levels.keys():
        raise StudyError(
            f"{path}: a factor cannot be called {_listed(taken)}, as a column of the results is; rename it"
        )
    study = Study(
        name=path.stem,
        title=content["title"],
        base=base,
        factors=levels,
        published=[_published(path, entry, levels) for entry in content.get("published") or []],
        predict=content.get("predict") or False,
        **_numbers(path, content),
    )
    names = [run.name for run in study.runs()]
    if len(set(names)) != len(names):
        raise StudyError(f"{path}: two runs would have one name; let names of levels and seeds differ in letters")
    if len(longest := max(names, key=len).encode()) > _MAX_NAME:
        raise StudyError(f"{path}: a run's name has {len(longest)} bytes; give levels names, {{levels: {{NAME: ...}}}}")
    return study


def _numbers(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """The seeds, and the options of the tables."""
    seeds, fitted = content["seeds"], content.get("fitted") or []
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise StudyError(f"{path}: seeds must be a list of whole numbers, got {shortened(seeds)}")
    if not all(type(number) is int and number >= 3 for number in fitted):
        raise StudyError(
            f"{path}: fitted must be a list of numbers of eigenvalues, 3 at the least, got {shortened(fitted)}"
        )
    fit_rtol = content.get("fit_rtol")
    if fit_rtol is not None and not (isinstance(fit_rtol, float) and 0 < fit_rtol < 1):
        raise StudyError(f"{path}: fit_rtol must be a number between 0 and 1, got {shortened(fit_rtol)}")
    rows = content.get("rows", "last")
    if rows not in _ROWS:
        raise StudyError(f"{path}: rows must be one of {', '.join(_ROWS)}; got {shortened(rows)}")
    return {"seeds": seeds, "fitted": fitted, "fit_rtol": fit_rtol, "rows": rows}


def _read_mapping(path: Path) -> dict[str, Any]:
    try:
        content = read_yaml(path)
    except FileNotFoundError:
        raise StudyError(f"there is no file {path}; paths count from the current folder, {Path.cwd()}") from None
    except (OSError, ValueError) as error:
        raise StudyError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path} holds no settings; see example_configs/studies for what a study looks like")
    return content


def _base(path: Path, base: object) -> dict[str, Any]:
    found = _read_mapping(path.parent / base) if isinstance(base, str) else base
    if not isinstance(found, dict):
        raise StudyError(f"{path}: base must be a configuration or the name of a file with one, got {shortened(base)}")
    return found


def _unique(entries: Iterable[tuple[Any, Any]], what: str) -> dict[str, Any]:
    """Entries by the text of their names, which must differ."""
    found: dict[str, Any] = {}
    for name, entry in entries:
        if str(name) in found:
            raise StudyError(f"{what} have the name {shortened(str(name))}; let them differ")
        found[str(name)] = entry
    return found


def _levels(path: Path, name: str, entry: object) -> dict[str, dict[str, Any]]:
    what = f"{path}: two levels of factor {shortened(name)}"
    if isinstance(entry, dict) and entry.keys() == {"key", "values"} and isinstance(entry["values"], list):
        key = entry["key"]
        if isinstance(key, str) and entry["values"]:
            return _unique(((value, {key: value}) for value in entry["values"]), what)
    levels = entry.get("levels") if isinstance(entry, dict) and entry.keys() == {"levels"} else None
    if isinstance(levels, dict) and levels and all(isinstance(settings or {}, dict) for settings in levels.values()):
        return _unique(((level, dict(settings or {})) for level, settings in levels.items()), what)
    raise StudyError(
        f"{path}: factor {shortened(name)} must be {{key: ..., values: [...]}} or "
        "{levels: {NAME: {KEY: VALUE}}}, with at least one level"
    )


def _published(path: Path, entry: object, factors: Mapping[str, Mapping[str, object]]) -> Published:
    if not isinstance(entry, dict) or not isinstance(entry.get("at"), dict) or entry.keys() - _PUBLISHED_KEYS:
        raise StudyError(f"{path}: a published figure has {_listed(_PUBLISHED_KEYS)}; got {shortened(entry)}")
    at = _unique(entry["at"].items(), f"{path}: two entries of 'at'")
    at = {name: str(level) for name, level in at.items()}
    if unknown := {name for name, level in at.items() if name != "when" and level not in factors.get(name, {})}:
        raise StudyError(
            f"{path}: a published figure is at no setting of the study: {_listed(unknown)} in {shortened(entry)}"
        )
    figures = {name: value for name, value in entry.items() if name not in ("at", "holds")}
    if not all(type(value) in (int, float) and math.isfinite(value) for value in figures.values()):
        raise StudyError(f"{path}: published figures must be numbers, got {shortened(entry)}")
    if not isinstance(entry.get("holds"), bool | None):
        raise StudyError(f"{path}: holds must be true or false, got {shortened(entry['holds'])}")
    return Published(**{**entry, "at": at})


def _check_config(config: Mapping[str, Any], name: str) -> None:
    """Check the parts of a configuration that a study adds to."""
    trainer = config.get("trainer") or {}
    if not isinstance(trainer, dict):
        raise StudyError(f"{name}: trainer must be a mapping, got {shortened(trainer)}")
    callbacks = trainer.get("callbacks") or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        path = callback.get("class_path") if isinstance(callback, dict) else callback
        options = callback.get("init_args") if isinstance(callback, dict) else None
        if not isinstance(path, str | None) or not isinstance(options or {}, dict):
            raise StudyError(
                f"{name}: an entry of trainer.callbacks is a class's name or {{class_path: ..., init_args: {{...}}}}, "
                f"got {shortened(callback)}"
            )


def with_overrides(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with some settings replaced; unchanged parts are shared with the given one.

    Args:
        config: nested mappings and lists.
        settings: values by dotted key; in a list the part of the key is a position. A missing mapping is made, a
            missing position is an error.

    Raises:
        StudyError: if a key leads through a value that is neither mapping nor list, or is too long.

    Example:
        >>> with_overrides({"trainer": {"callbacks": [{"k": 1}]}}, {"trainer.callbacks.0.k": 2, "seed": 3})
        {'trainer': {'callbacks': [{'k': 2}]}, 'seed': 3}
    """
    changed = dict(config)
    for key, value in settings.items():
        parts = str(key).split(".")
        if len(parts) > _MAX_PARTS:
            raise StudyError(f"the key {shortened(str(key))} has more than {_MAX_PARTS} parts")
        changed = _replaced(changed, parts, copy.deepcopy(value), str(key))
    return changed


def _replaced(place: Any, parts: Sequence[str], value: Any, key: str) -> Any:
    """A copy of a mapping or list with one entry replaced, at any depth."""
    if not parts:
        return value
    first, *rest = parts
    if isinstance(place, list):
        if not (first.isascii() and first.isdecimal() and len(first) < 10 and int(first) < len(place)):
            raise StudyError(
                f"the key {shortened(key)} asks for entry {first:.60} of a list of {len(place)}, counted from 0"
            )
        position = int(first)
        return [*place[:position], _replaced(place[position], rest, value, key), *place[position + 1 :]]
    if not isinstance(place, dict):
        raise StudyError(f"the key {shortened(key)} leads into {shortened(place)}, which has no settings")
    inner = place.get(first)
    return {**place, first: _replaced({} if inner is None and rest else inner, rest, value, key)}


def _listed(names: Set[Any]) -> str:
    listed = sorted(f"{name!s:.60}" for name in names)
    return ", ".join(listed[:20])
