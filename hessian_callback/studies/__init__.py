"""Grids of training runs that are measured, and the tables that compare them with printed figures."""
