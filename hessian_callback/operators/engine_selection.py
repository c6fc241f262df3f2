"""Which engine forms the products that are left: decided by what was measured on the run's own model."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Timing", "TracingStatistics", "tracing_pays", "trial_pays"]

# Products after which double backward has been timed: the first warms up.
TIMED_PRODUCTS = 4
# A trial that finds nothing must not cost more than this share of the products that are left.
_TRIAL_SHARE = 0.05
# What a change-over must gain, because times are measured with noise.
_MARGIN = 0.05
# Tracing runs Python for each node of the gradient's graph; seconds for each, on a slow core, before one was timed.
_SECONDS_PER_NODE = 6e-3
# Imports and caches that the first trace of a process pays for.
_FIRST_TRACE_SECONDS = 2.0


@dataclass
class TracingStatistics:
    """What a run has learnt about tracing its model; each measurement adds to it, and the next begins with it.

    Attributes:
        trace_seconds: what tracing one shape of batch took, on the slowest rank; ``None``: never traced.
        ratio: time of a traced product over one by double backward.
        failure: why the model cannot be traced, or its traced product not be used; ``None``: no such reason.

    Example:
        >>> TracingStatistics().expected_trace_seconds(100)  # nothing known: 2 s and 6 ms a node
        2.6
        >>> TracingStatistics(trace_seconds=0.3, ratio=0.8).expected_trace_seconds(100)
        0.3
    """

    trace_seconds: float | None = None
    ratio: float | None = None
    failure: str | None = None

    def expected_trace_seconds(self, num_nodes: int) -> float:
        """Estimate the seconds of a trace, for a gradient with ``num_nodes`` nodes in its graph."""
        if self.trace_seconds is not None:
            return self.trace_seconds
        return _FIRST_TRACE_SECONDS + _SECONDS_PER_NODE * num_nodes


@dataclass(frozen=True)
class Timing:
    """Seconds, each of the slowest rank.

    Attributes:
        product: of a product by double backward.
        trace: of tracing one batch, expected or measured.
        rest: of what a change-over needs besides: further traces, constants, a comparison for each batch.
    """

    product: float
    trace: float
    rest: float = 0.0


def trial_pays(timing: Timing, products_left: int, experience: TracingStatistics) -> bool:
    """Whether to trace one batch to see what it gains.

    Without experience of this model a trial may cost a twentieth of the products that are left. With experience
    it is made where the change-over that it begins is expected to pay.

    Example:
        >>> trial_pays(Timing(product=0.1, trace=1.0), 150, TracingStatistics())
        False
        >>> trial_pays(Timing(product=0.2, trace=1.0), 150, TracingStatistics())
        True
        >>> trial_pays(Timing(product=0.1, trace=1.0), 150, TracingStatistics(trace_seconds=1.0, ratio=0.6))
        True
    """
    if experience.failure is not None or products_left <= 0:
        return False
    if experience.ratio is not None:
        return tracing_pays(timing, products_left, experience.ratio)
    return timing.trace <= _TRIAL_SHARE * products_left * timing.product


def tracing_pays(timing: Timing, products_left: int, ratio: float) -> bool:
    """Whether the products left are done sooner by a change-over, by a margin of a twentieth.

    Args:
        timing: what products cost, and what is still to be paid for the change-over.
        products_left: how many are expected.
        ratio: time of a traced product over one by double backward.

    Example:
        >>> tracing_pays(Timing(product=0.1, trace=2.0, rest=0.5), products_left=100, ratio=0.5)
        True
        >>> tracing_pays(Timing(product=0.1, trace=2.0, rest=0.5), products_left=100, ratio=0.8)
        False
    """
    changed = timing.trace + timing.rest + products_left * ratio * timing.product
    return changed < (1 - _MARGIN) * products_left * timing.product
