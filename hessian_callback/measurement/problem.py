"""The problem of one measurement: model, loss and samples, on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.operators.engine_selection import TracingStatistics
from hessian_callback.operators.hessian import HessianOperator
from hessian_callback.operators.parameters import ParameterFilter

__all__ = ["Problem"]


@dataclass(frozen=True)
class Problem:
    r"""A weighted mean loss over fixed batches, whose Hessian is measured.

    .. math:: L(\theta) = \sum_i w_i L_i(\theta) \Big/ \sum_i w_i

    Attributes:
        model: the module, in eval mode unless the loss of the training mode is wanted.
        loss_fn: ``(model, batch) -> scalar``, the mean loss over a batch.
        batches: this rank's batches, on the model's device.
        weights: a positive weight for each.
        keys: a number for each batch that no other batch of any rank has.
        num_samples: samples over all ranks.
        num_batches: batches over all ranks.
        ranks: the processes that share the batches.
        batch_weight: ``batch -> float``, the number of terms that a batch's mean loss averages over.
        parameters: the chosen parameters, see `HessianOperator`.
        precision: of the parameters, such as ``"float32"``.
        restore_state: puts the state that an evaluation of the loss changes back, see `HessianOperator`.
        changes: returns the paths of state that evaluations changed and that is not put back: `Snapshot.changes`.
        unchecked: returns the paths of state that is too much to be compared: `Snapshot.unchecked`.
    """

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batches: Sequence[Any]
    weights: Sequence[float]
    keys: Sequence[int]
    num_samples: int
    num_batches: int
    ranks: Ranks
    batch_weight: Callable[[Any], float] | None = None
    parameters: ParameterFilter | None = None
    precision: str = "float32"
    restore_state: Callable[[], None] | None = None
    changes: Callable[[], list[str]] | None = None
    unchecked: Callable[[], list[str]] | None = None

    def on_parameters(self, parameters: ParameterFilter) -> Problem:
        """Return the same loss with other chosen parameters: a diagonal block of the Hessian."""
        return replace(self, parameters=parameters)

    def on_samples(self, batches: Sequence[Any], weights: Sequence[float], keys: Sequence[int]) -> Problem:
        """Return the loss over other batches of this rank."""
        return replace(self, batches=batches, weights=weights, keys=keys)

    def operator(
        self, *, hvp: str, memory_budget: int | None, tracing_statistics: TracingStatistics
    ) -> HessianOperator:
        """Make the Hessian; a collective.

        Args:
            hvp: how products are formed, see `HessianOperator`.
            memory_budget: bytes for gradient graphs on each rank.
            tracing_statistics: what earlier operators of this problem measured for ``hvp="auto"``; added to.
        """
        return HessianOperator(
            self.model,
            self.loss_fn,
            self.batches,
            weights=self.weights,
            batch_weight=self.batch_weight,
            parameters=self.parameters,
            process_group=self.ranks.group,
            hvp=hvp,
            memory_budget=memory_budget,
            tracing_statistics=tracing_statistics,
            restore_state=self.restore_state,
        )
