"""Measure a model in one call, without a Trainer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.extras.base import Extra
from hessian_callback.measurement.loss import CheckedLoss
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.measurement.measurer import Measurer
from hessian_callback.measurement.observer import Observer
from hessian_callback.measurement.place import Place
from hessian_callback.measurement.problem import Problem
from hessian_callback.measurement.solvers import Solver
from hessian_callback.measurement.state_guard import preserve_state
from hessian_callback.operators.batches import leading_dimension
from hessian_callback.operators.parameters import ParameterFilter

__all__ = ["measure"]


def measure(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    batches: Iterable[Any],
    *,
    num_eigenvalues: int = 50,
    weights: Sequence[float] | None = None,
    batch_weight: Callable[[Any], float] | None = None,
    parameters: ParameterFilter | None = None,
    groups: Mapping[str, ParameterFilter] | None = None,
    solver: Solver | None = None,
    extras: Iterable[str | Extra] = (),
    seed: int = 0,
    process_group: dist.ProcessGroup | None = None,
    epoch: int = 0,
    step: int = 0,
    observer: Observer | None = None,
) -> Measurement:
    r"""Measure the power law of a loss's Hessian: the largest eigenvalues with bounds, the fit, and extras.

    The Hessian is that of the weighted mean loss :math:`\sum_i w_i L_i(\theta) / \sum_i w_i` in the chosen parameters,
    with the model in eval mode. Parameters, buffers, modes, ``.grad`` and random generators are afterwards as before.

    With several ranks, all of them call it with their own batches and ``process_group``.

    Args:
        model: the module.
        loss_fn: ``(model, batch) -> scalar``, the mean loss over a batch.
        batches: this rank's batches, on the model's device.
        num_eigenvalues: K, at least 3.
        weights: a positive weight for each batch; the default is ``batch_weight``.
        batch_weight: ``batch -> float``, the number of terms that a batch's mean loss averages over; the default is
            the leading dimension that its tensors share.
        parameters: which parameters, see `HessianOperator`; the default is all that require a gradient.
        groups: parameters whose diagonal blocks are measured as well, by the group's name.
        solver: `Lanczos` or `PublishedProtocol`; the default is ``Lanczos()``.
        extras: further quantities, by name or as objects, see `EXTRAS`.
        seed: starts the solver and draws random vectors.
        process_group: the ranks that share the batches; ``None`` for this process alone.
        epoch: noted in the measurement.
        step: noted in the measurement.
        observer: follows the measurement.

    Returns:
        The measurement.

    Raises:
        ValueError: if an option is out of range, there is no batch, or the loss cannot be differentiated twice.
        ArithmeticError: if the loss or a product is NaN or infinite.
        PeerError: if another rank failed.

    Example:
        >>> model = nn.Linear(30, 1, bias=False).double()
        >>> inputs = torch.randn(400, 30, dtype=torch.float64) * torch.arange(1.0, 31.0) ** -0.5
        >>> targets = torch.zeros(400, 1, dtype=torch.float64)
        >>> def loss(model, batch):
        ...     return nn.functional.mse_loss(model(batch[0]), batch[1])
        >>> measurement = measure(model, loss, [(inputs, targets)], num_eigenvalues=10)
        >>> measurement.num_fitted, 0.5 < measurement.slope < 1.5
        (10, True)
    """
    ranks = Ranks(process_group)
    own = list(batches)
    with ranks.propagate_errors("weighing the batches"):
        shares = _weights(own, weights, batch_weight)
        sizes = [_num_samples(batch) for batch in own]
    counts = ranks.all_reduce(
        torch.tensor([len(own), sum(sizes)], dtype=torch.float64, device=ranks.control_device)
    ).tolist()
    problem = Problem(
        model=model,
        loss_fn=CheckedLoss(loss_fn, getattr(loss_fn, "__name__", type(loss_fn).__name__)),
        batches=own,
        weights=shares,
        keys=[ranks.rank + ranks.world_size * number for number in range(len(own))],
        num_samples=int(counts[1]),
        num_batches=int(counts[0]),
        ranks=ranks,
        batch_weight=batch_weight,
        parameters=parameters,
        precision=" and ".join(sorted({str(p.dtype).removeprefix("torch.") for p in model.parameters()})),
    )
    measurer = Measurer(num_eigenvalues, solver=solver, extras=extras, groups=groups, seed=seed)
    place = Place(epoch=epoch, step=step, when="step")
    folder = measurer.solver.checkpoint_folder
    checkpoint = None if folder is None else folder / f"step={step}"
    with preserve_state(model) as snapshot:
        guarded = replace(
            problem,
            restore_state=snapshot.restore_loss_state,
            changes=snapshot.changes,
            unchecked=snapshot.unchecked,
        )
        return measurer.measure(guarded, place, observer=observer, checkpoint=checkpoint).measurement


def _weights(
    batches: Sequence[Any], weights: Sequence[float] | None, batch_weight: Callable[[Any], float] | None
) -> list[float]:
    if weights is not None:
        if len(weights) != len(batches):
            raise ValueError(f"there are {len(batches)} batches but {len(weights)} weights; pass one per batch")
        return [float(weight) for weight in weights]
    return [float((batch_weight or leading_dimension)(batch)) for batch in batches]


def _num_samples(batch: Any) -> int:
    try:
        return int(leading_dimension(batch))
    except ValueError:  # The batch has its own weight, and counts as one sample.
        return 1
