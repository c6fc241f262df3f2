"""What a study consists of: a configuration, the factors that are varied, and the figures that it is compared with."""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import yaml

__all__ = ["RESERVED", "PlannedRun", "Printed", "Study", "StudyError", "load_study", "with_overrides"]

_KEYS = {"title", "base", "set", "seeds", "factors", "fitted", "known_to", "rows", "predict", "printed"}
_PRINTED_KEYS = {"at", "fit_error", "slope", "holds", "gap_exponent"}
_ROWS = ("last", "first and last", "all")
#: Columns of the results, which a factor cannot be called.
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
    """A study that can't be read or run; the message says what to do."""


@dataclass(frozen=True)
class Printed:
    """Figures of a publication for one setting.

    Attributes:
        at: the setting: a level for some of the factors, and ``when`` for the place in the run.
        fit_error: d_ks.
        slope: s_hat; ``None`` where none is printed.
        holds: whether the power law was accepted.
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
        config: what ``hessian-callback fit`` is to be given, without what depends on the folder.
    """

    name: str
    labels: Mapping[str, str]
    seed: int
    config: Mapping[str, Any] = field(repr=False)

    @property
    def digest(self) -> str:
        """A number that is the same for equal configurations."""
        text = json.dumps(self.config, sort_keys=True, default=str)
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Study:
    """A grid of runs; `load_study` reads one from a file.

    Attributes:
        name: the file's name without its ending.
        title: what it is about, for the tables.
        base: the configuration that all runs share.
        factors: levels by factor; of each level its settings, by dotted key.
        seeds: one run each, for every combination of levels.
        fitted: the K that power laws are fitted at, all to the same eigenvalues; empty: what was measured.
        known_to: relative error bound up to which an eigenvalue is fitted; ``None``: the ``rtol`` of its measurement.
        rows: which measurements the table shows: ``"last"``, ``"first and last"`` or ``"all"``.
        predict: whether the statistics are correlated with the test loss.
        printed: figures to compare with.
    """

    name: str
    title: str
    base: Mapping[str, Any] = field(repr=False)
    factors: Mapping[str, Mapping[str, Mapping[str, Any]]]
    seeds: Sequence[int]
    fitted: Sequence[int] = ()
    known_to: float | None = None
    rows: str = "last"
    predict: bool = False
    printed: Sequence[Printed] = ()

    def runs(self, only: Sequence[str] = (), seeds: Sequence[int] | None = None) -> list[PlannedRun]:
        """The runs, seed by seed, so that a study that is cut short has a bit of everything.

        Args:
            only: patterns for the names, with ``*``; empty: all.
            seeds: other seeds than the study's own.

        Raises:
            StudyError: if a pattern matches no run.
        """
        combinations = list(itertools.product(*[levels.items() for levels in self.factors.values()]))
        planned = []
        for seed in self.seeds if seeds is None else seeds:
            for combination in combinations:
                labels = {factor: level for factor, (level, _) in zip(self.factors, combination, strict=True)}
                config = copy.deepcopy(dict(self.base))
                for _, settings in combination:
                    config = with_overrides(config, settings)
                config["seed_everything"] = seed
                planned.append(PlannedRun(_run_name(labels, seed), labels, seed, config))
        for pattern in only:
            if not any(fnmatchcase(run.name, pattern) for run in planned):
                raise StudyError(f"no run of {self.name} is called {pattern!r}; --list shows the names")
        return [run for run in planned if not only or any(fnmatchcase(run.name, pattern) for pattern in only)]

    def printed_for(self, labels: Mapping[str, str]) -> Printed | None:
        """The printed figures for a setting, if there are any."""
        return next((entry for entry in self.printed if entry.matches(labels)), None)


def _run_name(labels: Mapping[str, str], seed: int) -> str:
    parts = [f"{factor} {level}" for factor, level in labels.items()] + [f"seed {seed}"]
    return "_".join(re.sub(r"[^\w.+]+", "-", part).strip("-") for part in parts)


