"""The record of a measurement: what it says, and that a checkpoint gives it back."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
import torch

from hessian_callback.algorithms.density import SpectralDensity
from hessian_callback.algorithms.spectrum import Spectrum
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
