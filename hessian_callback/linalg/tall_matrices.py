"""Linear algebra of tall matrices whose rows are cut over the ranks: a few columns of length P."""

from __future__ import annotations

import torch
from torch import Tensor

from hessian_callback.linalg.distributed import Partition, Ranks
from hessian_callback.linalg.full_float32 import full_float32

__all__ = ["LONGEST_SUM", "inner_products", "orthonormal_columns", "triangular_factor"]

# Longest sum that is left to BLAS in float32 on a CPU. BLAS adds in a few accumulators: 8192 terms already cost vectors
# that sit on few coordinates their orthogonality.
LONGEST_SUM = 2048


@full_float32()
def inner_products(left: Tensor, right: Tensor, ranks: Ranks) -> Tensor:
    r"""Form :math:`X^T Y`, summed over the ranks.

    Args:
        left: this rank's rows of X, ``(slice_length, m)``.
        right: this rank's rows of Y, ``(slice_length, n)``.
        ranks: the processes that hold the other rows.

    Returns:
        ``(m, n)``, in float64 on the CPU, the same on all ranks.

    Example:
        >>> X = torch.eye(3, 2)
        >>> inner_products(X, 2 * X, Ranks())
        tensor([[2., 0.],
                [0., 2.]], dtype=torch.float64)
    """
    units = _unit(left), _unit(right)
    if units != (1, 1):
        left, right = left / units[0], right / units[1]
    if left.device.type == "cpu" and left.dtype != torch.float64:
        total = torch.zeros(left.shape[1], right.shape[1], dtype=torch.float64, device="cpu")
        for x, y in zip(left.split(LONGEST_SUM), right.split(LONGEST_SUM), strict=True):
            total += (x.T @ y).double()
    else:
        total = (left.T @ right).cpu().double()
    return ranks.all_reduce((units[0] * units[1] * total).to(ranks.control_device)).cpu()


def _unit(columns: Tensor) -> float:
    """Return 1, or the largest entry of a matrix whose squares would vanish or overflow."""
    largest = float(torch.linalg.vector_norm(columns, ord=torch.inf)) if columns.numel() else 0.0
    room = torch.finfo(columns.dtype).tiny ** 0.25
    vanishes, overflows = 0 < largest < room, 1 / room < largest < float("inf")
    return largest if vanishes or overflows else 1.0


@full_float32()
def triangular_factor(columns: Tensor, partition: Partition, ranks: Ranks) -> tuple[Tensor, Tensor]:
    r"""Compute the QR decomposition of a tall matrix, :math:`X = Q R`: one on each rank, and one of their factors.

    Forming :math:`X^T X` instead would lose half of the digits.

    Args:
        columns: this rank's rows of X, ``(slice_length, k)``, the padding zero; :math:`k \le P`.
        partition: how the rows are cut.
        ranks: the processes that hold the other rows.

    Returns:
        This rank's rows of Q, ``(slice_length, k)``, and R, ``(k, k)`` in float64 on the CPU. If X is rank
        deficient, the columns of Q that belong to zeros on R's diagonal are arbitrary.

    Source:
        Demmel, Grigori, Hoemmen and Langou (2012), where it is called TSQR.

    Example:
        >>> X = torch.tensor([[3.0, 0.0], [4.0, 5.0]], dtype=torch.float64)
        >>> Q, R = triangular_factor(X, Partition(2, 1, 0), Ranks())
        >>> torch.allclose(Q @ R, X), torch.allclose(Q.T @ Q, torch.eye(2, dtype=torch.float64))
        (True, True)
    """
    width = columns.shape[1]
    own, factor = torch.linalg.qr(columns[: partition.length])
    height = factor.shape[0]
    padded = torch.zeros(width, width, dtype=torch.float64, device="cpu")
    padded[:height] = factor.cpu().double()
    stacked = torch.zeros(ranks.world_size, width, width, dtype=torch.float64, device="cpu")
    stacked[ranks.rank] = padded
    stacked = ranks.all_reduce(stacked.to(ranks.control_device)).cpu()
    outer, upper = torch.linalg.qr(stacked.view(-1, width))
    # Libraries may round differently on different machines.
    agreed = ranks.broadcast(torch.cat([outer, upper]).to(ranks.control_device)).cpu()
    outer, upper = agreed[:-width], agreed[-width:]
    block = outer[ranks.rank * width : ranks.rank * width + height]
    result = columns.new_zeros(columns.shape)
    result[: partition.length] = own @ block.to(own)
    return result, upper


@full_float32()
def orthonormal_columns(columns: Tensor, partition: Partition, ranks: Ranks) -> Tensor:
    r"""Compute an orthonormal basis of the range of a tall matrix, without directions that only rounding spans.

    Args:
        columns: this rank's rows, ``(slice_length, k)``, the padding zero.
        partition: how the rows are cut.
        ranks: the processes that hold the other rows.

    Returns:
        This rank's rows of the basis, ``(slice_length, r)``, r being the numerical rank.

    Example:
        >>> X = torch.tensor([[1.0, 2.0], [0.0, 0.0], [1.0, 2.0]], dtype=torch.float64)
        >>> orthonormal_columns(X, Partition(3, 1, 0), Ranks()).abs()
        tensor([[0.7071],
                [0.0000],
                [0.7071]], dtype=torch.float64)
    """
    basis, upper = triangular_factor(columns, partition, ranks)
    left, values, _ = torch.linalg.svd(upper)
    smallest = 10 * max(upper.shape) * torch.finfo(columns.dtype).eps * values[:1]
    kept = (values > smallest).to(torch.float64)
    agreed = ranks.broadcast(torch.cat([left, kept[None]]).to(ranks.control_device)).cpu()
    return basis @ agreed[:-1, agreed[-1] > 0].to(basis)
