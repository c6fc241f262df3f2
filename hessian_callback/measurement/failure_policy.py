"""What happens to a run when a part of a measurement fails, on all ranks together."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from hessian_callback._options import check_choice
from hessian_callback.linalg.distributed import PeerError, RankLostError, Ranks
from hessian_callback.measurement.errors import NotTrainableError

__all__ = ["FailurePolicy", "Outcome", "SigtermReceived"]

T = TypeVar("T")


class SigtermReceived(Exception):
    """The process got SIGTERM: the remaining time belongs to the run, which has to save its state."""


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """The result of a task that may have failed.

    Attributes:
        value: the task's value; ``None`` if it failed on any rank.
        reason: why it failed, in one line; ``None`` if it succeeded on all ranks.
    """

    value: T | None
    reason: str | None


class FailurePolicy:
    """Runs tasks that may fail on some ranks, and raises on all ranks or on none.

    Args:
        on_error: ``"raise"`` raises every error. ``"warn"`` warns once of each and continues.
        permanent: types of errors that recur at every try.
        plain: types of errors whose message is a whole sentence and is shown without their name.

    Example:
        >>> failures = FailurePolicy("raise")
        >>> failures.run(lambda: 1 + 1, Ranks(), stage="adding", consequence="no sum")
        Outcome(value=2, reason=None)
    """

    def __init__(
        self,
        on_error: str = "warn",
        *,
        permanent: tuple[type[Exception], ...] = (ValueError, TypeError),
        plain: tuple[type[Exception], ...] = (PeerError,),
    ) -> None:
        self.on_error = check_choice("on_error", on_error, ("warn", "raise"))
        self._permanent = permanent
        self._plain = plain
        self._warned: set[str] = set()

    def copy(self) -> FailurePolicy:
        """Return the same policy without the memory of its warnings."""
        return FailurePolicy(self.on_error, permanent=self._permanent, plain=self._plain)

    def forget(self) -> None:
        """Forget the warnings, so that each is given again."""
        self._warned.clear()

    def run(
        self,
        task: Callable[[], T],
        ranks: Ranks,
        *,
        stage: str,
        consequence: str,
        raise_permanent: bool = False,
    ) -> Outcome[T]:
        """Run a task on all ranks and agree on the outcome.

        Args:
            task: the task. It holds no collective that ranks would leave in different ways.
            ranks: the processes; all of them must call.
            stage: the activity, for the errors of other ranks (a participle: "computing ...").
            consequence: what follows for the run, as the beginning of the warning.
            raise_permanent: raise permanent errors even with ``on_error="warn"``.

        Returns:
            The task's value, or the reason of the failure.

        Raises:
            RankLostError: if another process has ended.
            SigtermReceived: if the task raised it.
            Exception: the task's error, or a `PeerError`, as the policy demands.
        """
        error: Exception | None = None
        value: T | None = None
        try:
            value = task()
        except (RankLostError, SigtermReceived):
            raise
        except Exception as exception:
            error = exception
        failed = ranks.failed_ranks(error is not None)
        if not failed:
            return Outcome(value, None)
        permanent = raise_permanent and bool(ranks.failed_ranks(isinstance(error, self._permanent)))
        waits = bool(ranks.failed_ranks(isinstance(error, NotTrainableError)))
        if (self.on_error == "raise" and not waits) or permanent:
            raise error if error is not None else PeerError(stage, failed)
        reason = self.in_one_line(error if error is not None else PeerError(stage, failed))
        # A rank warns of its own error. Of the ranks without one, the first is enough.
        if ranks.rank == 0 or (error is not None and not isinstance(error, PeerError)):
            self._warn(f"{consequence}: {reason}", reason)
        return Outcome(None, reason)

    def in_one_line(self, error: Exception) -> str:
        """Return an error's message in one line, with the error's type unless it is a plain one."""
        text = " ".join(str(error).split())
        return text if isinstance(error, self._plain) else f"{type(error).__name__}: {text}"

    def _warn(self, text: str, reason: str) -> None:
        if reason not in self._warned:
            self._warned.add(reason)
            warnings.warn(text, stacklevel=3)
