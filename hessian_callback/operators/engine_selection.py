"""The choice between double backward and tracing, from times that are measured on the model itself."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.operators.cuda_graphs import launching_dominates
from hessian_callback.operators.loss import BatchLoss
from hessian_callback.operators.memory_plan import MemoryPlan
from hessian_callback.operators.products import (
    DoubleBackward,
    Linearize,
    ProductEngine,
    check_agreement,
    trial_directions,
)
from hessian_callback.operators.tracing import TracedProduct, signature

__all__ = [
    "TIMED_PRODUCTS",
    "EngineSelection",
    "Timing",
    "TracingStatistics",
    "largest_over_ranks",
    "tracing_pays",
    "trial_pays",
]

# Products that time double backward; the first one warms up.
TIMED_PRODUCTS = 4
# What a traced product of a network with and without convolutions is expected to save before one was timed: 2 to 30 %
# of ten small networks' with (their double backward forms gradients that nobody asked for), hardly anything without.
_GAIN_WITH_CONVOLUTIONS, _GAIN = 0.15, 0.05
# Share of the time that a change-over must gain, because measured times are noisy.
_MARGIN = 0.05
# Seconds of tracing for each node of the gradient's graph on a slow core, used until a trace was timed. Those of batch
# normalisation have long derivatives.
_SECONDS_PER_NODE, _SECONDS_PER_NODE_WITH_NORMALISATION = 10e-3, 25e-3
# Seconds of the imports of the first trace of a process, and the package that takes them. Lightning imports it as well,
# products by double backward don't.
_IMPORT_SECONDS = 1.0
_IMPORTED = "torch._dynamo"


@dataclass
class TracingStatistics:
    """Times of tracing a model. Each measurement updates them, and the next one starts from them.

    Attributes:
        trace_seconds: seconds of tracing one shape of batch on the slowest rank; ``None`` before the first trace.
        ratio: time of a traced product over one by double backward.
        failure: why the model cannot be traced, or its traced product not be used; ``None`` if it can.
        product_seconds: seconds of the products by double backward in measurements without a trial.

    Example:
        >>> TracingStatistics(trace_seconds=0.3, ratio=0.8).expected_trace_seconds(["MulBackward0"] * 100)
        0.3
    """

    trace_seconds: float | None = None
    ratio: float | None = None
    failure: str | None = None
    product_seconds: float = 0.0

    def expected_trace_seconds(self, nodes: Sequence[str]) -> float:
        """Estimate the seconds of a trace, for a gradient with these nodes in its graph."""
        if self.trace_seconds is not None:
            return self.trace_seconds
        each = _SECONDS_PER_NODE_WITH_NORMALISATION if _any("BatchNorm", nodes) else _SECONDS_PER_NODE
        return (_IMPORTED not in sys.modules) * _IMPORT_SECONDS + each * len(nodes)


def _any(kind: str, nodes: Sequence[str]) -> bool:
    return any(kind in node for node in nodes)


@dataclass(frozen=True)
class Timing:
    """Seconds, each of the slowest rank.

    Attributes:
        product: of a product by double backward.
        trace: of tracing one batch, expected or measured.
        rest: of all else in a change-over: further traces, constants, a comparison for each batch.
        gain: share of a product's time that tracing is expected to save before a traced one was timed.
    """

    product: float
    trace: float
    rest: float = 0.0
    gain: float = _GAIN


def trial_pays(timing: Timing, products_left: int, known: TracingStatistics) -> bool:
    """Return whether to trace one batch, to measure the time of a traced product.

    The first trial of a model may take as long as tracing would be expected to save, in the products that are left and
    in those of earlier measurements: a training measures again and again, and a trial is made once. Later changes are
    made if they are expected to save time.

    Example:
        >>> trial_pays(Timing(product=0.1, trace=1.0), 150, TracingStatistics())
        False
        >>> trial_pays(Timing(product=0.2, trace=1.0), 150, TracingStatistics())
        True
        >>> trial_pays(Timing(product=0.1, trace=1.0), 150, TracingStatistics(trace_seconds=1.0, ratio=0.6))
        True
    """
    if known.failure is not None or products_left <= 0:
        return False
    if known.ratio is not None:
        return tracing_pays(timing, products_left, known.ratio)
    return timing.trace <= timing.gain * (known.product_seconds + products_left * timing.product)


def tracing_pays(timing: Timing, products_left: int, ratio: float) -> bool:
    """Return whether a change-over saves more than a twentieth of the remaining products' time.

    Args:
        timing: times of a product and of the change-over.
        products_left: number of products that are expected.
        ratio: time of a traced product over one by double backward.

    Example:
        >>> tracing_pays(Timing(product=0.1, trace=2.0, rest=0.5), products_left=100, ratio=0.5)
        True
        >>> tracing_pays(Timing(product=0.1, trace=2.0, rest=0.5), products_left=100, ratio=0.8)
        False
    """
    changed = timing.trace + timing.rest + products_left * ratio * timing.product
    return changed < (1 - _MARGIN) * products_left * timing.product


@dataclass(frozen=True)
class _Trial:
    """Measurements of one traced batch on this rank."""

    trace_seconds: float = 0.0
    ratio: float = 0.0
    num_bytes: int = 0  # of the constants of all batches
    first: tuple[Hashable, TracedProduct] | None = None
    failure: str | None = None


class EngineSelection:
    """The decision to continue with a recorded product or, on all ranks together, with `Linearize`.

    On a GPU that waits for launches, double backward is recorded as a CUDA graph, which takes as long as some ten
    products. Tracing is considered where that was not possible or would gain nothing.

    Args:
        loss: the loss.
        ranks: the processes that share the products.
        known: times of earlier traces of the model; updated.
        automatic: whether the engine may be changed.
        recording: whether the products may be recorded.

    Attributes:
        reason: why the engine in use was chosen.
        products_left: number of products that are expected.
    """

    def __init__(
        self, loss: BatchLoss, ranks: Ranks, known: TracingStatistics, *, automatic: bool, recording: bool = False
    ) -> None:
        self.reason = "no change-over was considered" if automatic else "asked for by name"
        self.products_left = 0
        self._loss = loss
        self._ranks = ranks
        self._known = known
        self._device = loss.parameters[0].device
        self._automatic = automatic
        self._recording = recording and self._device.type == "cuda"
        self._undecided = self._automatic or self._recording
        self._seconds: list[float] = []
        self._launching: list[float] = []

    @property
    def timing(self) -> bool:
        """Whether the next product is to be timed."""
        return self._undecided and self.products_left > 0 and not self.due

    @property
    def due(self) -> bool:
        """Whether enough products have been timed for a decision."""
        return self._undecided and self.products_left > 0 and len(self._seconds) >= TIMED_PRODUCTS

    def record(self, began: float) -> None:
        """Note the time of a product that began at a time `now` and is queued by now."""
        self._launching.append(time.perf_counter() - began)
        self._seconds.append(self.now() - began)

    def now(self) -> float:
        """Return the time in seconds, after all work that was queued on the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def choose(self, engine: DoubleBackward, plan: MemoryPlan) -> ProductEngine | None:
        """Return the engine for the remaining products; ``None`` if it must be built again. A collective."""
        self._undecided = False
        left, known = self.products_left, self._known
        own = statistics.median(self._seconds[1:])
        is_recorded = (
            self._recording and launching_dominates(statistics.median(self._launching[1:]), own) and engine.record()
        )
        if not self._automatic:
            if is_recorded:
                self.reason += ", recorded as a CUDA graph"
            return engine
        if self._ranks.failed_ranks(is_recorded):
            self.reason = "launches take most of a product's time, so it is recorded as a CUDA graph"
            return engine
        draws = bool(self._ranks.failed_ranks(self._loss.draws))
        nodes = engine.nodes
        own_gain = _GAIN_WITH_CONVOLUTIONS if _any("Convolution", nodes) else _GAIN
        product, trace, steady, gain = largest_over_ranks(
            self._ranks, own, known.expected_trace_seconds(nodes), _num_traces(plan.parts.batches), own_gain
        )
        # A trace for each further shape; for each batch its constants and a product by either engine.
        rest = max(0.0, steady - 1) * trace + 3 * product
        if draws or not trial_pays(Timing(product, trace, rest, gain), left, known):
            known.product_seconds += left * product
            self.reason = known.failure or "too few products are left to pay for tracing"
            if draws:
                self.reason = "the loss draws random numbers, which a trace would not repeat"
            return engine
        trial = self._trial(engine, plan)
        # Each number tells all ranks about one kind of failure.
        out_of_room = trial is not None and trial.num_bytes > plan.budget
        failed = trial is not None and trial.failure is not None
        seconds = (0.0, 0.0, 0.0) if trial is None else (trial.trace_seconds, trial.ratio * own, trial.ratio)
        trace, changed, _, any_failed, any_out = largest_over_ranks(
            self._ranks, *seconds, float(failed), float(out_of_room)
        )
        if any_failed:
            known.failure = (trial.failure if trial is not None else None) or "another rank cannot trace the loss"
        elif any_out:
            known.failure = "the constants of a trace exceed the memory budget"
        if known.failure is not None:
            self.reason = known.failure
            return engine
        known.trace_seconds, known.ratio = trace, changed / product
        if not tracing_pays(Timing(product, 0.0, max(0.0, steady - 1) * trace + 3 * product), left, known.ratio):
            self.reason = f"a traced product takes {known.ratio:.2f} of its time, not enough for the products left"
            return engine
        return self._change_over(engine, trial)

    def _trial(self, engine: DoubleBackward, plan: MemoryPlan) -> _Trial | None:
        """Trace one batch and time its product against double backward; ``None`` on a rank without batches."""
        if not engine.batches:
            return None
        batch = plan.parts.largest
        index = next(n for n, other in enumerate(engine.batches) if other is batch)
        directions = trial_directions(self._loss)
        try:
            with self._loss.differentiable():
                began = self.now()
                traced, shared = Linearize.trace(self._loss, batch)
                seconds = self.now() - began
                constants = traced.constants(batch)
                check_agreement(Linearize.name, traced.product(constants, directions), engine, index)
                times: tuple[list[float], list[float]] = ([], [])
                for _ in range(2):
                    began = self.now()
                    traced.product(constants, directions)
                    between = self.now()
                    engine.part(index, directions)
                    times[0].append(between - began)
                    times[1].append(self.now() - between)
            size = traced.size(batch, constants) * len(engine.batches)
            first = (signature(batch), traced) if shared else None
            return _Trial(seconds, min(times[0]) / min(times[1]), size, first)
        except Exception as error:
            return _Trial(failure=f"tracing failed ({type(error).__name__}: {_beginning(error)})")

    def _change_over(self, engine: DoubleBackward, trial: _Trial | None) -> ProductEngine | None:
        """Replace double backward batch by batch; if that fails on any rank, on none."""
        error: Exception | None = None
        changed: ProductEngine = engine
        if engine.batches:
            first = None if trial is None else trial.first
            try:
                changed = Linearize(self._loss, engine.batches, engine.weights, reference=engine, first=first)
            except Exception as exception:
                exception.__traceback__ = None  # Its frames hold the traces.
                error = exception
        else:
            changed = Linearize(self._loss, [], [])
        if self._ranks.failed_ranks(error is not None):
            why = "on another rank" if error is None else f"{type(error).__name__}: {_beginning(error)}"
            self._known.failure = self.reason = f"tracing failed ({why})"
            engine.close()
            return None
        ratio = self._known.ratio
        assert ratio is not None
        self.reason = f"measured to take {ratio:.2f} of double backward's time"
        return changed


def largest_over_ranks(ranks: Ranks, *values: float) -> list[float]:
    """Return the largest of the ranks' values, for each of several quantities; one exchange.

    Example:
        >>> largest_over_ranks(Ranks(), 1.0, 2.0)
        [1.0, 2.0]
    """
    table = torch.zeros(ranks.world_size, len(values), dtype=torch.float64, device=ranks.control_device)
    table[ranks.rank] = torch.tensor(values, dtype=torch.float64, device="cpu")
    largest: list[float] = ranks.all_reduce(table).amax(dim=0).tolist()
    return largest


def _num_traces(batches: Sequence[Any]) -> float:
    """Return the number of traces that batches need; those that share none need one each."""
    keys = [signature(batch) for batch in batches]
    return float(len({key for key in keys if key is not None}) + sum(key is None for key in keys))


def _beginning(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 100 else text[:97] + "..."
