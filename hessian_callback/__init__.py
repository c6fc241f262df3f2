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
    from hessian_callback.callbacks.power_law import PowerLawHessianCallback
    from hessian_callback.metrics import PowerLawFitError, PowerLawSlope
    from hessian_callback.operators.hessian import HessianOperator
    from hessian_callback.power_law.fit import PowerLawFit, fit_power_law

__all__ = [
    "HessianOperator",
    "PowerLawEarlyStopping",
    "PowerLawFit",
    "PowerLawFitError",
    "PowerLawHessianCallback",
    "PowerLawSlope",
    "Spectrum",
    "__version__",
    "fit_power_law",
    "top_eigenvalues",
]

_MODULES = {
    "HessianOperator": "operators.hessian",
    "PowerLawEarlyStopping": "callbacks.early_stopping",
    "PowerLawFit": "power_law.fit",
    "PowerLawFitError": "metrics",
    "PowerLawHessianCallback": "callbacks.power_law",
    "PowerLawSlope": "metrics",
    "Spectrum": "algorithms.spectrum",
    "fit_power_law": "power_law.fit",
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
