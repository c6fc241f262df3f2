"""The power-law slope of the Hessian spectrum, measured while PyTorch Lightning trains.

Names that need Lightning or torchmetrics are imported when they are first used, so that the numerical core
(`HessianOperator`, `top_eigenvalues`, `fit_power_law`) costs no more than PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hessian_callback._version import __version__

if TYPE_CHECKING:
    from hessian_callback.algorithms.lanczos import top_eigenvalues
    from hessian_callback.algorithms.spectrum import Spectrum
    from hessian_callback.callbacks.early_stopping import PowerLawEarlyStopping
    from hessian_callback.callbacks.edge import EdgeOfStabilityMonitor
    from hessian_callback.callbacks.power_law import PowerLawHessianCallback
    from hessian_callback.measurement.extras.density import Density
    from hessian_callback.measurement.extras.norms import Norms
    from hessian_callback.measurement.extras.numerical_interval import NumericalInterval
    from hessian_callback.measurement.extras.outlier_ratio import OutlierRatio
    from hessian_callback.measurement.extras.split_half import SplitHalf
    from hessian_callback.measurement.extras.subspace import Subspace
    from hessian_callback.measurement.extras.trace import FrobeniusNorm, Trace
    from hessian_callback.measurement.measure import measure
    from hessian_callback.measurement.measurement import Measurement
    from hessian_callback.measurement.solvers import Lanczos, PublishedProtocol
    from hessian_callback.metrics import PowerLawFitError, PowerLawSlope
    from hessian_callback.operators.hessian import HessianOperator
    from hessian_callback.power_law.fit import PowerLawFit, fit_power_law

__all__ = [
    "Density",
    "EdgeOfStabilityMonitor",
    "FrobeniusNorm",
    "HessianOperator",
    "Lanczos",
    "Measurement",
    "Norms",
    "NumericalInterval",
    "OutlierRatio",
    "PowerLawEarlyStopping",
    "PowerLawFit",
    "PowerLawFitError",
    "PowerLawHessianCallback",
    "PowerLawSlope",
    "PublishedProtocol",
    "Spectrum",
    "SplitHalf",
    "Subspace",
    "Trace",
    "__version__",
    "fit_power_law",
    "measure",
    "top_eigenvalues",
]

_MODULES = {
    "Density": "measurement.extras.density",
    "EdgeOfStabilityMonitor": "callbacks.edge",
    "FrobeniusNorm": "measurement.extras.trace",
    "HessianOperator": "operators.hessian",
    "Lanczos": "measurement.solvers",
    "Measurement": "measurement.measurement",
    "Norms": "measurement.extras.norms",
    "NumericalInterval": "measurement.extras.numerical_interval",
    "OutlierRatio": "measurement.extras.outlier_ratio",
    "PowerLawEarlyStopping": "callbacks.early_stopping",
    "PowerLawFit": "power_law.fit",
    "PowerLawFitError": "metrics",
    "PowerLawHessianCallback": "callbacks.power_law",
    "PowerLawSlope": "metrics",
    "PublishedProtocol": "measurement.solvers",
    "Spectrum": "algorithms.spectrum",
    "SplitHalf": "measurement.extras.split_half",
    "Subspace": "measurement.extras.subspace",
    "Trace": "measurement.extras.trace",
    "fit_power_law": "power_law.fit",
    "measure": "measurement.measure",
    "top_eigenvalues": "algorithms.lanczos",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
