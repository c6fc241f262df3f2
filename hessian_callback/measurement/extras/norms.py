"""Norms of parameters and gradient as an extra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hessian_callback.measurement.extras.base import Examination, Extra, Finding
from hessian_callback.operators.fully_shard import is_sharded
from hessian_callback.operators.gradients import gradient_norm, parameter_norm
from hessian_callback.operators.hessian import HessianOperator

__all__ = ["Norms"]


@dataclass(frozen=True, kw_only=True)
class Norms(Extra):
    """The Euclidean norms of the chosen parameters and of the loss's gradient in them; costs one gradient.

    Logs ``parameter_norm`` and ``gradient_norm``.
    """

    name: ClassVar[str] = "norms"
    keys: ClassVar[Mapping[str, str]] = {
        "parameter_norm": "Euclidean norm of the parameters",
        "gradient_norm": "Euclidean norm of the gradient of the held-out loss",
    }

    def compute(self, examination: Examination) -> Finding:
        """Compute both norms."""
        operator, problem = examination.open_operator, examination.problem
        assert isinstance(operator, HessianOperator)
        if is_sharded(problem.model) and not operator.exact:
            raise ValueError("norms need whole parameters, and hvp='finite_difference' leaves them sharded")
        gradient = gradient_norm(operator.loss, operator.batches, operator.weights, problem.ranks)
        return Finding({"parameter_norm": parameter_norm(operator.loss.parameters), "gradient_norm": gradient})
