r"""Read from an optimizer at which curvature its steps become unstable.

On a quadratic loss with Hessian :math:`H`, and with the optimizer's statistics frozen as they are, one step of every
optimizer below has the form

.. math::
    m' = \beta m + \kappa g, \qquad
    \theta' = (1 - \eta w) \theta - P^{-1} (a g + b m'), \qquad g = (H + w_2) \theta,

with a diagonal preconditioner :math:`P`, momentum :math:`\beta`, decoupled weight decay :math:`w` and L2 penalty
:math:`w_2`. The iteration diverges exactly if an eigenvalue exceeds 1 of

.. math::
    A = C^{1/2} (H + w_2) C^{1/2} + \tfrac{1}{2} \eta w, \qquad
    C = P^{-1} \, \frac{(1 + \beta) a + \kappa b}{2 (1 + \beta)} .

The derivation, and the values of a, b and :math:`\kappa` for each optimizer, are on the documentation's page "Edge of
stability". :math:`C` and the last term are linear in the learning rate, so the largest stable rate is the present one
divided by the largest eigenvalue of A.

Sources: Cohen et al., "Gradient Descent on Neural Networks Typically Occurs at the Edge of Stability" (ICLR 2021),
Appendix B, for gradient descent, heavy ball and Nesterov; Cohen et al., "Adaptive Gradient Methods at the Edge of
Stability" (2022), section 2, for Adam and RMSprop. The others follow in the same way.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from hessian_callback._options import check_number

__all__ = [
    "PreconditionerFunction",
    "StabilityLimits",
    "UnsupportedOptimizerError",
    "Update",
    "check_optimizer",
    "read_update",
    "stability_limits",
]

#: ``(group, state, parameter) -> (P, threshold)``; ``None`` for a parameter that the next step leaves as it is.
PreconditionerFunction = Callable[
    [Mapping[str, Any], Mapping[str, Any], nn.Parameter], tuple[Tensor | float, float] | None
]


class UnsupportedOptimizerError(ValueError):
    """An optimizer whose preconditioner cannot be read."""


@dataclass(frozen=True, eq=False)
class Update:
    r"""The coefficients of one parameter's update.

    Attributes:
        preconditioner: the diagonal :math:`P`, of the parameter's shape, or a number.
        momentum: :math:`\beta`.
        direct: :math:`a`, the rate of the gradient itself.
        averaged: :math:`\kappa b`, the rate of the gradient through the momentum.
        penalty: :math:`w_2`.
        decay: :math:`\eta w`.

    Example:
        >>> adam = Update(torch.ones(3), momentum=0.9, averaged=0.1 * 1e-3)
        >>> round(adam.threshold)  # 38 / lr
        38000
    """

    preconditioner: Tensor | float
    momentum: float = 0.0
    direct: float = 0.0
    averaged: float = 0.0
    penalty: float = 0.0
    decay: float = 0.0

    @property
    def threshold(self) -> float:
        r"""Largest stable eigenvalue of :math:`P^{-1/2} H P^{-1/2}` without weight decay; infinite at rate zero."""
        rate = (1 + self.momentum) * self.direct + self.averaged
        return 2 * (1 + self.momentum) / rate if rate > 0 else math.inf


@dataclass(frozen=True, eq=False)
class StabilityLimits:
    r"""The diagonal matrices of :math:`A`, whose largest eigenvalue is 1 at the edge of stability.

    Attributes:
        scale: the diagonal of :math:`C^{1/2}`, ``(P,)``; zero for coordinates that the optimizer does not move.
        shift: the diagonal of what weight decay adds, ``(P,)``.
        negative: whether the optimizer maximizes the loss, so that :math:`H` enters with the negative sign.
        lr: the learning rate of the first group that moves a chosen parameter.
        threshold: the largest stable eigenvalue of :math:`P^{-1/2} H P^{-1/2}` for that group, such as ``38 / lr``.
        uniform: the common values of ``scale`` squared and of ``shift`` if all coordinates have the same, so that A has
            the eigenvectors of :math:`H`, else ``None``.
    """

    scale: Tensor
    shift: Tensor
    negative: bool
    lr: float
    threshold: float
    uniform: tuple[float, float] | None


def check_optimizer(optimizer: Optimizer, preconditioner: PreconditionerFunction | None = None) -> None:
    """Check that the preconditioner of an optimizer can be read.

    Args:
        optimizer: the optimizer.
        preconditioner: the user's own function, which reads any optimizer.

    Raises:
        UnsupportedOptimizerError: if it is no optimizer with a known rule and there is no function, or if some of its
            groups minimize and others maximize.

    Example:
        >>> check_optimizer(torch.optim.LBFGS([nn.Parameter(torch.zeros(2))]))
        Traceback (most recent call last):
        ...
        hessian_callback.measurement.preconditioners.UnsupportedOptimizerError: the stability of LBFGS ...
    """
    if preconditioner is None and _rule_of(optimizer) is None:
        known = ", ".join(kind.__name__ for kind in _RULES)
        raise UnsupportedOptimizerError(
            f"the stability of {type(optimizer).__name__} is not known, only that of {known}; pass "
            "preconditioner=callable(group, state, parameter) that returns its diagonal preconditioner and the largest "
            "stable curvature"
        )
    if len({bool(group.get("maximize", False)) for group in optimizer.param_groups}) > 1:
        raise UnsupportedOptimizerError(
            "some groups of the optimizer minimize and others maximize, so no Hessian decides about stability; use "
            "an optimizer for each"
        )


def _rule_of(optimizer: Optimizer) -> Callable[[Mapping[str, Any], Mapping[str, Any]], Update | None] | None:
    """Return the rule of an optimizer, or of a subclass that takes its steps as the parent does."""
    kind = next((base for base in type(optimizer).__mro__ if base in _RULES), None)
    # PyTorch wraps the method of every class that is instantiated.
    same = kind is not None and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step)
    return _RULES[kind] if same and kind is not None else None


def read_update(
    optimizer: Optimizer,
    group: Mapping[str, Any],
    parameter: nn.Parameter,
    preconditioner: PreconditionerFunction | None = None,
) -> Update | None:
    """Read the coefficients of a parameter's update between two steps, with the state of the last step.

    Args:
        optimizer: the optimizer, see `check_optimizer`.
        group: the parameter's group.
        parameter: the parameter.
        preconditioner: the user's own function.

    Returns:
        The coefficients; ``None`` if the optimizer has no state of the parameter yet.
    """
    # Reading a missing entry of the optimizer's dictionary would create it.
    state = optimizer.state.get(parameter, {})
    if preconditioner is not None:
        found = preconditioner(group, state, parameter)
        if found is None:
            return None
        diagonal, threshold = found
        return Update(diagonal, direct=2 / check_number("the threshold of preconditioner=", threshold, above=0))
    rule = _rule_of(optimizer)
    assert rule is not None, "check_optimizer was called"
    return rule(group, state)


def stability_limits(
    optimizer: Optimizer,
    parameters: Mapping[str, nn.Parameter],
    preconditioner: PreconditionerFunction | None = None,
) -> StabilityLimits | None:
    """Read the limits of stability from an optimizer as it is between two steps. A collective if it is sharded.

    A coordinate counts as fixed if its parameter is not in the optimizer, or has no state while others have one.

    Args:
        optimizer: the optimizer.
        parameters: the parameters in which the Hessian is taken, in its order.
        preconditioner: the user's own function, see `PreconditionerFunction`.

    Returns:
        The limits; ``None`` before the first step of an optimizer that adapts to its gradients.

    Raises:
        UnsupportedOptimizerError: see `check_optimizer`; also if none of the parameters is in the optimizer.
        ValueError: if a preconditioner has another shape than its parameter, or is not positive and finite.

    Example:
        Gradient descent at rate .5 is stable up to a curvature of 4.

        >>> model = nn.Linear(2, 1, bias=False)
        >>> limits = stability_limits(torch.optim.SGD(model.parameters(), lr=0.5), dict(model.named_parameters()))
        >>> limits.threshold, limits.scale
        (4.0, tensor([0.5000, 0.5000], dtype=torch.float64))
    """
    check_optimizer(optimizer, preconditioner)
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    if not any(parameter in groups for parameter in parameters.values()):
        raise UnsupportedOptimizerError(
            f"none of the chosen parameters is in the {type(optimizer).__name__}; choose parameters= or optimizer= so "
            "that they go together"
        )
    scales, shifts = [], []
    first: tuple[float, float] | None = None
    for name, parameter in parameters.items():
        group = groups.get(parameter)
        update = None if group is None else read_update(optimizer, group, parameter, preconditioner)
        curvature, shift = _diagonals(name, parameter, update)
        scales.append(curvature.sqrt())
        shifts.append(shift)
        if update is not None and group is not None and (first is None or first[1] == math.inf):
            first = (float(group["lr"]), update.threshold)
    if first is None:
        return None
    scale, shift = torch.cat(scales), torch.cat(shifts)
    same = bool((scale == scale[0]).all()) and bool((shift == shift[0]).all())
    return StabilityLimits(
        scale=scale,
        shift=shift,
        negative=bool(optimizer.param_groups[0].get("maximize", False)),
        lr=first[0],
        threshold=first[1],
        uniform=(float(scale[0]) ** 2, float(shift[0])) if same else None,
    )


def _diagonals(name: str, parameter: nn.Parameter, update: Update | None) -> tuple[Tensor, Tensor]:
    """Return one parameter's parts of the diagonals of C and of the shift; a complex one counts as two real ones."""
    shape = (*parameter.shape, 2) if parameter.is_complex() else tuple(parameter.shape)
    dtype = torch.float32 if parameter.device.type == "mps" else torch.float64
    zeros = torch.zeros(shape, dtype=dtype, device=parameter.device)
    if update is None:
        return zeros.flatten(), zeros.flatten()
    diagonal = torch.as_tensor(_whole(update.preconditioner), dtype=dtype, device=parameter.device).detach()
    if parameter.is_complex() and diagonal.ndim and diagonal.shape == parameter.shape:
        diagonal = diagonal.unsqueeze(-1)
    if diagonal.ndim and tuple(diagonal.shape) not in (shape, (*shape[:-1], 1) if parameter.is_complex() else shape):
        raise ValueError(
            f"the preconditioner of {name} has shape {tuple(diagonal.shape)}, and the parameter has "
            f"{tuple(parameter.shape)}; return a number or a tensor of the parameter's shape"
        )
    if not bool(torch.isfinite(diagonal).all()) or bool((diagonal <= 0).any()):
        raise ValueError(
            f"the preconditioner of {name} must be positive and finite, and holds zeros, negative numbers, NaN or "
            "infinity; raise the optimizer's eps, or examine its gradients"
        )
    curvature = (zeros + 1 / (update.threshold * diagonal)).flatten()
    return curvature, curvature * update.penalty + update.decay / 2


