"""The parsers, each with inputs and the exceptions that it documents; anything else that it raises is a finding."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import yaml
from hypothesis import strategies as st

import hessian_callback
from benchmarks.fuzz.inputs import changed_state, mutated, odd_values
from hessian_callback.algorithms.density import SpectralDensity
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.measurement.history import (
    FILE_NAME,
    HistoryError,
    HistoryWriter,
    history_from_state,
    read_histories,
)
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.reports.logged_scalars import LoggedScalars, losses_at, read_scalars
from hessian_callback.reports.report import write_report
from hessian_callback.studies.definition import StudyError, load_study
from hessian_callback.studies.one_run import complete_config, settings_text

__all__ = ["TARGETS", "Target"]

# Notes and messages longer than this would fill a page or a terminal.
MOST_CHARACTERS = 4000


@dataclass(frozen=True)
class Target:
    """A parser to be fuzzed.

    Attributes:
        inputs: strategy for its inputs.
        run: parse an input; return ``"read"`` or ``"refused"``, and raise for a finding.
        seeds: valid files, if the inputs are bytes.
    """

    inputs: st.SearchStrategy[Any]
    run: Callable[[Any], str]
    seeds: Sequence[bytes] = ()


def measurement(step: int = 3, **options: Any) -> Measurement:
    """A measurement with everything that a state may hold."""
    values = torch.tensor([3.0, 2.0, 0.5, 1e-300], dtype=torch.float64)
    spectrum = Spectrum(
        eigenvalues=values,
        error_bounds=values / 300,
        converged=torch.tensor([True, True, True, False]),
        rtol=0.01,
        missed_probability=1e-4,
        num_matvecs=40,
        stopped="max_matvecs",
        rounding=1e-12,
        symmetry_defect=0.0,
        ritz_values=values,
    )
    found: dict[str, Any] = {"epoch": 1, "step": step, "when": "step", "reason": None, "seconds": 1 / 3, **options}
    return Measurement(spectrum=spectrum, fit=fit_power_law(values[:3]), **found)


def rich() -> Measurement:
    """A measurement with comparisons, groups and a density."""
    return measurement(
        loss=float("nan"),
        comparisons={"trace": float("inf"), "slope_half_1": 0.1},
        not_compared={"gradients": "a reason\nof “two” lines"},
        density=SpectralDensity(torch.rand(2, 3).double(), torch.rand(2, 3), size=9, rounding=1e-9, num_matvecs=6),
        groups={"head": measurement(), "body": measurement(reason="failed")},
    )


def check_measurement(entry: Measurement) -> None:
    """Use a measurement that was read as callbacks and reports use it."""
    assert len(entry.summary()) > 0
    assert all(isinstance(value, float) for value in entry.scalars().values())
    assert isinstance(entry.location, str)
    same = replace(entry, loss=None, comparisons={}, groups={})  # NaN is not equal to itself.
    assert Measurement.from_state(same.to_state()).to_state().keys() == same.to_state().keys()
    hash(entry)


def check_message(error: Exception, remedy: str) -> None:
    """Check that an error names its remedy and is short."""
    assert remedy in str(error)
    assert len(str(error)) < MOST_CHARACTERS


def run_state(state: Any) -> str:
    """Read a callback's checkpoint state."""
    try:
        history = history_from_state(state)
    except ValueError as error:
        check_message(error, "resume with")
        return "refused"
    for entry in history:
        check_measurement(entry)
    return "read"


def run_history(data: bytes) -> str:
    """Read a history file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, FILE_NAME)
        path.write_bytes(data)
        try:
            stored = read_histories(path)
        except HistoryError as error:
            check_message(error, "read the folder with the release that wrote it")
            return "refused"
        assert sum(map(len, stored.notes)) < MOST_CHARACTERS
        for history in stored.histories.values():
            for entry in history:
                check_measurement(entry)
            if history:
                HistoryWriter("h").write([folder], history)
                read_histories(path)
    return "read"


def states() -> list[Any]:
    """Checkpoint states of a callback."""
    plain = {"version": 1, "history": [measurement(1).to_state(), rich().to_state()], "time": {"spent": 1.0}}
    return [plain, {"version": 1, "history": [], "time": {"spent": 1.0}}]


def histories() -> list[bytes]:
    """History files: of one run, of a resumed one, and of two callbacks."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        first = [measurement(1), measurement(2)]
        HistoryWriter("h", run="a").write([folder], first)
        found.append(Path(folder, FILE_NAME).read_bytes())
        HistoryWriter("h", run="b").write([folder], [*first, rich()])
        found.append(Path(folder, FILE_NAME).read_bytes())
        HistoryWriter("other", run="a").write([folder], [measurement(1, when="validate")])
        found.append(Path(folder, FILE_NAME).read_bytes())
    return found


