"""Optional quantities of a measurement, one class and one module each."""
