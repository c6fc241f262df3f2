"""The mean loss of a batch as a differentiable function of chosen parameters."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hessian_callback.operators.batches import map_tensors, tensors
from hessian_callback.operators.cuda_generators import own_cuda_state
from hessian_callback.operators.derivatives import (
    exact_derivatives,
    explained,
    graph_nodes,
    without_reentrant_checkpoints,
)
from hessian_callback.operators.hooks import suspend_hooks

__all__ = ["BatchLoss", "LossModule", "NotAFunctionError"]

# A derivative inside of the loss, such as a gradient penalty, leaves nodes of such names in the graph.
_SECOND_DERIVATIVE = re.compile("Backward.*Backward")


class NotAFunctionError(ValueError):
    """Raised if a loss gives two values for the same parameters and the same batch.

    Attributes:
        finding: the message without cause and remedy.
    """

    def __init__(self, finding: str, remedy: str) -> None:
        super().__init__(f"{finding}. {remedy}")
        self.finding = finding


class BatchLoss:
    """The mean loss of a batch as a function of chosen parameters.

    The value is a function of the parameters and the batch alone, as far as possible:

    - *Random numbers.* Before each evaluation Python's, NumPy's and PyTorch's global generators get a state that
      depends on the batch only. Afterwards they get their former state back.
    - *State.* ``restore_state`` is called after each evaluation. A batch that the loss changes in place is copied
      for each evaluation.
    - *Other parameters.* Inside `differentiable` only the chosen parameters require grad, so autograd records
      nothing for operations that don't depend on them. If the loss takes derivatives itself, all others keep
      their setting.

    Args:
        model: the module that holds the parameters.
        loss_fn: ``(model, batch) -> scalar``.
        parameters: the tensors to differentiate with respect to, each once. A complex one counts as its real and
            imaginary parts.
        restore_state: undoes the changes of state that an evaluation makes.
        rank: the rank that evaluates the loss. Ranks use different random numbers.

    Attributes:
        draws: whether any evaluation has moved a global random generator.
        changes_batch: whether any evaluation has changed its batch in place.

    Example:
        >>> model = nn.Linear(1, 1, bias=False)
        >>> loss = BatchLoss(model, lambda m, x: (torch.rand(1) * m(x)).mean(), [model.weight])
        >>> batch = torch.ones(2, 1)
        >>> bool(loss.value(batch) == loss.value(batch)), loss.draws
        (True, True)
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        parameters: Sequence[nn.Parameter],
        *,
        restore_state: Callable[[], None] | None = None,
        rank: int = 0,
    ) -> None:
        self.model = model
        self.parameters = list(parameters)
        self.sizes = [parameter.numel() * (2 if parameter.is_complex() else 1) for parameter in parameters]
        self.draws = False
        self.changes_batch = False
        self._loss_fn = loss_fn
        self._restore_state = restore_state
        chosen = {id(parameter) for parameter in self.parameters}
        self._others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
        self._frozen: list[nn.Parameter] = []
        self._first_seed = rank << 20
        # Batches and the seeds of their random numbers, by identity.
        self._seeds: dict[int, tuple[Any, int]] = {}
        self._seen: set[int] = set()

    def value(self, batch: Any) -> Tensor:
        """Evaluate the loss, and check that it can be differentiated.

        Raises:
            TypeError: if the loss is not a tensor.
            ValueError: if it is not a scalar, or does not depend on any chosen parameter.
        """
        if id(batch) in self._seen:
            return self._checked(self._evaluate(batch))
        loss = self._checked(self._with_derivatives_inside(batch))
        self._seen.add(id(batch))
        return loss

    def gradient(self, batch: Any, *, create_graph: bool) -> tuple[Tensor, list[Tensor]]:
        """Return the loss and its gradient; parameters it does not depend on get zeros."""
        loss = self.value(batch)
        gradients = torch.autograd.grad(loss, self.parameters, create_graph=create_graph, materialize_grads=True)
        return loss.detach(), list(gradients)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Cut a flat vector ``(P,)`` into the parameters' shapes; real pieces are views."""
        return [
            # A complex view needs an even offset.
            torch.view_as_complex(piece.clone().view(*parameter.shape, 2))
            if parameter.is_complex()
            else piece.view(parameter.shape)
            for piece, parameter in zip(vector.split(self.sizes), self.parameters, strict=True)
        ]

    def accumulate(self, total: Tensor, pieces: Sequence[Tensor | None], weight: float) -> None:
        """Add pieces in the parameters' shapes to a flat vector ``(P,)``, in place; ``None`` stands for zeros."""
        with torch.no_grad():
            for part, piece in zip(total.split(self.sizes), pieces, strict=True):
                if piece is not None:
                    whole = piece if piece.layout == torch.strided else piece.to_dense()
                    real = torch.view_as_real(whole.resolve_conj()) if whole.is_complex() else whole
                    part.add_(real.reshape(-1), alpha=weight)

    def check(self, batches: Sequence[Any]) -> list[float]:
        """Evaluate every batch once and the first one twice; return the values of the loss.

        Raises:
            ArithmeticError: if a value is NaN or infinite.
            ValueError: if two evaluations of the same batch differ.
        """
        values = []
        with self.differentiable():
            for index, batch in enumerate([*batches, *batches[:1]]):
                loss = without_reentrant_checkpoints(partial(self.value, batch), self.parameters)
                value = float(loss.detach())
                if value != value or abs(value) == float("inf"):
                    raise ArithmeticError(
                        f"the loss of batch {index % len(batches)} is {value}: no Hessian exists there. Check the "
                        "batch for invalid inputs, and whether training has diverged. Give a batch whose labels are "
                        "all ignored the weight 0 with batch_weight=..."
                    )
                values.append(value)
                del loss  # with its graph, before the next
        *values, again = values
        # The same operations on the same CPU round alike; on other devices sums may be formed in any order.
        tolerance = (1e2 if self.parameters[0].device.type == "cpu" else 1e4) * _eps(self.parameters[0])
        if abs(values[0] - again) > tolerance * max(abs(values[0]), abs(again)):
            raise self._difference(values[0], again)
        return values

    @contextmanager
    def differentiable(self) -> Iterator[None]:
        """Make second derivatives possible and their errors readable; let only the chosen parameters require grad.

        Hooks that observe training are removed: they could change the gradients, and see those of a measurement.
        """
        frozen = [parameter for parameter in self._others if parameter.requires_grad]
        outer, self._frozen = self._frozen, frozen or self._frozen
        try:
            for parameter in frozen:
                parameter.requires_grad_(False)
            with suspend_hooks(self.model), exact_derivatives(self.model), explained():
                yield
        finally:
            for parameter in frozen:
                parameter.requires_grad_(True)
            self._frozen = outer

    @contextmanager
    def fixed(self, batch: Any) -> Iterator[None]:
        """Give the random generators the state that belongs to a batch; afterwards put generators and state back."""
        seed = self._seeds.setdefault(id(batch), (batch, self._first_seed + len(self._seeds)))[1]
        generators = _Generators(self.parameters[0].device)
        try:
            with generators.seeded(seed):
                start = None if self.draws else generators.states()
                yield
                if start is not None and generators.states() != start:
                    self.draws = True
        finally:
            self.restore()

    def restore(self) -> None:
        """Undo the changes of state that an evaluation made, if the caller has said how."""
        if self._restore_state is not None:
            self._restore_state()

    def _with_derivatives_inside(self, batch: Any) -> Any:
        """Evaluate a new batch; if the loss takes derivatives itself, let all parameters require grad again.

        Those derivatives may be with respect to parameters that were not chosen.
        """
        try:
            loss = self._first_value(batch)
        except RuntimeError as error:
            if not self._frozen or "does not require grad" not in str(error):
                raise
        else:
            if (
                not self._frozen
                or not isinstance(loss, Tensor)
                or not any(_SECOND_DERIVATIVE.search(node.name()) for node in graph_nodes([loss]))
            ):
                return loss
        self._unfreeze()
        return self._evaluate(batch)

    def _unfreeze(self) -> None:
        for parameter in self._frozen:
            parameter.requires_grad_(True)
        self._frozen, self._others = [], []

    def _first_value(self, batch: Any) -> Any:
        """Evaluate a batch that was not evaluated before, and notice if that changes it."""
        whole = list(tensors(batch))
        copies = [tensor.detach().clone() for tensor in whole]
        versions = [_version(tensor) for tensor in whole]
        loss = self._evaluate(batch)
        changed = [number for number, tensor in enumerate(whole) if _version(tensor) != versions[number]]
        if changed and not self.changes_batch:
            self.changes_batch = True
            with torch.no_grad():
                for number in changed:
                    whole[number].copy_(copies[number])
            loss = self._evaluate(batch)
        return loss

    def _evaluate(self, batch: Any) -> Any:
        # New containers each time: the loss may take entries out of its batch, or replace them.
        fresh = map_tensors(batch, torch.clone if self.changes_batch else _itself)
        with self.fixed(batch):
            return self._loss_fn(self.model, fresh)

    def _checked(self, loss: Any) -> Tensor:
        if not isinstance(loss, Tensor):
            raise TypeError(f"the loss must be a tensor, got {type(loss).__name__}; return the mean loss of the batch")
        if loss.numel() != 1:
            raise ValueError(
                f"the loss must be a scalar, got shape {tuple(loss.shape)}; return its mean over the batch"
            )
        if not loss.requires_grad:
            raise ValueError(
                "the loss does not depend on any parameter that requires grad; do not detach it, nor compute it "
                "under torch.no_grad, nor choose parameters that are frozen"
            )
        return loss.reshape(())

    def _difference(self, one: float, other: float) -> NotAFunctionError:
        text = f"the loss is no function of the parameters and the batch: the same batch gave {one:.9g} and {other:.9g}"
        if self.draws:
            text += ", although all global random generators were in the same state"
        else:
            text += ", and no global random generator moved"
        return NotAFunctionError(
            text,
            "An evaluation changes some state (a queue, a counter, a hidden state that is carried over, a generator "
            "of its own). Pass restore_state=..., a function that puts this state back, or a loss_fn that leaves it "
            "as it is",
        )


