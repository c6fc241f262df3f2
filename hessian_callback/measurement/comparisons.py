"""Which of the optional comparisons a measurement makes, under which names their numbers go, and what they cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hessian_callback.algorithms.sharpness import SpectralDensity, moments, spectral_density
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.algorithms.subspace import subspace_rotation
from hessian_callback.linalg.linear_operator import SymmetricOperator
from hessian_callback.power_law.effective_rank import outlier_ratio
from hessian_callback.power_law.uncertainty import slope_numerical_interval

__all__ = ["EXTRAS", "Comparisons", "Finding", "numerical_interval_of"]

EXTRAS = ("trace", "frobenius", "density", "subspace", "norms", "numerical_interval", "halves")

# Random vectors of the density: enough for a standard error.
_DENSITY_VECTORS = 4


@dataclass(frozen=True)
class Finding:
    """What one comparison found.

    Attributes:
        values: numbers by name.
        num_hvps: products spent.
        density: the spectral density, if that was it.
    """

    values: dict[str, float]
    num_hvps: int = 0
    density: SpectralDensity | None = None


@dataclass(frozen=True)
class Comparisons:
    """A checked choice of comparisons.

    Attributes:
        extras: names out of `EXTRAS`: ``trace`` and ``frobenius`` (`sharpness.moments`; together they cost
            what one does), ``density`` (`sharpness.spectral_density`), ``subspace``
            (`subspace.subspace_rotation`), ``norms``, ``numerical_interval`` and ``halves``.
        trace_hvps: products for trace and Frobenius norm.
        density_hvps: products for the density, in four runs.
        subspace_dimension: k of the compared eigenspaces.
        num_classes: C of the ratio lambda_1 / lambda_(C+1); ``None`` for none.

    Raises:
        ValueError: for an unknown or repeated name, or a number out of range.

    Example:
        >>> chosen = Comparisons(("trace", "frobenius", "numerical_interval"))
        >>> chosen.needs_eigenvectors, chosen.expected_hvps(200)
        (True, 30)
    """

    extras: tuple[str, ...] = ()
    trace_hvps: int = 30
    density_hvps: int = 160
    subspace_dimension: int = 10
    num_classes: int | None = None

    def __post_init__(self) -> None:
        """Check the choice."""
        unknown = sorted(set(self.extras) - set(EXTRAS))
        if unknown:
            raise ValueError(f"extras={unknown!r} are unknown; choose among {', '.join(EXTRAS)}")
        if len(set(self.extras)) < len(self.extras):
            raise ValueError(f"extras={list(self.extras)!r} names one twice")
        if self.trace_hvps < 4:
            raise ValueError(f"trace_hvps must be at least 4 for a standard error, got {self.trace_hvps}")
        if self.density_hvps < _DENSITY_VECTORS:
            raise ValueError(f"density_hvps must be at least {_DENSITY_VECTORS}, got {self.density_hvps}")
        if self.subspace_dimension < 1:
            raise ValueError(f"subspace_dimension must be at least 1, got {self.subspace_dimension}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")

    def check(self, num_eigenvalues: int, mode: str) -> None:
        """Check that the comparisons fit the spectrum they will get.

        Args:
            num_eigenvalues: K.
            mode: ``"strict"`` or ``"paper"``, whose spectra have neither eigenvectors nor bounds by index.

        Raises:
            ValueError: if they don't.
        """
        if "subspace" in self.extras and self.subspace_dimension >= num_eigenvalues:
            raise ValueError(
                f"subspace_dimension={self.subspace_dimension} must be below num_eigenvalues={num_eigenvalues}: "
                "the bound takes the eigenvalue outside the subspace"
            )
        if self.num_classes is not None and self.num_classes >= num_eigenvalues:
            raise ValueError(
                f"num_classes={self.num_classes} must be below num_eigenvalues={num_eigenvalues}: the ratio takes "
                "the eigenvalue after those of the classes"
            )
        unproven = sorted({"subspace", "numerical_interval"}.intersection(self.extras))
        if mode == "paper" and unproven:
            raise ValueError(
                f"extras={unproven!r} need eigenvalues that are known by index, which mode='paper' does not give; "
                "leave them out, or use a second callback with mode='strict' and another prefix"
            )

    @property
    def needs_eigenvectors(self) -> bool:
        """Whether the eigenvalue solver has to form eigenvectors: as much memory as K vectors of length P."""
        return not {"trace", "frobenius", "subspace"}.isdisjoint(self.extras)

    def expected_hvps(self, hvps_per_spectrum: int) -> int:
        """Estimate the products that all comparisons of a measurement take.

        Args:
            hvps_per_spectrum: products that a spectrum is expected to take. Each half takes as many, on half of
                the samples: the two count as one spectrum.
        """
        products = 0
        if not {"trace", "frobenius"}.isdisjoint(self.extras):
            products += self.trace_hvps
        if "density" in self.extras:
            products += self.density_hvps
        if "subspace" in self.extras:
            products += self.subspace_dimension
        if "halves" in self.extras:
            products += hvps_per_spectrum
        return products

    def of_spectrum(self, spectrum: Spectrum, num_fitted: int | None) -> list[tuple[str, Callable[[], Finding]]]:
        """List the chosen comparisons that need no product, by name.

        Args:
            spectrum: the top eigenvalues.
            num_fitted: K of the fit; ``None`` if there is none.
        """
        tasks: list[tuple[str, Callable[[], Finding]]] = []
        if self.num_classes is not None:
            classes = self.num_classes
            known = spectrum.positive_converged
            tasks.append(("outlier_ratio", lambda: Finding({"outlier_ratio": outlier_ratio(known, classes)})))
        if "numerical_interval" in self.extras and num_fitted is not None:
            tasks.append(("numerical_interval", lambda: _numerical(spectrum, num_fitted)))
        return tasks

    def of_operator(
        self, operator: SymmetricOperator, spectrum: Spectrum, previous: Spectrum | None, *, seed: int
    ) -> list[tuple[str, Callable[[], Finding]]]:
        """List the chosen comparisons that multiply with the operator, by name; they run when they are called.

        Args:
            operator: the Hessian; every rank must call the same comparisons in the same order.
            spectrum: its top eigenvalues, with eigenvectors if `needs_eigenvectors` and they are to be had.
            previous: those of the measurement before, with eigenvectors; ``None`` if there is none to compare with.
            seed: seed of the random vectors.
        """
        tasks: list[tuple[str, Callable[[], Finding]]] = []
        if not {"trace", "frobenius"}.isdisjoint(self.extras):
            tasks.append(("trace and Frobenius norm", lambda: self._moments(operator, spectrum, seed)))
        if "density" in self.extras:
            tasks.append(("spectral density", lambda: self._density(operator, seed)))
        if "subspace" in self.extras and previous is not None:
            before = previous
            tasks.append(("subspace", lambda: self._rotation(operator, before, spectrum)))
        return tasks

    def _moments(self, operator: SymmetricOperator, spectrum: Spectrum, seed: int) -> Finding:
        deflating = spectrum if spectrum.eigenvectors is not None else None
        found = moments(operator, num_products=self.trace_hvps, spectrum=deflating, seed=seed)
        values: dict[str, float] = {}
        if "trace" in self.extras:
            values |= {"trace": found.trace.value, "trace_stderr": found.trace.stderr}
        if "frobenius" in self.extras:
            norm = found.frobenius_norm
            values |= {"frobenius_norm": norm.value, "frobenius_norm_stderr": norm.stderr}
        return Finding(values, found.num_matvecs)

    def _density(self, operator: SymmetricOperator, seed: int) -> Finding:
        steps = self.density_hvps // _DENSITY_VECTORS
        density = spectral_density(operator, num_vectors=_DENSITY_VECTORS, num_steps=steps, seed=seed)
        # Not the share of negative eigenvalues: with most of them next to zero, that is a matter of single nodes.
        mass = density.negative_mass
        values = {"negative_mass": mass.value, "negative_mass_stderr": mass.stderr}
        return Finding(values, density.num_matvecs, density)

    def _rotation(self, operator: SymmetricOperator, previous: Spectrum, current: Spectrum) -> Finding:
        dimension = self.subspace_dimension
        if not bool(current.converged[: dimension + 1].all()):
            raise ValueError(
                f"of the {dimension + 1} eigenvalues that bound a subspace of dimension {dimension}, not all "
                "converged; allow more products (max_hvps) or lower subspace_dimension"
            )
        rotation = subspace_rotation(operator, previous, current, dimension=dimension)
        values = {
            "subspace_angle": rotation.largest_angle,
            "subspace_overlap": rotation.overlap,
            "subspace_change": rotation.perturbation_norm,
        }
        if rotation.gap > 0:
            values["subspace_sine_bound"] = rotation.sine_bound
        return Finding(values, rotation.num_matvecs)


def numerical_interval_of(spectrum: Spectrum, num_eigenvalues: int) -> tuple[float, float]:
    r"""Smallest and largest slope that a spectrum's error bounds leave open.

    Exact products never put a Ritz value above the eigenvalue of its rank, so the i-th eigenvalue lies in
    :math:`[\theta_i - \rho, \theta_i + b_i]`, where :math:`\rho` is the rounding level.

    Args:
        spectrum: eigenvalues with bounds by rank.
        num_eigenvalues: K, how many of them were fitted.

    Returns:
        ``(low, high)``; see `slope_numerical_interval`.

    Raises:
        ValueError: if an eigenvalue is not above the rounding level, or K is out of range.

    Example:
        >>> import torch
        >>> from hessian_callback.algorithms.lanczos import top_eigenvalues
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> diagonal = torch.arange(1, 301, dtype=torch.float64) ** -1.0
        >>> spectrum = top_eigenvalues(MatvecOperator(lambda v: diagonal * v, 300), k=20, rtol=0.01)
        >>> low, high = numerical_interval_of(spectrum, 20)
        >>> low < 0.8789 < high, high - low < 0.02
        (True, True)
    """
    rounding = spectrum.rounding
    return slope_numerical_interval(
        spectrum.eigenvalues[:num_eigenvalues] - rounding,
        spectrum.error_bounds[:num_eigenvalues] + rounding,
        sides="above",
        num_eigenvalues=num_eigenvalues,
    )


def _numerical(spectrum: Spectrum, num_fitted: int) -> Finding:
    low, high = numerical_interval_of(spectrum, num_fitted)
    return Finding({"slope_numerical_low": low, "slope_numerical_high": high})
