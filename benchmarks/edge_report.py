"""Write the tables of docs/edge.md and docs/reproduction.md from the CSVs: python -m benchmarks.edge_report."""

from __future__ import annotations

import csv
import math
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent / "edge"
PAGES = [Path(__file__).parents[1] / "docs" / name for name in ("edge.md", "reproduction.md")]

#: Steps before a loss's rise in which an alarm counts as a warning.
HORIZON = 40
_MARKED = re.compile(r"(<!-- edge (\w+) -->\n).*?(<!-- end -->)", re.S)

Row = Mapping[str, str]


def read(name: str) -> list[Row]:
    path = FOLDER / f"{name}.csv"
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def grouped(rows: Iterable[Row], *names: str) -> dict[tuple[str, ...], list[Row]]:
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def table(header: str, rows: Iterable[Sequence[object]]) -> str:
    names = header.split("|")
    lines = ["| " + " | ".join(name.strip() for name in names) + " |", "|" + "---|" * len(names)]
    return "\n".join([*lines, *("| " + " | ".join(map(str, row)) + " |" for row in rows)])


# -- full-batch runs ---------------------------------------------------------------------------------------


def equilibrium() -> str:
    rows = []
    for (optimizer, lr, momentum), run in grouped(read("equilibrium"), "optimizer", "lr", "momentum").items():
        beta = float(momentum)
        adam = optimizer == "Adam"
        threshold = (2 + 2 * beta) / ((1 - beta if adam else 1) * float(lr))
        measured = [float(row["preconditioned_sharpness"]) for row in run]
        last = measured[-(len(measured) // 4) :]
        above = next((row["step"] for row in run if float(row["ratio"]) > 0.97), "not in this run")
        name = "Adam" if adam else ("gradient descent" if not beta else f"gradient descent, momentum {momentum}")
        rows.append(
            [
                name,
                lr,
                f"{threshold:.4g}",
                f"{min(measured):.4g}",
                f"{statistics.mean(last):.4g}",
                f"{statistics.mean(last) / threshold:.3f}",
                f"{min(last) / threshold:.2f}–{max(last) / threshold:.2f}",
                above,
            ]
        )
    return table(
        "full-batch run | lr | predicted edge | smallest before | mean of the last quarter | ratio | its range | "
        "first at .97",
        rows,
    )


# -- warnings ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A measured step of a run before its loss rises; ``left``: steps until then, infinite if it never does."""

    run: tuple[str, ...]
    step: int
    left: float
    signals: Mapping[str, float]


def points(rows: Iterable[Row]) -> list[Point]:
    found = []
    for key, run in grouped(rows, "task", "optimizer", "lr", "jump", "seed").items():
        rise = rise_of(run)
        earlier: dict[str, list[float]] = {"ratio": [], "gradient_norm": []}
        for row in run:
            step = int(row["step"])
            if step >= rise:
                break
            signals = {"ratio": float(row["ratio"]), "z-score of the loss": float(row["zscore"])}
            for column, name in (("ratio", "ratio"), ("gradient_norm", "gradient norm")):
                now, before = float(row[column]), earlier[column]
                signals[name] = now
                signals[f"{name} over its median so far"] = now / statistics.median(before) if before else math.nan
                before += [now] if math.isfinite(now) else []
            found.append(Point(key, step, rise - step, signals))
    return found


def rise_of(run: Sequence[Row]) -> float:
    """The first step at which the loss on the fixed samples exceeds its minimum so far by half and by .1."""
    least = math.inf
    for row in run:
        loss = float(row["full_loss"])
        if not math.isfinite(loss) or loss > 1.5 * least + 0.1:
            return float(row["step"])
        least = min(least, loss)
    return math.inf


def value(point: Point, signal: str) -> float:
    """An unknown signal gives no alarm."""
    found = point.signals[signal]
    return found if not math.isnan(found) else -math.inf


def auc(signal: str, positive: Sequence[Point], negative: Sequence[Point]) -> float:
    """The probability that the signal is larger before a rise than on a healthy step."""
    wins = sum(
        (value(p, signal) > value(n, signal)) + 0.5 * (value(p, signal) == value(n, signal))
        for p in positive
        for n in negative
    )
    return wins / (len(positive) * len(negative))


def warning() -> str:
    every = points(read("warning"))
    if not every:
        return "not run"
    parts: dict[str, Callable[[Point], bool]] = {
        "all": lambda point: True,
        "digits": lambda point: point.run[0] == "digits",
        "text": lambda point: point.run[0] == "text",
        "rates that jump": lambda point: float(point.run[3]) > 1,
    }
    rows = []
    for part, belongs in parts.items():
        chosen = [point for point in every if belongs(point)]
        negative = [point for point in chosen if point.left > HORIZON]
        rate = share(negative, "ratio", 1.0)
        for signal in sorted(chosen[0].signals, reverse=True):
            for rule, threshold in thresholds(signal, negative, rate):
                rows.append(summary(signal, rule, threshold, part, chosen))
    return table(
        "runs | signal | alarm at | false alarms on healthy steps | rises warned of | median lead, steps | area under "
        "the curve",
        rows,
    )


def thresholds(signal: str, negative: Sequence[Point], rate: float) -> list[tuple[str, float]]:
    """The edge itself, and for each signal the threshold with a false alarm on 5 % of the healthy steps."""
    found = (
        [("1, the edge", 1.0)] if signal == "ratio" else [(f"{rate:.1%} false alarms", at_rate(signal, negative, rate))]
    )
    return [*found, ("5 % false alarms", at_rate(signal, negative, 0.05))]


def at_rate(signal: str, negative: Sequence[Point], rate: float) -> float:
    ordered = sorted((value(point, signal) for point in negative), reverse=True)
    return ordered[min(int(rate * len(ordered)), len(ordered) - 1)]


def share(chosen: Sequence[Point], signal: str, threshold: float) -> float:
    return sum(value(point, signal) > threshold for point in chosen) / len(chosen) if chosen else math.nan


def summary(signal: str, rule: str, threshold: float, part: str, chosen: Sequence[Point]) -> list[object]:
    negative = [point for point in chosen if point.left > HORIZON]
    before = [point for point in chosen if point.left <= HORIZON]
    leads = []
    runs: dict[tuple[str, ...], list[Point]] = {}
    for point in before:
        runs.setdefault(point.run, []).append(point)
    for run in runs.values():
        alarms = [point.left for point in run if value(point, signal) > threshold]
        leads += [max(alarms)] if alarms else []
    shown = rule if rule.startswith("1,") else f"{threshold:.3g} ({rule})"
    return [
        part,
        signal,
        shown,
        f"{share(negative, signal, threshold):.1%} of {len(negative)}",
        f"{len(leads)} of {len(runs)}",
        f"{statistics.median(leads):g}" if leads else "–",
        f"{auc(signal, before, negative):.2f}" if before and negative else "–",
    ]


def runs_table() -> str:
    """One row for each setting: the largest ratio before a rise, and when the loss rose."""
    rows = []
    for (task, optimizer, lr, jump), runs in grouped(read("warning"), "task", "optimizer", "lr", "jump").items():
        ratios, rises = [], []
        for run in grouped(runs, "seed").values():
            rise = rise_of(run)
            known = [float(row["ratio"]) for row in run if int(row["step"]) < rise]
            ratios.append(max((ratio for ratio in known if math.isfinite(ratio)), default=math.nan))
            rises.append("never" if rise == math.inf else f"{rise:g}")
        rows.append([task, optimizer, lr, jump, ", ".join(f"{ratio:.2g}" for ratio in ratios), ", ".join(rises)])
    return table("task | optimizer | lr | jump | largest ratio before (by seed) | loss rises at step", rows)


# -- mini-batches ------------------------------------------------------------------------------------------


def noise() -> str:
    rows = []
    for (optimizer, size), runs in grouped(read("noise"), "optimizer", "batch_size").items():
        settled, rises = ([float(row[name]) for row in runs] for name in ("settled_ratio", "ratio_at_rise"))
        rows.append([optimizer, size, ", ".join(f"{v:.2f}" for v in settled), ", ".join(f"{v:.2f}" for v in rises)])
    return table("optimizer | batch | ratio at which the run settles (by seed) | ratio from which the loss rises", rows)


TABLES = {"equilibrium": equilibrium, "warning": warning, "runs": runs_table, "noise": noise}


def main() -> None:
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        page.write_text(
            _MARKED.sub(lambda match: f"{match[1]}\n{TABLES[match[2]]()}\n\n{match[3]}", text), encoding="utf-8"
        )


if __name__ == "__main__":
    main()