class LossModule(nn.Module):
    """The loss as a module, so that parameters anywhere inside the model have names in it."""

    def __init__(self, loss: BatchLoss) -> None:
        super().__init__()
        self.model = loss.model
        self._loss = [loss]  # in a list: the loss is not a submodule

    def forward(self, batch: Any) -> Tensor:
        """Evaluate a batch without fixed random numbers."""
        (loss,) = self._loss
        return loss._checked(loss._loss_fn(loss.model, map_tensors(batch, _itself)))


class _Generators:
    """The global random generators of Python, NumPy and PyTorch, on the CPU and on one device."""

    def __init__(self, device: torch.device) -> None:
        self._generators = [torch.default_generator]
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            self._generators.append(torch.cuda.default_generators[index])

    def states(self) -> list[Any]:
        torch_states = [generator.get_state().numpy().tobytes() for generator in self._generators]
        name, keys, position, has_gauss, cached = np.random.get_state()
        return [random.getstate(), (name, np.asarray(keys).tobytes(), position, has_gauss, cached), *torch_states]

    @contextmanager
    def seeded(self, seed: int) -> Iterator[None]:
        """Seed all of them; afterwards give them their former states back."""
        python, numpy, on_cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
        try:
            random.seed(seed)
            np.random.seed(seed)
            torch.default_generator.manual_seed(seed)
            with ExitStack() as stack:
                for generator in self._generators[1:]:
                    stack.enter_context(own_cuda_state(generator, seed))
                yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            torch.set_rng_state(on_cpu)


def _itself(tensor: Tensor) -> Tensor:
    return tensor


def _version(tensor: Tensor) -> int:
    # Tensors made in inference mode count no versions, and cannot be changed in place outside of it.
    return 0 if tensor.is_inference() else tensor._version


def _eps(tensor: Tensor) -> float:
    return torch.finfo(tensor.dtype).eps
