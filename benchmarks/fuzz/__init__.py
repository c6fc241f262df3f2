"""Random and mutated inputs for everything that parses files: ``python -m benchmarks.fuzz NAME --seconds 600``."""
