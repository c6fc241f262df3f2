"""One measurement of the edge of stability, against dense matrices."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from hessian_callback.measurement.edge import EdgeMeasurement, EdgeMeasurer, EdgeState, edge_history
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.preconditioners import StabilityLimits, stability_limits
from hessian_callback.operators.engine_selection import TracingStatistics
from hessian_callback.operators.parameters import select_parameters
from tests.helpers.problems import problem

PLACE = Place(epoch=1, step=7, when="step")


def stepped(kind: Any, **options: Any) -> tuple[Any, StabilityLimits]:
    """The problem after three steps of an optimizer, and the optimizer's limits."""
    ours = problem()
    optimizer = kind(ours.model.parameters(), **options)
    for batch in ours.batches[:3]:
        optimizer.zero_grad()
        ours.loss_fn(ours.model, batch).backward()
        optimizer.step()
    limits = stability_limits(optimizer, select_parameters(ours.model))
    assert limits is not None
    return ours, limits


def dense(ours: Any) -> Tensor:
    with ours.operator(hvp="double_backward", memory_budget=None, tracing_statistics=TracingStatistics()) as hessian:
        return torch.stack([hessian.matvec(e) for e in torch.eye(hessian.num_parameters, dtype=torch.float64)])


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (torch.optim.SGD, {"lr": 0.3, "momentum": 0.9, "weight_decay": 0.01}),
        (torch.optim.SGD, {"lr": 0.3, "maximize": True}),
        (torch.optim.AdamW, {"lr": 0.01, "weight_decay": 0.5}),
        (torch.optim.RMSprop, {"lr": 0.01, "weight_decay": 0.1}),
    ],
)
def test_all_quantities_are_those_of_dense_matrices(kind: Any, options: Any) -> None:
    ours, limits = stepped(kind, **options)
    measured, state = EdgeMeasurer(rtol=1e-3).measure(ours, limits, PLACE)
    H = dense(ours)
    sign = -1.0 if options.get("maximize") else 1.0
    A = sign * limits.scale[:, None] * H * limits.scale + torch.diag(limits.shift)
    ratio = float(torch.linalg.eigvalsh(A)[-1])
    sharpness = float(torch.linalg.eigvalsh(H)[-1])
    assert measured.ratio is not None
    assert measured.sharpness is not None
    assert measured.ratio_error is not None
    assert measured.sharpness_error is not None
    assert abs(measured.ratio - ratio) <= measured.ratio_error <= 1e-3 * ratio
    assert abs(measured.sharpness - sharpness) <= measured.sharpness_error <= 2e-3 * sharpness
    assert measured.preconditioned_sharpness == pytest.approx(measured.ratio * limits.threshold)
    assert measured.max_lr == pytest.approx(options["lr"] / measured.ratio)
    assert measured.lr == options["lr"]
    assert (measured.epoch, measured.step, measured.when) == (1, 7, "step")
    assert set(state.vectors) == ({"scaled"} if limits.uniform and sign > 0 else {"scaled", "plain"})


def test_gradient_descent_takes_one_eigenvalue() -> None:
    ours, limits = stepped(torch.optim.SGD, lr=0.3)
    measured, _ = EdgeMeasurer().measure(ours, limits, PLACE)
    assert measured.ratio is not None
    assert measured.sharpness == pytest.approx(measured.ratio * 2 / 0.3)


def test_the_last_eigenvector_saves_products() -> None:
    ours, limits = stepped(torch.optim.Adam, lr=0.01)
    measurer = EdgeMeasurer(rtol=1e-3)
    cold, state = measurer.measure(ours, limits, PLACE)
    warm, _ = measurer.measure(ours, limits, PLACE, state=state)
    assert warm.num_hvps < cold.num_hvps
    assert warm.ratio == pytest.approx(cold.ratio, rel=2e-3)


def test_a_stale_eigenvector_hides_no_larger_eigenvalue() -> None:
    """The start vector is the exact eigenvector of the second eigenvalue; the probe finds the first."""
    ours, limits = stepped(torch.optim.SGD, lr=0.3)
    vectors = torch.linalg.eigh(dense(ours))[1]
    state = EdgeState(vectors={"scaled": vectors[:, -2]})
    found, _ = EdgeMeasurer().measure(ours, limits, PLACE, state=state)
    truth = float(torch.linalg.eigvalsh(dense(ours))[-1])
    assert found.sharpness is not None
    assert found.sharpness_error is not None
    assert abs(found.sharpness - truth) <= found.sharpness_error


def test_rates_of_zero_have_no_ratio() -> None:
    ours, limits = stepped(torch.optim.SGD, lr=0.0)
    measured, _ = EdgeMeasurer().measure(ours, limits, PLACE)
    assert measured.ratio is None
    assert measured.num_hvps == 0
    assert measured.reason == "all learning rates are 0, so every curvature is stable"
    assert measured.scalars() == {"num_hvps": 0.0, "seconds": 0.0}
    assert "no ratio (all learning rates are 0" in measured.summary()


def test_the_error_of_float32_products_is_measured_once() -> None:
    ours, limits = stepped(torch.optim.SGD, lr=0.3)
    single = replace(ours, model=ours.model.float(), batches=[(x.float(), y) for x, y in ours.batches])
    measurer = EdgeMeasurer()
    first, state = measurer.measure(single, limits, PLACE)
    assert 0 < state.errors["scaled"] < 1e-3
    second, later = measurer.measure(single, limits, PLACE, state=state)
    assert later.errors == state.errors
    assert second.ratio == pytest.approx(first.ratio, rel=0.05)


def test_a_measurement_survives_its_state() -> None:
    entries = [
        EdgeMeasurement(
            1, 2, "step", ratio=0.5, ratio_error=0.1, max_lr=0.2, lr=0.1, loss=1.0, num_hvps=9, seconds=0.1
        ),
        EdgeMeasurement(1, 4, "fit_end", reason="the loss is NaN"),
    ]
    assert edge_history([entry.to_state() for entry in entries]) == entries


@pytest.mark.parametrize("state", [{"epoch": 1}, {"epoch": "1", "step": 2, "when": "step"}, None])
def test_a_damaged_state_is_refused(state: Any) -> None:
    with pytest.raises(ValueError, match="resume with another prefix"):
        edge_history([state])


def test_a_diverged_loss_raises() -> None:
    ours, limits = stepped(torch.optim.SGD, lr=0.3)
    with torch.no_grad():
        ours.model[0].weight.fill_(float("nan"))
    with pytest.raises(ArithmeticError):
        EdgeMeasurer().measure(ours, limits, PLACE)
