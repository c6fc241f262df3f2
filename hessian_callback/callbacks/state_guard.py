"""Leave a training run as it was before a measurement: `preserve_state` for a module with a trainer."""

from __future__ import annotations

import signal
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torchmetrics import Metric

from hessian_callback.callbacks.lightning_packages import (
    LightningModule,
    MisconfigurationException,
    RunningStage,
    Trainer,
    is_a,
    sibling,
)
from hessian_callback.measurement.inference_tensors import ordinary_tensors
from hessian_callback.measurement.state_guard import (
    Snapshot,
    defer_signals,
    deferrable_signals,
    eval_mode,
    preserve_random_state,
)
from hessian_callback.measurement.state_records import is_user_made
from hessian_callback.operators.fully_shard import reshard
from hessian_callback.operators.hooks import suspend_hooks

__all__ = ["defer_saving_signals", "defer_sigterm", "preserve_training_state", "stage_set_to"]

_SCALARS = (type(None), bool, int, float, str)
_ABSENT = object()


@contextmanager
def preserve_training_state(trainer: Trainer, pl_module: LightningModule) -> Iterator[Snapshot]:
    """Evaluate losses of a module that is being trained, and restore all state afterwards.

    Inside the block the module is in eval mode, nothing is logged, metrics do not synchronise, gradients are enabled,
    and hooks on gradients are removed (see `suspend_hooks`). Signals whose handlers may save a checkpoint are deferred
    (see `defer_saving_signals`).

    Afterwards, also if an exception passes through, everything that follows is as before, bit for bit: parameters,
    buffers, ``.grad``, modes, hooks, ``requires_grad``, attributes of all modules with the containers, tensors,
    metrics, files and generators in them, global variables that the user's functions name, the state of optimizers,
    learning-rate schedulers and the data module, the trainer's own settings, and the global random generators.
    Callbacks and loggers are not restored.

    Args:
        trainer: the running trainer.
        pl_module: its module.

    Yields:
        The snapshot. `Snapshot.remember` adds objects, `Snapshot.changes` names changes that are not restored, and
        `Snapshot.restore_loss_state` makes a function of a loss that changes state.

    Raises:
        UnrestorableStateError: if the block changed a tensor or array in place that was not copied, or read a stream
            that cannot be rewound.
    """
    # A forward pass leaves the outermost module unsharded, with parameters that stand in for the real ones.
    reshard(pl_module)
    with ExitStack() as stack:
        stack.enter_context(defer_saving_signals(trainer))
        # Tensors made inside must be ordinary ones, and those kept are written to again.
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        # Before the snapshot, which then takes the copies for the state.
        stack.enter_context(ordinary_tensors(pl_module))
        stack.enter_context(preserve_random_state())
        stack.enter_context(_trainer_set_aside(trainer))
        stack.enter_context(eval_mode(pl_module))
        stack.enter_context(suspend_hooks(pl_module))
        stack.enter_context(_silenced(pl_module, alone=trainer.world_size == 1))
        snapshot = stack.enter_context(Snapshot())
        snapshot.remember(pl_module)
        _remember_trainer(snapshot, trainer)
        yield snapshot


def _remember_trainer(snapshot: Snapshot, trainer: Trainer) -> None:
    """Remember what a step can reach through its trainer and may change."""
    for number, optimizer in enumerate(trainer.optimizers):
        snapshot.remember(optimizer, name=f"trainer.optimizers[{number}]")
    # The wrappers that ``self.optimizers()`` returns.
    for number, wrapper in enumerate(getattr(trainer.strategy, "_lightning_optimizers", ())):
        snapshot.remember(wrapper, restore=True, name=f"optimizers()[{number}]")
    for number, config in enumerate(trainer.lr_scheduler_configs):
        name = f"trainer.lr_scheduler_configs[{number}]"
        snapshot.remember(config, restore=True, name=name)
        snapshot.remember(config.scheduler, restore=True, name=f"{name}.scheduler")
    for name, value in vars(trainer).items():
        # The user's own attributes; those of Lightning are its machinery, but for these two lists.
        own = isinstance(value, (dict, list, set, deque)) and name not in ("callbacks", "_loggers")
        if own or is_user_made(type(value)):
            snapshot.remember(value, name=f"trainer.{name}")
    data_module = getattr(trainer, "datamodule", None)
    if data_module is not None:
        snapshot.remember(data_module, restore=True)


