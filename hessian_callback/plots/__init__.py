"""Figures of measurements, drawn with matplotlib."""
