"""Runs in which the edge of stability was monitored, read from the numbers that loggers wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hessian_callback.reports.logged_scalars import LoggedValue, read_scalars
from hessian_callback.reports.run_files import Run

__all__ = ["EdgeRun", "find_edge_runs"]

_LOGS = ("*tfevents*", "metrics.csv")


@dataclass(frozen=True)
class EdgeRun:
    """The measurements of one `EdgeOfStabilityMonitor` in one run.

    Attributes:
        name: the run's folder, by its last two parts.
        folder: the folder.
        prefix: the monitor's prefix.
        ratios: the logged ratios.
        errors: bounds on their errors, by step.
        max_lrs: the largest stable learning rates, by step.
        losses: the losses on the monitor's samples, by step.
    """

    name: str
    folder: Path
    prefix: str
    ratios: Sequence[LoggedValue]
    errors: Mapping[int, float]
    max_lrs: Mapping[int, float]
    losses: Mapping[int, float]

    @property
    def lrs(self) -> dict[int, float]:
        """The learning rates, by step: the largest stable rate times the ratio."""
        return {r.step: self.max_lrs[r.step] * r.value for r in self.ratios if r.step in self.max_lrs}

    @property
    def first_above(self) -> int | None:
        """The first step with a ratio above 1; ``None`` if there is none."""
        return next((ratio.step for ratio in self.ratios if ratio.value > 1), None)


def find_edge_runs(folders: Iterable[Path], known: Iterable[Run] = ()) -> list[EdgeRun]:
    """Find the monitored runs in some folders and below them.

    Args:
        folders: run folders, or folders of run folders; those that do not exist have no runs.
        known: runs whose numbers were read before.

    Returns:
        One for each run and prefix, sorted by folder.
    """
    scalars = {run.folder: run.scalars for run in known}
    places = {path.parent for root in folders for pattern in _LOGS for path in root.rglob(pattern) if path.is_file()}
    found = []
    for folder in sorted(places | scalars.keys()):
        values = scalars[folder] if folder in scalars else read_scalars(folder).values
        for name in sorted(values):
            prefix, slash, quantity = name.rpartition("/")
            if slash and quantity == "ratio" and f"{prefix}/ratio_error" in values:
                errors, rates, losses = (
                    {value.step: value.value for value in values.get(f"{prefix}/{other}", ())}
                    for other in ("ratio_error", "max_lr", "loss")
                )
                short = "/".join(folder.parts[-2:])
                found.append(EdgeRun(short, folder, prefix, values[name], errors, rates, losses))
    return found