@contextmanager
def _trainer_set_aside(trainer: Trainer) -> Iterator[None]:
    """Replace loggers and stage inside the block, and restore attributes of the trainer and its loops afterwards."""
    owners = (trainer, trainer.state, trainer.fit_loop, trainer.fit_loop.epoch_loop)
    kept = [
        (vars(owner), {name: value for name, value in vars(owner).items() if isinstance(value, _SCALARS)})
        for owner in owners
    ]
    epoch_loop, connector = trainer.fit_loop.epoch_loop, trainer._logger_connector
    collecting = [vars(loop) for loop in (epoch_loop, epoch_loop.val_loop, trainer.validate_loop)]
    collected, last_hook = [attributes["_results"] for attributes in collecting], connector._current_fx
    own = dict(vars(trainer))
    should_stop, stage, loggers = trainer.should_stop, trainer.state.stage, trainer.loggers
    try:
        trainer.loggers = [_silent(logger, sibling(trainer, "loggers.logger", "DummyLogger")) for logger in loggers]
        trainer.state.stage = RunningStage.TRAINING
        for attributes in collecting:
            attributes["_results"] = _NothingLogged(attributes["_results"])
        yield
    finally:
        for attributes, results in zip(collecting, collected, strict=True):
            attributes["_results"] = results
        connector._current_fx = last_hook
        trainer.should_stop, trainer.state.stage, trainer.loggers = should_stop, stage, loggers
        for attributes, values in kept:
            attributes.update(values)
        for name in vars(trainer).keys() - own.keys():
            del vars(trainer)[name]
        vars(trainer).update({name: value for name, value in own.items() if vars(trainer).get(name) is not value})


class _NothingLogged:
    """Stands for the logged values of a loop: for calls of ``log`` by another name, such as ``partial(self.log)``.

    The values are read as before, by ``trainer.callback_metrics`` for example.
    """

    def __init__(self, results: Any) -> None:
        self._results = results

    def log(self, *_: Any, **__: Any) -> None:
        """Do nothing."""

    reset = log

    def __len__(self) -> int:
        return len(self._results)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._results, name)


def _silent(logger: Any, dummy: type[Any]) -> Any:
    """Return a logger that logs nothing, and has the class, the folders and the names of another one.

    ``trainer.log_dir`` depends on the class. They are read when the loss asks for them, because some loggers begin a
    run then.
    """
    names = ("save_dir", "log_dir", "root_dir", "name", "version")
    attributes = {name: property(partial(_read, logger, name)) for name in names if hasattr(type(logger), name)}
    attributes["__class__"] = property(lambda _: type(logger))
    return type(dummy.__name__, (dummy,), attributes)()


def _read(logger: Any, name: str, _: Any) -> Any:
    return getattr(logger, name)


@contextmanager
def _silenced(pl_module: LightningModule, *, alone: bool) -> Iterator[None]:
    """Make the logging of modules do nothing and their metrics not synchronise."""
    replaced: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for module in pl_module.modules():
        # In the instance's dictionary, past whatever the class thinks of assignments.
        if is_a(module, "LightningModule"):
            # Not all hooks may log.
            functions = {"log": _do_nothing, "log_dict": _do_nothing, "_current_fx_name": "training_step"}
            if not alone:
                functions["all_gather"] = _refuse_to_gather
            replaced.append((module.__dict__, functions))
        if isinstance(module, Metric):
            # Ranks hold different numbers of batches, so a collective here would hang.
            replaced.append(
                (module.__dict__, {"dist_sync_on_step": False, "sync_on_compute": False, "_to_sync": False})
            )
    before = [(attributes, {name: attributes.get(name, _ABSENT) for name in values}) for attributes, values in replaced]
    try:
        for attributes, values in replaced:
            attributes.update(values)
        yield
    finally:
        for attributes, values in before:
            for name, value in values.items():
                if value is _ABSENT:
                    attributes.pop(name, None)
                else:
                    attributes[name] = value


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


def _refuse_to_gather(*_: Any, **__: Any) -> None:
    raise MisconfigurationException(
        "the loss calls self.all_gather(), but the Hessian is summed over batches that are dealt to the "
        "ranks unevenly; pass loss_fn=..., a function of one batch alone"
    )


def defer_saving_signals(trainer: Trainer) -> AbstractContextManager[list[int]]:
    """Defer signals whose handlers may save a checkpoint: see `defer_signals`.

    SLURM's requeue signal makes Lightning save at once, and inside a measurement parameters may be perturbed. SIGTERM
    is deferred as well, except in a run of one process whose only handler is Lightning's: that one only sets
    ``trainer.received_sigterm``, which a measurement watches in order to give up early.

    Args:
        trainer: the running trainer.

    Returns:
        A context manager that yields the list of signals that have arrived.
    """
    numbers = None
    if trainer.world_size == 1 and _only_notifies(signal.getsignal(signal.SIGTERM)):
        numbers = deferrable_signals() - {signal.SIGTERM}
    return defer_signals(numbers)


def _only_notifies(handler: Any) -> bool:
    """Whether a handler is Lightning's own that notes the arrival of SIGTERM, and nothing else."""
    handlers = getattr(handler, "signal_handlers", [handler])
    return all(getattr(one, "__name__", "") in ("_sigterm_notifier_fn", "_sigterm_handler_fn") for one in handlers)


def defer_sigterm() -> AbstractContextManager[list[int]]:
    """Call the handler of SIGTERM only after the block.

    Under several ranks Lightning's handler broadcasts, wherever it interrupts a rank; between collectives
    that are under way the broadcast would be taken for one of them.
    """
    return defer_signals([signal.SIGTERM])


@contextmanager
def stage_set_to(trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    """Set the stage that ``trainer.training``, ``trainer.validating`` and so on report, inside the block."""
    before = trainer.state.stage
    trainer.state.stage = stage
    try:
        yield
    finally:
        trainer.state.stage = before
