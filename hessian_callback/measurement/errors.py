"""Errors of the user's code that a measurement runs: those that will come again, and those that may pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from hessian_callback.linalg.distributed import PeerError, RankLostError
from hessian_callback.operators.memory import is_out_of_memory

__all__ = [
    "LossError",
    "NotReadyError",
    "NotTrainableError",
    "SampleError",
    "UserCodeError",
    "may_pass",
    "one_line",
    "sample_errors",
]


class UserCodeError(ValueError):
    """Raised instead of an error of the user's data or loss that every measurement would meet again.

    A run should end with it before training. The original error, if there was one, is its ``__cause__``.
    """


class SampleError(UserCodeError):
    """Raised if samples can't be taken from a loader."""


class LossError(UserCodeError):
    """Raised if a loss can't be evaluated on a batch of the samples."""


class NotReadyError(RuntimeError):
    """Raised if a loss needs an attribute that the module does not have yet, and may have after training began."""


class NotTrainableError(NotReadyError):
    """Raised if too many of the chosen parameters are frozen, and may be unfrozen later; it never ends a run."""


def may_pass(error: BaseException) -> bool:
    """Whether an error says nothing about the next attempt: short memory, files, networks, other ranks.

    Example:
        >>> may_pass(MemoryError()), may_pass(ConnectionResetError()), may_pass(KeyError("labels"))
        (True, True, False)
    """
    return (
        isinstance(error, (MemoryError, OSError, PeerError, RankLostError, NotReadyError))
        or not isinstance(error, Exception)
        or is_out_of_memory(error)
    )


def one_line(error: BaseException) -> str:
    r"""Return the type and the message of an error, without line breaks.

    Example:
        >>> one_line(ValueError("two\n  lines"))
        'ValueError: two lines'
    """
    return ": ".join(filter(None, (type(error).__name__, " ".join(str(error).split()))))


@contextmanager
def sample_errors(action: str) -> Iterator[None]:
    """Raise a `SampleError` instead of whatever the user's data set, sampler or collate function raises.

    Errors that `may_pass` are left as they are.

    Args:
        action: what was being done, as a participle.

    Example:
        >>> with sample_errors("loading sample 3"):
        ...     {}["labels"]
        Traceback (most recent call last):
        ...
        hessian_callback.measurement.errors.SampleError: loading sample 3 raised KeyError: 'labels'...
    """
    try:
        yield
    except UserCodeError:
        raise
    except Exception as error:
        if may_pass(error):
            raise
        raise SampleError(
            f"{action} raised {one_line(error)}. Samples are loaded in the main process, without worker_init_fn. "
            "Correct the data set, sampler or collate function, or pass dataloader=my_loader, another loader"
        ) from error
