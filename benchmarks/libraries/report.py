"""The page of outcomes."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.libraries.trial import OPTIONS, SOURCES, Run, Trial

_HEAD = """# Libraries written elsewhere

Written by `python -m benchmarks.libraries`. Each library trains a small model for two epochs (neuralforecast: 20 steps)
on the CPU, without a network. A library without a LightningModule of its own has its real model in a plain one
("wrapped"). One run has no callback, one has the callback with samples of the validation loader, the default, and one
with samples of the training loader (`dataloader="train"`). All start from the same seeds, and must end with the same
weights, states of optimizers, random generators, modes, hyperparameters and logged metrics, bit for bit.

The callback measures {k} eigenvalues on {n} samples, before the first step and at the end of each epoch. "At once"
means that no other option was needed. Otherwise the table names the option, and the message that asks for it stands
below the table. Products and seconds are medians over the measurements of a run; seconds are those of one processor.
"""


def report(trials: Sequence[Trial], *, not_run: Sequence[str]) -> str:
    """Return the page as Markdown."""
    lines = [
        _HEAD.format(k=OPTIONS["num_eigenvalues"], n=OPTIONS["num_samples"]),
        "| Library | Trainer of | Model | Data | The same bit for bit | Validation samples | Training samples "
        "| Products | Seconds |",
        "|---|---|---|---|---|---|---|---|---|",
        *map(_row, trials),
    ]
    if not_run:
        lines += ["", f"Not run: {', '.join(not_run)}."]
    messages = [text for trial in trials for text in _messages(trial)]
    if messages:
        lines += ["", "## Messages", "", *messages]
    return "\n".join(lines) + "\n"


def _row(trial: Trial) -> str:
    last = [next((run for run in reversed(trial.runs) if run.source == source), None) for source in SOURCES]
    measured = [run for run in last if run is not None and run.num_hvps is not None]
    cells = [
        f"{trial.name} {trial.version}",
        trial.trainer,
        trial.model,
        trial.data,
        _same(trial),
        *map(_measured, last),
        f"{measured[0].num_hvps:.0f}" if measured else "",
        f"{measured[0].seconds:.1f}" if measured and measured[0].seconds is not None else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _same(trial: Trial) -> str:
    if trial.irreproducible:
        return f"two runs without the callback differ: {', '.join(trial.irreproducible[:3])}"
    differing = [run for run in trial.runs if run.differs]
    return f"no: {', '.join(differing[0].differs[:3])}" if differing else "yes"


def _measured(run: Run | None) -> str:
    if run is None:
        return "not run"
    if run.error:
        return "refused"
    how = "at once" if run.remedy is None else f"with `{run.remedy}`"
    good = sum(slope is not None for slope in run.slopes)
    return how if run.measured else f"{good} of {len(run.slopes)} measurements {how}"


def _messages(trial: Trial) -> list[str]:
    """Return a line for each source of samples that did not do at once."""
    lines = {}
    for run in trial.runs:
        if not run.measured:
            message = run.error or "; ".join(run.reasons) or "no measurement was due"
            lines[message] = f"- **{trial.name}**, {_SOURCES[run.source]}: {message}"
    return list(lines.values())


_SOURCES = {"val": "validation samples", "train": "training samples"}
