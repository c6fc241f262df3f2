"""One measurement of a training run: an entry of ``PowerLawHessianCallback.history``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from hessian_callback.algorithms.density import SpectralDensity
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.measurement.stored_state import checked_fields, shortened
from hessian_callback.power_law.fit import PowerLawFit, fit_power_law

__all__ = ["LOGGED_KEYS", "Measurement", "Mode", "When", "logged_keys"]

# States keep the names of their first version, so that old checkpoints and history files stay readable.
_STATE_NAMES = {"num_matvecs": "num_hvps"}
_STATE_STOP_REASONS = {"max_matvecs": "max_hvps"}

#: The keys that every measurement logs, without the prefix, and their values. Those of extras are in their classes.
LOGGED_KEYS = {
    "slope": "ŝ, the maximum-likelihood slope of λₖ ∝ k⁻ˢ over the K largest eigenvalues",
    "slope_stderr": "ŝ/√K, its standard error if the eigenvalues were independent",
    "slope_low": "lower end of the slope's 95 % interval under the same assumption",
    "slope_high": "upper end of this interval",
    "fit_error": "Kolmogorov–Smirnov distance between the eigenvalues and the fitted law",
    "critical_distance": "fit error above which a power law is rejected at 5 %, with a fitted exponent; 1.36/√K under "
    "``PublishedProtocol``",
    "critical_distance_paper": "1.36/√K, the paper's critical value; not under ``PublishedProtocol``",
    "density_exponent": "β̂ = 1 + 1/ŝ, the exponent of the eigenvalues' density",
    "lambda_max": "the largest eigenvalue",
    "num_fitted": "K, the number of eigenvalues fitted",
    "num_hvps": "Hessian-vector products that the spectrum took",
    "seconds": "seconds that training stood still for the measurement",
}

# Quantities of a fit whose eigenvalues have bounds.
_STRICT_KEYS = {"slope_low", "slope_high", "critical_distance_paper"}

When = Literal["fit_start", "epoch", "step", "fit_end", "validate"]
Mode = Literal["strict", "paper"]


def logged_keys(mode: Mode, *, of_group: bool = False) -> list[str]:
    """Return the keys that every measurement with a slope logs, without prefix and name of the group.

    Example:
        >>> set(logged_keys("strict")) - set(logged_keys("paper", of_group=True)) == {
        ...     "slope_low", "slope_high", "critical_distance_paper", "seconds"}
        True
    """
    left_out = (set() if mode == "strict" else _STRICT_KEYS) | ({"seconds"} if of_group else set())
    return [key for key in LOGGED_KEYS if key not in left_out]


@dataclass(frozen=True, eq=False)
class Measurement:
    r"""The result of one measurement of a training run.

    A measurement that failed, or whose slope cannot be compared with the others, is an entry like any other:
    ``reason`` gives the cause in plain text, and the quantities that could be computed are set.

    Attributes:
        epoch: the trainer's ``current_epoch``.
        step: optimizer steps taken before the measurement.
        when: ``"fit_start"`` (before the first step), ``"epoch"``, ``"step"``, ``"fit_end"`` or
            ``"validate"``.
        spectrum: the largest eigenvalues, without eigenvectors; ``None`` if the measurement failed.
        fit: the power law fitted to the leading resolved eigenvalues; ``None`` if none could be fitted.
        reason: why no slope was logged; ``None`` if one was.
        seconds: wall time that training stood still for it.
        num_parameters: size ``P`` of the Hessian; ``None`` if the measurement failed before it was known.
        num_samples: held-out samples over all ranks; ``None`` likewise.
        loss: mean loss over the held-out samples, the function whose Hessian was measured.
        engine: the engine that computed the Hessian-vector products.
        world_size: number of ranks that shared the work.
        mode: ``"strict"`` for `Lanczos`, or ``"paper"`` for `PublishedProtocol`, whose ``spectrum`` has no bounds by
            index.
        comparisons: results of the optional comparisons, by the name that they are logged under.
        not_compared: why a requested comparison has no result, by its name.
        density: the spectral density, if it was requested.
        precision: of the Hessian-vector products, such as ``"float32"`` or ``"float32 (a copy of bfloat16)"``.
        groups: the same measurement of diagonal blocks of the Hessian, by the name of the group of parameters.
        val_loss: the validation loss that the run logged at the same weights, if `live_prediction` follows it.
        train_loss: the training loss that the run logged last, usually the mean over the epoch.

    Example:
        >>> failed = Measurement(epoch=3, step=120, when="epoch", spectrum=None, fit=None,
        ...                      reason="the loss is NaN", seconds=0.2)
        >>> failed.logged, failed.slope, failed.location
        (False, None, 'epoch 3')
        >>> Measurement.from_state(failed.to_state()) == failed
        True
        >>> print(failed.summary())
        epoch 3, step 120: no slope (the loss is NaN), 0.2 s
    """

    epoch: int
    step: int
    when: When
    spectrum: Spectrum | None
    fit: PowerLawFit | None
    reason: str | None
    seconds: float
    num_parameters: int | None = None
    num_samples: int | None = None
    loss: float | None = None
    engine: str | None = None
    world_size: int = 1
    mode: Mode = "strict"
    comparisons: Mapping[str, float] = field(default_factory=dict)
    not_compared: Mapping[str, str] = field(default_factory=dict)
    density: SpectralDensity | None = None
    precision: str | None = None
    groups: Mapping[str, Measurement] = field(default_factory=dict)
    val_loss: float | None = None
    train_loss: float | None = None

    @property
    def location(self) -> str:
        """Where in the run the measurement was made, in words for tables, captions and messages."""
        return {
            "fit_start": "before training" if self.step == 0 else f"resumed at step {self.step}",
            "epoch": f"epoch {self.epoch}",
            "step": f"step {self.step}",
            "fit_end": "end of training",
            "validate": "validation",
        }[self.when]

    @property
    def has_result(self) -> bool:
        """Whether there is something to draw."""
        return self.spectrum is not None

    @property
    def logged(self) -> bool:
        """Whether this measurement's slope went to the logger."""
        return self.reason is None

    @property
    def slope(self) -> float | None:
        r"""Power-law slope :math:`\hat s` of the fitted eigenvalues, logged or not."""
        return None if self.fit is None else float(self.fit.slope)

    @property
    def slope_stderr(self) -> float | None:
        """Standard error of the slope."""
        return None if self.fit is None else float(self.fit.slope_stderr)

    @property
    def density_exponent(self) -> float | None:
        r"""Exponent :math:`\hat\beta = 1 + 1/\hat s` of the eigenvalue density."""
        return None if self.fit is None else float(self.fit.density_exponent)

    @property
    def fit_error(self) -> float | None:
        """Kolmogorov-Smirnov distance of the fit."""
        return None if self.fit is None else float(self.fit.fit_error)

    @property
    def critical_distance(self) -> float | None:
        r"""The fit error above which ``within_critical_distance`` is false, at the level of 5 %.

        `PowerLawFit.critical_distance_fitted`; under `PublishedProtocol` the constant :math:`1.36 / \sqrt K`.
        """
        if self.fit is None:
            return None
        return self.fit.critical_distance_paper if self.mode == "paper" else self.fit.critical_distance_fitted

    @property
    def within_critical_distance(self) -> bool | None:
        """Whether the fit error is compatible with a power law, by the ``critical_distance`` of the mode."""
        if self.fit is None:
            return None
        paper = self.mode == "paper"
        return self.fit.within_critical_distance_paper if paper else self.fit.within_critical_distance_fitted

    @property
    def fitted_eigenvalues(self) -> torch.Tensor:
        """The eigenvalues that the fit used, ``(K,)``, descending; none if there is no fit."""
        if self.spectrum is None:
            return torch.zeros(0, dtype=torch.float64, device="cpu")
        return self.spectrum.eigenvalues[: self.num_fitted or 0]

    @property
    def num_fitted(self) -> int | None:
        """Number ``K`` of eigenvalues that the fit used."""
        return None if self.fit is None else int(self.fit.num_eigenvalues)

    @property
    def lambda_max(self) -> float | None:
        """Largest eigenvalue, if it converged."""
        if self.spectrum is None or not self.spectrum.converged[:1].any():
            return None
        return float(self.spectrum.eigenvalues[0])

    @property
    def num_hvps(self) -> int | None:
        """Hessian-vector products spent."""
        return None if self.spectrum is None else self.spectrum.num_matvecs

    def scalars(self) -> dict[str, float]:
        """Return the logged quantities by their names without the prefix; unknown ones are left out.

        Quantities of the fit are included only if the slope was logged, since a slope at another ``K`` does not belong
        to the same curve. Names of quantities of a group of parameters end in its name.
        """
        values: dict[str, float | None] = {
            "lambda_max": self.lambda_max,
            "num_fitted": None if self.spectrum is None else self.num_fitted or 0,
            "num_hvps": self.num_hvps,
            "seconds": self.seconds,
        }
        if self.logged:
            values |= {
                "slope": self.slope,
                "fit_error": self.fit_error,
                "slope_stderr": self.slope_stderr,
                "density_exponent": self.density_exponent,
            }
            values["critical_distance"] = self.critical_distance
            if self.fit is not None and self.mode == "strict":
                low, high = self.fit.slope_interval(0.95)
                values |= {"slope_low": low, "slope_high": high}
                values["critical_distance_paper"] = self.fit.critical_distance_paper
        values |= {
            name: value for name, value in self.comparisons.items() if self.logged or not name.startswith("slope_")
        }
        for group, measurement in self.groups.items():
            values |= {f"{name}/{group}": v for name, v in measurement.scalars().items() if name != "seconds"}
        return {name: float(value) for name, value in values.items() if value is not None}

    def summary(self) -> str:
        """Return the measurement as one line of text, with the slopes of its groups."""
        where = f"epoch {self.epoch}, step {self.step}"
        seconds = f"{self.seconds:.1f} s"
        products = f"{self.num_hvps} HVPs" + (f" in {self.precision}" if self.precision else "")
        cost = f"{products}, {seconds}" if self.spectrum else seconds
        groups = "".join(f"; {group}: {measurement._slope_in_words()}" for group, measurement in self.groups.items())
        if self.fit is None:
            return f"{where}: no slope ({self.reason}), {cost}{groups}"
        protocol = ", paper protocol" if self.mode == "paper" else ""
        fitted = f"{self._slope_in_words()}, fit error {self.fit_error:.3f}, K = {self.num_fitted}{protocol}, {cost}"
        text = f"{where}: {fitted}" if self.logged else f"{where}: {fitted}; not logged ({self.reason})"
        return text + groups

    def _slope_in_words(self) -> str:
        return "no slope" if self.fit is None else f"slope {self.slope:.3f} ± {self.slope_stderr:.3f}"

    # -- checkpoints -----------------------------------------------------------------------------

    def to_state(self) -> dict[str, Any]:
        """Return Python scalars, dictionaries and tensors that ``torch.load(weights_only=True)`` accepts.

        The fit is not among them, since ``num_fitted`` and the eigenvalues determine it.
        """
        state: dict[str, Any] = {
            "epoch": int(self.epoch),
            "step": int(self.step),
            "when": str(self.when),
            "reason": self.reason,
            "seconds": float(self.seconds),
            "num_parameters": self.num_parameters,
            "num_samples": self.num_samples,
            "loss": self.loss,
            "val_loss": self.val_loss,
            "train_loss": self.train_loss,
            "engine": self.engine,
            "precision": self.precision,
            "world_size": int(self.world_size),
            "num_fitted": self.num_fitted,
            "mode": str(self.mode),
            "comparisons": {name: float(value) for name, value in self.comparisons.items()},
            "not_compared": dict(self.not_compared),
            "groups": {group: measurement.to_state() for group, measurement in self.groups.items()},
            "density": None,
            "spectrum": None,
        }
        if self.density is not None:
            state["density"] = _state_of(self.density)
        if self.spectrum is not None:
            state["spectrum"] = _state_of(self.spectrum)
            del state["spectrum"]["eigenvectors"]
        return state

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Measurement:
        """Restore a measurement from the return value of `to_state`, including states of releases without comparisons.

        Raises:
            ValueError: if a name, type, shape or range is not that of a measurement.
        """
        return cls._restored(state, with_groups=True)

    @classmethod
    def _restored(cls, state: object, *, with_groups: bool) -> Measurement:
        if not isinstance(state, Mapping):
            raise ValueError(f"the state of a measurement must be a mapping, got {shortened(state)}")
        values = dict(state)
        for name in ("num_fitted", "spectrum"):
            if name not in values:
                raise ValueError(f"the state of a measurement lacks {name}")
        num_fitted, spectrum, density = values.pop("num_fitted"), values["spectrum"], values.get("density")
        groups = values.get("groups", {})
        if not isinstance(groups, Mapping) or (groups and not with_groups):
            raise ValueError(f"groups must be a mapping to measurements without groups, got {shortened(groups)}")
        values["groups"] = {group: cls._restored(part, with_groups=False) for group, part in groups.items()}
        values["spectrum"] = None if spectrum is None else _spectrum_from(spectrum)
        values["density"] = None if density is None else _density_from(density)
        values["fit"] = _fit_again(values["spectrum"], num_fitted)
        checked = cls(**checked_fields(cls, values))
        for name, least in (("epoch", 0), ("step", 0), ("seconds", 0), ("world_size", 1)):
            _check(getattr(checked, name) >= least, f"{name} must be at least {least}", getattr(checked, name))
        _check(checked.seconds < float("inf"), "seconds must be finite", checked.seconds)
        return checked

    def __eq__(self, other: object) -> bool:
        """Compare by value; eigenvalues and bounds bit for bit, wall time included."""
        if not isinstance(other, Measurement):
            return NotImplemented
        return _equal(self.to_state(), other.to_state())

    def __hash__(self) -> int:
        """Hash by where in the run the measurement was made."""
        return hash((self.epoch, self.step, self.when))


