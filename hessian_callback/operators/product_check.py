"""A check that Hessian-vector products are derivatives of the gradient."""

from __future__ import annotations

import math
import re
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from hessian_callback.linalg.distributed import Partition
from hessian_callback.linalg.random_vectors import Purpose, gaussian_slice
from hessian_callback.operators.derivatives import DoubleBackwardError, graph_nodes
from hessian_callback.operators.hessian import HessianOperator
from hessian_callback.operators.reference_products import ReferenceProducts

__all__ = ["ProductCheck", "WrongProductError", "check_products"]


class WrongProductError(DoubleBackwardError):
    """Hessian-vector products differ from the derivative of the gradient, or are not symmetric."""


@dataclass(frozen=True)
class ProductCheck:
    r"""Result of a check that found no error.

    Attributes:
        asymmetry: :math:`|u^T H v - v^T H u| / \max(\|H u\|, \|H v\|)` for unit vectors u and v.
        difference: :math:`\|H v - D v\| / \max(\|H v\|, \|D v\|)`, where D v is a difference of gradients; ``None``
            if nothing can be concluded from differences, or if the products are differences themselves.
        precision: the precision of the check, such as ``"float64"``.
    """

    asymmetry: float
    difference: float | None
    precision: str


@dataclass(frozen=True)
class _Limits:
    """Steps of differences and largest errors for one precision.

    Steps are relative to the norm of the parameters. The first one is tried first. Agreement with any suffices,
    because a wrong product agrees with none.
    """

    steps: tuple[float, ...]
    difference: float
    asymmetry: float


# In float64 a relative error of the gradient of 1e-15 becomes 1e-8 at the first step. Short steps cross no kinks of
# ReLU units. Long ones suit gradients that are computed with less precision inside.
_FLOAT64 = _Limits(steps=(1e-7, 1e-9, 1e-8, 1e-5, 1e-3), difference=1e-3, asymmetry=1e-4)
# In float32 an error of 1e-7 becomes 1e-4. Steps cross kinks, so losses with kinks are not compared.
_FLOAT32 = _Limits(steps=(1e-3, 3e-4, 3e-3, 1e-4, 1e-2), difference=0.1, asymmetry=0.02)
# The error must exceed the disagreement of two differences by this factor to count.
_CERTAIN = 5.0
# Backward passes of functions that are not differentiable everywhere.
_KINKS = re.compile("Relu|Threshold|MaxPool|Hardtanh|Hardsigmoid|Hardswish|Abs|Clamp|M(?:ax|in|edian)|Sort|Topk|shrink")


def check_products(operator: HessianOperator, *, seed: int) -> ProductCheck:
    r"""Check along random directions that an operator's products are those of a Hessian.

    Products by double backward are wrong, without any error of PyTorch, if the gradient is not a differentiable
    function that autograd sees whole: a custom ``torch.autograd.Function`` computes its gradient in forward, a
    term is detached, a straight-through estimator replaces a derivative, or PyTorch's own second derivative is wrong.
    The check forms :math:`H u` for a random :math:`u`, and :math:`H v` for :math:`v` between :math:`u` and
    :math:`H u`. It tests that :math:`u^T H v = v^T H u`, and that :math:`H v` is a central difference of
    gradients. Two steps of a difference that disagree with each other prove nothing, so kinks and large third
    derivatives cause no false alarm.

    The check runs in float64, with float64 values of the parameters, buffers and batches, whatever their precision.
    If the loss doesn't run in float64, or its tensors don't fit the free memory, the check runs in the parameters'
    precision with wider limits. Costs two products and four gradients of all batches; more only if the first
    comparison fails. A collective.

    Args:
        operator: the operator.
        seed: of the random direction, at least 0.

    Raises:
        WrongProductError: on all ranks together, if the products are wrong; the message names the operation if
            the graph of the loss shows it.

    Example:
        >>> model = torch.nn.Linear(2, 1)
        >>> with HessianOperator(model, lambda m, x: m(x).square().mean(), [torch.rand(8, 2)]) as operator:
        ...     result = check_products(operator, seed=0)
        >>> result.asymmetry < 1e-12, result.difference < 1e-6, result.precision
        (True, True, 'float64')
    """
    direction = gaussian_slice(
        Partition(operator.num_parameters, 1, 0), seed=seed, draw=1 << 31, purpose=Purpose.SKETCH
    )
    direction /= direction.norm()
    for float64 in (True, False):
        reference = operator.reference(float64=float64)
        if reference is not None:
            result = _Comparison(operator, reference).run(direction)
            if result is not None:
                return result
    # No reference is available. Symmetry can be tested without one.
    return _Comparison(operator, None).run_without_reference(direction)


