r"""The cross entropy of a language model's head, which never holds the logits of all tokens.

For hidden states :math:`h_i`, the head's weight :math:`W` and targets :math:`y_i` the loss is

.. math:: L = \frac1N \sum_i \Bigl(\log \sum_v e^{z_{iv}} - z_{i y_i}\Bigr), \qquad z = h W^T.

With :math:`p = \operatorname{softmax}(z)` and :math:`r = (p - 1_y) / N` its gradient is

.. math:: \nabla_h L = r W, \qquad \nabla_W L = r^T h,

and along a direction :math:`(u, U)` of :math:`(h, W)`, with :math:`t = u W^T + h U^T` and
:math:`q_i = p_i \odot (t_i - \langle p_i, t_i \rangle) / N`, the second derivative is

.. math:: \nabla_h^2 L\,(u, U) = q W + r U, \qquad \nabla_W^2 L\,(u, U) = q^T h + r^T u.

Each is a sum over tokens, so each is computed for a few tokens at a time from h and W, and nothing as large as the
logits is kept between them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["chunked_cross_entropy"]


def chunked_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
    """Return the mean cross entropy of the logits ``hidden @ weight.T``, computed for some tokens at a time.

    The value and its first and second derivatives are those of ``F.cross_entropy(hidden @ weight.T, targets)``. Their
    rounding error is smaller on a CPU, where ``F.cross_entropy`` adds up the probabilities in order. Beside the
    arguments, about three arrays of ``chunk`` times V numbers exist at a time. With all logits at once, a product with
    the Hessian takes seven to nine of N times V. Each derivative computes the logits again. Third derivatives, forward
    derivatives and negative targets are not supported.

    Args:
        hidden: hidden states, ``(N, d)``.
        weight: the head's weight, ``(V, d)``, in the same dtype. In half precision the logits are rounded to it, and
            everything after them is computed in float32.
        targets: the classes, ``(N,)``, from 0 to V - 1.
        chunk: tokens at a time.

    Returns:
        A scalar in float32, or in float64 if the arguments are.

    Example:
        >>> from torch.nn import functional as F
        >>> hidden, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(7, 3, dtype=torch.float64)
        >>> targets = torch.tensor([0, 6, 2, 2, 5])
        >>> expected = F.cross_entropy(hidden @ weight.T, targets)
        >>> torch.allclose(chunked_cross_entropy(hidden, weight, targets, chunk=2), expected)
        True
    """
    loss: Tensor = _Loss.apply(hidden, weight, targets, chunk)  # type: ignore[no-untyped-call]
    return loss


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        ctx.save_for_backward(hidden, weight, targets)
        ctx.chunk = chunk
        total = hidden.new_zeros((), dtype=_precise(hidden))
        for part in _chunks(targets, chunk):
            logits = _logits(hidden[part], weight)
            total += (logits.logsumexp(dim=1) - logits.gather(1, targets[part].unsqueeze(1)).squeeze(1)).sum()
        return total / len(targets)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, targets = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:2]
        gradients: tuple[Tensor | None, ...] = _Gradient.apply(  # type: ignore[no-untyped-call]
            hidden, weight, grads[0], targets, ctx.chunk, wanted
        )
        return (*gradients, None, None)


class _Gradient(torch.autograd.Function):
    """The gradient with respect to hidden states and weight, as far as each is wanted."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, grad: Tensor, targets: Tensor, chunk: int, wanted: tuple[bool, bool]
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(hidden, weight, grad, targets)
        ctx.chunk = chunk
        ctx.set_materialize_grads(False)
        for_hidden = torch.empty_like(hidden) if wanted[0] else None
        for_weight = torch.zeros_like(weight) if wanted[1] else None
        for part in _chunks(targets, chunk):
            inputs = hidden[part]
            residuals = _probabilities(inputs, weight)
            _subtract_targets(residuals, targets[part])
            residuals = residuals.mul_(grad / len(targets)).to(weight.dtype)
            if for_hidden is not None:
                for_hidden[part] = residuals @ weight
            if for_weight is not None:
                for_weight.addmm_(residuals.T, inputs)
        return for_hidden, for_weight

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *directions: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, grad, targets = ctx.saved_tensors
        towards, weight_towards = directions
        want_hidden, want_weight, want_grad = ctx.needs_input_grad[:3]
        for_hidden = torch.empty_like(hidden) if want_hidden else None
        for_weight = torch.zeros_like(weight) if want_weight else None
        for_grad = torch.zeros_like(grad) if want_grad else None
        number = len(targets)
        for part in _chunks(targets, ctx.chunk):
            inputs, labels = hidden[part], targets[part]
            probabilities = _probabilities(inputs, weight)
            # The derivative of the logits along the direction.
            along = torch.zeros_like(probabilities, dtype=weight.dtype)
            if towards is not None:
                along.addmm_(towards[part], weight.T)
            if weight_towards is not None:
                along.addmm_(inputs, weight_towards.T)
            along = along.to(probabilities.dtype)
            mean = torch.linalg.vecdot(probabilities, along)
            if for_grad is not None:
                for_grad += (mean - along.gather(1, labels.unsqueeze(1)).squeeze(1)).sum() / number
            curved = along.sub_(mean.unsqueeze(1)).mul_(probabilities).mul_(grad / number).to(weight.dtype)
            if for_hidden is not None:
                for_hidden[part] = curved @ weight
            if for_weight is not None:
                for_weight.addmm_(curved.T, inputs)
            del along, curved
            # Hidden states and weight are multiplied with each other, so each has a term in the other's direction.
            mixed_hidden = for_hidden is not None and weight_towards is not None
            mixed_weight = for_weight is not None and towards is not None
            if mixed_hidden or mixed_weight:
                _subtract_targets(probabilities, labels)
                residuals = probabilities.mul_(grad / number).to(weight.dtype)
                if for_hidden is not None and weight_towards is not None:
                    for_hidden[part] += residuals @ weight_towards
                if for_weight is not None and towards is not None:
                    for_weight.addmm_(residuals.T, towards[part])
        return for_hidden, for_weight, for_grad, None, None, None


def _chunks(targets: Tensor, chunk: int) -> Iterator[slice]:
    return (slice(start, start + chunk) for start in range(0, len(targets), chunk))


def _precise(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    return (hidden @ weight.T).to(_precise(hidden))


def _probabilities(hidden: Tensor, weight: Tensor) -> Tensor:
    probabilities = torch.softmax(_logits(hidden, weight), dim=1)
    # On a CPU softmax adds in order: over 49,152 classes its sum is off by 3e-5 in float32, and derivatives by as much.
    return probabilities.div_(probabilities.sum(dim=1, keepdim=True))


def _subtract_targets(probabilities: Tensor, targets: Tensor) -> None:
    """Subtract 1 in the targets' places, in place."""
    probabilities.scatter_add_(1, targets.unsqueeze(1), -torch.ones_like(targets, dtype=probabilities.dtype)[:, None])
