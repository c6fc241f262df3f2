"""The weights that the optimizer trains, while other callbacks exchange them for validation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessian_callback.callbacks.lightning_packages import Trainer
from hessian_callback.callbacks.state_guard import defer_saving_signals
from hessian_callback.callbacks.trainer_state import has_own_hook
from hessian_callback.measurement.state_records import own_part

__all__ = ["TrainingWeights", "averaging_callbacks", "may_exchange_before_validation", "may_exchange_weights"]

# Hooks between the start of validation and a measurement at its end.
_HOOKS = ("on_validation_start", "on_validation_epoch_start", "on_validation_batch_start", "on_validation_batch_end")


class TrainingWeights:
    """Copies of the trained weights, made before other callbacks can exchange them, and put back for a measurement.

    A callback that averages weights puts the averages in the place of the weights for validation, and exchanges them
    again in one of the hooks at the end of validation, before or after the one in which a measurement is made.
    """

    def __init__(self) -> None:
        self._kept: list[tuple[Tensor, Tensor]] = []
        self._waiting_in: dict[str, Any] | None = None

    def keep(self, module: nn.Module) -> None:
        """Copy the values of parameters and buffers."""
        # Ordinary tensors, because they are written to.
        with torch.inference_mode(False), torch.no_grad():
            self._kept = [
                (tensor, own_part(tensor).clone())
                for tensor in itertools.chain(module.parameters(), module.buffers())
                if not tensor.is_meta and not isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer))
            ]

    def keep_before_validation(self, trainer: Trainer, module: nn.Module) -> None:
        """Copy the values when the next validation begins, before the module can exchange them in its first hook."""
        loop = trainer.fit_loop.epoch_loop.val_loop
        # Of another callback that waits as well.
        other = {name: value for name, value in vars(loop).items() if name == "run"}
        self._waiting_in = vars(loop)

        def keep_and_run() -> Any:
            self._stop_waiting()
            vars(loop).update(other)
            self.keep(module)
            return loop.run()

        # No hook of a callback comes before `on_validation_model_eval` of the module.
        vars(loop)["run"] = keep_and_run

    def _stop_waiting(self) -> None:
        if self._waiting_in is not None:
            self._waiting_in.pop("run", None)
            self._waiting_in = None

    def discard(self) -> None:
        """Discard the copies."""
        self._stop_waiting()
        self._kept = []

    @contextmanager
    def put_back(self, trainer: Any) -> Iterator[bool]:
        """Put the copies in the place of the present values inside the block, if any parameter differs from its copy.

        Args:
            trainer: the running trainer, whose handlers of signals may save the weights.

        Yields:
            Whether any parameter differed.
        """
        differing = [(tensor, kept) for tensor, kept in self._kept if not torch.equal(own_part(tensor), kept)]
        if not any(isinstance(tensor, nn.Parameter) for tensor, _ in differing):
            yield False
            return
        with defer_saving_signals(trainer):
            _exchange(differing)
            try:
                yield True
            finally:
                _exchange(differing)


def _exchange(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    with torch.inference_mode(False), torch.no_grad():
        for tensor, kept in pairs:
            own = own_part(tensor)
            present = own.clone()
            own.copy_(kept)
            kept.copy_(present)


def averaging_callbacks(callbacks: Iterable[Any]) -> list[str]:
    """Return the names of callbacks that average weights, by the names of their classes.

    Example:
        >>> from lightning.pytorch.callbacks import EMAWeightAveraging, RichProgressBar
        >>> averaging_callbacks([EMAWeightAveraging(), RichProgressBar()])
        ['EMAWeightAveraging']
    """
    return [
        type(callback).__name__
        for callback in callbacks
        if any("Averag" in base.__name__ or "EMA" in base.__name__ for base in type(callback).__mro__)
    ]


def may_exchange_before_validation(module: nn.Module) -> bool:
    """Return whether a module may exchange its weights when Lightning sets it to eval mode for a validation.

    Optimizers without a schedule are used so: the module overrides ``on_validation_model_eval``, ``eval`` or ``train``.

    Example:
        >>> may_exchange_before_validation(nn.Linear(1, 1))
        False
    """
    return any(has_own_hook(module, hook) for hook in ("on_validation_model_eval", "eval", "train"))


def may_exchange_weights(objects: Iterable[Any]) -> bool:
    """Return whether a callback or module may exchange weights in validation: copies are made only then.

    Callbacks that average weights may, and so may hooks of validation that neither Lightning nor this package defines.

    Args:
        objects: the other callbacks, and the module.

    Example:
        >>> from lightning.pytorch.callbacks import EMAWeightAveraging, RichProgressBar
        >>> may_exchange_weights([RichProgressBar()]), may_exchange_weights([EMAWeightAveraging()])
        (False, True)
    """
    objects = list(objects)
    return bool(averaging_callbacks(objects)) or any(has_own_hook(one, hook) for one in objects for hook in _HOOKS)