def run_csv(data: bytes) -> str:
    """Read a metrics.csv, and find the losses of measurements in it."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "metrics.csv").write_bytes(data)
        found = read_scalars(Path(folder))
    check_scalars(found)
    return "read" if found.values else "refused"


def run_events(data: bytes) -> str:
    """Read a file of TensorBoard's events."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "events.out.tfevents.1.host").write_bytes(data)
        found = read_scalars(Path(folder))
    check_scalars(found)
    return "read" if found.values else "refused"


def check_scalars(found: LoggedScalars) -> None:
    """Check what readers of scalars rely on: finite steps that ascend, and numbers."""
    history = [measurement(step, when=when, epoch=step) for step, when in ((0, "fit_start"), (1, "epoch"), (9, "step"))]
    assert sum(map(len, found.notes)) < MOST_CHARACTERS
    for name, values in found.values.items():
        assert isinstance(name, str)
        assert all(one.step < other.step for one, other in pairwise(values))
        assert all(isinstance(value.value, float) and isinstance(value.epoch, int | None) for value in values)
        losses = losses_at(history, values)
        assert len(losses) == len(history)
        assert {loss for loss in losses if loss is not None} <= {value.value for value in values} or any(
            value.value != value.value for value in values
        )


def run_report(files: tuple[bytes, bytes, str]) -> str:
    """Write the report of a run with a changed history and table, beside an unchanged run."""
    history, table, name = files
    with tempfile.TemporaryDirectory() as root:
        for folder, lines in ((Path(root, "runs", name), history), (Path(root, "runs", "whole"), histories()[0])):
            folder.mkdir(parents=True)
            (folder / FILE_NAME).write_bytes(lines)
        Path(root, "runs", name, "metrics.csv").write_bytes(table)
        written = write_report([Path(root, "runs")], Path(root, "page.html"))
        page = written.html.read_text(encoding="utf-8")
    assert "<b>&" not in page.replace("<b>&ndash;", "")
    assert len(page) < 3_000_000
    assert written.num_runs >= 1
    return "refused" if written.left_out else "read"


