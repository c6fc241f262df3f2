"""Norms of the parameters and of the gradient over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.operators.loss import BatchLoss

__all__ = ["gradient_norm", "parameter_norm"]


def parameter_norm(parameters: Sequence[Tensor]) -> float:
    r"""Euclidean norm of all parameters together, :math:`\|\theta\|_2`; no product.

    Args:
        parameters: each of them whole, on every rank.

    Example:
        >>> parameter_norm([torch.tensor([[3.0]]), torch.tensor([4.0])])
        5.0
    """
    squared = [
        float(torch.linalg.vector_norm(parameter.detach(), dtype=_precise(parameter))) for parameter in parameters
    ]
    return float(torch.tensor(squared, dtype=torch.float64, device="cpu").norm())


def gradient_norm(loss: BatchLoss, batches: Sequence[Any], weights: Sequence[float], ranks: Ranks) -> float:
    r"""Euclidean norm of the gradient of a weighted mean loss over all ranks' batches.

    .. math:: \Big\| \sum_i w_i \nabla_\theta L_i(\theta) \Big/ \sum_i w_i \Big\|_2

    Costs one gradient of the loss and no product.

    Args:
        loss: the mean loss of a batch in its parameters, each whole on every rank: `HessianOperator.loss`, so that
            draws are the Hessian's and state is restored.
        batches: this rank's batches.
        weights: a positive weight for each.
        ranks: the processes that hold the other batches; all of them must call.

    Raises:
        PeerError: if another rank failed.

    Example:
        The loss :math:`\theta^2` has the gradient :math:`2 \theta`.

        >>> model = torch.nn.Linear(1, 1, bias=False)
        >>> _ = model.weight.data.fill_(3.0)
        >>> square = lambda module, batch: module(batch).square().mean()
        >>> gradient_norm(BatchLoss(model, square, [model.weight]), [torch.ones(2, 1)], [2.0], Ranks())
        6.0
    """
    size = sum(loss.sizes)
    partition = ranks.partition(size)
    like = torch.view_as_real(loss.parameters[0]) if loss.parameters[0].is_complex() else loss.parameters[0]
    total: Tensor | None = torch.zeros(size, dtype=like.dtype, device=like.device)
    with ranks.propagate_errors("computing the gradient"), torch.enable_grad(), loss.differentiable():
        assert total is not None
        for batch, weight in zip(batches, weights, strict=True):
            _, gradients = loss.gradient(batch, create_graph=False)
            loss.accumulate(total, gradients, weight)
    piece = ranks.reduce_scatter(total, partition, dtype=like.dtype, device=like.device, stage="computing the gradient")
    sums = torch.tensor(
        [float(torch.linalg.vector_norm(piece, dtype=_precise(piece))) ** 2, float(sum(weights))],
        dtype=torch.float64,
        device=ranks.control_device,
    )
    squared, weight = ranks.all_reduce(sums).tolist()
    return float(squared**0.5 / weight)


def _precise(tensor: Tensor) -> torch.dtype | None:
    # MPS has no float64.
    return None if tensor.device.type == "mps" else torch.float64
