r"""The ratio of the largest eigenvalue to the first one behind the outliers, as an extra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hessian_callback._options import check_int
from hessian_callback.measurement.extras.base import Examination, Extra, Finding
from hessian_callback.power_law.effective_rank import outlier_ratio

__all__ = ["OutlierRatio"]


@dataclass(frozen=True, kw_only=True)
class OutlierRatio(Extra):
    r"""The ratio :math:`\lambda_1 / \lambda_{C+1}`, for classifiers with about one outlier a class; costs nothing.

    Logs ``outlier_ratio``.

    Args:
        num_classes: C, at least 1 and below the number of eigenvalues.

    Raises:
        ValueError: if ``num_classes`` is out of range.
    """

    name: ClassVar[str] = "outlier_ratio"
    keys: ClassVar[Mapping[str, str]] = {
        "outlier_ratio": "largest eigenvalue over the one behind the ``num_classes`` largest",
    }

    num_classes: int

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_int("num_classes", self.num_classes, at_least=1)

    def check(self, num_eigenvalues: int) -> None:
        """Check that an eigenvalue is left behind those of the classes.

        Raises:
            ValueError: if not.
        """
        if self.num_classes >= num_eigenvalues:
            raise ValueError(
                f"num_classes={self.num_classes} must be below num_eigenvalues={num_eigenvalues}: the ratio takes "
                "the eigenvalue after those of the classes"
            )

    def compute(self, examination: Examination) -> Finding:
        """Compute the ratio."""
        known = examination.spectrum.positive_converged
        return Finding({"outlier_ratio": outlier_ratio(known, self.num_classes)})
