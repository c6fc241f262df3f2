"""The pieces of a piecewise smooth loss: which side of its kinks an evaluation lies on.

A loss with ReLU units has another Hessian on each side of a kink. Where an input of a unit is zero up to rounding,
evaluations in float32 and in float64 lie on different sides, and their Hessians differ by more than rounding. An
evaluation in float64 that follows the decisions of one in float32 is the second derivative of the same piece.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Decision", "FollowedPieces", "RecordedPieces"]

# The function that decided, and what: see `_decide`.
Decision = tuple[Any, Tensor]


class RecordedPieces(TorchFunctionMode):
    """Record the decisions that operations take inside the block, in order.

    Attributes:
        decisions: for each operation with kinks, on which side of them each number lies; for comparisons, and positions
            of largest values, their results.

    Example:
        >>> with RecordedPieces() as recorded:
        ...     _ = F.relu(torch.tensor([-1.0, 2.0]))
        >>> recorded.decisions[0][1].tolist()
        [0, 1]
    """

    def __init__(self) -> None:
        super().__init__()
        self.decisions: list[Decision] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DISCRETE:
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                self.decisions.append((func, result.detach().clone()))
            return result
        decision = _decide(func, args, kwargs)
        if decision is not None:
            self.decisions.append((func, decision))
        return func(*args, **kwargs)


class FollowedPieces(TorchFunctionMode):
    """Evaluate operations on the pieces that other evaluations of them have decided for.

    A number on the other side of a kink is reflected to this side. Numbers that lie on the same side are not changed.

    Args:
        decisions: those of a `RecordedPieces` around the same code.

    Raises:
        ValueError: if the code calls other operations, or with other shapes.

    Example:
        >>> with RecordedPieces() as recorded:
        ...     _ = F.relu(torch.tensor([-1e-9, 2.0]))
        >>> x = torch.tensor([1e-9, 2.0], dtype=torch.float64, requires_grad=True)
        >>> with FollowedPieces(recorded.decisions):
        ...     F.relu(x).sum().backward()
        >>> x.grad.tolist()
        [0.0, 1.0]
    """

    def __init__(self, decisions: Sequence[Decision]) -> None:
        super().__init__()
        self._decisions = iter(decisions)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _DISCRETE:
            result = func(*args, **kwargs)
            return self._next(func, result) if isinstance(result, Tensor) else result
        decision = _decide(func, args, kwargs)
        if decision is None:
            return func(*args, **kwargs)
        wanted = self._next(func, decision)
        if torch.equal(wanted, decision):
            return func(*args, **kwargs)
        return _KINKED[func].follow(func, args, kwargs, wanted, decision)

    def check_all_followed(self) -> None:
        """Raise if the evaluation took fewer decisions than were recorded: then it may have followed wrong ones."""
        if next(self._decisions, None) is not None:
            raise ValueError("the loss takes other operations than in its former evaluation")

    def _next(self, func: Any, own: Tensor) -> Tensor:
        expected, decision = next(self._decisions, (None, own))
        if expected is not func or decision.shape != own.shape:
            raise ValueError("the loss takes other operations than in its former evaluation")
        return decision.to(own.dtype)


def _decide(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    """Return the decisions of an operation with kinks; ``None`` for any other, or with arguments that are not known."""
    kind = _KINKED.get(func)
    if kind is None or not args or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
        return None
    with torch.no_grad():
        decision: Tensor | None = kind.decide(func, args, kwargs)
    return decision


class _Breakpoints:
    """A function of each number, smooth between breakpoints; a decision is the number of breakpoints below.

    A number on a breakpoint has the derivative of one side: of the upper side for those in ``closed``.
    """

    def __init__(
        self, breakpoints: Callable[[Mapping[str, Any]], Sequence[Any]], *names: str, closed: Sequence[bool] = ()
    ) -> None:
        self._breakpoints = breakpoints
        self._closed = closed
        self._names = names

    def _points(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[tuple[float, bool]] | None:
        given = {**_defaults(func), **dict(zip(self._names, args[1:], strict=False)), **kwargs}
        points = self._breakpoints(given)
        if any(isinstance(point, Tensor) for point in points):
            return None
        closed = self._closed or [False] * len(points)
        return sorted((float(p), c) for p, c in zip(points, closed, strict=True) if p is not None)

    def decide(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        points = self._points(func, args, kwargs)
        return None if points is None else _below(args[0], points)

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Tensor, own: Tensor) -> Any:
        points = self._points(func, args, kwargs)
        assert points is not None
        shift = _reflection(args[0].detach(), points, wanted, own)
        works_in_place = getattr(func, "__name__", "").endswith("_") or _defaults(func, args, kwargs).get("inplace")
        shifted = args[0].add_(shift) if works_in_place else args[0] + shift
        return func(shifted, *args[1:], **kwargs)


class _BreakpointsOfDifference(_Breakpoints):
    """A loss of each difference of two numbers, smooth between breakpoints."""

    def decide(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        if len(args) < 2:
            return None
        return super().decide(func, (args[0] - args[1],), kwargs)

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Tensor, own: Tensor) -> Any:
        points = self._points(func, (), kwargs)
        assert points is not None
        shift = _reflection((args[0] - args[1]).detach(), points, wanted, own)
        return func(args[0] + shift, *args[1:], **kwargs)


def _reflection(numbers: Tensor, points: Sequence[tuple[float, bool]], wanted: Tensor, own: Tensor) -> Tensor:
    """Return what moves each number to the wanted side of the breakpoint that lies between."""
    nearest = torch.minimum(wanted, own).long().clamp(max=len(points) - 1)
    between = numbers.new_tensor([point for point, _ in points])[nearest]
    # A number on the breakpoint itself leaves it by a rounding error.
    eps = torch.finfo(numbers.dtype).eps
    distance = torch.maximum((between - numbers).abs(), eps * between.abs().clamp(min=eps))
    return torch.where(wanted != own, between - numbers + torch.where(wanted > own, distance, -distance), 0.0)


def _below(numbers: Tensor, points: Sequence[tuple[float, bool]]) -> Tensor:
    count = torch.zeros_like(numbers, dtype=torch.int8)
    for point, closed in points:
        count += numbers >= point if closed else numbers > point
    return count


class _LargerOfTwo:
    """The larger or the smaller of two numbers; a decision is whether the first is larger."""

    def decide(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        other = _other(args, kwargs)
        return None if other is None else (args[0] > other).char() + (args[0] >= other)

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Tensor, own: Tensor) -> Any:
        other = _other(args, kwargs)
        assert other is not None
        # Equal numbers share the derivative.
        first = 2 if "max" in func.__name__ else 0
        chosen = torch.where(wanted == first, args[0], torch.where(wanted == 1, (args[0] + other) / 2, other))
        return torch.where(wanted == own, func(args[0], other), chosen)


def _other(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
    other = args[1] if len(args) == 2 else kwargs.get("other")
    return other if isinstance(other, Tensor) else None


class _LargestAlong:
    """The largest or smallest number along a dimension, with its place or without it; a decision is the place."""

    def _dimension(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> int | None:
        dimension = args[1] if len(args) > 1 else kwargs.get("dim")
        if isinstance(dimension, (tuple, list)) and len(dimension) == 1:
            dimension = dimension[0]
        return dimension if type(dimension) is int else None

    def decide(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        dimension = self._dimension(args, kwargs)
        if dimension is None:
            return None
        numbers: Tensor = args[0]
        return (numbers.argmin if "min" in func.__name__ else numbers.argmax)(dimension, keepdim=True)

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Tensor, own: Tensor) -> Any:
        dimension = self._dimension(args, kwargs)
        assert dimension is not None
        found = func(*args, **kwargs)
        values, *places = [found] if isinstance(found, Tensor) else found
        chosen, differs = args[0].gather(dimension, wanted), wanted != own
        if chosen.shape != values.shape:  # without keepdim
            chosen, differs, wanted = (t.squeeze(dimension) for t in (chosen, differs, wanted))
        # The number itself, so that comparisons with the result find it.
        values = torch.where(differs, chosen, values)
        return type(found)((values, torch.where(differs, wanted, places[0]))) if places else values


class _Largest:
    """The largest or smallest number: of two tensors, along a dimension, or of all."""

    def _kind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if _other(args, kwargs) is not None:
            return _LargerOfTwo()
        return _LargestAlong() if len(args) > 1 or "dim" in kwargs else _LargestOfAll()

    def decide(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        decision: Tensor | None = self._kind(args, kwargs).decide(func, args, kwargs)
        return decision

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Tensor, own: Tensor) -> Any:
        return self._kind(args, kwargs).follow(func, args, kwargs, wanted, own)


class _LargestOfAll:
    """The largest or smallest of all numbers; a decision is its place."""

    def decide(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        numbers: Tensor = args[0]
        return numbers.argmin() if "min" in func.__name__ else numbers.argmax()

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Tensor, own: Tensor) -> Any:
        return args[0].flatten()[wanted]


class _LargestInWindow:
    """Max pooling over windows; a decision is the place of the largest number in the last dimensions, flattened."""

    def __init__(self, num_dimensions: int) -> None:
        self._num_dimensions = num_dimensions

    def decide(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        if kwargs.get("return_indices") or any(argument is True for argument in args[2:]):
            return None
        indices: Tensor = func(*args, **{**kwargs, "return_indices": True})[1]
        return indices

    def follow(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], wanted: Tensor, own: Tensor) -> Any:
        first = -self._num_dimensions
        return args[0].flatten(first).gather(-1, wanted.flatten(first)).view(wanted.shape)


@cache
def _signature(func: Any) -> inspect.Signature | None:
    try:
        return inspect.signature(func)
    except (TypeError, ValueError):  # Those that are not written in Python have none.
        return None


def _defaults(func: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of a Python function by name, those that are given and those that are not."""
    signature = _signature(func)
    if signature is None:
        return dict(kwargs or {})
    bound = signature.bind_partial(*args, **(kwargs or {}))
    bound.apply_defaults()
    return dict(bound.arguments)


