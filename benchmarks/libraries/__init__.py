"""Libraries written elsewhere, trained with the callback and without: `python -m benchmarks.libraries`."""
