"""The spectral density of the Hessian as an extra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hessian_callback._options import check_int
from hessian_callback.algorithms.density import spectral_density
from hessian_callback.measurement.extras.base import Examination, Extra, Finding

__all__ = ["Density"]

# Random vectors: enough for a standard error.
_NUM_VECTORS = 4


@dataclass(frozen=True, kw_only=True)
class Density(Extra):
    r"""The density of all eigenvalues, by `spectral_density`, and the negative eigenvalues' share.

    Logs ``negative_mass``, :math:`\sum_{\lambda_i < 0} |\lambda_i| / \sum_i |\lambda_i|`, and
    ``negative_mass_stderr``; the density itself is in ``history``.

    Args:
        num_hvps: products to spend, in four Lanczos runs; at least 4.

    Raises:
        ValueError: if ``num_hvps`` is out of range.
    """

    name: ClassVar[str] = "density"
    keys: ClassVar[Mapping[str, str]] = {
        "negative_mass": "share of the negative eigenvalues in the sum of absolute values, 0 to 1",
        "negative_mass_stderr": "its standard error",
    }

    num_hvps: int = 160

    def __post_init__(self) -> None:
        """Check types and ranges."""
        check_int("num_hvps", self.num_hvps, at_least=_NUM_VECTORS)

    def expected_hvps(self, hvps_per_spectrum: int) -> int:
        """Return at least the products that `compute` spends."""
        return self.num_hvps

    def compute(self, examination: Examination) -> Finding:
        """Compute the density."""
        density = spectral_density(
            examination.open_operator,
            num_vectors=_NUM_VECTORS,
            num_steps=self.num_hvps // _NUM_VECTORS,
            seed=examination.seed,
        )
        # Not the share of their number: most eigenvalues lie next to zero, so that depends on single nodes.
        mass = density.negative_mass
        values = {"negative_mass": mass.value, "negative_mass_stderr": mass.stderr}
        return Finding(values, density.num_matvecs, density)
