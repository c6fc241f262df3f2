"""Random vectors by global coordinate: the same for any number of ranks, independent, and with the right moments."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch import Tensor

from hessian_callback.linalg.distributed import Partition
from hessian_callback.linalg.random_vectors import Purpose, gaussian_slice, rademacher_slice

SIZE = 3 * (1 << 16) + 17  # four pieces of the stream, the last one short


def whole(slice_of: Callable[..., Tensor], world_size: int, **options: int) -> Tensor:
    slices = [slice_of(Partition(SIZE, world_size, rank), **options) for rank in range(world_size)]
    return torch.cat(slices)


@pytest.mark.parametrize("draw", [gaussian_slice, rademacher_slice])
@pytest.mark.parametrize("world_size", [2, 3, 7])
def test_any_number_of_ranks_draws_one_vector(draw: Callable[..., Tensor], world_size: int) -> None:
    alone = whole(draw, 1, seed=5, draw=2)
    shared = whole(draw, world_size, seed=5, draw=2)
    assert torch.equal(shared[:SIZE], alone)
    assert not shared[SIZE:].any()


def test_the_solver_s_vector_stays_what_a_seed_has_meant() -> None:
    expected = np.random.Generator(np.random.Philox(key=np.array([3, 1], dtype=np.uint64))).standard_normal(4)
    drawn = gaussian_slice(Partition(4, 1, 0), seed=3, draw=1)
    np.testing.assert_array_equal(drawn.numpy(), expected)


def test_distribution() -> None:
    gaussian = whole(gaussian_slice, 1, seed=1, draw=0).numpy()
    assert scipy.stats.kstest(gaussian, "norm").pvalue > 1e-3
    signs = whole(rademacher_slice, 1, seed=1, draw=0)
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(float(signs.mean())) < 4 / SIZE**0.5


def test_seeds_draws_and_purposes_are_independent() -> None:
    vectors = [
        whole(gaussian_slice, 1, seed=seed, draw=draw, purpose=purpose)
        for seed in (0, 1)
        for draw in (0, 1)
        for purpose in (Purpose.SOLVER, Purpose.MOMENTS)
    ]
    correlation = torch.corrcoef(torch.stack(vectors)) - torch.eye(len(vectors), dtype=torch.float64)
    assert correlation.abs().max() < 5 / SIZE**0.5


@pytest.mark.parametrize("draw_slice", [gaussian_slice, rademacher_slice])
@pytest.mark.parametrize(
    ("seed", "draw", "error", "message"),
    [
        (-1, 0, ValueError, "seed must be at least 0, got -1"),
        (2**64, 0, ValueError, "seed must be below 18446744073709551616, got 18446744073709551616"),
        (0.0, 0, TypeError, r"seed must be an integer, got 0\.0"),
        (True, 0, TypeError, "seed must be an integer, got True"),
        (None, 0, TypeError, "seed must be an integer, got None"),
        (0, -1, ValueError, "draw must be at least 0, got -1"),
        (0, 2**32, ValueError, "draw must be below 4294967296"),  # the next purpose begins there
    ],
)
def test_seeds_out_of_range_are_refused(
    draw_slice: Callable[..., Tensor], seed: Any, draw: int, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        draw_slice(Partition(4, 1, 0), seed=seed, draw=draw)


def test_integers_of_numpy_and_torch_are_seeds() -> None:
    expected = gaussian_slice(Partition(4, 1, 0), seed=2**64 - 1, draw=0)
    assert torch.equal(gaussian_slice(Partition(4, 1, 0), seed=np.uint64(2**64 - 1), draw=0), expected)  # type: ignore[arg-type]
    seven = torch.tensor(7)
    assert torch.equal(
        gaussian_slice(Partition(4, 1, 0), seed=seven, draw=0),  # type: ignore[arg-type]
        gaussian_slice(Partition(4, 1, 0), seed=7, draw=0),
    )