_ZERO = _Breakpoints(lambda _: (0.0,))
_CLAMP = _Breakpoints(lambda given: (given.get("min"), given.get("max")), "min", "max", closed=(True, False))
_CLAMP_MIN = _Breakpoints(lambda given: (given["min"],), "min", closed=(True,))
_CLAMP_MAX = _Breakpoints(lambda given: (given["max"],), "max")
_HARDTANH = _Breakpoints(
    lambda given: (given.get("min_val", -1.0), given.get("max_val", 1.0)), "min_val", "max_val", closed=(False, True)
)
_THRESHOLD = _Breakpoints(lambda given: (given["threshold"],), "threshold")
_SHRINK = _Breakpoints(lambda given: (-given.get("lambd", 0.5), given.get("lambd", 0.5)), "lambd", closed=(True, False))
_THREE = _Breakpoints(lambda _: (-3.0, 3.0), closed=(False, True))
_SIX = _Breakpoints(lambda _: (0.0, 6.0), closed=(False, True))

_L1 = _BreakpointsOfDifference(lambda _: (0.0,))
_SMOOTH_L1 = _BreakpointsOfDifference(lambda given: (-given["beta"], given["beta"]), closed=(False, True))
_HUBER = _BreakpointsOfDifference(lambda given: (-given["delta"], given["delta"]), closed=(True, False))


