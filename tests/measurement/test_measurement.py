"""The record of a measurement: what it says, and that a checkpoint gives it back."""

from __future__ import annotations

import copy
import dataclasses
import io
import re
from typing import Any

import pytest
import torch

from hessian_callback.algorithms.density import SpectralDensity
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.measurement.history import history_from_state
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.power_law.fit import fit_power_law


def measurement(num_fitted: int = 20, reason: str | None = None, **changes: Any) -> Measurement:
    values = 3 * torch.arange(1, 21, dtype=torch.float64) ** -1.2
    converged = torch.arange(20) < num_fitted
    spectrum = Spectrum(
        # A view into more, as a solver may return it.
        eigenvalues=torch.cat([values, torch.zeros(1000, dtype=torch.float64)])[:20],
        error_bounds=1e-3 * values,
        converged=converged,
        missed_probability=1e-4,
        num_matvecs=70,
        stopped="converged",
        rounding=1e-9,
        symmetry_defect=1e-8,
        ritz_values=values,
        rtol=1e-2,
        eigenvectors=torch.zeros(50, 20),
    )
    fit = fit_power_law(values[:num_fitted]) if num_fitted >= 3 else None
    fields = {
        "epoch": 2,
        "step": 30,
        "when": "epoch",
        "spectrum": spectrum,
        "fit": fit,
        "reason": reason,
        "seconds": 1.25,
        "num_parameters": 50,
        "num_samples": 64,
        "loss": 0.5,
        "engine": "double_backward",
    }
    return Measurement(**{**fields, **changes})


