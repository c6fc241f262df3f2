"""A run left as it was found: everything observable is restored, whatever happens in between.

Training code keeps state in many places: buffers, metric states, lists of step outputs, counters,
random generators, modes. Instead of a list of known places, the guard walks the module and what hangs
on it, remembers what it finds, and puts it back in a ``finally``, also when Ctrl-C comes in between.
"""

from __future__ import annotations

import copy
import operator
import random
import signal
import sys
import threading
import types
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler
from torchmetrics import Metric

from hessian_callback.operators.fully_shard import reshard

__all__ = ["Snapshot", "defer_sigterm", "preserve_random_state", "preserve_training_state", "stage_set_to"]

# A tensor up to this size is copied, so that a change in place can be undone, as long as all copies
# together stay within the total; another one is watched, and a change in place is an error.
_COPIED_BYTES = 64 * 2**20
_COPIED_BYTES_TOTAL = 512 * 2**20
# Longer lists are taken to be appended to only.
_COPIED_ITEMS = 10_000
_DEPTH = 4

_CONTAINERS = (dict, OrderedDict, defaultdict, list, set, deque)


@contextmanager
def preserve_training_state(trainer: Trainer, pl_module: LightningModule) -> Iterator[Snapshot]:
    """Evaluate losses of a module that is being trained, and leave no trace of it.

    Inside, the module is in eval mode, ``log`` and ``log_dict`` do nothing, the trainer's loggers are
    dummies, metrics do not synchronise, and gradients are on whatever the surrounding loop decided.
    Afterwards, also when an exception passes through, all of the following are as before, bit for bit:
    parameters, buffers, ``.grad``, train and eval modes, ``requires_grad``, attributes of all modules
    with the containers, tensors, metrics and generators in them, Python's, numpy's and torch's global
    random state, and the trainer's ``should_stop``, stage and loggers.

    Args:
        trainer: the running trainer.
        pl_module: its module.

    Yields:
        What is remembered; more can be added with `Snapshot.remember`.

    Raises:
        RuntimeError: if the block changed a tensor in place that was too large to keep a copy of.
    """
    # A forward pass leaves the outermost module unsharded, with parameters that stand in for the real ones.
    reshard(pl_module)
    # Tensors made inside must be ordinary ones, and those kept are written to again.
    with torch.inference_mode(False), torch.enable_grad(), preserve_random_state():
        snapshot = Snapshot()
        snapshot.remember(pl_module)
        should_stop, stage, loggers = trainer.should_stop, trainer.state.stage, trainer.loggers
        try:
            trainer.loggers = [DummyLogger() for _ in loggers]
            trainer.state.stage = RunningStage.TRAINING
            _silence(pl_module, alone=trainer.world_size == 1)
            yield snapshot
        finally:
            trainer.should_stop, trainer.state.stage, trainer.loggers = should_stop, stage, loggers
            snapshot.restore()


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restore Python's, numpy's and torch's global random states afterwards, on all devices in use.

    Example:
        >>> before = random.getstate()
        >>> with preserve_random_state():
        ...     _ = random.random(), torch.rand(1)
        >>> random.getstate() == before
        True
    """
    python, of_numpy, of_torch = random.getstate(), np.random.get_state(), torch.get_rng_state()
    # Asking a device that is not in use would start it, which a forked process must not do.
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and _cuda_in_use() else None
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(of_numpy)
        torch.set_rng_state(of_torch)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)
        if mps is not None:
            torch.mps.set_rng_state(mps)


def _cuda_in_use() -> bool:
    return bool(torch.cuda.is_initialized())


@contextmanager
def defer_sigterm() -> Iterator[None]:
    """Hand SIGTERM on to its handler only afterwards.

    Under several ranks Lightning's handler broadcasts, wherever it interrupts a rank; between collectives
    that are under way it would be taken for one of them.
    """
    before = signal.getsignal(signal.SIGTERM)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        if arrived:
            signal.raise_signal(signal.SIGTERM)


@contextmanager
def stage_set_to(trainer: Trainer, stage: RunningStage) -> Iterator[None]:
    """Let ``trainer.training``, ``trainer.validating`` and so on answer as in another stage."""
    before = trainer.state.stage
    trainer.state.stage = stage
    try:
        yield
    finally:
        trainer.state.stage = before


def _silence(pl_module: LightningModule, *, alone: bool) -> None:
    """Change modules for the time of the guard; the snapshot taken before undoes it."""
    for module in pl_module.modules():
        # Set directly: an overridden `train` may do more than set the mode.
        module.training = False
        if isinstance(module, LightningModule):
            # In the instance's dictionary, past whatever the class thinks of assignments.
            module.__dict__["log"] = module.__dict__["log_dict"] = _do_nothing
            if not alone:
                module.__dict__["all_gather"] = _refuse_to_gather
        if isinstance(module, Metric):
            # Ranks hold different numbers of batches, so a collective here would hang.
            module.__dict__.update(dist_sync_on_step=False, sync_on_compute=False, _to_sync=False)


def _do_nothing(*_: Any, **__: Any) -> None:
    return None


def _refuse_to_gather(*_: Any, **__: Any) -> None:
    raise MisconfigurationException(
        "the loss calls self.all_gather(), but the Hessian is summed over batches that are dealt to the "
        "ranks unevenly; pass loss_fn=..., a function of one batch alone"
    )


class Snapshot:
    """What was found where, and how to put it back."""

    def __init__(self) -> None:
        self._seen: dict[int, Any] = {}  # Holds the objects, so that no id is used twice.
        self._undo: list[Callable[[], object]] = []
        self._watched: list[tuple[str, Tensor, int]] = []
        self._copied_bytes = 0
        self._copy_tensors = True

    def remember(self, value: Any, *, copy_tensors: bool = True) -> None:
        """Remember a module, a data set, or another object, with what hangs on it.

        Args:
            value: the object.
            copy_tensors: whether to keep copies of its tensors, or only to watch them.
        """
        self._copy_tensors = copy_tensors
        self._visit(value, type(value).__name__, 0)

    def restore(self) -> None:
        """Put everything back.

        Raises:
            RuntimeError: if a tensor that was only watched has changed.
        """
        # Latest first: references are put back in the end, after the contents of what they refer to.
        for undo in reversed(self._undo):
            undo()
        for name, tensor, version in self._watched:
            if tensor._version != version:
                raise RuntimeError(
                    f"the loss changed the tensor {name} in place, which a measurement must not do to a run; "
                    "it is too large to keep a copy of. Pass loss_fn=..., a function without side effects"
                )

    def _visit(self, value: Any, name: str, depth: int) -> None:
        if value is None or isinstance(value, (bool, int, float, complex, str, bytes)) or id(value) in self._seen:
            return
        if isinstance(value, Tensor):
            self._seen[id(value)] = value
            self._visit_tensor(value, name)
        elif isinstance(value, nn.Module):
            self._seen[id(value)] = value
            self._visit_attributes(value, name, depth)
        elif isinstance(value, tuple):
            for i, item in enumerate(value):
                self._visit(item, f"{name}[{i}]", depth + 1)
        elif type(value) in _CONTAINERS:
            self._seen[id(value)] = value
            self._visit_container(value, name, depth)
        elif isinstance(value, np.ndarray):
            self._seen[id(value)] = value
            if value.nbytes <= _COPIED_BYTES and self._copy_tensors and value.flags.writeable:
                kept = value.copy()
                self._undo.append(lambda: np.copyto(value, kept))
        elif (undo := _generator_state(value)) is not None:
            self._seen[id(value)] = value
            self._undo.append(undo)
        elif depth < _DEPTH and _is_plain_object(value):
            self._seen[id(value)] = value
            self._visit_attributes(value, name, depth)

    def _visit_attributes(self, owner: Any, name: str, depth: int) -> None:
        attributes = owner.__dict__
        kept = dict(attributes)

        def undo() -> None:
            if not _same_items(attributes, kept):
                attributes.clear()
                attributes.update(kept)

        self._undo.append(undo)
        for key, value in kept.items():
            if key in ("_trainer", "_fabric"):
                continue
            # Submodules may nest as deep as they like; other objects may lead anywhere.
            inside = (
                depth if isinstance(owner, nn.Module) and key in ("_modules", "_parameters", "_buffers") else depth + 1
            )
            self._visit(value, f"{name}.{key}", inside)

    def _visit_container(self, container: Any, name: str, depth: int) -> None:
        if isinstance(container, list) and len(container) > _COPIED_ITEMS:
            length = len(container)
            self._undo.append(lambda: operator.delitem(container, slice(length, None)))
            return
        kept = copy.copy(container)
        if isinstance(container, dict):

            def undo() -> None:
                if not _same_items(container, kept):
                    container.clear()
                    container.update(kept)

            items = list(container.items())
        else:

            def undo() -> None:
                if len(container) != len(kept) or any(a is not b for a, b in zip(container, kept, strict=True)):
                    container.clear()
                    container.update(kept) if isinstance(container, set) else container.extend(kept)

            items = list(enumerate(container))
        self._undo.append(undo)
        for key, value in items:
            self._visit(value, f"{name}[{key!r}]", depth)

    def _visit_tensor(self, tensor: Tensor, name: str) -> None:
        if isinstance(tensor, (nn.UninitializedParameter, nn.UninitializedBuffer)) or tensor.is_meta:
            return
        requires_grad, gradient = tensor.requires_grad, tensor.grad if tensor.is_leaf else None
        is_inference = tensor.is_inference()
        size = _own_part(tensor).numel() * tensor.element_size()
        small = size <= _COPIED_BYTES and self._copied_bytes + size <= _COPIED_BYTES_TOTAL
        if self._copy_tensors and small and tensor.layout == torch.strided:
            self._copied_bytes += size
            with torch.no_grad():
                kept = _own_part(tensor).clone()

            def undo_contents() -> None:
                # Compared, not judged by the version counter, which `.data` goes round; and written only
                # if changed, because writing makes graphs that hold the tensor unusable.
                with torch.inference_mode(is_inference), torch.no_grad():
                    own = _own_part(tensor)
                    if not torch.equal(own, kept):
                        own.copy_(kept)

            self._undo.append(undo_contents)
        elif not is_inference:
            self._watched.append((name, tensor, tensor._version))

        if tensor.is_leaf and not is_inference:

            def undo_gradient() -> None:
                if tensor.requires_grad != requires_grad:
                    tensor.requires_grad_(requires_grad)
                if tensor.grad is not gradient:
                    tensor.grad = gradient

            self._undo.append(undo_gradient)
            if gradient is not None and id(gradient) not in self._seen:
                self._seen[id(gradient)] = gradient
                self._visit_tensor(gradient, f"{name}.grad")


def _own_part(tensor: Tensor) -> Tensor:
    """Return what this rank holds of a tensor: of a sharded one its shard, as comparing the whole is a collective."""
    detached = tensor.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached


def _same_items(one: dict[Any, Any], other: dict[Any, Any]) -> bool:
    return len(one) == len(other) and all(
        a is c and b is d for (a, b), (c, d) in zip(one.items(), other.items(), strict=True)
    )


def _generator_state(value: Any) -> Callable[[], object] | None:
    """Return what puts a random generator back to its present state; ``None`` for anything else."""
    if isinstance(value, torch.Generator):
        of_torch = value.get_state()
        return lambda: value.set_state(of_torch)
    if isinstance(value, np.random.Generator):
        bits = value.bit_generator
        of_bits = copy.deepcopy(bits.state)
        return lambda: setattr(bits, "state", of_bits)
    if isinstance(value, np.random.RandomState):
        of_numpy = value.get_state()
        return lambda: value.set_state(of_numpy)
    if isinstance(value, random.Random):
        of_python = value.getstate()
        return lambda: value.setstate(of_python)
    return None


def _is_plain_object(value: Any) -> bool:
    """Whether an object is of the user's making: its attributes are data, not a library's machinery.

    Libraries' objects may be changed by threads of their own in the meantime, so they are let alone.
    """
    if isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType, Trainer)):
        return False
    if not isinstance(getattr(value, "__dict__", None), dict):
        return False
    if isinstance(value, (Dataset, Sampler)):
        return True  # torch's own subsets and samplers lead to the user's.
    module = type(value).__module__
    if module.partition(".")[0] in sys.stdlib_module_names and module != "__main__":
        return False
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file
