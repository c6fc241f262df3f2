"""A user's loss as a function of a model and a batch, which gets copies of batches and whose errors are explained."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode
from torch.utils._python_dispatch import TorchDispatchMode

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.batch_copies import copy_batch
from hessian_callback.measurement.errors import LossError, NotReadyError, UserCodeError, may_pass, one_line
from hessian_callback.operators.batches import halves, leading_dimension
from hessian_callback.operators.derivatives import DoubleBackwardError, explained
from hessian_callback.operators.fully_shard import is_sharded

__all__ = ["REDUCTION_WARNINGS", "CheckedLoss", "Reduction", "loss_reduction", "mean_loss", "refuse_collectives"]

Reduction = Literal["mean", "sum", "other"]

# What a loss of each reduction means for a measurement, for a warning.
REDUCTION_WARNINGS: dict[Reduction | None, str] = {
    "sum": (
        "the loss of a batch is the sum over its samples, so eigenvalues grow with the batch size. Return the mean "
        "over the batch (reduction='mean'), in loss_fn if not in the training step"
    ),
    "other": (
        "the loss of a batch is not the mean over its samples, so the Hessian depends on the batch size. For class "
        "weights or a varying number of counted tokens, pass batch_weight=..., what the loss averages over; a loss "
        "that compares the samples of a batch needs the batch size of the training"
    ),
}


class CheckedLoss:
    """A loss function whose batches are copied, whose errors are explained and whose result is checked.

    Each call hands over a copy of the batch, `copy_batch`: a function that takes entries out of the batch, adds some,
    or normalises tensors in place is the same function at the next call. If several ranks run, collectives inside the
    function are refused, because the ranks hold different numbers of batches.

    Args:
        function: ``(model, batch) -> loss``, or to a mapping with the loss under ``"loss"``.
        name: the function's name, for messages.
        origin: the loader of the batches in words, for messages.
        remedy: what to do if the function fails, a sentence.

    Example:
        >>> loss = CheckedLoss(lambda model, batch: batch.pop("x").sum(), "my_loss")
        >>> batch = {"x": torch.ones(3)}
        >>> float(loss(None, batch)), float(loss(None, batch))
        (3.0, 3.0)
    """

    def __init__(
        self, function: Callable[..., Any], name: str, *, origin: str = "the samples", remedy: str = "Correct it."
    ) -> None:
        self._function = function
        self.__name__ = name
        self._origin = origin
        self._remedy = remedy
        self._shared: set[type] = set()

    def __call__(self, model: Any, batch: Any) -> Tensor:
        """Evaluate the loss.

        Raises:
            LossError: if the function raises, or returns no tensor. The function's own error is the cause.
            NotReadyError: if the model lacks an attribute that its class uses, or has ``None`` there, and a hook may
                set it later.
            DoubleBackwardError: if the function raises what is known to mean a missing second derivative.
        """
        try:
            with explained(), refuse_collectives(model):
                output = self._function(model, self._copy(batch))
        except (UserCodeError, DoubleBackwardError):
            raise
        except Exception as error:
            # While a loss is traced, errors say what can't be traced.
            if may_pass(error) or get_proxy_mode() is not None:
                raise
            raise self._explained(model, error) from error
        if isinstance(output, Mapping):
            output = output.get("loss")
        if not isinstance(output, Tensor):
            found = "None" if output is None else f"a {type(output).__name__}"
            skipped = (
                " Training skips a batch without a loss; give it the weight 0 with batch_weight=..., a callable(batch)."
                if output is None
                else ""
            )
            raise LossError(
                f"{self.__name__} returned {found} where a loss tensor is needed, or a dictionary with one "
                f"under 'loss', {self._circumstances(model)}.{skipped} {self._remedy}"
            )
        return output

    def _copy(self, batch: Any) -> Any:
        known = len(self._shared)
        copied = copy_batch(batch, self._shared)
        if len(self._shared) > known:
            names = ", ".join(sorted(kind.__name__ for kind in self._shared))
            warnings.warn(
                f"batches hold objects that can't be copied ({names}), so a change that the loss makes to them stays; "
                "give their class a __copy__, or pass batches without them",
                stacklevel=3,
            )
        return copied

    def _explained(self, model: Any, error: Exception) -> Exception:
        if _may_be_set_later(model, error):
            return NotReadyError(
                f"{self.__name__} needs an attribute that the module does not have ({one_line(error)}). If a hook "
                "of training sets it, only later measurements succeed; set it in __init__ or setup() instead"
            )
        unset = _unset_attributes(model, error)
        if unset:
            return NotReadyError(
                f"{self.__name__} raised {one_line(error)}, {self._circumstances(model)}. It uses attributes that are "
                f"None or empty ({', '.join(unset)}). If a hook of training sets them, only later measurements "
                "succeed; set them in __init__ or setup() instead"
            )
        cause = ""
        if "Inference tensors cannot be saved" in str(error):
            cause = (
                " It uses a tensor that was made under torch.inference_mode(); make it outside of that, or use "
                "Trainer(inference_mode=False)."
            )
        return LossError(
            f"{self.__name__} raised {one_line(error)}, {self._circumstances(model)}.{cause} {self._remedy}"
        )

    def _circumstances(self, model: Any) -> str:
        mode = f" in {'train' if model.training else 'eval'} mode" if isinstance(model, nn.Module) else ""
        return f"on a batch of {self._origin}{mode}"


def _may_be_set_later(model: Any, error: Exception) -> bool:
    """Whether an error is that of an attribute that a module lacks and its class mentions."""
    owner = getattr(error, "obj", None)
    if not isinstance(error, AttributeError) or not isinstance(model, nn.Module) or not isinstance(owner, nn.Module):
        return False
    functions = [function for kind in type(owner).__mro__ for function in vars(kind).values()]
    return any(error.name in function.__code__.co_names for function in functions if hasattr(function, "__code__"))


def _unset_attributes(model: Any, error: BaseException) -> list[str]:
    """Return the attributes of a module that are not set, used where an error was raised, and named by its hooks.

    Not set is ``None``, and what is empty if an entry is missing.
    """
    if not isinstance(model, nn.Module):
        return []
    used: set[str] = set()
    trace = error.__traceback__
    while trace is not None:
        used.update(trace.tb_frame.f_code.co_names)
        trace = trace.tb_next
    hooks = [
        function.__code__.co_names
        for kind in type(model).__mro__
        for name, function in vars(kind).items()
        if name.startswith("on_") and hasattr(function, "__code__")
    ]
    named = {name for names in hooks for name in names}
    missing = isinstance(error, LookupError)
    return [
        name
        for name, value in vars(model).items()
        if name in used & named and (value is None or (missing and isinstance(value, (dict, list)) and not value))
    ]


@contextmanager
def refuse_collectives(model: Any = None) -> Iterator[None]:
    """Raise a `LossError` in the block if it communicates with other ranks, rather than wait for them.

    Ranks evaluate a loss on different numbers of batches, so a collective in it would wait until the process group's
    timeout. Nothing is refused if a single rank runs, or if the model's own forward pass communicates, as
    ``fully_shard`` does. It holds for this thread.

    Args:
        model: the model whose loss is evaluated.
    """
    alone = not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1)
    if alone or (isinstance(model, nn.Module) and is_sharded(model)):
        yield
        return
    with _NoCollectives():  # type: ignore[no-untyped-call]
        yield


class _NoCollectives(TorchDispatchMode):
    """Every collective of ``torch.distributed``, however it is imported, is an operator of these namespaces."""

    _NAMESPACES = ("c10d", "_c10d_functional", "_c10d_functional_autograd", "c10d_functional")

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in self._NAMESPACES and func._opname not in ("wait_tensor", "_wrap_tensor_autograd"):
            raise LossError(
                f"the loss communicates with other ranks ({func._opname.strip('_')}), but the ranks evaluate it on "
                "different numbers of batches, so they would wait for each other. Pass loss_fn=..., a function of "
                "one batch alone"
            )
        return func(*args, **(kwargs or {}))


# -- means -------------------------------------------------------------------------------------------


def mean_loss(
    loss: Callable[[Any, Any], Tensor], model: Any, batches: Sequence[Any], weights: Sequence[float], ranks: Ranks
) -> float:
    """Return the weighted mean of the loss over all ranks' batches.

    Example:
        >>> mean_loss(lambda _, batch: batch.mean(), None, [torch.ones(2), torch.zeros(6)], [2, 6], Ranks())
        0.25
    """
    sums = torch.zeros(2, dtype=torch.float64, device="cpu")
    with ranks.propagate_errors("evaluating the loss"), torch.no_grad():
        for batch, weight in zip(batches, weights, strict=True):
            sums += weight * torch.tensor([float(loss(model, batch)), 1.0], dtype=torch.float64, device="cpu")
    total, weight = ranks.all_reduce(sums.to(ranks.control_device)).tolist()
    return float(total / weight)


def loss_reduction(
    loss: Callable[[Any, Any], Tensor],
    model: Any,
    batch: Any,
    *,
    batch_weight: Callable[[Any], float] | None = None,
    rtol: float = 1e-3,
) -> Reduction | None:
    """Compare the loss of a batch with the losses of its two halves.

    Three evaluations, without gradients. A mean over samples is the weighted mean of its halves' losses, and a sum is
    their sum. Losses with class weights, with a varying number of counted tokens, and losses that compare the samples
    of a batch are neither. A mean over batches of any loss but the first depends on the size of the batches.

    Args:
        loss: ``(model, batch) -> loss``.
        model: the model.
        batch: a batch that can be cut in two.
        batch_weight: what the loss averages over; default: samples.
        rtol: relative tolerance of the comparison.

    Returns:
        ``"mean"``, ``"sum"``, ``"other"``, or ``None`` if the batch can't be cut, or mean and sum can't be told apart.

    Example:
        >>> batch = torch.arange(1.0, 5.0)
        >>> loss_reduction(lambda _, x: x.mean(), None, batch), loss_reduction(lambda _, x: x.sum(), None, batch)
        ('mean', 'sum')
        >>> loss_reduction(lambda _, x: x.std(), None, batch)
        'other'
    """
    weigh = batch_weight or leading_dimension
    try:
        parts = halves(batch)
    except ValueError:
        return None
    weights = [float(weigh(part)) for part in parts]
    with torch.no_grad():
        whole = float(loss(model, batch))
        values = [float(loss(model, part)) for part, weight in zip(parts, weights, strict=True) if weight > 0]
    if len(values) < len(parts):
        return None
    mean = sum(weight * value for weight, value in zip(weights, values, strict=True)) / sum(weights)
    total = sum(values)
    scale = sum(map(abs, values)) * rtol
    if not abs(total - mean) > 2 * scale:  # Zero, or not a number.
        return None
    if abs(whole - mean) <= scale:
        return "mean"
    return "sum" if abs(whole - total) <= scale else "other"
