"""Checks of a problem before its first measurement, which say what a measurement cannot correct."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hessian_callback.measurement.errors import LossError, NotTrainableError
from hessian_callback.measurement.loss import REDUCTION_WARNINGS, loss_reduction
from hessian_callback.measurement.problem import Problem
from hessian_callback.measurement.state_guard import preserve_random_state
from hessian_callback.measurement.state_records import REMEDY
from hessian_callback.operators.fully_shard import is_sharded
from hessian_callback.operators.hessian import HessianOperator
from hessian_callback.operators.loss import NotAFunctionError
from hessian_callback.operators.parameters import chosen_sizes

__all__ = [
    "changes_warning",
    "check_trainable",
    "explained_change",
    "parameters_warning",
    "reduction_warning",
    "unchecked_warning",
]

# A warning names so many attributes, and the reduction is judged by one of so many batches.
_SHOWN = 3
_UNRESTORABLE = "a library's object, or a tensor or array that is too large to copy"


def check_trainable(problem: Problem, num_eigenvalues: int) -> None:
    """Check that enough of the chosen parameters are trained for K eigenvalues.

    Raises:
        NotTrainableError: if there are too few, but there would be enough if none were frozen.
    """
    trained, all_chosen = chosen_sizes(problem.model, problem.parameters)
    if trained < num_eigenvalues <= all_chosen:
        chosen = "the parameters" if problem.parameters is None else f"parameters={problem.parameters!r}"
        raise NotTrainableError(
            f"{all_chosen - trained} of {all_chosen} rows of the Hessian of {chosen} belong to frozen parameters, and "
            f"num_eigenvalues={num_eigenvalues} needs more than the other {trained}. They are measured as soon as they "
            "are trained"
        )


def reduction_warning(operator: HessianOperator, problem: Problem) -> str | None:
    """Return a warning if the loss of a batch is not the mean over its samples; ``None`` if it is, or if unknown.

    The loss is evaluated on one of this rank's batches and on its halves. Losses that draw random numbers, and those
    of sharded models, are not examined.
    """
    if operator.draws or is_sharded(problem.model):
        return None

    def loss(model: Any, batch: Any) -> Tensor:
        value = problem.loss_fn(model, batch)
        if problem.restore_state is not None:
            problem.restore_state()
        return value

    for batch in problem.batches[:_SHOWN]:
        try:
            with preserve_random_state():
                reduction = loss_reduction(loss, problem.model, batch, batch_weight=problem.batch_weight)
        except Exception:  # The loss takes no half of a batch, or there is no memory; neither is an error here.
            return None
        if reduction is not None:
            return REDUCTION_WARNINGS.get(reduction)
    return None


def parameters_warning(problem: Problem) -> str | None:
    """Return a warning if an evaluation of the loss writes to trained parameters; ``None`` if it does not."""
    changed = _changed_parameters(problem)
    if not changed:
        return None
    return (
        f"the loss changes {changed} in place (nn.Embedding(max_norm=...) does), so the Hessian is that at the changed "
        "values, without the dependence of the change on the parameters"
    )


def changes_warning(problem: Problem) -> str | None:
    """Return a warning if the loss changed state that is not restored; ``None`` if it did not."""
    changed = _changes(problem)
    if not changed:
        return None
    return (
        f"the loss changes {changed}, or the loading of its samples does. It cannot be restored ({_UNRESTORABLE}), so "
        f"training continues from a changed state. {REMEDY}"
    )


def unchecked_warning(problem: Problem) -> str | None:
    """Return a warning if there is too much state to restore or compare; ``None`` if all is."""
    unchecked = _listed([] if problem.unchecked is None else problem.unchecked())
    if not unchecked:
        return None
    return (
        f"{unchecked} holds too many objects or bytes to be compared, so training continues from a changed state if "
        f"the loss, or the loading of its samples, changes it. {REMEDY}, or dataloader=..., a loader of its own data"
    )


def explained_change(problem: Problem, error: NotAFunctionError) -> LossError:
    """Return the error for a loss that gave two values for the same parameters and batch."""
    changed, parameters = _changes(problem), _changed_parameters(problem)
    cause = "An evaluation changes some state that is not put back (a generator of its own, a library's object)"
    if changed:
        cause = f"It changes {changed}, which cannot be restored ({_UNRESTORABLE})"
    elif parameters:
        cause = f"It changes {parameters} in place, which the optimizer trains; freeze parameters that the loss updates"
    return LossError(f"{error.finding}. {cause}. {REMEDY}")


def _changed_parameters(problem: Problem) -> str:
    """Evaluate the loss once, and return the names of the trained parameters that it writes to; "" if unknown."""
    if is_sharded(problem.model) or not problem.batches:
        return ""
    named = [(name, parameter) for name, parameter in problem.model.named_parameters() if parameter.requires_grad]
    versions = [parameter._version for _, parameter in named]
    try:
        with preserve_random_state(), torch.no_grad():
            problem.loss_fn(problem.model, problem.batches[0])
    except Exception:  # A whole batch may not fit the memory, of which the Hessian takes parts.
        return ""
    finally:
        if problem.restore_state is not None:
            problem.restore_state()
    return _listed(
        [name for (name, parameter), before in zip(named, versions, strict=True) if parameter._version != before]
    )


def _changes(problem: Problem) -> str:
    return _listed([] if problem.changes is None else problem.changes())


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
