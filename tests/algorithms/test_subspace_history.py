"""Overlaps of a run's eigenspaces: closed forms, an independent oracle, bounded memory, and ranks that agree."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hessian_callback.algorithms.subspace_history import SubspaceHistory
from hessian_callback.linalg.distributed import Partition, Ranks
from tests.helpers.ranks import run_ranks


def spaces(num: int, size: int = 9, dimension: int = 2, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num)
    made = torch.randn(num, size, dimension, generator=generator, dtype=torch.float64)
    return [torch.linalg.qr(one).Q.to(dtype) for one in made]


def filled(kept: list[Tensor], *, steps: list[int] | None = None, **options: int) -> SubspaceHistory:
    history = SubspaceHistory(**options)
    for position, vectors in enumerate(kept):
        step = position if steps is None else steps[position]
        history.add(vectors, history.overlaps_with(vectors, Ranks()), step=step)
    return history


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_overlaps_are_the_mean_squared_cosines_of_the_principal_angles(dtype: torch.dtype) -> None:
    made = spaces(5, dtype=dtype)
    found = filled(made).overlaps
    expected = [
        [np.mean(np.cos(scipy.linalg.subspace_angles(a.double().numpy(), b.double().numpy())) ** 2) for a in made]
        for b in made
    ]
    np.testing.assert_allclose(found, expected, atol=20 * torch.finfo(dtype).eps)


def test_overlap_does_not_depend_on_the_basis() -> None:
    (one, other) = spaces(2)
    turned = torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64)).Q
    np.testing.assert_allclose(filled([one, other @ turned]).overlaps, filled([one, other]).overlaps, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=20), st.integers(1, 6))
def test_the_first_and_newest_spaces_stay_with_their_overlaps(gaps: list[int], capacity: int) -> None:
    steps = np.cumsum(gaps).tolist()
    made = spaces(len(steps))
    history = filled(made, steps=steps, capacity=capacity)
    assert len(history) == min(capacity, len(steps))
    names, axis = history.labels
    assert axis == "step"
    kept = [steps.index(int(name)) for name in names]
    assert kept == sorted(kept)
    assert kept[-1] == len(steps) - 1
    assert capacity == 1 or kept[0] == 0
    products = [[float((made[a].T @ made[b]).square().sum()) / 2 for a in kept] for b in kept]
    np.testing.assert_allclose(history.overlaps, products, atol=1e-12)


def test_the_kept_spaces_cover_the_run_evenly() -> None:
    steps = list(range(200))
    names, _ = filled(spaces(200), steps=steps, capacity=10).labels
    gaps = np.diff([int(name) for name in names])
    assert names[0] == "0"
    assert gaps.max() <= 200 / 9 * 2


def test_memory_is_bounded() -> None:
    made = spaces(9)
    each = made[0].numel() * made[0].element_size()
    assert len(filled(made, max_bytes=3 * each)) == 3
    assert len(filled(made, max_bytes=0)) == 1


def test_epochs_are_labels_only_if_they_are_unique() -> None:
    history = SubspaceHistory()
    for step, (vectors, label) in enumerate(zip(spaces(3), ["start", "0", "0"], strict=True)):
        history.add(vectors, history.overlaps_with(vectors, Ranks()), step=step, label=label)
        if step == 1:
            assert history.labels == (["start", "0"], "epoch")
    assert history.labels == (["0", "1", "2"], "step")


def test_another_shape_clears_the_history() -> None:
    history = filled(spaces(3))
    (other,) = spaces(1, size=7)
    overlaps = history.overlaps_with(other, Ranks())
    assert len(history) == 3
    history.add(other, overlaps, step=9)
    assert history.labels == (["9"], "step")
    torch.testing.assert_close(history.overlaps, torch.ones(1, 1, dtype=torch.float64))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="capacity must be at least 1"):
        SubspaceHistory(capacity=0)
    with pytest.raises(TypeError, match=r"capacity must be an integer, got 2\.5"):
        SubspaceHistory(capacity=2.5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="max_bytes must be at least 0, got -1"):
        SubspaceHistory(max_bytes=-1)
    with pytest.raises(ValueError, match="take them from overlaps_with"):
        filled(spaces(2)).add(spaces(2)[0], [0.5], step=2)


def sliced(rank: int) -> list[list[float]]:
    ranks = Ranks(dist.group.WORLD)
    partition = Partition(9, ranks.world_size, rank)
    history = SubspaceHistory(capacity=3)
    for step, vectors in enumerate(spaces(5)):
        padded = torch.zeros(partition.slice_length * ranks.world_size, 2, dtype=torch.float64)
        padded[:9] = vectors
        mine = padded.split(partition.slice_length)[rank]
        history.add(mine, history.overlaps_with(mine, ranks), step=step)
    return history.overlaps.tolist()


def test_ranks_that_hold_slices_find_the_same() -> None:
    one, other = (outcome.value for outcome in run_ranks(sliced, 2))
    assert one == other
    np.testing.assert_allclose(one, filled(spaces(5), capacity=3).overlaps, atol=1e-14)