def run_study(data: bytes) -> str:
    """Read a study, and plan its runs."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "study.yaml")
        path.write_bytes(data)
        try:
            study = load_study(path)
        except StudyError as error:
            check_message(error, "")
            return "refused"
        runs = study.runs()
        assert len({run.name for run in runs}) == len(runs) <= 10_000
        digest = runs[0].digest
        config = complete_config(runs[0].config, Path(folder))
        assert settings_text(config, digest).startswith("# digest: ")
    return "read"


#: Classes whose constructors check their options.
CONSTRUCTORS = [
    *("PowerLawHessianCallback", "PowerLawEarlyStopping", "Lanczos", "PublishedProtocol", "Density", "Trace"),
    *("FrobeniusNorm", "Norms", "NumericalInterval", "OutlierRatio", "SplitHalf", "Subspace"),
    *("PowerLawSlope", "PowerLawFitError"),
]
#: Options that they require.
REQUIRED: dict[str, dict[str, Any]] = {"OutlierRatio": {"num_classes": 3}, "PowerLawEarlyStopping": {"mode": "min"}}
#: Values that one option or another takes, so that several options are read together.
USUAL_VALUES = (1, 3, 0.5, True, None, "val", "train_loss", "trace", "raise", "min", "^0", [1, 3], {"head": "^head"})


def options_of(name: str) -> list[str]:
    """Return the names of the options of a constructor."""
    parameters = inspect.signature(getattr(hessian_callback, name)).parameters.values()
    return [one.name for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)]


OPTIONS = {name: names for name in CONSTRUCTORS if (names := options_of(name))}


@st.composite
def options(draw: st.DrawFn) -> tuple[str, dict[str, Any]]:
    """Draw a class, and values of up to four of its options."""
    name = draw(st.sampled_from(sorted(OPTIONS)))
    chosen = draw(st.lists(st.sampled_from(OPTIONS[name]), max_size=4, unique=True))
    return name, {option: draw(odd_values() | st.sampled_from(USUAL_VALUES)) for option in chosen}


def run_options(drawn: tuple[str, dict[str, Any]]) -> str:
    """Construct an object; an error must be of a documented type and name one of the options."""
    name, given = drawn
    try:
        getattr(hessian_callback, name)(**{**REQUIRED.get(name, {}), **given})
    except (ValueError, TypeError) as error:
        check_message(error, "")
        if not any(option in str(error) for option in OPTIONS[name]):
            raise AssertionError("the message names no option") from error
        return "refused"
    return "read"


def csv_files() -> list[bytes]:
    """Tables as CSVLogger writes them."""
    table = b"epoch,step,train_loss,val_loss\r\n0,0,1.5,\r\n0,1,,1.25\r\n1,2,1e-05,\r\n1,3,,nan\r\n"
    return [table, b"\xef\xbb\xbf" + table.replace(b"\r\n", b"\n"), table.decode().encode("utf-16")]


def event_files() -> list[bytes]:
    """A file of events as TensorBoardLogger writes it."""
    from torch.utils.tensorboard import SummaryWriter

    with tempfile.TemporaryDirectory() as folder:
        with SummaryWriter(folder) as writer:
            for step in range(4):
                writer.add_scalar("epoch", step // 2, step)
                writer.add_scalar("val_loss", 1 / (1 + step), step)
        (path,) = Path(folder).glob("*tfevents*")
        return [path.read_bytes()]


def study_files() -> list[bytes]:
    """A study with every key, one without factors, and one with aliases."""
    whole = {
        "title": "A study",
        "base": {"model": {"width": 1}, "trainer": {"callbacks": [{"class_path": "a.B", "init_args": {"k": 1}}]}},
        "set": {"trainer.callbacks.0.init_args.k": 5},
        "seeds": [3, 4],
        "factors": {
            "width": {"key": "model.width", "values": [10, 20]},
            "rate": {"levels": {"fast": {"model.rate": 1.0}, "slow": {"model.rate": 0.1}}},
        },
        "fitted": [50, 200],
        "fit_rtol": 0.05,
        "rows": "all",
        "predict": True,
        "published": [{"at": {"width": 10, "when": "trained"}, "fit_error": 0.1, "slope": 1.0, "holds": True}],
    }
    plain = {name: whole[name] for name in ("title", "base", "seeds")}
    aliases = b"title: x\nbase: {a: &a {b: 1}, c: {<<: *a, d: 2}, e: [*a, *a]}\nseeds: [0]\nfactors:\n"
    aliases += b"  f: {levels: {g: &g {a.b: 2}, h: {<<: *g, c.d: [1]}}}\n"
    return [yaml.safe_dump(whole).encode(), yaml.safe_dump(plain).encode(), aliases]


def of_bytes(seeds: Sequence[bytes], run: Callable[[bytes], str]) -> Target:
    """A parser of files, fed with changed copies of valid ones."""
    return Target(mutated(seeds), run, seeds)


TARGETS: dict[str, Callable[[], Target]] = {
    "state": lambda: Target(changed_state(states()), run_state),
    "history": lambda: of_bytes(histories(), run_history),
    "csv": lambda: of_bytes(csv_files(), run_csv),
    "events": lambda: of_bytes(event_files(), run_events),
    "study": lambda: of_bytes(study_files(), run_study),
    "options": lambda: Target(options(), run_options),
    "report": lambda: Target(
        st.tuples(
            mutated(histories()), mutated(csv_files()), st.sampled_from(["a", "$\\frac$", "<b>&\"'", "_x", "é\u202e"])
        ),
        run_report,
    ),
}
