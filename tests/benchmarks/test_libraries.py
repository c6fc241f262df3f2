"""The drill with other libraries: it sees what differs, and says which remedy was needed. No library is needed here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "libraries").exists(), reason="the benchmarks are not part of an installed package"
)

if (ROOT / "benchmarks" / "libraries").exists():
    from benchmarks.libraries import trial
    from benchmarks.libraries.library import MODULES, Library
    from benchmarks.libraries.report import report
    from benchmarks.libraries.training import Wrapped, train_from_scratch
    from benchmarks.libraries.trial import Run, Trial, differences


def test_every_library_has_a_module() -> None:
    for module in MODULES.values():
        assert "LIBRARY = Library(" in (ROOT / "benchmarks" / "libraries" / f"{module}.py").read_text("utf-8")


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        (torch.tensor([float("nan")]), torch.tensor([float("nan")]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor([1.0]), torch.tensor([1.0], dtype=torch.float64), False),
        (torch.zeros(2, 1), torch.zeros(1, 2), False),
        (1.0, 1, False),
        (torch.tensor(True), torch.tensor(True), True),
    ],
    ids=["NaN", "signed zero", "dtype", "shape", "type", "scalar"],
)
def test_states_are_compared_bit_for_bit(one: Any, other: Any, same: bool) -> None:
    first, second = ({"a": trial._frozen(value)} for value in (one, other))
    assert differences(first, second) == ([] if same else ["a"])


def test_a_missing_entry_is_a_difference() -> None:
    assert differences({"a": "1", "b": "2"}, {"a": "1", "c": "3"}) == ["b", "c"]


def module_and_data() -> tuple[Any, Any, Any]:
    data = TensorDataset(torch.randn(8, 2))
    module = Wrapped(torch.nn.Linear(2, 2), lambda model, batch: model(batch[0]).square().mean())
    return module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=4)


def train(callbacks: Sequence[Any]) -> None:
    train_from_scratch(module_and_data, callbacks, max_epochs=1)


def train_noticing_others(callbacks: Sequence[Any]) -> None:
    """A library whose weights depend on whether it has another callback."""

    def disturbed() -> tuple[Any, Any, Any]:
        module, *loaders = module_and_data()
        module.model.bias.data += len(callbacks)
        return module, *loaders

    train_from_scratch(disturbed, callbacks, max_epochs=1)


def tried(monkeypatch: pytest.MonkeyPatch, **fields: Any) -> Trial:
    library = Library(model="a line", data="noise", **{"train": train, **fields})
    monkeypatch.setattr(trial, "library", lambda name: library)
    return trial.run_trial("numpy")


@pytest.mark.slow
def test_a_run_that_needs_nothing_is_measured_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tried(monkeypatch, remedies={"seed=3": {"seed": 3}})
    assert [(run.source, run.remedy, run.differs) for run in result.runs] == [("val", None, []), ("train", None, [])]
    assert all(run.measured and len(run.slopes) == 2 and run.num_hvps for run in result.runs)
    assert "| yes | at once | at once |" in report([result], not_run=["zuko"])


@pytest.mark.slow
def test_remedies_are_tried_in_turn_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = {"batch_weight": lambda batch: None}
    result = tried(monkeypatch, setting=wrong, remedies={"still": wrong, "len": {"batch_weight": lambda b: 4.0}})
    assert [run.remedy for run in result.runs] == [None, "still", "len"] * 2
    assert [run.measured for run in result.runs] == [False, False, True] * 2
    text = report([result], not_run=[])
    assert "with `len`" in text
    assert "batch_weight returned None" in text


@pytest.mark.slow
def test_a_change_of_training_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    result = tried(monkeypatch, train=train_noticing_others)
    assert not result.irreproducible
    assert "weights/model.bias" in result.runs[0].differs
    assert "no: weights/model.weight" in report([result], not_run=[])


def test_runs_that_differ_by_themselves_are_told_apart() -> None:
    result = Trial("a", "1", "m", "d", irreproducible=["weights/x"], runs=[Run("val", None), Run("train", None)])
    text = report([result], not_run=["zuko"])
    assert "two runs without the callback differ: weights/x" in text
    assert "Not run: zuko." in text