def load_study(path: str | Path, overrides: Mapping[str, Any] | None = None) -> Study:
    """Read a study.

    The file is YAML with the keys

    - ``title``;
    - ``base``: a configuration for ``hessian-callback fit``, in place or as a file's name, which counts from the study;
    - ``set``: settings for all runs, by dotted key, as in ``trainer.callbacks.0.init_args.num_eigenvalues: 50``;
    - ``factors``: for each factor either ``{key: DOTTED.KEY, values: [...]}``, or ``{levels: {NAME: {DOTTED.KEY:
      VALUE, ...}, ...}}``; every combination of levels is a setting;
    - ``seeds``: a run for each of them in every setting;
    - ``fitted``: the numbers of eigenvalues that laws are fitted to, such as ``[50, 200]``;
    - ``known_to``: relative error bound up to which eigenvalues are fitted, instead of the measurement's own ``rtol``;
    - ``rows``: ``last``, ``first and last`` or ``all`` of the measurements stand in the table;
    - ``predict``: ``true`` for correlations with the test loss;
    - ``printed``: a list of ``{at: {FACTOR: LEVEL, when: ...}, fit_error: ..., slope: ..., holds: ...}``.

    Args:
        path: the file.
        overrides: settings by dotted key, applied after ``set`` and before the factors.

    Raises:
        StudyError: if something in it is not understood.
    """
    path = Path(path)
    content = _read_yaml(path)
    unknown = content.keys() - _KEYS
    if unknown:
        raise StudyError(f"{path}: unknown {_listed(unknown)}; a study has {_listed(_KEYS)}")
    missing = {"title", "base", "seeds"} - content.keys()
    if missing:
        raise StudyError(f"{path}: {_listed(missing)} is missing")
    base = content["base"]
    if isinstance(base, str):
        base = _read_yaml(path.parent / base)
    if not isinstance(base, dict):
        raise StudyError(f"{path}: base must be a configuration or the name of a file with one, got {base!r}")
    for key in ("set", "factors"):
        if not isinstance(content.get(key) or {}, dict):
            raise StudyError(f"{path}: {key} must be a mapping, got {content[key]!r}")
    base = with_overrides(with_overrides(base, content.get("set") or {}), overrides or {})
    factors = {str(name): _levels(path, name, entry) for name, entry in (content.get("factors") or {}).items()}
    if taken := RESERVED & factors.keys():
        raise StudyError(
            f"{path}: a factor cannot be called {_listed(taken)}, as a column of the results is; rename it"
        )
    seeds = content["seeds"]
    if not isinstance(seeds, list) or not seeds or not all(type(seed) is int and seed >= 0 for seed in seeds):
        raise StudyError(f"{path}: seeds must be a list of whole numbers, got {seeds!r}")
    fitted = content.get("fitted") or []
    if not isinstance(fitted, list) or not all(type(number) is int and number >= 3 for number in fitted):
        raise StudyError(f"{path}: fitted must be a list of numbers of eigenvalues, 3 at the least, got {fitted!r}")
    known_to = content.get("known_to")
    if known_to is not None and not (isinstance(known_to, float) and 0 < known_to < 1):
        raise StudyError(f"{path}: known_to must be a number between 0 and 1, got {known_to!r}")
    rows = content.get("rows", "last")
    if rows not in _ROWS:
        raise StudyError(f"{path}: rows must be one of {', '.join(_ROWS)}; got {rows!r}")
    printed = [_printed(path, entry, factors) for entry in content.get("printed") or []]
    study = Study(
        name=path.stem,
        title=str(content["title"]),
        base=base,
        factors=factors,
        seeds=seeds,
        fitted=fitted,
        known_to=known_to,
        rows=rows,
        predict=bool(content.get("predict", False)),
        printed=printed,
    )
    names = [run.name for run in study.runs()]
    if len(set(names)) != len(names):
        raise StudyError(f"{path}: two runs would have one name; let names of levels and seeds differ in letters")
    return study


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"there is no file {path}; paths count from the current folder, {Path.cwd()}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise StudyError(f"{path} can't be read: {error}") from error
    if not isinstance(content, dict):
        raise StudyError(f"{path} holds no settings; see example_configs/studies for what a study looks like")
    return content


def _levels(path: Path, name: object, entry: object) -> dict[str, dict[str, Any]]:
    if isinstance(entry, dict) and entry.keys() == {"key", "values"} and isinstance(entry["values"], list):
        return {str(value): {entry["key"]: value} for value in entry["values"]}
    levels = entry.get("levels") if isinstance(entry, dict) and entry.keys() == {"levels"} else None
    if isinstance(levels, dict) and all(isinstance(settings or {}, dict) for settings in levels.values()):
        return {str(level): dict(settings or {}) for level, settings in levels.items()}
    raise StudyError(
        f"{path}: factor {name!r} must be {{key: ..., values: [...]}} or {{levels: {{NAME: {{KEY: VALUE}}}}}}"
    )


def _printed(path: Path, entry: object, factors: Mapping[str, Mapping[str, object]]) -> Printed:
    if not isinstance(entry, dict) or not isinstance(entry.get("at"), dict) or entry.keys() - _PRINTED_KEYS:
        raise StudyError(f"{path}: a printed figure has {_listed(_PRINTED_KEYS)}; got {entry!r}")
    at = {str(name): str(level) for name, level in entry["at"].items()}
    if unknown := {name for name, level in at.items() if name != "when" and level not in factors.get(name, {})}:
        raise StudyError(f"{path}: a printed figure is at no setting of the study: {_listed(unknown)} in {entry!r}")
    figures = {name: value for name, value in entry.items() if name not in ("at", "holds")}
    if not all(isinstance(value, (int, float)) for value in figures.values()):
        raise StudyError(f"{path}: printed figures must be numbers, got {entry!r}")
    return Printed(**{**entry, "at": at})


def with_overrides(config: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return a configuration with some settings replaced.

    Args:
        config: nested mappings and lists.
        settings: values by dotted key; in a list the part of the key is a position. A missing mapping is made, a
            missing position is an error.

    Raises:
        StudyError: if a key leads through something that is neither mapping nor list.

    Example:
        >>> with_overrides({"trainer": {"callbacks": [{"k": 1}]}}, {"trainer.callbacks.0.k": 2, "seed": 3})
        {'trainer': {'callbacks': [{'k': 2}]}, 'seed': 3}
    """
    changed = copy.deepcopy(dict(config))
    for key, value in settings.items():
        *parents, last = str(key).split(".")
        place: Any = changed
        for part in parents:
            place = _step(place, part, key)
        if isinstance(place, list):
            place[_position(place, last, key)] = copy.deepcopy(value)
        elif isinstance(place, dict):
            place[last] = copy.deepcopy(value)
        else:
            raise StudyError(f"the key {key} leads into {place!r}, which has no settings")
    return changed


def _step(place: Any, part: str, key: str) -> Any:
    if isinstance(place, list):
        return place[_position(place, part, key)]
    if isinstance(place, dict):
        if place.get(part) is None:
            place[part] = {}
        return place[part]
    raise StudyError(f"the key {key} leads into {place!r}, which has no settings")


def _position(place: Sequence[Any], part: str, key: str) -> int:
    if not part.isdigit() or int(part) >= len(place):
        raise StudyError(f"the key {key} asks for entry {part} of a list of {len(place)}, counted from 0")
    return int(part)


def _listed(names: Set[str]) -> str:
    return ", ".join(sorted(map(str, names)))
