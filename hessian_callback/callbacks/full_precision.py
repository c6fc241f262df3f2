"""Float32 copies of modules with half-precision parameters, on which their Hessian is formed."""

from __future__ import annotations

import copy
import gc
import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hessian_callback.callbacks.lightning_packages import LightningModule, MisconfigurationException, Trainer
from hessian_callback.linalg.free_memory import free_memory
from hessian_callback.measurement.batch_copies import map_tensors
from hessian_callback.operators.fully_shard import is_sharded
from hessian_callback.operators.memory import readable_size

__all__ = ["batch_in_full_precision", "check_copy_is_used", "has_half_precision", "in_full_precision"]

_HALF = (torch.float16, torch.bfloat16)
# Largest share of the free memory for a copy. Products and their graphs need the rest.
_SHARE = 0.5

_REMEDY = (
    "use precision='bf16-mixed', or examine a checkpoint with Trainer(precision='32-true').validate() on a device "
    "with more memory"
)


def has_half_precision(module: nn.Module) -> bool:
    """Whether any parameter of a module is in half precision, a frozen one included.

    Example:
        >>> has_half_precision(nn.Linear(2, 2)), has_half_precision(nn.Linear(2, 2).bfloat16())
        (False, True)
    """
    return any(parameter.dtype in _HALF for parameter in module.parameters())


def in_full_precision(trainer: Trainer, pl_module: LightningModule) -> tuple[LightningModule, str]:
    """Return a module to form second derivatives on, and the precision of these derivatives.

    In half precision rounding errors exceed the smaller eigenvalues of a Hessian. So a module with such parameters is
    copied, and the parameters of the copy are converted to float32: its Hessian is that of the float32 loss at the
    same values. Methods of the copy that were compiled run eagerly. Functions of the module, such as hooks, whose
    closures refer to it are made again for the copy. Any other module is returned as it is.

    Args:
        trainer: its trainer, which the copy shares.
        pl_module: the module in training.

    Returns:
        The module, and a text such as ``"float32"`` or ``"float32 (a copy of bfloat16)"``.

    Raises:
        MisconfigurationException: if there is no room for a copy, or the module cannot be copied.
    """
    found = sorted({str(p.dtype).removeprefix("torch.") for p in pl_module.parameters()})
    if not has_half_precision(pl_module):
        return pl_module, " and ".join(found)
    reason = "parameters in half precision need a copy in float32 to form the Hessian on"
    if is_sharded(pl_module):
        raise MisconfigurationException(f"{reason}, and sharded parameters can't be copied: {_REMEDY}")
    needed = sum(4 * t.numel() for t in itertools.chain(pl_module.parameters(), pl_module.buffers()))
    free = free_memory(pl_module.device)
    # Ranks on one machine share the main memory.
    sharing = trainer.world_size if pl_module.device.type == "cpu" else 1
    if free is not None and needed > _SHARE * free / sharing:
        raise MisconfigurationException(
            f"{reason}, which would take {readable_size(needed)} of the {readable_size(free / sharing)} that are free: "
            f"{_REMEDY}"
        )
    try:
        copied = _copy_with_attributes(pl_module, trainer)
    except Exception as error:
        raise MisconfigurationException(f"{reason}, but the module cannot be copied ({error}): {_REMEDY}") from error
    if pl_module._trainer is not None:
        copied.trainer = trainer  # A copy of a LightningModule is not attached.
    for parameter in copied.parameters():
        parameter.grad = None
    return copied.float(), f"float32 (a copy of {' and '.join(name for name in found if name != 'float32')})"


def _copy_with_attributes(pl_module: LightningModule, trainer: Trainer) -> LightningModule:
    """Copy a module with its attributes, and half-precision tensors in them as float32, except for the trainer."""
    own = {id(tensor) for tensor in itertools.chain(pl_module.parameters(), pl_module.buffers())}
    memo: dict[int, Any] = {id(trainer): trainer}
    for tensor in _reachable_tensors(pl_module, trainer):
        # Python refuses to copy results of an operation with their graph, such as losses in a list.
        if id(tensor) not in own and (tensor.grad_fn is not None or tensor.dtype in _HALF):
            values = tensor.detach()
            memo[id(tensor)] = values.float() if values.dtype in _HALF else values.clone()
    with _functions_of_the_copy(pl_module, trainer, own | {id(module) for module in pl_module.modules()}, memo):
        copied = copy.deepcopy(pl_module, memo)
    # Methods that were compiled stay those of the original; Lightning compiles the steps, if the module is compiled.
    for original in pl_module.modules():
        for name, value in vars(original).items():
            method = getattr(value, "_torchdynamo_orig_callable", None)
            if isinstance(method, MethodType):
                vars(memo[id(original)])[name] = copy.deepcopy(method, memo)
    return copied


