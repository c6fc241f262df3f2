"""Small models and data sets that the example configurations train on."""

from hessian_callback.demos.digits import DigitsCNN, DigitsData

__all__ = ["DigitsCNN", "DigitsData"]
