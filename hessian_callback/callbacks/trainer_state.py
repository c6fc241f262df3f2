"""The present place of a run, read from the trainer's state."""

from __future__ import annotations

import time
import weakref
from collections.abc import Sequence
from typing import Any, Literal

from lightning_utilities.core.rank_zero import rank_zero_warn

from hessian_callback.callbacks.lightning_packages import CallbackBase, Trainer
from hessian_callback.measurement.measurement import Measurement

__all__ = [
    "EpochClock",
    "Hook",
    "Run",
    "callbacks_of",
    "has_own_hook",
    "is_last",
    "logged_step",
    "move_to_front",
    "values_are_read_after_validation",
]

# Packages whose callbacks and modules are known.
_KNOWN = ("lightning.", "pytorch_lightning.", "hessian_callback.", "torch.")


#: The hooks of Lightning in which measurements are made.
Hook = Literal["on_train_start", "on_train_batch_end", "on_validation_epoch_end", "on_train_epoch_end", "on_train_end"]


def callbacks_of(trainer: Trainer) -> list[CallbackBase]:
    """Return the trainer's callbacks."""
    callbacks: list[CallbackBase] = trainer.callbacks  # type: ignore[attr-defined]
    return callbacks


def move_to_front(trainer: Trainer, callbacks: Sequence[Any]) -> None:
    """Put some of the trainer's callbacks before the others, each part in its order."""
    if callbacks_of(trainer)[: len(callbacks)] != callbacks:
        others = [other for other in callbacks_of(trainer) if other not in callbacks]
        trainer.callbacks = [*callbacks, *others]  # type: ignore[attr-defined]


def has_own_hook(one: Any, hook: str) -> bool:
    """Return whether an object has a hook of its own, or its class has one that isn't Lightning's or this package's.

    Example:
        >>> from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
        >>> has_own_hook(EarlyStopping("x"), "on_validation_end")
        False
        >>> has_own_hook(LambdaCallback(on_validation_end=print), "on_validation_end")
        True
    """
    if hook in vars(one):
        return True
    owner = next((base for base in type(one).__mro__ if hook in vars(base)), None)
    return owner is not None and not owner.__module__.startswith(_KNOWN)


def values_are_read_after_validation(trainer: Trainer, pl_module: Any) -> bool:
    """Return whether anyone may read logged values after a validation, and not only after a training epoch.

    Lightning's EarlyStopping and ModelCheckpoint do if they are told to or if validation does not simply end every
    epoch. The hook ``on_validation_end`` of any other callback, and of the module, may.
    """
    if not trainer.enable_validation:
        return False
    # A trainer whose interval is a time does not have the attribute.
    if getattr(trainer, "val_check_interval", None) != 1.0 or trainer.check_val_every_n_epoch != 1:
        return True
    told = ("_check_on_train_epoch_end", "_save_on_train_epoch_end")
    return any(
        any(getattr(one, name, None) is False for name in told) or has_own_hook(one, "on_validation_end")
        for one in (*callbacks_of(trainer), pl_module)
    )


def is_last(trainer: Trainer) -> bool:
    """Return whether training is known to end here, at the end of an epoch."""
    epochs, steps = trainer.max_epochs, trainer.max_steps
    long_enough = trainer.current_epoch + 1 >= (trainer.min_epochs or 0)
    return (
        (trainer.should_stop and long_enough and trainer.global_step >= (trainer.min_steps or 0))
        or (epochs is not None and epochs >= 0 and trainer.current_epoch + 1 >= epochs)
        or 0 <= steps <= trainer.global_step
    )


def logged_step(trainer: Trainer, hook: Hook) -> int:
    """Return the step under which loggers get a measurement: batches with an optimizer step, as Lightning counts them.

    With several optimizers, or several steps in a batch, ``trainer.global_step`` is larger.

    Args:
        trainer: the trainer.
        hook: the hook in which it is logged.
    """
    # Lightning counts a batch after its hook, and subtracts one for values that are logged after the training epoch.
    correction = {"on_train_batch_end": 1, "on_train_epoch_end": -1}.get(hook, 0)
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped) + correction


class Run:
    """Remembers the objects of a run, to notice that a callback is used in another one.

    It keeps none of them alive. A copy of it, by `copy.deepcopy` or `pickle`, belongs to no run that it meets.

    Example:
        >>> run, trainer, another = Run(), {"a trainer"}, {"a trainer"}
        >>> run.changes(trainer), run.changes(trainer), run.changes(another)
        (False, False, True)
    """

    def __init__(self) -> None:
        self._members: list[weakref.ref[Any]] | None = None

    def changes(self, *members: Any) -> bool:
        """Return whether the objects are others than at the last call; ``False`` at the first call."""
        before = None if self._members is None else [member() for member in self._members]
        self._members = [weakref.ref(member) for member in members]
        return before is not None and list(map(id, before)) != list(map(id, members))

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the references, which cannot be pickled."""
        return {"_members": None if self._members is None else []}


class EpochClock:
    """Compares the time of a measurement with that of a training epoch, and warns once if it is longer."""

    def __init__(self) -> None:
        self._began: tuple[float, float] | None = None
        self._warned = False

    def start(self, spent: float) -> None:
        """Start an epoch.

        Args:
            spent: seconds that all measurements took before.
        """
        self._began = (time.monotonic(), spent)

    def seconds(self, spent: float) -> float | None:
        """Return the seconds of the epoch without the measurements in it; ``None`` if no epoch was started."""
        if self._began is None:
            return None
        began, before = self._began
        return time.monotonic() - began - (spent - before)

    def stop(self) -> None:
        """End the run."""
        self._began = None

    def warn_of(self, measurement: Measurement, epoch_seconds: float | None) -> None:
        """Warn if a measurement took longer than the epoch."""
        if epoch_seconds is None or self._warned or measurement.seconds <= epoch_seconds:
            return
        self._warned = True
        rank_zero_warn(
            f"a measurement of the Hessian took {measurement.seconds:.2g} s, more than a training epoch "
            f"({epoch_seconds:.2g} s); measure less often (every_n_epochs, max_overhead), on fewer "
            "samples (num_samples), or fewer eigenvalues (num_eigenvalues)"
        )
