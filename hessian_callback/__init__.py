"""The power-law slope of the Hessian spectrum, measured while PyTorch Lightning trains.

Names that need Lightning or torchmetrics are imported when they are first used, so that the numerical core
(`HessianOperator`, `top_eigenvalues`, `fit_power_law`) costs no more than PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from hessian_callback._version import __version__

if TYPE_CHECKING:
    from hessian_callback.callback import PowerLawHessianCallback
    from hessian_callback.early_stopping import PowerLawEarlyStopping
    from hessian_callback.hessian import HessianOperator
    from hessian_callback.lanczos import top_eigenvalues
    from hessian_callback.metrics import PowerLawFitError, PowerLawSlope
    from hessian_callback.power_law import PowerLawFit, fit_power_law
    from hessian_callback.spectrum import Spectrum

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

_ROOMS = {
    "HessianOperator": "hessian",
    "PowerLawEarlyStopping": "early_stopping",
    "PowerLawFit": "power_law",
    "PowerLawFitError": "metrics",
    "PowerLawHessianCallback": "callback",
    "PowerLawSlope": "metrics",
    "Spectrum": "spectrum",
    "fit_power_law": "power_law",
    "top_eigenvalues": "lanczos",
}


def __getattr__(name: str) -> Any:
    if name not in _ROOMS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_ROOMS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
