"""All extras, by the names that ``extras=[...]`` takes."""

from __future__ import annotations

from collections.abc import Iterable

from hessian_callback._options import check_each
from hessian_callback.measurement.extras.base import Extra
from hessian_callback.measurement.extras.density import Density
from hessian_callback.measurement.extras.norms import Norms
from hessian_callback.measurement.extras.numerical_interval import NumericalInterval
from hessian_callback.measurement.extras.outlier_ratio import OutlierRatio
from hessian_callback.measurement.extras.split_half import SplitHalf
from hessian_callback.measurement.extras.subspace import Subspace
from hessian_callback.measurement.extras.trace import FrobeniusNorm, Trace
from hessian_callback.measurement.solvers import Solver

__all__ = ["EXTRAS", "expected_hvps", "make_extras"]

EXTRAS: dict[str, type[Extra]] = {
    kind.name: kind
    for kind in (Trace, FrobeniusNorm, Density, Subspace, Norms, NumericalInterval, OutlierRatio, SplitHalf)
}

_RENAMED = {"halves": "split_half"}


def make_extras(chosen: Iterable[str | Extra], num_eigenvalues: int, solver: Solver) -> tuple[Extra, ...]:
    """Make the extras that a user chose by name or as objects, and check them.

    Args:
        chosen: names out of `EXTRAS`, or objects.
        num_eigenvalues: K.
        solver: the solver of the measurement.

    Raises:
        ValueError: if a name is unknown or appears twice, or an extra does not fit K or the solver.

    Example:
        >>> from hessian_callback.measurement.solvers import Lanczos
        >>> [extra.name for extra in make_extras(["trace", Density(num_hvps=80)], 50, Lanczos())]
        ['trace', 'density']
    """
    if isinstance(chosen, str):
        raise ValueError(f"extras must be a list of names or objects, such as [{chosen!r}]; got {chosen!r}")
    extras = check_each(lambda _, one: _make(one), "extras", chosen)
    names = [extra.name for extra in extras]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise ValueError(f"extras contains {repeated[0]!r} twice; keep one")
    for extra in extras:
        extra.check(num_eigenvalues)
        if extra.needs_bounds and not solver.proves_bounds:
            raise ValueError(
                f"extras=[{extra.name!r}] needs eigenvalues with error bounds, which {type(solver).__name__} does not "
                "compute; leave it out, or use a second callback with solver=Lanczos() and another prefix"
            )
    return extras


def expected_hvps(extras: Iterable[Extra], hvps_per_spectrum: int) -> int:
    """Estimate the products that all extras of a measurement take.

    Args:
        extras: the extras.
        hvps_per_spectrum: products that a spectrum is expected to take.
    """
    products = {extra.work: extra.expected_hvps(hvps_per_spectrum) for extra in extras}
    return sum(products.values())


def _make(chosen: str | Extra) -> Extra:
    if isinstance(chosen, Extra):
        return chosen
    if not isinstance(chosen, str) or chosen not in EXTRAS:
        if isinstance(chosen, str) and chosen in _RENAMED:
            raise ValueError(f"extras=[{chosen!r}] is now extras=[{_RENAMED[chosen]!r}]")
        raise ValueError(f"extras contains {chosen!r}; choose among {', '.join(EXTRAS)}, or pass Extra objects")
    try:
        return EXTRAS[chosen]()
    except TypeError as error:
        kind = EXTRAS[chosen].__name__
        raise ValueError(f"extras=[{chosen!r}] needs an option: pass {kind}(...) instead of its name") from error