def _state_of(value: Spectrum | SpectralDensity) -> dict[str, Any]:
    state = {_STATE_NAMES.get(part.name, part.name): _plain(getattr(value, part.name)) for part in fields(value)}
    if "stopped" in state:
        state["stopped"] = _STATE_STOP_REASONS.get(state["stopped"], state["stopped"])
    return state


def _values_of(state: object) -> object:
    """Rename the fields of a stored spectrum or density to the names of this release."""
    if not isinstance(state, Mapping):
        return state
    names = {saved: name for name, saved in _STATE_NAMES.items()}
    values = {names.get(name, name): value for name, value in state.items()}
    for reason, saved in _STATE_STOP_REASONS.items():
        if values.get("stopped") == saved:
            values["stopped"] = reason
    return values


def _check(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{rule}, got {shortened(value)}")


def _spectrum_from(state: object) -> Spectrum:
    spectrum = Spectrum(**checked_fields(Spectrum, _values_of(state)))
    values, bounds = spectrum.eigenvalues, spectrum.error_bounds
    for name in ("eigenvalues", "error_bounds", "ritz_values"):
        tensor: torch.Tensor = getattr(spectrum, name)
        _check(tensor.ndim == 1 and tensor.is_floating_point(), f"{name} must be a vector of floats", tensor)
        _check(not bool(tensor.isnan().any()), f"{name} must not hold NaN", tensor)
    _check(bool(values.isfinite().all()), "eigenvalues must be finite", values)
    _check(bool((values[:-1] >= values[1:]).all()), "eigenvalues must descend", values)
    _check(bounds.shape == values.shape, f"error_bounds must have the shape {tuple(values.shape)}", bounds)
    _check(bool((bounds >= 0).all()), "error_bounds must not be negative", bounds)
    converged = spectrum.converged
    _check(converged.dtype == torch.bool, "converged must hold truth values", converged)
    _check(converged.shape == values.shape, f"converged must have the shape {tuple(values.shape)}", converged)
    return spectrum


def _density_from(state: object) -> SpectralDensity:
    density = SpectralDensity(**checked_fields(SpectralDensity, _values_of(state)))
    for name in ("nodes", "weights"):
        tensor: torch.Tensor = getattr(density, name)
        _check(tensor.ndim == 2 and tensor.is_floating_point(), f"{name} must be a matrix of floats", tensor)
    shape = density.nodes.shape
    _check(density.weights.shape == shape, f"weights must have the shape {tuple(shape)}", density.weights)
    _check(density.size >= 1, "size must be at least 1", density.size)
    return density


def _fit_again(spectrum: Spectrum | None, num_fitted: object) -> PowerLawFit | None:
    """Fit the power law that a state describes by its number of eigenvalues."""
    if num_fitted is None:
        return None
    measured = 0 if spectrum is None else len(spectrum.eigenvalues)
    if spectrum is None or type(num_fitted) is not int or not 0 < num_fitted <= measured:
        raise ValueError(
            f"num_fitted must be None or lie between 1 and {measured}, the number of eigenvalues, "
            f"got {shortened(num_fitted)}"
        )
    return fit_power_law(spectrum.eigenvalues[:num_fitted])


def _plain(value: Any) -> Any:
    # Cloned, because a saved view takes the whole storage behind it along.
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    return bool(one == other)
