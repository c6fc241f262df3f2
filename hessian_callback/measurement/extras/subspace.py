"""The rotation of the top eigenspace between measurements as an extra."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from hessian_callback._options import check_int, optional
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.algorithms.subspace import subspace_rotation
from hessian_callback.algorithms.subspace_history import SubspaceHistory
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.measurement.extras.base import Examination, Extra, Finding

__all__ = ["Subspace", "SubspaceState"]

_DEFAULT_DIMENSION = 10


@dataclass(frozen=True)
class SubspaceState:
    """The eigenspaces that later measurements are compared with.

    Attributes:
        previous: the last measurement's spectrum with its leading eigenvectors, on the CPU.
        spaces: eigenspaces of the run, for the picture of their overlaps.
    """

    previous: Spectrum
    spaces: SubspaceHistory


@dataclass(frozen=True, kw_only=True)
class Subspace(Extra):
    """The rotation of the leading eigenvectors since the last measurement; costs ``dimension`` products.

    Logs ``subspace_angle`` (the largest principal angle, in radians), ``subspace_overlap``, ``subspace_change`` (the
    norm of the Hessian's change on the subspace) and ``subspace_sine_bound`` (the Davis-Kahan bound on the sine of the
    angle), see `subspace_rotation`. Nothing is compared across a resume. With figures up to 24 eigenspaces of the run
    are kept on the CPU for a picture of their overlaps, in at most 1 GiB on each rank.

    Args:
        dimension: number of eigenvectors; the default is 10, or one less than the number of eigenvalues.

    Raises:
        ValueError: if ``dimension`` is out of range.
    """

    name: ClassVar[str] = "subspace"
    keys: ClassVar[Mapping[str, str]] = {
        "subspace_angle": "largest angle between the top eigenspaces of two successive measurements, in radians",
        "subspace_overlap": "mean squared cosine of these angles; 1 for equal spaces",
        "subspace_change": "norm of the difference that the new Hessian makes on the old eigenvectors",
        "subspace_sine_bound": "Davis-Kahan bound on the sine of the angle, if the gap is positive",
    }
    needs_eigenvectors: ClassVar[bool] = True
    needs_bounds: ClassVar[bool] = True

    dimension: int | None = None

    def __post_init__(self) -> None:
        """Check types and ranges."""
        optional(check_int, "dimension", self.dimension, at_least=1)

    def check(self, num_eigenvalues: int) -> None:
        """Check that an eigenvalue is left outside the subspace.

        Raises:
            ValueError: if not.
        """
        if self.dimension is not None and self.dimension >= num_eigenvalues:
            raise ValueError(
                f"Subspace(dimension={self.dimension}) must be below num_eigenvalues={num_eigenvalues}: the bound "
                "takes the eigenvalue outside the subspace"
            )

    def expected_hvps(self, hvps_per_spectrum: int) -> int:
        """Return at least the products that `compute` spends."""
        return _DEFAULT_DIMENSION if self.dimension is None else self.dimension

    def compute(self, examination: Examination) -> Finding | None:
        """Compare with the last measurement, and keep the eigenvectors for the next one."""
        operator, spectrum = examination.open_operator, examination.spectrum
        dimension = min(self.dimension or _DEFAULT_DIMENSION, examination.num_eigenvalues - 1)
        if spectrum.eigenvectors is None:
            return None
        state: SubspaceState | None = examination.state
        if state is not None and _same_parameters(state.previous, operator):
            finding = self._rotation(operator, state.previous, spectrum, dimension)
        else:
            finding = Finding()
        leading = spectrum.eigenvectors[:, :dimension]
        spaces = SubspaceHistory() if state is None else state.spaces
        if examination.draws_figures and bool(spectrum.converged[: dimension + 1].all()):
            spaces = _with_space(spaces, leading, examination)
        kept = replace(spectrum, eigenvectors=leading.cpu().clone())
        return replace(finding, state=SubspaceState(kept, spaces))

    def _rotation(self, operator: SymmetricOperator, previous: Spectrum, current: Spectrum, dimension: int) -> Finding:
        if not bool(current.converged[: dimension + 1].all()):
            raise ValueError(
                f"of the {dimension + 1} eigenvalues that bound a subspace of dimension {dimension}, not all "
                "converged; allow more products (max_hvps) or a smaller Subspace(dimension=...)"
            )
        assert previous.eigenvectors is not None
        before = replace(previous, eigenvectors=previous.eigenvectors.to(operator.device, operator.dtype))
        rotation = subspace_rotation(operator, before, current, dimension=dimension)
        values = {
            "subspace_angle": rotation.largest_angle,
            "subspace_overlap": rotation.overlap,
            "subspace_change": rotation.perturbation_norm,
        }
        if rotation.gap > 0:
            values["subspace_sine_bound"] = rotation.sine_bound
        return Finding(values, rotation.num_matvecs)


def _same_parameters(previous: Spectrum, operator: SymmetricOperator) -> bool:
    vectors = previous.eigenvectors
    return vectors is not None and vectors.shape[0] == operator.partition.slice_length


def _with_space(spaces: SubspaceHistory, vectors: Tensor, examination: Examination) -> SubspaceHistory:
    place = examination.place
    overlaps = spaces.overlaps_with(vectors, examination.problem.ranks)
    label = {"fit_start": "start", "epoch": str(place.epoch)}.get(place.when)
    extended = spaces.copy()
    extended.add(vectors, overlaps, step=place.step, label=label)
    return extended