def _all(kind: Any, *functions: Any) -> dict[Any, Any]:
    return dict.fromkeys(functions, kind)


_KINKED: dict[Any, Any] = {
    **_all(_ZERO, F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_, F.leaky_relu, F.leaky_relu_),
    **_all(_ZERO, F.elu, F.elu_, F.selu, F.selu_, F.celu, F.celu_, F.prelu, torch.prelu, Tensor.prelu),
    **_all(_ZERO, torch.selu, torch.selu_, torch.celu, torch.celu_),
    **_all(_ZERO, torch.abs, torch.abs_, Tensor.abs, Tensor.abs_, Tensor.__abs__, torch.absolute, Tensor.absolute),
    **_all(_SIX, F.relu6),
    **_all(_HARDTANH, F.hardtanh, F.hardtanh_),
    **_all(_THRESHOLD, F.threshold, torch.threshold, torch.threshold_),
    **_all(_THREE, F.hardswish),
    **_all(_SHRINK, F.softshrink, F.hardshrink, torch.hardshrink, Tensor.hardshrink),
    F.l1_loss: _L1,
    F.smooth_l1_loss: _SMOOTH_L1,
    F.huber_loss: _HUBER,
    **_all(_CLAMP, torch.clamp, torch.clamp_, Tensor.clamp, Tensor.clamp_, torch.clip, torch.clip_),
    **_all(_CLAMP, Tensor.clip, Tensor.clip_),
    **_all(_CLAMP_MIN, torch.clamp_min, torch.clamp_min_, Tensor.clamp_min, Tensor.clamp_min_),
    **_all(_CLAMP_MAX, torch.clamp_max, torch.clamp_max_, Tensor.clamp_max, Tensor.clamp_max_),
    **_all(_LargerOfTwo(), torch.maximum, torch.minimum, Tensor.maximum, Tensor.minimum, torch.fmax, torch.fmin),
    **_all(_Largest(), torch.max, torch.min, Tensor.max, Tensor.min, torch.amax, torch.amin, Tensor.amax, Tensor.amin),
    **_all(_LargestInWindow(1), F.max_pool1d, F.adaptive_max_pool1d),
    **_all(_LargestInWindow(2), F.max_pool2d, F.adaptive_max_pool2d),
    **_all(_LargestInWindow(3), F.max_pool3d, F.adaptive_max_pool3d),
}
# Their results have no derivative, so they can be taken over.
_DISCRETE: frozenset[Any] = frozenset(
    [
        *(torch.gt, torch.ge, torch.lt, torch.le, torch.greater, torch.greater_equal, torch.less, torch.less_equal),
        *(Tensor.gt, Tensor.ge, Tensor.lt, Tensor.le, Tensor.__gt__, Tensor.__ge__, Tensor.__lt__, Tensor.__le__),
        *(Tensor.greater, Tensor.greater_equal, Tensor.less, Tensor.less_equal, torch.isclose, Tensor.isclose),
        *(torch.argmax, torch.argmin, torch.argsort, Tensor.argmax, Tensor.argmin, Tensor.argsort),
        *(torch.sign, Tensor.sign, torch.heaviside, Tensor.heaviside, torch.floor, Tensor.floor, torch.round),
    ]
)