class _Comparison:
    """The comparison of products with differences of gradients, in one precision."""

    def __init__(self, operator: HessianOperator, reference: ReferenceProducts | None) -> None:
        self._operator = operator
        self._reference = reference
        dtype = operator.dtype if reference is None else reference.dtype
        self._dtype = dtype
        self._limits = _FLOAT64 if dtype == torch.float64 else _FLOAT32
        ranks = operator.ranks
        smooth = dtype == torch.float64 or not ranks.failed_ranks(_has_kinks(operator))
        self._differences_tell = reference is not None and smooth

    def run(self, direction: Tensor) -> ProductCheck | None:
        """Compare along a direction; ``None`` if the loss does not run in this precision."""
        assert self._reference is not None
        multiply = self._multiply if self._operator.exact else self._first_difference
        pairs = self._pairs(direction, multiply)
        if pairs is None:
            return None
        (first, one), (second, other) = pairs
        if not self._operator.exact:
            return self._differences_only((first, one), (second, other))
        asymmetry = self._asymmetry(first, one, second, other)
        difference, step = None, self._limits.steps[0]
        if self._differences_tell:
            difference, step = self._compare(second, other)
        wrong = difference is not None and difference > self._limits.difference
        asymmetric = (
            asymmetry > self._limits.asymmetry
            and not self._is_rounding()
            and asymmetry > _CERTAIN * self._rounding(second, other)
        )
        if wrong or asymmetric:
            of_gradient = self._asymmetry_of_differences(first, second, step) if self._differences_tell else None
            raise WrongProductError(self._message(asymmetry, difference if wrong else None, of_gradient))
        return ProductCheck(asymmetry, difference, self._precision)

    def _is_rounding(self) -> bool:
        """Return whether the loss is so small that a cross entropy near it consists of rounding errors."""
        return abs(self._operator.mean_loss) < 1e3 * torch.finfo(self._dtype).eps

    def _rounding(self, vector: Tensor, product: Tensor) -> float:
        """Return the relative change of a product if the parameters change by rounding."""
        assert self._reference is not None
        eps = torch.finfo(self._dtype).eps
        generator = torch.Generator().manual_seed(0)
        moved = torch.randn(len(vector), generator=generator, dtype=torch.float64, device="cpu")
        moved *= 4 * eps * max(1.0, self._reference.function.parameter_norm) / len(vector) ** 0.5
        products = self._reference.products([vector], moved=moved.to(vector.device, self._dtype))
        return math.inf if products is None else self._norm(products[0] - product) / (self._norm(product) or 1.0)

    def run_without_reference(self, direction: Tensor) -> ProductCheck:
        """Test the symmetry of the operator's own products."""
        operator = self._operator
        pairs = self._pairs(direction, lambda vector: operator.partition.cut(operator.matvec(vector)))
        assert pairs is not None
        (first, one), (second, other) = pairs
        asymmetry = self._asymmetry(first, one, second, other)
        if operator.exact and asymmetry > self._limits.asymmetry:
            raise WrongProductError(self._message(asymmetry, None, None))
        return ProductCheck(asymmetry, None, self._precision)

    def _differences_only(self, first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> ProductCheck:
        """Test whether the derivative of the gradient is symmetric.

        Differences that are asymmetric with one step must be so with another one, and agree with each other: at a
        kink they don't.
        """
        (u, one), (v, other) = first, second
        tried: list[tuple[Tensor, Tensor, float]] = []
        for step in (None, *self._limits.steps[1:]):
            if step is not None:
                pair = self._difference(u, step), self._difference(v, step)
                if pair[0] is None or pair[1] is None:
                    break
                one, other = pair[0], pair[1]
            tried.append((one, other, self._asymmetry(u, one, v, other)))
            if tried[-1][2] <= self._limits.asymmetry:
                break
        one, other, asymmetry = min(tried, key=lambda entry: entry[2])
        certain = [
            entry[2]
            for number, entry in enumerate(tried)
            for again in tried[:number]
            if min(entry[2], again[2]) > _CERTAIN * self._change(entry, again)
        ]
        if self._differences_tell and asymmetry > self._limits.asymmetry and certain:
            raise WrongProductError(self._message(max(certain), None, max(certain)))
        return ProductCheck(asymmetry, None, self._precision)

    def _change(self, entry: tuple[Tensor, Tensor, float], again: tuple[Tensor, Tensor, float]) -> float:
        """Return the relative change of two differences from one step to another."""
        pairs = ((entry[0], again[0]), (entry[1], again[1]))
        return max(self._norm(one - other) / (self._norm(one) or 1.0) for one, other in pairs)

    def _pairs(
        self, direction: Tensor, multiply: Callable[[Tensor], Tensor | None]
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
        """Return a random unit vector u and one between u and H u, whole, with this rank's slices of their products."""
        operator = self._operator
        first = direction.to(operator.device, self._dtype)
        one = multiply(first)
        if one is None:
            return None
        length = self._norm(one)
        second = first
        if length > 0:
            second = first + operator.ranks.all_gather(one, operator.partition) / length
            second = second / second.norm()
        other = multiply(second)
        return None if other is None else ((first, one), (second, other))

    def _multiply(self, vector: Tensor) -> Tensor | None:
        assert self._reference is not None
        products = self._reference.products([vector])
        return None if products is None else products[0]

    def _first_difference(self, vector: Tensor) -> Tensor | None:
        return self._difference(vector, self._limits.steps[0])

    def _difference(self, vector: Tensor, step: float) -> Tensor | None:
        assert self._reference is not None
        return self._reference.difference(vector, step)

    def _compare(self, vector: Tensor, product: Tensor) -> tuple[float | None, float]:
        """Return the relative distance of a product from differences, and the step of the closest one.

        ``None`` if differences with several steps disagree among each other.
        """
        norm = self._norm(product)
        differences: list[Tensor] = []
        errors: list[float] = []
        scale = norm
        for step in self._limits.steps:
            difference = self._difference(vector, step)
            if difference is None:
                return None, step
            differences.append(difference)
            scale = max(norm, self._norm(difference))
            errors.append(self._norm(difference - product))
            if errors[-1] <= self._limits.difference * scale:
                return errors[-1] / (scale or 1.0), step
        best = min(range(len(errors)), key=lambda number: self._spread(differences, number))
        step, spread = self._limits.steps[best], self._spread(differences, best)
        scale = max(norm, self._norm(differences[best]))
        certain = errors[best] > _CERTAIN * spread
        return (errors[best] / scale if certain else None), step

    def _spread(self, differences: list[Tensor], number: int) -> float:
        """Return the distance of one difference from the closest other one."""
        return min(
            self._norm(differences[number] - other) for position, other in enumerate(differences) if position != number
        )

    def _asymmetry_of_differences(self, first: Tensor, second: Tensor, step: float) -> float:
        one, other = self._difference(first, step), self._difference(second, step)
        assert one is not None
        assert other is not None
        return self._asymmetry(first, one, second, other)

    def _asymmetry(self, first: Tensor, one: Tensor, second: Tensor, other: Tensor) -> float:
        cut = self._operator.partition.cut
        crossed = self._dot(cut(first), other) - self._dot(cut(second), one)
        return abs(crossed) / (max(self._norm(one), self._norm(other)) or 1.0)

    def _norm(self, piece: Tensor) -> float:
        return float(self._dot(piece, piece) ** 0.5)

    def _dot(self, one: Tensor, other: Tensor) -> float:
        ranks = self._operator.ranks
        own = torch.dot(one.to(torch.float64), other.to(torch.float64))
        return float(ranks.all_reduce(own.reshape(1).to(ranks.control_device)))

    @property
    def _precision(self) -> str:
        return str(self._dtype).removeprefix("torch.")

    def _message(self, asymmetry: float, difference: float | None, of_gradient: float | None) -> str:
        """Say by how much the products are wrong, why, and what helps."""
        found = []
        if asymmetry > self._limits.asymmetry:
            found.append(f"they are not symmetric (u.Hv and v.Hu differ by {asymmetry:.1%})")
        if difference is not None:
            found.append(f"they differ by {difference:.1%} from a difference of gradients")
        text = f"the Hessian-vector products are wrong: {' and '.join(found)}. "
        suspects = _suspects(self._operator)
        named = f"The loss uses {'; '.join(suspects)}. " if suspects else ""
        if of_gradient is not None and of_gradient > self._limits.asymmetry:
            return (
                f"{text}The gradient is not the derivative of a function, so there is no Hessian: a term is detached, "
                "or a backward pass returns something else than the derivative, as straight-through estimators do. "
                f"{named}The matrix that would be measured holds detached values constant. "
                "Pass a loss_fn without this operation"
            )
        return (
            f"{text}Autograd does not see all of the gradient's dependence on the parameters, as if part of the "
            "gradient were computed in forward or outside of autograd. "
            f"{named}The matrix that would be measured lacks the curvature of this part. Pass a loss_fn without this "
            "operation, or use hvp='finite_difference', which needs first derivatives only"
        )


def _has_kinks(operator: HessianOperator) -> bool:
    loss = operator.loss
    with loss.differentiable():
        return any(
            _KINKS.search(node.name()) for batch in operator.batches[:1] for node in graph_nodes([loss.value(batch)])
        )


def _suspects(operator: HessianOperator) -> list[str]:
    """Describe operations of the loss that are known to break second derivatives; this rank's first batch."""
    found: dict[str, None] = {}
    try:
        for batch in operator.batches[:1]:
            with operator.loss.differentiable(), _Detached(found):
                value = operator.loss.value(batch)
            for node in graph_nodes([value]):
                function = getattr(node, "_forward_cls", None)
                if function is not None:
                    found.setdefault(f"the torch.autograd.Function {function.__qualname__}")
                elif node.name().startswith("WeightNorm"):
                    found.setdefault("weight_norm, whose second derivative is wrong in PyTorch on the CPU")
    except Exception:  # The names only explain an error that is raised anyway.
        pass
    return list(found)[:4]


class _Detached(TorchFunctionMode):
    """Note where tensors that require grad leave autograd, by file and line."""

    _READS = frozenset({Tensor.detach, Tensor.data.__get__, Tensor.item, Tensor.tolist, Tensor.numpy})  # type: ignore[attr-defined]

    def __init__(self, found: dict[str, None]) -> None:
        super().__init__()
        self._found = found

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves = func in self._READS or not torch.is_grad_enabled()
        if leaves and any(isinstance(value, Tensor) and value.requires_grad for value in args):
            place = _place_in_user_code()
            if place is not None:
                name = getattr(func, "__name__", "an operation").replace("__get__", "data")
                self._found.setdefault(f"{name} at {place}, which leaves autograd")
        return func(*args, **(kwargs or {}))


# Libraries that detach for logging, and those that call the loss.
_OTHERS = ("torch", "lightning", "pytorch_lightning", "torchmetrics", "hessian_callback")


def _place_in_user_code() -> str | None:
    place = None
    for frame in reversed(traceback.extract_stack()[:-2]):
        parts = Path(frame.filename).parts
        if parts[-3:] == ("torch", "autograd", "function.py"):
            return None  # Inside of a custom function, which is named itself.
        if place is None and "torch" not in parts:
            if any(name in parts[:-1] for name in _OTHERS):
                return None
            place = f"{parts[-1]}:{frame.lineno}"
    return place
