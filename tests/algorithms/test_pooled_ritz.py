"""The published protocol beside the strict one on the same operator: where they agree, and how it goes wrong."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hessian_callback import HessianOperator, fit_power_law, top_eigenvalues
from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.algorithms.pooled_ritz import PooledRitzValues, pooled_ritz_values
from hessian_callback.linalg.linear_operator import MatvecOperator
from tests.helpers.cases import CASES
from tests.helpers.ranks import run_ranks

SIZE = 2000
POWER_LAW = torch.arange(1, SIZE + 1, dtype=torch.float64) ** -1.0
# Ten outliers on a bulk that is no power law at all.
OUTLIERS = torch.cat(
    [
        torch.linspace(8, 3, 10).double(),
        torch.from_numpy(np.sort(np.random.default_rng(0).beta(1.5, 1.5, 1990))[::-1].copy()),
    ]
)
K = 60


def operator_of(eigenvalues: Tensor) -> MatvecOperator:
    return MatvecOperator(lambda v: eigenvalues * v, len(eigenvalues))


def test_every_run_finds_the_same_eigenvalues_again() -> None:
    """Where the strict protocol has K eigenvalues, the pool of three runs has K / 3, three times each."""
    operator = operator_of(POWER_LAW)
    pool = pooled_ritz_values(operator, num_runs=3, num_steps=K)
    strict = top_eigenvalues(operator, k=K)
    torch.testing.assert_close(pool.ritz_values[:K], POWER_LAW[: K // 3].repeat_interleave(3), rtol=0.01, atol=0)
    torch.testing.assert_close(strict.eigenvalues, POWER_LAW[:K], rtol=0.01, atol=0)
    assert pool.num_distinct(K) == K // 3
    # The slope survives, the same K is believed to have been seen, and only a third of it was.
    pooled, proven = fit_power_law(pool.top(K).eigenvalues), fit_power_law(strict.positive_converged)
    assert pooled.slope == pytest.approx(fit_power_law(POWER_LAW[: K // 3]).slope, rel=0.02)
    assert pooled.num_eigenvalues == proven.num_eigenvalues == K
    honest = fit_power_law(POWER_LAW[: K // 3])
    assert pooled.slope_stderr == pytest.approx(honest.slope_stderr / 3**0.5, rel=0.02)
    assert pooled.critical_distance_paper == pytest.approx(honest.critical_distance_paper / 3**0.5)
    assert pooled.critical_distance_paper == pytest.approx(1.36 / K**0.5)


def test_a_tail_that_has_not_converged_bends_the_slope() -> None:
    operator = operator_of(POWER_LAW)
    truth = fit_power_law(POWER_LAW[:K]).slope
    strict = top_eigenvalues(operator, k=K)
    assert strict.all_converged
    assert fit_power_law(strict.positive_converged).slope == pytest.approx(truth, rel=0.01)
    for num_runs, num_steps in ((1, K), (3, K // 3)):
        pool = pooled_ritz_values(operator, num_runs=num_runs, num_steps=num_steps)
        top = pool.top(K)
        bent = fit_power_law(top.eigenvalues[top.eigenvalues > 0])
        assert bent.slope > 3 * truth
        # The residuals knew.
        assert top.num_converged < 0.6 * K


@pytest.mark.slow
def test_a_bulk_looks_steeper_than_it_is() -> None:
    operator = operator_of(OUTLIERS)
    truth = fit_power_law(OUTLIERS[:K]).slope
    strict = top_eigenvalues(operator, k=K, max_matvecs=20 * K)
    assert fit_power_law(strict.positive_converged).slope == pytest.approx(truth, rel=0.05)
    pool = pooled_ritz_values(operator, num_steps=K)
    assert fit_power_law(pool.top(K).eigenvalues).slope > 2 * truth


def test_what_the_pool_claims() -> None:
    pool = pooled_ritz_values(operator_of(OUTLIERS), num_steps=30)
    distances = (pool.ritz_values[:, None] - OUTLIERS).abs().min(1).values
    assert (distances <= pool.residuals + pool.rounding).all()
    assert (pool.ritz_values.diff() <= 0).all()
    top = pool.top(K)
    assert (top.missed_probability, top.stopped, top.num_matvecs) == (1.0, "max_matvecs", pool.num_matvecs)
    assert 0 < top.num_converged < K
    assert pool.num_distinct(K) <= int((pool.ritz_values[:K] > 0).sum())


def test_a_wide_interval_joins_all_that_it_reaches() -> None:
    pool = PooledRitzValues(
        ritz_values=torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=torch.float64),
        residuals=torch.tensor([2.5, 0.1, 0.1, 0.1], dtype=torch.float64),
        num_runs=1,
        rounding=0.0,
        num_matvecs=4,
    )
    assert [pool.num_distinct(k) for k in range(5)] == [0, 1, 1, 2, 3]


def test_progress_and_cost() -> None:
    seen: list[LanczosProgress] = []
    pool = pooled_ritz_values(operator_of(POWER_LAW), num_runs=2, num_steps=5, progress=seen.append)
    assert [now.num_matvecs for now in seen] == list(range(1, 11))
    assert pool.num_matvecs == seen[-1].max_matvecs == 10
    small = pooled_ritz_values(operator_of(POWER_LAW[:4]), num_runs=2)
    assert small.num_matvecs == 8


def _on_ranks(rank: int) -> Any:
    case = CASES["mlp"]()
    size = dist.get_world_size()
    operator = HessianOperator(
        case.model,
        case.loss_fn,
        case.batches[rank::size],
        weights=case.weights[rank::size],
        process_group=dist.group.WORLD,
    )
    return pooled_ritz_values(operator, num_steps=8)


def test_the_number_of_ranks_does_not_matter() -> None:
    (alone,) = (outcome.value for outcome in run_ranks(_on_ranks, 1))
    for outcome in run_ranks(_on_ranks, 2):
        torch.testing.assert_close(outcome.value.ritz_values, alone.ritz_values, atol=1e-9, rtol=0)
        assert outcome.value.num_matvecs == alone.num_matvecs


def test_errors() -> None:
    operator = operator_of(POWER_LAW)
    with pytest.raises(ValueError, match="num_runs"):
        pooled_ritz_values(operator, num_runs=0)
    with pytest.raises(ValueError, match="num_steps"):
        pooled_ritz_values(operator, num_steps=0)
    with pytest.raises(TypeError, match="num_steps must be an integer"):
        pooled_ritz_values(operator, num_steps=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="seed must be at least 0"):
        pooled_ritz_values(operator, num_steps=2, seed=-1)
    with pytest.raises(ValueError, match="k must"):
        pooled_ritz_values(operator, num_steps=2).top(0)
