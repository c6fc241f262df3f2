"""The display of a running measurement in a Trainer: its cost, its progress, and the end when SIGTERM arrives."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from lightning_utilities.core.rank_zero import rank_zero_warn

from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.callbacks.lightning_packages import Trainer
from hessian_callback.callbacks.progress import announce, measuring
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.linalg.free_memory import free_memory
from hessian_callback.measurement.failure_policy import SigtermReceived
from hessian_callback.measurement.observer import CostEstimate, Observer
from hessian_callback.measurement.problem import Problem
from hessian_callback.operators.hessian import HessianOperator
from hessian_callback.operators.memory import readable_size

__all__ = ["Announcements", "TrainerObserver"]


class Announcements:
    """Lines that are printed once for a run.

    Args:
        prefix: the callback's prefix, with which lines begin.
        verbose: whether anything is printed.
    """

    def __init__(self, prefix: str, verbose: bool) -> None:
        self.prefix = prefix
        self.verbose = verbose
        self._said: dict[str, str] = {}

    def forget(self) -> None:
        """Forget what was announced."""
        self._said.clear()

    def is_new(self, topic: str, version: str = "") -> bool:
        """Return whether a topic was not announced in this version before; it counts as announced from now on."""
        if self._said.get(topic) == version:
            return False
        self._said[topic] = version
        return True

    def say(self, trainer: Trainer, text: str) -> None:
        """Print a line above the progress bar."""
        announce(trainer, f"{self.prefix}: {text}")


class TrainerObserver(Observer):
    """Follows one measurement of a Trainer's run.

    Args:
        trainer: the trainer.
        ranks: its processes.
        announcements: the lines that were printed before.
        hvp: the engine that was asked for.
        arrived: gets an entry when SIGTERM arrives.
    """

    def __init__(
        self, trainer: Trainer, ranks: Ranks, announcements: Announcements, hvp: str, arrived: Sequence[int]
    ) -> None:
        self._arrived = arrived
        self._trainer = trainer
        self._ranks = ranks
        self._announcements = announcements
        self._hvp = hvp

    def operator_made(self, operator: HessianOperator, problem: Problem, cost: CostEstimate) -> None:
        """Print the expected cost of the first measurement, and that draws are fixed if the loss draws."""
        if operator.draws and self._announcements.verbose and self._announcements.is_new("draws"):
            self._announcements.say(
                self._trainer,
                "the loss draws random numbers, so it is measured with the same draws of a batch in every evaluation",
            )
        if not self._announcements.verbose or not self._announcements.is_new("cost"):
            return
        more = f", about {cost.num_extra_hvps} more for {', '.join(cost.extras)}" if cost.num_extra_hvps else ""
        vectors = cost.num_basis_vectors + cost.num_kept_vectors
        basis = vectors * operator.partition.slice_length * torch.finfo(operator.dtype).bits // 8
        limit = f" (at most {cost.num_basis_vectors} at a time)" if cost.basis_is_limited else ""
        graphs = operator.num_cached_graphs * operator.bytes_per_graph
        free = free_memory(operator.device)
        available = "" if free is None else f" ({readable_size(free)} are free)"
        each = operator.seconds_per_product()
        self._announcements.say(
            self._trainer,
            f"first measurement: {operator.num_parameters:,} parameters, {problem.num_samples:,} samples in "
            f"{problem.num_batches} batch(es), about {cost.num_hvps} Hessian-vector products (at most "
            f"{cost.max_hvps}){more}, {1e3 * each:.3g} ms each, so about "
            f"{each * (cost.num_hvps + cost.num_extra_hvps):.2g} s, and memory for each rank about "
            f"{readable_size(basis)} of Lanczos vectors{limit} and {readable_size(graphs)} of gradient graphs"
            f"{available}. Measurements are in the history of the callback in trainer.callbacks",
        )

    @contextmanager
    def solving(
        self, name: str, expected_hvps: int, checkpoint: str | None
    ) -> Iterator[Callable[[LanczosProgress], None]]:
        """Show a progress bar, and end the computation when SIGTERM arrives."""
        with measuring(self._trainer, name, expected_hvps) as show:
            begun = False

            def progress(now: LanczosProgress) -> None:
                nonlocal begun
                if not begun and now.num_matvecs > 1 and self._announcements.verbose:
                    self._announcements.say(self._trainer, f"continues with product {now.num_matvecs}, by {checkpoint}")
                begun = True
                show(now)
                self.between_parts()

            yield progress

    def operator_used(self, operator: HessianOperator) -> None:
        """Print that batches were halved, and the choice of the engine."""
        if operator.num_halvings:
            self._announcements.say(
                self._trainer,
                f"out of memory, so batches were halved {operator.num_halvings} time(s) and the measurement went on; "
                "a loader with smaller batches, or a memory_budget, avoids that",
            )
        if (
            self._hvp == "auto"
            and self._announcements.verbose
            and self._announcements.is_new("engine", operator.engine)
        ):
            self._announcements.say(self._trainer, f"products by {operator.engine}: {operator.engine_reason}")

    def between_parts(self) -> None:
        """End the measurement when SIGTERM arrived."""
        # Ranks get the signal at different products, and must end at the same one.
        if self._ranks.any(bool(self._arrived) or bool(self._trainer.received_sigterm)):
            raise SigtermReceived

    def warn(self, text: str) -> None:
        """Warn, with the callback's prefix."""
        rank_zero_warn(f"{self._announcements.prefix}: {text}")
