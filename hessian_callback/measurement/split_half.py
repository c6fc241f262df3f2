r"""What the choice of the held-out samples does to a slope: the same weights on two halves of the batches.

The slope's standard error from the fit supposes that the spectrum is given. A spectrum on other samples would
have been another one. Two disjoint random halves show by how much: with slopes :math:`s_1` and :math:`s_2`, the
variance of a half's slope is estimated by :math:`(s_1 - s_2)^2 / 2`, and that on all samples by half of it, so

.. math:: \sigma = |s_1 - s_2| / 2 .

That is an estimate from a single difference: averages of :math:`\sigma^2` over measurements mean something, one of
them says little. The mean of the halves, against the slope on all samples, shows what the number of samples does:
with few of them for K eigenvalues, halves are steeper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.operators.batches import halves, leading_dimension

__all__ = ["assign_halves", "cut_large", "sampling_stderr"]

# A batch with a larger share of the weight is cut: two halves out of a few large batches would be uneven.
_LARGEST_SHARE = 1 / 4


def cut_large(
    batches: Sequence[Any],
    weights: Sequence[float],
    keys: Sequence[int],
    ranks: Ranks,
    *,
    batch_weight: Callable[[Any], float] | None = None,
) -> tuple[list[Any], list[float], list[int]]:
    """Cut batches in two until none holds more than a quarter of all ranks' weight, where they can be cut.

    Args:
        batches: this rank's batches.
        weights: the weight of each.
        keys: a number for each that no other batch has.
        ranks: the processes that hold the other batches; all of them must call.
        batch_weight: what a batch's mean loss averages over; ``None``: its samples.

    Returns:
        The parts, their weights, and keys that are as unique.

    Example:
        >>> parts, weights, keys = cut_large([torch.arange(8.0)], [8.0], [0], Ranks())
        >>> [len(part) for part in parts], weights, keys
        ([2, 2, 2, 2], [2.0, 2.0, 2.0, 2.0], [0, 1, 2, 3])
    """
    total = torch.tensor([float(sum(weights))], dtype=torch.float64, device=ranks.control_device)
    limit = float(ranks.all_reduce(total)) * _LARGEST_SHARE
    weigh = batch_weight or leading_dimension
    parts: list[tuple[Any, float, int]] = []
    for batch, weight, key in zip(batches, weights, keys, strict=True):
        whole = [(batch, float(weight))]
        # Twice is enough: a batch has at most the whole weight.
        for _ in range(2):
            whole = [part for one in whole for part in (_cut(*one, weigh) if one[1] > limit else [one])]
        parts += [(part, share, 4 * key + number) for number, (part, share) in enumerate(whole)]
    return [part for part, _, _ in parts], [share for _, share, _ in parts], [key for _, _, key in parts]


def _cut(batch: Any, weight: float, weigh: Callable[[Any], float]) -> list[tuple[Any, float]]:
    try:
        parts = [(part, float(weigh(part))) for part in halves(batch)]
    except ValueError:  # Of a batch that has no halves there is only the whole.
        return [(batch, weight)]
    total = sum(share for _, share in parts)
    return [(part, weight * share / total) for part, share in parts if share > 0]


def assign_halves(keys: Sequence[int], weights: Sequence[float], ranks: Ranks, *, seed: int = 0) -> list[int]:
    """Divide the batches of all ranks into two random halves of about equal weight.

    The same seed and keys give the same halves, however the batches are dealt to the ranks.

    Args:
        keys: a number for each of this rank's batches that no other batch has.
        weights: the weight of each.
        ranks: the processes that hold the other batches; all of them must call.
        seed: chooses the halves.

    Returns:
        0 or 1 for each of this rank's batches.

    Raises:
        ValueError: if there are fewer than two batches over all ranks.

    Example:
        >>> halves = assign_halves([0, 1, 2, 3], [8.0, 8.0, 8.0, 8.0], Ranks(), seed=1)
        >>> sorted(halves)
        [0, 0, 1, 1]
    """
    numbers = [int(count) for count in ranks.gather([len(keys)])[:, 0].tolist()]
    if sum(numbers) < 2:
        raise ValueError(
            f"{sum(numbers)} batch(es) can't be divided into halves; give the loader a smaller batch size, so that "
            "the held-out samples come in several batches, or batches whose tensors share a leading dimension"
        )
    padding = [0.0] * (max(numbers) - len(keys))
    tables = [ranks.gather([*own, *padding]).tolist() for own in (keys, weights)]
    every = [
        (int(tables[0][rank][number]), tables[1][rank][number])
        for rank in range(ranks.world_size)
        for number in range(numbers[rank])
    ]
    every.sort()
    loads, half_of = [0.0, 0.0], {}
    for position in np.random.default_rng([seed, 2]).permutation(len(every)).tolist():
        key, weight = every[position]
        half_of[key] = int(loads[1] < loads[0])
        loads[half_of[key]] += weight
    return [half_of[key] for key in keys]


def sampling_stderr(first: float, second: float) -> float:
    r"""Standard error of the slope on all samples, from those of two halves: :math:`|s_1 - s_2| / 2`.

    Args:
        first: slope on one half, without unit.
        second: on the other, from as many eigenvalues.

    Example:
        >>> sampling_stderr(1.25, 1.0)
        0.125
    """
    return abs(first - second) / 2
