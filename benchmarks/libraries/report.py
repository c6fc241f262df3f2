"""The page of outcomes."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.libraries.trial import OPTIONS, Run, Trial

_HEAD = """# Libraries written elsewhere

Written by `python -m benchmarks.libraries`. Each library trains a small model for two epochs on the CPU, without a
network, once without the callback and once with it, from the same seeds. A library without a LightningModule of its
own has its real model in a plain one ("wrapped"). Both runs must end with the same weights, states of optimizers, random
generators, modes and logged metrics, bit for bit. The callback measures {k} eigenvalues on {n} samples, before the first
step and after each epoch. "At once" means without options for the library's sake; otherwise the options that
were needed stand in the table, and the message of the callback that asks for them below. Products and seconds are medians
over the measurements of a run, on one thread of a busy machine.
"""


def report(trials: Sequence[Trial], *, not_run: Sequence[str]) -> str:
    """Return the page as Markdown."""
    lines = [_HEAD.format(k=OPTIONS["num_eigenvalues"], n=OPTIONS["num_samples"])]
    lines += [
        "| Library | Trainer of | Model | Data | Training bit for bit the same | Measured | Products | Seconds |",
        "|---|---|---|---|---|---|---|---|",
        *map(_row, trials),
    ]
    if not_run:
        lines += ["", f"Not run: {', '.join(not_run)}."]
    asked = [_asked(trial) for trial in trials if len(trial.runs) > 1 or not trial.runs[-1].measured]
    if asked:
        lines += ["", "## Messages", "", *asked]
    return "\n".join(lines) + "\n"


def _row(trial: Trial) -> str:
    last = trial.runs[-1]
    cells = [
        f"{trial.name} {trial.version}",
        trial.trainer,
        trial.model,
        trial.data,
        _same(trial),
        _measured(last),
        "" if last.num_hvps is None else f"{last.num_hvps:.0f}",
        "" if last.seconds is None else f"{last.seconds:.1f}",
    ]
    return "| " + " | ".join(cells) + " |"


def _same(trial: Trial) -> str:
    differing = [run for run in trial.runs if run.error is None and run.differs]
    if differing:
        text = f"no: {', '.join(differing[0].differs[:3])}"
        return f"{text} (differs without the callback as well)" if trial.irreproducible else text
    ended = [run for run in trial.runs if run.error is None]
    return "yes" if ended else "the run is refused"


def _measured(run: Run) -> str:
    if not run.measured:
        return "no"
    return "at once" if run.remedy is None else f"with `{run.remedy}`"


def _asked(trial: Trial) -> str:
    first = trial.runs[0]
    message = first.error or "; ".join(first.reasons) or "no measurement was due"
    return f"- **{trial.name}**: {message}"
