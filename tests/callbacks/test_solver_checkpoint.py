"""Measurements whose process was killed are continued by the callback, with the same result."""

from __future__ import annotations

import signal
import warnings
from dataclasses import replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from hessian_callback.algorithms import solver_checkpoint
from hessian_callback.algorithms.lanczos import top_eigenvalues
from hessian_callback.measurement import solvers
from tests.helpers.faults import Killed, full_disk
from tests.helpers.killed_measurement import fit
from tests.helpers.launched import launch


@pytest.fixture
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Save at every opportunity, not every five minutes."""
    monkeypatch.setattr(solvers, "top_eigenvalues", partial(top_eigenvalues, checkpoint_every=0))


def fitted(*args: Any, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "(?!.*(starts over|saved|saves))")
        return fit(*args, **options)


def die() -> None:
    raise Killed


def without_times(callback: Any) -> list[Any]:
    return [
        replace(entry, seconds=0.0, groups={name: replace(group, seconds=0.0) for name, group in entry.groups.items()})
        for entry in callback.history
    ]


def test_a_measurement_whose_process_was_killed_goes_on(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed at the twelfth product of step 4; the run that is started again comes to the same weights."""
    process = launch("tests.helpers.killed_measurement", tmp_path / "solver")
    whole = fitted(tmp_path / "other")
    output = process.finish()
    assert process.returncode == -signal.SIGKILL, output
    assert [path.name for path in (tmp_path / "solver").iterdir()] == ["hessian-step=4"]
    lines: list[str] = []
    monkeypatch.setattr("hessian_callback.callbacks.trainer_observer.announce", lambda _, line: lines.append(line))
    resumed = fitted(tmp_path / "solver", verbose=True)
    assert f"hessian: continues with product 12, by {tmp_path / 'solver' / 'hessian-step=4'}" in lines
    assert [resumed.steps.count(step) for step in (0, 4)] == [whole.steps.count(0), whole.steps.count(4) - 11]
    assert without_times(resumed) == without_times(whole)
    assert list((tmp_path / "solver").iterdir()) == []


def test_a_measurement_of_other_weights_warns_and_starts_over(tmp_path: Path, often: None) -> None:
    with pytest.raises(Killed):
        fitted(tmp_path / "solver", (4, 12), die)
    with pytest.warns(UserWarning, match=r"hessian: the measurement starts over: .* is of another matrix") as caught:
        other = fitted(tmp_path / "solver", weights=2)
    assert sum("starts over" in str(warning.message) for warning in caught) == 1
    assert without_times(other) == without_times(fitted(tmp_path / "other", weights=2))
    assert list((tmp_path / "solver").iterdir()) == []


def test_parts_have_folders_of_their_own(tmp_path: Path, often: None) -> None:
    options: dict[str, Any] = {"groups": {"last": r"^net\.4"}, "prefix": "curvature/hessian"}
    whole = fitted(tmp_path / "other", **options)
    for product in (12, whole.history[-1].num_hvps):
        with pytest.raises(Killed):
            fitted(tmp_path / "solver", (4, product), die, **options)
        names = [path.name for path in (tmp_path / "solver").iterdir()]
        assert names == ["curvature%2Fhessian-step=4" + ("" if product == 12 else "-group=last")]
    assert without_times(fitted(tmp_path / "solver", **options)) == without_times(whole)
    assert list((tmp_path / "solver").iterdir()) == []


def test_a_measurement_that_fails_leaves_nothing_unless_the_run_ends_with_it(tmp_path: Path, often: None) -> None:
    def fail() -> None:
        raise OSError("no reading")

    callback = fitted(tmp_path, (4, 12), fail)
    assert callback.history[1].reason == "OSError: no reading"
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="no reading"):
        fitted(tmp_path, (4, 12), fail, on_error="raise")
    assert [path.name for path in tmp_path.iterdir()] == ["hessian-step=4"]


def test_a_measurement_that_cannot_be_saved_is_made(
    tmp_path: Path, often: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = without_times(fitted(tmp_path / "other"))
    with monkeypatch.context() as patch:
        patch.setattr(solver_checkpoint.os, "fsync", partial(full_disk, count(7, -1)))
        with pytest.warns(UserWarning, match="could not be saved") as caught:
            callback = fitted(tmp_path / "full")
    # The first measurement fails to save; the second finds the disk full before its first product.
    messages = [str(warning.message) for warning in caught]
    assert sum("continues without further saves" in message for message in messages) == 1
    assert sum("the measurement is not saved: the folder" in message for message in messages) == 1
    assert without_times(callback) == whole
    assert list((tmp_path / "full").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"the measurement is not saved: the folder .* can't be used"):
        assert without_times(fitted(tmp_path / "file" / "solver", root=tmp_path / "other")) == whole
