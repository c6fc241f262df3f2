"""How many samples a number of eigenvalues needs."""

from __future__ import annotations

import warnings

__all__ = ["SAMPLES_PER_EIGENVALUE", "warn_of_few_samples"]

#: With fewer samples per eigenvalue the sample's own rank bends the spectrum: a small network's slope was 23 % too
#: steep with 3, and 6 % with 10 (benchmarks/STATISTICS.md).
SAMPLES_PER_EIGENVALUE = 10


def warn_of_few_samples(num_samples: int, num_eigenvalues: int) -> None:
    """Warn if there are too few samples for the number of eigenvalues.

    Args:
        num_samples: N, over all ranks.
        num_eigenvalues: K.
    """
    enough = SAMPLES_PER_EIGENVALUE * num_eigenvalues
    if num_samples < enough:
        warnings.warn(
            f"{num_samples} samples are few for {num_eigenvalues} eigenvalues: the spectrum's tail is then that of the "
            "sample, not of the loss, and the slope too steep (on a small network by 23 % at 3 samples an eigenvalue, "
            f"by 6 % at 10). Choose num_samples of at least {enough}, or a smaller num_eigenvalues; "
            "extras=['split_half'] measures the effect of the number of samples",
            stacklevel=3,
        )