def _whole(value: Any) -> Any:
    """Return the whole tensor of a sharded one; a collective. Any other value is returned as it is."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


# -- the rules, one for each optimizer -------------------------------------------------------------------


def _sgd(group: Mapping[str, Any], state: Mapping[str, Any]) -> Update | None:
    lr, momentum, dampening = float(group["lr"]), float(group["momentum"]), float(group["dampening"])
    if not momentum:
        return Update(1.0, direct=lr, penalty=float(group["weight_decay"]))
    direct = lr if group["nesterov"] else 0.0
    averaged = lr * (1 - dampening) * (momentum if group["nesterov"] else 1.0)
    return Update(1.0, momentum, direct, averaged, penalty=float(group["weight_decay"]))


def _adam(group: Mapping[str, Any], state: Mapping[str, Any]) -> Update | None:
    step = _steps(state)
    if step is None:
        return None
    beta1, beta2 = map(float, group["betas"])
    second = state["max_exp_avg_sq"] if group["amsgrad"] else state["exp_avg_sq"]
    root = _map(lambda v: v.sqrt() / math.sqrt(1 - beta2**step) + float(group["eps"]), second)
    return _averaging(group, beta1, _map(lambda d: d * (1 - beta1**step), root))


def _adamw(group: Mapping[str, Any], state: Mapping[str, Any]) -> Update | None:
    # In torch 2.6 it is no Adam, and its groups do not say so.
    return _adam({"decoupled_weight_decay": True, **group}, state)


def _nadam(group: Mapping[str, Any], state: Mapping[str, Any]) -> Update | None:
    step = _steps(state)
    if step is None:
        return None
    lr, (beta1, beta2), psi = float(group["lr"]), map(float, group["betas"]), float(group["momentum_decay"])
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (psi * t)) for t in (step, step + 1))
    product = float(state["mu_product"])
    root = _map(lambda v: (v / (1 - beta2**step)).sqrt() + float(group["eps"]), state["exp_avg_sq"])
    direct = lr * (1 - mu) / (1 - product)
    averaged = lr * mu_next / (1 - product * mu_next) * (1 - beta1)
    return Update(root, beta1, direct, averaged, **_weight_decay(group))


def _radam(group: Mapping[str, Any], state: Mapping[str, Any]) -> Update | None:
    step = _steps(state)
    if step is None:
        return None
    beta1, beta2 = map(float, group["betas"])
    longest = 2 / (1 - beta2) - 1
    length = longest - 2 * step * beta2**step / (1 - beta2**step)
    if length <= 5:
        return _averaging(group, beta1, 1 - beta1**step)
    rectification = math.sqrt((length - 4) * (length - 2) * longest / ((longest - 4) * (longest - 2) * length))
    factor = (1 - beta1**step) / (rectification * math.sqrt(1 - beta2**step))
    root = _map(lambda v: (v.sqrt() + float(group["eps"])) * factor, state["exp_avg_sq"])
    return _averaging(group, beta1, root)


def _adamax(group: Mapping[str, Any], state: Mapping[str, Any]) -> Update | None:
    step = _steps(state)
    if step is None:
        return None
    beta1 = float(group["betas"][0])
    return _averaging(group, beta1, _map(lambda u: u * (1 - beta1**step), state["exp_inf"]))


def _rmsprop(group: Mapping[str, Any], state: Mapping[str, Any]) -> Update | None:
    if _steps(state) is None:
        return None
    square, lr, momentum = state["square_avg"], float(group["lr"]), float(group["momentum"])
    variance = _map(lambda v, m: v - m**2, square, state["grad_avg"]) if group["centered"] else square
    root = _map(lambda v: v.sqrt() + float(group["eps"]), variance)
    rate = {"averaged": lr} if momentum else {"direct": lr}
    return Update(root, momentum, penalty=float(group["weight_decay"]), **rate)


def _adagrad(group: Mapping[str, Any], state: Mapping[str, Any]) -> Update | None:
    step = _steps(state)
    if step is None:
        return None
    slowing = 1 + (step - 1) * float(group["lr_decay"])
    root = _map(lambda total: (total.sqrt() + float(group["eps"])) * slowing, state["sum"])
    return Update(root, direct=float(group["lr"]), penalty=float(group["weight_decay"]))


def _steps(state: Mapping[str, Any]) -> float | None:
    """Return the steps that a parameter has taken; ``None`` before the first."""
    step = float(state.get("step", 0))
    return step if step >= 1 else None


def _averaging(group: Mapping[str, Any], beta: float, preconditioner: Tensor | float) -> Update:
    return Update(preconditioner, beta, averaged=float(group["lr"]) * (1 - beta), **_weight_decay(group))


def _weight_decay(group: Mapping[str, Any]) -> dict[str, float]:
    decay = float(group["weight_decay"])
    return {"decay": float(group["lr"]) * decay} if group.get("decoupled_weight_decay") else {"penalty": decay}


def _map(function: Callable[..., Tensor], *states: Tensor) -> Tensor:
    """Compute in float64, also from states in half precision; complex states are viewed as real."""
    whole = [_whole(state) for state in states]
    real = [torch.view_as_real(state) if state.is_complex() else state for state in whole]
    return function(*(state if state.device.type == "mps" else state.double() for state in real))


_RULES: dict[type[Optimizer], Callable[[Mapping[str, Any], Mapping[str, Any]], Update | None]] = {
    SGD: _sgd,
    Adam: _adam,
    AdamW: _adamw,
    NAdam: _nadam,
    RAdam: _radam,
    RMSprop: _rmsprop,
    Adagrad: _adagrad,
    Adamax: _adamax,
}