def _reachable_tensors(root: Any, left_out: Any) -> Iterator[Tensor]:
    return (one for one in _reachable(root, left_out) if isinstance(one, Tensor))


def _reachable(root: Any, left_out: Any) -> Iterator[Any]:
    """Yield the objects that a copy of an object would reach, without those behind another object."""
    seen, waiting = {id(left_out)}, [root]
    while waiting:
        one = waiting.pop()
        if id(one) in seen or isinstance(one, (type, ModuleType, BuiltinFunctionType, str, int, float)):
            continue
        seen.add(id(one))
        yield one
        if isinstance(one, FunctionType):
            # Not its global variables.
            waiting.extend(_held_by(one))
        elif not isinstance(one, Tensor):
            waiting.extend(gc.get_referents(one))


def _held_by(function: FunctionType) -> tuple[Any, ...]:
    defaults, named = function.__defaults__ or (), function.__kwdefaults__ or {}
    return *(function.__closure__ or ()), *defaults, *named.values()


@contextmanager
def _functions_of_the_copy(root: Any, left_out: Any, own: set[int], memo: dict[int, Any]) -> Iterator[None]:
    """Let a copy of an object have functions of its own, if their closures reach the object or what has a copy.

    `copy.deepcopy` takes functions as they are, so a hook ``lambda *_: setattr(self, ...)`` of the copy would change
    the original.

    Args:
        root: the object that is copied inside the block.
        left_out: an object that is not copied.
        own: the ids of the object's parts.
        memo: the memory of `copy.deepcopy`, which gets the functions.
    """
    cells: dict[int, tuple[CellType, CellType]] = {}
    made: list[tuple[FunctionType, FunctionType]] = []
    for function in [one for one in _reachable(root, left_out) if isinstance(one, FunctionType)]:
        if not any(id(one) in own or id(one) in memo for one in _reachable(_held_by(function), left_out)):
            continue
        inner = tuple(cells.setdefault(id(cell), (cell, CellType()))[1] for cell in function.__closure__ or ())
        copied = FunctionType(function.__code__, function.__globals__, function.__name__, None, inner or None)
        memo[id(function)] = copied
        made.append((function, copied))
    yield
    for function, copied in made:
        copied.__defaults__ = copy.deepcopy(function.__defaults__, memo)
        copied.__kwdefaults__ = copy.deepcopy(function.__kwdefaults__, memo)
        copied.__dict__.update(copy.deepcopy(function.__dict__, memo))
    for cell, own_cell in cells.values():
        with suppress(ValueError):  # An empty cell.
            own_cell.cell_contents = copy.deepcopy(cell.cell_contents, memo)


class _Uses(TorchDispatchMode):
    """Note whether operations use parameters or buffers of a module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found = False
        tensors = itertools.chain(module.parameters(), module.buffers())
        self._storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel() > 0}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for value in tree_leaves((args, kwargs)):
            plain = type(value) in (Tensor, nn.Parameter) and value.layout == torch.strided
            self.found |= plain and value.untyped_storage().data_ptr() in self._storages
        return func(*args, **(kwargs or {}))


def check_copy_is_used(loss: Callable[[Any, Any], Tensor], copied: nn.Module, original: nn.Module, batch: Any) -> None:
    """Evaluate the loss of a copy, and raise an error if it uses tensors of the original.

    Raises:
        MisconfigurationException: if it does.
    """
    with _Uses(original) as uses:
        loss(copied, batch)
    if uses.found:
        raise MisconfigurationException(
            "the Hessian of half-precision parameters is formed on a copy in float32, but the loss uses parameters or "
            "buffers of the original, through a global variable or the optimizers, for example; reach them through "
            f"the module, or use another precision: {_REMEDY}"
        )


def batch_in_full_precision(batch: Any) -> Any:
    """Return a copy of a batch, of any class, with float32 tensors in place of half-precision ones.

    Example:
        >>> batch_in_full_precision({"x": torch.ones(2, dtype=torch.bfloat16), "y": torch.tensor(1)})
        {'x': tensor([1., 1.]), 'y': tensor(1)}
    """
    return map_tensors(batch, lambda tensor: tensor.float() if tensor.dtype in _HALF else tensor)
