"""Trace and Frobenius norm of the Hessian as extras; both come from the same products."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from hessian_callback._options import check_int
from hessian_callback.algorithms.trace import Moments, moments
from hessian_callback.measurement.extras.base import Examination, Extra, Finding

__all__ = ["FrobeniusNorm", "Trace"]


@dataclass(frozen=True, kw_only=True)
class _Moment(Extra):
    """Estimate a sum over all eigenvalues by random vectors, deflated by the eigenvectors.

    Args:
        num_hvps: products to spend, at least 4 for a standard error.
    """

    needs_eigenvectors: ClassVar[bool] = True

    num_hvps: int = 30

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_int("num_hvps", self.num_hvps, at_least=4)

    @property
    def work(self) -> Hashable:
        """Identifies the products; trace and Frobenius norm share them."""
        return "moments", self.num_hvps

    def expected_hvps(self, hvps_per_spectrum: int) -> int:
        """Return the products that `compute` spends."""
        return self.num_hvps

    def moments(self, examination: Examination) -> tuple[Moments, int]:
        """Return trace and Frobenius norm, and the products that were spent for this call."""
        spectrum = examination.spectrum if examination.spectrum.eigenvectors is not None else None
        found, first = examination.share(
            self.work,
            lambda: moments(
                examination.open_operator, num_matvecs=self.num_hvps, spectrum=spectrum, seed=examination.seed
            ),
        )
        return found, found.num_matvecs if first else 0


@dataclass(frozen=True, kw_only=True)
class Trace(_Moment):
    r"""The trace of the Hessian, :math:`\sum_i \lambda_i`, with its standard error, by `moments`.

    Logs ``trace`` and ``trace_stderr``.

    Args:
        num_hvps: products to spend, at least 4.

    Raises:
        ValueError: if ``num_hvps`` is out of range.
    """

    name: ClassVar[str] = "trace"
    keys: ClassVar[Mapping[str, str]] = {
        "trace": "sum of all eigenvalues, estimated",
        "trace_stderr": "its standard error",
    }

    def compute(self, examination: Examination) -> Finding:
        """Compute the trace."""
        found, num_hvps = self.moments(examination)
        return Finding({"trace": found.trace.value, "trace_stderr": found.trace.stderr}, num_hvps)


@dataclass(frozen=True, kw_only=True)
class FrobeniusNorm(_Moment):
    r"""The Frobenius norm of the Hessian, :math:`\sqrt{\sum_i \lambda_i^2}`, with its standard error, by `moments`.

    Logs ``frobenius_norm`` and ``frobenius_norm_stderr``.

    Args:
        num_hvps: products to spend, at least 4; shared with `Trace` of the same number.

    Raises:
        ValueError: if ``num_hvps`` is out of range.
    """

    name: ClassVar[str] = "frobenius"
    keys: ClassVar[Mapping[str, str]] = {
        "frobenius_norm": "root of the sum of squares of all eigenvalues, estimated",
        "frobenius_norm_stderr": "its standard error",
    }

    def compute(self, examination: Examination) -> Finding:
        """Compute the Frobenius norm."""
        found, num_hvps = self.moments(examination)
        norm = found.frobenius_norm
        return Finding({"frobenius_norm": norm.value, "frobenius_norm_stderr": norm.stderr}, num_hvps)
