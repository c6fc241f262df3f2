"""The power law of a list of eigenvalues: the fit, its errors and its alternatives."""
