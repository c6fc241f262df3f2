"""Algorithms on any symmetric operator: top eigenvalues with bounds, trace, density and subspaces."""
