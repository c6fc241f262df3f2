"""The Lightning callbacks and everything else that imports Lightning to measure a run."""
