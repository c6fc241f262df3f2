"""Norms of parameters and gradient: closed forms, uneven batches, and any number of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.operators.gradients import gradient_norm, parameter_norm
from hessian_callback.operators.loss import BatchLoss
from tests.helpers.cases import CASES
from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize("name", CASES)
def test_gradient_of_the_weighted_mean(name: str) -> None:
    case = CASES[name]()
    total = sum(
        weight * case.loss_fn(case.model, batch) for batch, weight in zip(case.batches, case.weights, strict=True)
    )
    parameters = list(case.model.parameters())
    gradients = torch.autograd.grad(total / sum(case.weights), parameters)
    expected = float(torch.cat([gradient.flatten() for gradient in gradients]).norm())
    found = gradient_norm(BatchLoss(case.model, case.loss_fn, parameters), case.batches, case.weights, Ranks())
    assert found == pytest.approx(expected, rel=1e-12)
    assert all(parameter.grad is None for parameter in parameters)


def test_parameter_norm() -> None:
    parameters = [nn.Parameter(torch.full((2, 3), 2.0)), nn.Parameter(torch.tensor(5.0))]
    assert parameter_norm(parameters) == 7.0
    # A norm whose square float32 cannot hold.
    assert parameter_norm([torch.full((4,), 1e30)]) == pytest.approx(2e30)
    assert parameter_norm([]) == 0.0


def _on_ranks(rank: int, failing: int | None) -> Any:
    case = CASES["mlp"]()
    size = dist.get_world_size()

    def loss_fn(model: nn.Module, batch: Any) -> Any:
        if rank == failing:
            raise ZeroDivisionError("broken")
        return case.loss_fn(model, batch)

    loss = BatchLoss(case.model, loss_fn, list(case.model.parameters()), rank=rank)
    return gradient_norm(loss, case.batches[rank::size], case.weights[rank::size], Ranks(dist.group.WORLD))


def test_ranks_share_the_batches_and_fail_together() -> None:
    (alone,) = (outcome.value for outcome in run_ranks(_on_ranks, 1, None))
    # The third rank has no batch.
    assert [outcome.value for outcome in run_ranks(_on_ranks, 3, None)] == pytest.approx([alone] * 3)
    outcomes = run_ranks(_on_ranks, 2, 1, expect_errors=True)
    assert [outcome.error for outcome in outcomes] == ["PeerError", "ZeroDivisionError"]
