"""The loss whose Hessian is measured: a function of a LightningModule and one batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
from torch import Tensor

from hessian_callback.callbacks.lightning_packages import (
    LightningModule,
    MisconfigurationException,
    Trainer,
    is_a,
    sibling,
)
from hessian_callback.measurement.loss import CheckedLoss

__all__ = ["LossFunction", "as_in_a_step", "resolve_loss"]

LossFunction = Callable[[Any, Any], Tensor]

_REMEDY = (
    "Pass loss_fn=..., a callable(pl_module, batch) that returns the batch's mean loss, "
    "or give the module a method hessian_loss(batch)"
)


def resolve_loss(
    pl_module: LightningModule, loss_fn: Callable[..., Any] | None = None, *, origin: str = "the samples"
) -> LossFunction:
    """Find the loss of a module: ``loss_fn``, else ``pl_module.hessian_loss``, else ``training_step``.

    ``training_step`` logs, updates metrics and may count, so call the result inside `preserve_training_state`. It gets
    a copy of the batch at each call, and its errors are explained; see `measurement.loss.CheckedLoss`.

    Args:
        pl_module: the module, attached to a trainer or not.
        loss_fn: ``callable(pl_module, batch)`` that returns the mean loss of the batch.
        origin: the loader of the batches in words, for messages: `SampleSource.description`.

    Returns:
        ``loss(pl_module, batch)``. A dictionary is replaced by its entry ``"loss"``.

    Raises:
        MisconfigurationException: if there is no loss function and ``training_step`` can't be used: the module
            optimises manually, its step takes the data loader's iterator, or it has none.

    Example:
        >>> class Line(LightningModule):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.slope = torch.nn.Parameter(torch.tensor(2.0))
        ...     def training_step(self, batch):
        ...         return {"loss": ((self.slope * batch[0] - batch[1]) ** 2).mean()}
        >>> line = Line()
        >>> resolve_loss(line)(line, (torch.ones(3), torch.zeros(3))).item()
        4.0
    """
    if loss_fn is not None:
        if not callable(loss_fn):
            raise MisconfigurationException(f"loss_fn is a {type(loss_fn).__name__}. {_REMEDY}")
        name = getattr(loss_fn, "__name__", type(loss_fn).__name__)
        return CheckedLoss(loss_fn, f"loss_fn ({name})", origin=origin, remedy=_remedy(origin))
    own = getattr(pl_module, "hessian_loss", None)
    if callable(own):
        # Called on the module that is passed, which may be a copy of this one.
        name = f"{type(pl_module).__name__}.hessian_loss"
        return CheckedLoss(_hessian_loss, name, origin=origin, remedy=_remedy(origin))
    name = f"{type(pl_module).__name__}.training_step"
    return CheckedLoss(_training_step_of(pl_module), name, origin=origin, remedy=_remedy(origin))


def _remedy(origin: str) -> str:
    if "training loader" in origin:
        return f"{_REMEDY}."
    return f"If it needs batches of the training loader, use dataloader='train'. {_REMEDY}."


def as_in_a_step(trainer: Trainer, pl_module: LightningModule, loss: LossFunction) -> LossFunction:
    """Evaluate a loss under the contexts that Lightning gives ``training_step``, as far as second derivatives allow.

    With ``precision="64-true"`` new tensors are double as well. Autocast is left out: the Hessian is that of
    the loss in the parameters' own precision. A module that was compiled as a whole runs eagerly.
    """
    contexts: list[Callable[[], AbstractContextManager[Any]]] = []
    if is_a(trainer.precision_plugin, "DoublePrecision"):
        contexts.append(trainer.precision_plugin.forward_context)
    # Lightning unwraps a compiled module, and keeps its compiled methods.
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        contexts.append(lambda: torch.compiler.set_stance("force_eager"))
    if not contexts:
        return loss

    def surrounded(module: Any, batch: Any) -> Tensor:
        with ExitStack() as stack:
            for context in contexts:
                stack.enter_context(context())
            return loss(module, batch)

    return surrounded


def _hessian_loss(pl_module: Any, batch: Any) -> Any:
    return pl_module.hessian_loss(batch)


def _training_step_of(pl_module: LightningModule) -> Callable[..., Any]:
    name = type(pl_module).__name__
    if not pl_module.automatic_optimization:
        raise MisconfigurationException(
            f"{name} optimises manually, so its training_step would step the optimizer instead of "
            f"returning a loss. {_REMEDY}"
        )
    # Lightning's own functions: they count what it will pass, also for decorated steps and those of an instance.
    if not sibling(pl_module, "utilities.model_helpers", "is_overridden")("training_step", pl_module):
        raise MisconfigurationException(f"{name} has no training_step to take the loss from. {_REMEDY}")
    takes = sibling(pl_module, "utilities.signature_utils", "is_param_in_hook_signature")
    if takes(pl_module.training_step, "dataloader_iter", explicit=True):
        raise MisconfigurationException(
            f"{name}.training_step takes the data loader's iterator, not a batch. {_REMEDY}"
        )
    takes_index = takes(pl_module.training_step, "batch_idx", min_args=2)

    def training_step(module: Any, batch: Any) -> Any:
        return module.training_step(batch, 0) if takes_index else module.training_step(batch)

    return training_step
