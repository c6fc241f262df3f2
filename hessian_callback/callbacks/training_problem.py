"""From a running Trainer to a `Problem`, and back to training without a trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, TypeVar

import torch.distributed as dist

from hessian_callback.callbacks.full_precision import check_copy_is_used, in_full_precision
from hessian_callback.callbacks.lightning_packages import LightningModule, Trainer
from hessian_callback.callbacks.module_loss import as_in_a_step, resolve_loss
from hessian_callback.callbacks.sample_source import SampleSource
from hessian_callback.callbacks.state_guard import defer_sigterm, preserve_training_state
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.failure_policy import FailurePolicy, Outcome
from hessian_callback.measurement.problem import Problem
from hessian_callback.measurement.samples import SampleSet
from hessian_callback.measurement.state_guard import Snapshot
from hessian_callback.operators.parameters import ParameterFilter

__all__ = ["ranks_of", "run_guarded", "training_problem"]

T = TypeVar("T")


def ranks_of(trainer: Trainer) -> Ranks:
    """Return the processes of a trainer's run."""
    return Ranks(dist.group.WORLD if trainer.world_size > 1 else None)


def training_problem(
    trainer: Trainer,
    pl_module: LightningModule,
    snapshot: Snapshot,
    samples: SampleSet,
    source: SampleSource,
    *,
    loss_fn: Callable[..., Any] | None,
    parameters: ParameterFilter | None,
    ranks: Ranks,
) -> Problem:
    """Make the problem whose Hessian is measured: the module's loss on the samples of its run.

    Call it inside `run_guarded`, on all ranks.

    Args:
        trainer: the trainer.
        pl_module: its module.
        snapshot: of the guard.
        samples: this rank's samples.
        source: their source.
        loss_fn: ``callable(pl_module, batch)`` that replaces the module's own loss.
        parameters: the chosen parameters, see `HessianOperator`.
        ranks: the processes of the run.
    """
    counted = samples.counted
    with ranks.propagate_errors("preparing the loss and the samples"):
        loss = as_in_a_step(trainer, pl_module, resolve_loss(pl_module, loss_fn, origin=source.description))
        batches = source.batches_on_device(trainer, pl_module, counted)
        model, precision = in_full_precision(trainer, pl_module)
        if model is not pl_module and batches:
            check_copy_is_used(loss, model, pl_module, batches[0])
    return Problem(
        model=model,
        loss_fn=loss,
        batches=batches,
        weights=counted.weights,
        keys=counted.keys,
        num_samples=samples.num_samples,
        num_batches=samples.num_batches,
        ranks=ranks,
        batch_weight=source.batch_weight,
        parameters=parameters,
        precision=precision,
        # A copy in float32 has state of its own.
        restore_state=snapshot.restore_loss_state if model is pl_module else None,
        changes=snapshot.changes,
        unchecked=snapshot.unchecked,
    )


def run_guarded(
    trainer: Trainer,
    pl_module: LightningModule,
    task: Callable[[Snapshot, Sequence[int]], T],
    ranks: Ranks,
    failures: FailurePolicy,
    *,
    stage: str,
    consequence: str,
    raise_permanent: bool,
) -> Outcome[T]:
    """Run a task in a run that afterwards continues as if it had not been, whether it fails or not.

    Args:
        trainer: the trainer.
        pl_module: its module.
        task: gets the guard's snapshot, and a list to which SIGTERM is added when it arrives.
        ranks: the processes of the run; all of them must call.
        failures: what happens if the task fails.
        stage: see `FailurePolicy.run`.
        consequence: see `FailurePolicy.run`.
        raise_permanent: see `FailurePolicy.run`.

    Returns:
        The outcome. If the task succeeded on all ranks and the guard failed, it has both a value and a reason.
    """
    values: list[T] = []

    def guarded() -> None:
        with preserve_training_state(trainer, pl_module) as snapshot, defer_sigterm() as arrived:
            values.append(task(snapshot, arrived))

    with defer_sigterm() if ranks.world_size > 1 else nullcontext():
        outcome = failures.run(
            guarded,
            ranks,
            stage=stage,
            consequence=consequence,
            raise_permanent=raise_permanent,
        )
        if outcome.reason is not None and ranks.failed_ranks(not values):
            values.clear()
    return Outcome(values[0] if values else None, outcome.reason)
