r"""Sampling error of a slope, from two random halves of the samples.

The standard error of the fit takes the spectrum as given, but other samples would have given another spectrum. Two
disjoint random halves estimate this sampling error. With slopes :math:`s_1` and :math:`s_2` the variance of a half's
slope is estimated by :math:`(s_1 - s_2)^2 / 2`, and the variance of the slope on all samples by half of it:

.. math:: \sigma = |s_1 - s_2| / 2 .

A single difference estimates a variance badly, so average :math:`\sigma^2` over measurements. The mean of the halves'
slopes, compared with the slope on all samples, shows the bias of few samples: with few samples for K eigenvalues the
halves are steeper.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.loss import mean_loss
from hessian_callback.operators.batches import halves, leading_dimension

__all__ = ["assign_halves", "check_parts", "cut_large", "sampling_stderr"]

# A batch with a larger share of the weight is cut, because two halves made of a few large batches would be uneven.
_LARGEST_SHARE = 1 / 4


def cut_large(
    batches: Sequence[Any],
    weights: Sequence[float],
    keys: Sequence[int],
    ranks: Ranks,
    *,
    batch_weight: Callable[[Any], float] | None = None,
) -> tuple[list[Any], list[float], list[int]]:
    """Cut batches in two until none holds more than a quarter of all ranks' weight, as far as they can be cut.

    The parts have the same mean loss only if the loss of a batch is the mean of its parts'; see `check_parts`.

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
        # Twice is enough, because a batch has at most the whole weight.
        for _ in range(2):
            whole = [part for one in whole for part in (_cut(*one, weigh) if one[1] > limit else [one])]
        parts += [(part, share, 4 * key + number) for number, (part, share) in enumerate(whole)]
    return [part for part, _, _ in parts], [share for _, share, _ in parts], [key for _, _, key in parts]


def _cut(batch: Any, weight: float, weigh: Callable[[Any], float]) -> list[tuple[Any, float]]:
    try:
        parts = [(part, float(weigh(part))) for part in halves(batch)]
    except ValueError:  # A batch without halves stays whole.
        return [(batch, weight)]
    total = sum(share for _, share in parts)
    return [(part, weight * share / total) for part, share in parts if share > 0]


def check_parts(
    loss: Callable[[Any, Any], Any],
    model: Any,
    whole: tuple[Sequence[Any], Sequence[float]],
    parts: tuple[Sequence[Any], Sequence[float]],
    ranks: Ranks,
    *,
    rtol: float = 1e-3,
) -> None:
    r"""Check that cutting batches left the mean loss as it was, :math:`\sum_i w_i L_i / \sum_i w_i`.

    A loss that compares the samples of a batch, or divides by something else than ``batch_weight`` counts, is another
    function on smaller batches, and so is its Hessian. All ranks must call.

    Args:
        loss: ``(model, batch) -> loss``.
        model: the model.
        whole: this rank's batches and their weights.
        parts: what `cut_large` made of them.
        ranks: the processes that hold the other batches.
        rtol: relative tolerance, on all ranks alike; about 10,000 times the rounding unit of the parameters.

    Raises:
        ValueError: if the means differ, on all ranks.
        PeerError: if evaluating the loss failed on another rank.

    Example:
        >>> batch = torch.arange(4.0)
        >>> cut = [batch[:2], batch[2:]], [2.0, 2.0]
        >>> check_parts(lambda _, x: x.mean(), None, ([batch], [4.0]), cut, Ranks())
        >>> check_parts(lambda _, x: x.var(), None, ([batch], [4.0]), cut, Ranks())
        Traceback (most recent call last):
        ...
        ValueError: the loss of a batch is not the mean of its parts' (with their weights, 1.66667 and 0.5)...
    """
    if ranks.failed_ranks(len(whole[0]) != len(parts[0])):
        of_whole, of_parts = (mean_loss(loss, model, *some, ranks) for some in (whole, parts))
        if not abs(of_whole - of_parts) <= rtol * max(abs(of_whole), abs(of_parts)):
            raise ValueError(
                f"the loss of a batch is not the mean of its parts' (with their weights, {of_whole:.6g} and "
                f"{of_parts:.6g}), so halves that cut a batch would measure another loss. Pass batch_weight=..., what "
                "the mean loss averages over, or take the samples in more batches (a smaller batch size, or a larger "
                "num_samples), so that none needs to be cut"
            )


def assign_halves(keys: Sequence[int], weights: Sequence[float], ranks: Ranks, *, seed: int = 0) -> list[int]:
    """Divide the batches of all ranks into two random halves of about equal weight.

    The same seed and keys give the same halves, whichever rank holds a batch.

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