CASES = {
    "logged": measurement(),
    "fewer": measurement(12, "only 12 of 20"),
    "no fit": measurement(1, "only 1 of 20"),
    "compared": measurement(
        comparisons={"trace": 7.5, "slope_half_1": 1.25},
        not_compared={"subspace": "not all converged"},
        density=SpectralDensity(
            nodes=torch.tensor([[3.0, -1.0]] * 2, dtype=torch.float64),
            weights=torch.tensor([[0.25, 0.75]] * 2, dtype=torch.float64),
            size=50,
            rounding=1e-9,
            num_matvecs=4,
        ),
        groups={"head": measurement(num_parameters=7), "body": measurement(1, "only 1 of 20")},
    ),
    "paper": measurement(mode="paper"),
    "failed": measurement(spectrum=None, fit=None, reason="the loss is NaN", num_parameters=None, num_samples=None),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_gives_it_back(case: str) -> None:
    before = CASES[case]
    file = io.BytesIO()
    torch.save(before.to_state(), file)
    assert file.tell() < 5000 * (1 + len(before.groups))  # Neither eigenvectors nor the storage behind a view.
    file.seek(0)
    after = Measurement.from_state(torch.load(file, weights_only=True))
    assert after == before
    assert hash(after) == hash(before)
    assert after.fit == before.fit
    assert after.scalars() == before.scalars()
    assert after.summary() == before.summary()


def test_what_is_logged() -> None:
    logged = CASES["logged"]
    assert logged.logged
    assert logged.scalars() == {
        "slope": logged.fit.slope,
        "fit_error": logged.fit.fit_error,
        "slope_stderr": logged.fit.slope_stderr,
        "slope_low": logged.fit.slope_interval()[0],
        "slope_high": logged.fit.slope_interval()[1],
        "critical_distance": logged.fit.critical_distance_fitted,
        "critical_distance_paper": logged.fit.critical_distance_paper,
        "density_exponent": logged.fit.density_exponent,
        "lambda_max": 3.0,
        "num_fitted": 20.0,
        "num_hvps": 70.0,
        "seconds": 1.25,
    }
    # No slope at another K, and no number in the place of one that does not exist.
    assert CASES["fewer"].scalars() == {"lambda_max": 3.0, "num_fitted": 12.0, "num_hvps": 70.0, "seconds": 1.25}
    assert CASES["no fit"].scalars()["num_fitted"] == 0
    assert CASES["failed"].scalars() == {"seconds": 1.25}
    assert measurement(0, "nothing").lambda_max is None


@pytest.mark.parametrize(
    ("case", "text"),
    [
        ("logged", "epoch 2, step 30: slope 1.0"),
        ("fewer", "K = 12, 70 HVPs, 1.2 s; not logged (only 12 of 20)"),
        ("no fit", "epoch 2, step 30: no slope (only 1 of 20), 70 HVPs, 1.2 s"),
        ("failed", "epoch 2, step 30: no slope (the loss is NaN), 1.2 s"),
        ("paper", "K = 20, paper protocol, 70 HVPs, 1.2 s"),
        ("compared", "70 HVPs, 1.2 s; head: slope 1.0"),
        ("compared", "; body: no slope"),
    ],
)
def test_summary(case: str, text: str) -> None:
    assert text in CASES[case].summary()


def test_comparisons_and_groups_are_logged_under_their_names() -> None:
    compared, plain = CASES["compared"].scalars(), CASES["logged"].scalars()
    assert compared.pop("trace") == 7.5
    assert compared.pop("slope_half_1") == 1.25
    groups = {name: compared.pop(name) for name in list(compared) if "/" in name}
    assert compared == plain
    # Of the one all that is logged of it, of the other what there is, and the seconds of neither.
    assert {f"{name}/head" for name in plain if name != "seconds"} == {n for n in groups if n.endswith("/head")}
    assert {n for n in groups if n.endswith("/body")} == {"lambda_max/body", "num_fitted/body", "num_hvps/body"}
    assert groups["slope/head"] == plain["slope"]
    # What is said of a slope that was not logged is not logged either.
    unlogged = dataclasses.replace(CASES["compared"], reason="only 12 of 20").scalars()
    assert "trace" in unlogged
    assert "slope_half_1" not in unlogged


def test_a_verdict_names_the_critical_value_it_used() -> None:
    strict, paper = CASES["logged"], CASES["paper"]
    assert strict.critical_distance == strict.fit.critical_distance_fitted
    assert paper.critical_distance == pytest.approx(1.36 / 20**0.5)
    assert paper.scalars()["critical_distance"] == paper.critical_distance
    for one in (strict, paper):
        assert one.within_critical_distance is (one.fit_error < one.critical_distance)
        assert torch.equal(one.fitted_eigenvalues, one.spectrum.eigenvalues)
    failed = CASES["failed"]
    assert failed.critical_distance is None
    assert failed.within_critical_distance is None
    assert len(failed.fitted_eigenvalues) == 0


def test_a_state_from_before_there_were_comparisons() -> None:
    state = CASES["logged"].to_state()
    for name in ("mode", "comparisons", "not_compared", "groups", "density"):
        del state[name]
    assert Measurement.from_state(state) == CASES["logged"]


def test_equality_is_of_values() -> None:
    one = CASES["logged"]
    assert one == measurement()
    assert one != dataclasses.replace(one, step=31)
    assert one != dataclasses.replace(one, spectrum=dataclasses.replace(one.spectrum, num_matvecs=71))
    assert one != "a measurement"


@pytest.mark.parametrize(
    ("where", "words"),
    [
        ({"when": "fit_start", "step": 0}, "before training"),
        ({"when": "fit_start", "step": 7}, "resumed at step 7"),
        ({"when": "epoch"}, "epoch 2"),
        ({"when": "step"}, "step 30"),
        ({"when": "fit_end"}, "end of training"),
        ({"when": "validate"}, "validation"),
    ],
)
def test_location(where: dict[str, Any], words: str) -> None:
    assert measurement(**where).location == words


# -- states that no release wrote ----------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")
STATE = CASES["compared"].to_state()


def changed(place: str, value: Any) -> dict[str, Any]:
    """The state of a measurement with one entry replaced, or removed by ``...``."""
    state = copy.deepcopy(STATE)
    *parents, last = place.split(".")
    inner = state
    for name in parents:
        inner = inner[name]
    if value is ...:
        del inner[last]
    else:
        inner[last] = value
    return state


WRONG = [
    ("epoch", "3", "epoch must be int, got '3'"),
    ("epoch", True, "epoch must be int, got True"),
    ("epoch", -1, "epoch must be at least 0, got -1"),
    ("epoch", 2**63, "epoch must be int, got"),
    ("step", 1.5, "step must be int, got 1.5"),
    ("step", 10**5000, "step must be int, got a value of type int"),
    ("step", ..., "lacks step"),
    ("when", "later", "when must be Literal"),
    ("when", ["epoch"], "when must be Literal"),
    ("seconds", NAN, "seconds must be at least 0, got nan"),
    ("seconds", INF, "seconds must be finite, got inf"),
    ("seconds", None, "seconds must be float, got None"),
    ("world_size", 0, "world_size must be at least 1, got 0"),
    ("reason", 3, "reason must be str | None, got 3"),
    ("mode", "other", "mode must be Literal"),
    ("comparisons", {"trace": "7"}, "comparisons must be"),
    ("comparisons", {3: 7.0}, "comparisons must be"),
    ("comparisons", None, "comparisons must be"),
    ("not_compared", {"a": 3}, "not_compared must be"),
    ("groups", [1], "groups must be a mapping to measurements without groups"),
    ("groups", {"a": 3}, "the state of a measurement must be a mapping, got 3"),
    ("groups", {"a": STATE}, "groups must be a mapping to measurements without groups"),
    ("num_fitted", "20", "num_fitted must be None or lie between 1 and 20"),
    ("num_fitted", 21, "num_fitted must be None or lie between 1 and 20, the number of eigenvalues, got 21"),
    ("num_fitted", -3, "num_fitted must be None or lie between 1 and 20"),
    ("num_fitted", ..., "lacks num_fitted"),
    ("spectrum", [1], "the state of a Spectrum must be a mapping"),
    ("spectrum", None, "num_fitted must be None or lie between 1 and 0"),
    ("spectrum.eigenvalues", [1.0], "eigenvalues must be Tensor"),
    ("spectrum.eigenvalues", torch.ones(2, 2), "eigenvalues must be a vector of floats, got a tensor of shape (2, 2)"),
    ("spectrum.eigenvalues", torch.arange(20), "eigenvalues must be a vector of floats"),
    ("spectrum.eigenvalues", torch.arange(20.0), "eigenvalues must descend"),
    ("spectrum.eigenvalues", torch.full((20,), NAN), "eigenvalues must not hold NaN"),
    ("spectrum.eigenvalues", torch.full((20,), INF), "eigenvalues must be finite"),
    ("spectrum.eigenvalues", torch.full((20,), -1.0), "positive"),
    ("spectrum.error_bounds", torch.ones(19), "error_bounds must have the shape (20,)"),
    ("spectrum.error_bounds", -torch.ones(20), "error_bounds must not be negative"),
    ("spectrum.converged", torch.ones(20), "converged must hold truth values"),
    ("spectrum.converged", torch.ones(3, dtype=torch.bool), "converged must have the shape (20,)"),
    ("spectrum.stopped", "tired", "stopped must be Literal"),
    ("spectrum.num_hvps", "9", "num_matvecs must be int, got '9'"),
    ("spectrum.rtol", ..., "lacks rtol"),
    ("spectrum.colour", 3, "a Spectrum has no 'colour'"),
    ("density.nodes", torch.ones(3), "nodes must be a matrix of floats"),
    ("density.weights", torch.ones(3, 2), "weights must have the shape (2, 2)"),
    ("density.size", 0, "size must be at least 1, got 0"),
    ("colour", 3, "a Measurement has no 'colour'"),
]


@pytest.mark.parametrize(("place", "value", "words"), WRONG, ids=[f"{place}-{words[:40]}" for place, _, words in WRONG])
def test_a_state_with_a_wrong_type_shape_or_range_is_refused(place: str, value: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        Measurement.from_state(changed(place, value))
    state = {"version": 1, "history": [STATE, changed(place, value)], "time": {}}
    with pytest.raises(ValueError, match="holds a history that cannot be read \\(measurement 1: ") as refused:
        history_from_state(state)
    text = str(refused.value)
    assert text.endswith("; resume with another prefix, which starts a new history")
    assert len(text.splitlines()) == 1
    assert len(text) < 400


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (None, "version None"),
        ({}, "version None"),
        ({"version": True, "history": []}, "version True"),
        ({"version": "1", "history": []}, "version '1'"),
        ({"version": 2, "history": []}, "version 2, this release reads 1"),
        ({"version": 1}, "history must be a list, got None"),
        ({"version": 1, "history": "abc"}, "history must be a list, got 'abc'"),
        ({"version": 1, "history": [3]}, "measurement 0: the state of a measurement must be a mapping, got 3"),
    ],
)
def test_a_state_that_is_no_history_is_refused(state: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as refused:
        history_from_state(state)
    assert "resume with" in str(refused.value)


def test_values_that_a_release_may_have_written_are_read() -> None:
    state = changed("loss", NAN)
    state["comparisons"]["trace"] = INF
    state["seconds"] = 3
    read = Measurement.from_state(state)
    assert isinstance(read.seconds, float)
    assert (read.comparisons["trace"], read.seconds) == (INF, 3.0)
