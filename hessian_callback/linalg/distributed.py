"""The one place that speaks ``torch.distributed``.

A vector of ``P`` coordinates is cut into ``W`` slices of equal length, the last ones padded with
zeros, and rank ``r`` keeps slice ``r``. A single process is ``W = 1`` of the same code: its slice is
the whole vector and every collective is the identity.

Failures travel with the data. Each slice that is summed over the ranks carries one flag slot per
rank, so that a rank that could not form its part of a product tells all others in that very product,
instead of leaving them to wait for the process group's timeout.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["Partition", "PeerError", "RankLostError", "Ranks"]


# PyTorch 2.13 deprecates the older names, with a warning at every call.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class PeerError(RuntimeError):
    """Raised on the ranks that did nothing wrong when another rank failed; names the failed ranks."""

    def __init__(self, stage: str, failed: list[int]) -> None:
        """Name the stage and the failed ranks."""
        self.stage = stage
        self.failed = failed
        who = f"rank {failed[0]}" if len(failed) == 1 else f"ranks {', '.join(map(str, failed))}"
        super().__init__(
            f"{who} failed while {stage}; the error itself is in the output of {who}. "
            "This rank stopped at the same point, so that none waits for the others."
        )


class RankLostError(RuntimeError):
    """Raised when a collective broke because another process is gone."""


@dataclass(frozen=True)
class Partition:
    """How a vector of ``size`` coordinates is cut over ``world_size`` ranks.

    Attributes:
        size: number of coordinates ``P`` of the whole vector.
        world_size: number of ranks ``W``.
        rank: the rank whose slice ``start:stop`` is.

    Example:
        >>> Partition(size=10, world_size=4, rank=3)
        Partition(size=10, world_size=4, rank=3)
        >>> [(Partition(10, 4, r).start, Partition(10, 4, r).stop) for r in range(4)]
        [(0, 3), (3, 6), (6, 9), (9, 10)]
    """

    size: int
    world_size: int
    rank: int

    @property
    def slice_length(self) -> int:
        """Coordinates that every rank's slice holds, padding included: ``ceil(P / W)``."""
        return -(-self.size // self.world_size)

    @property
    def start(self) -> int:
        """First coordinate of this rank's slice."""
        return min(self.rank * self.slice_length, self.size)

    @property
    def stop(self) -> int:
        """One past the last coordinate of this rank's slice, padding excluded."""
        return min((self.rank + 1) * self.slice_length, self.size)

    @property
    def length(self) -> int:
        """Coordinates of this rank's slice without the padding (0 is possible)."""
        return self.stop - self.start

    def cut(self, vector: Tensor) -> Tensor:
        """Return this rank's slice of a whole vector, ``(P,) -> (slice_length,)``, zero padded."""
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of shape ({self.size},), got {tuple(vector.shape)}")
        piece = vector.new_zeros(self.slice_length)
        piece[: self.length] = vector[self.start : self.stop]
        return piece


class Ranks:
    """A process group, or a single process, seen as ``W`` ranks that share one computation.

    Args:
        process_group: a ``torch.distributed`` process group; ``None`` for a single process.

    Example:
        >>> ranks = Ranks()
        >>> ranks.world_size, ranks.rank
        (1, 0)
        >>> ranks.all_reduce(torch.tensor([1.0, 2.0], dtype=torch.float64))
        tensor([1., 2.], dtype=torch.float64)
    """

    def __init__(self, process_group: dist.ProcessGroup | None = None) -> None:
        """Read size and rank from the group."""
        self.group = process_group
        self.world_size = 1 if process_group is None else dist.get_world_size(process_group)
        self.rank = 0 if process_group is None else dist.get_rank(process_group)
        if self.rank < 0:
            raise ValueError(
                "this process is not a member of the process group it was given; pass a group that holds it"
            )

    @classmethod
    def default(cls) -> Ranks:
        """Every rank of the running ``torch.distributed`` job, or the single process there is."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return cls(dist.group.WORLD)
        return cls(None)

    def partition(self, size: int) -> Partition:
        """Return how a vector of ``size`` coordinates is cut over these ranks."""
        return Partition(size, self.world_size, self.rank)

    # -- collectives ---------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place; returned for convenience."""
        if self.world_size > 1:
            with _lost_ranks_named():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor, in place, with that of the group's first rank."""
        if self.world_size > 1:
            with _lost_ranks_named():
                dist.broadcast(tensor, src=self._global_rank(0), group=self.group)
        return tensor

    def all_gather(self, piece: Tensor, partition: Partition) -> Tensor:
        """Join the ranks' slices, ``(slice_length,) -> (P,)``."""
        if self.world_size == 1:
            return piece
        whole = piece.new_empty(partition.slice_length * self.world_size)
        with _lost_ranks_named():
            all_gather(whole, piece.contiguous(), group=self.group)
        return whole[: partition.size]

    def reduce_scatter(
        self,
        vector: Tensor | None,
        partition: Partition,
        *,
        dtype: torch.dtype,
        device: torch.device,
        stage: str,
    ) -> Tensor:
        """Sum the ranks' whole vectors and return this rank's slice of the sum.

        One collective moves the data and the news of failures: the buffer of each slice ends in
        ``W`` flag slots, one per rank, that are summed along.

        Args:
            vector: this rank's contribution, shape ``(P,)``; ``None`` says that this rank failed.
            partition: how vectors are cut.
            dtype: the vector's dtype, needed where ``vector`` is ``None``.
            device: its device, likewise.
            stage: what was being done, for the error message (a participle: "computing ...").

        Returns:
            The slice of the sum, shape ``(slice_length,)``, zero padded.

        Raises:
            PeerError: on all ranks when any rank passed ``None``.
        """
        if self.world_size == 1:
            if vector is None:
                raise PeerError(stage, [0])
            return vector
        length, width = partition.slice_length, self.world_size
        buffer = torch.zeros(width, length + width, dtype=dtype, device=device)
        if vector is None:
            buffer[:, length + self.rank] = 1
        else:
            # Whole slices are copied at once; the slice that ends the vector, and those behind it, are not full.
            full = partition.size // length
            buffer[:full, :length] = vector[: full * length].view(full, length)
            if full < width:
                rest = partition.size - full * length
                buffer[full, :rest] = vector[full * length :]
        piece = buffer.new_empty(length + width)
        with _lost_ranks_named():
            reduce_scatter(piece, buffer.view(-1), group=self.group)
        failed = torch.nonzero(piece[length:]).flatten().tolist()
        if failed:
            raise PeerError(stage, failed)
        return piece[:length]

    # -- agreeing ------------------------------------------------------------------------------

    @contextmanager
    def propagate_errors(self, stage: str) -> Iterator[None]:
        """Run a block on all ranks and leave it together.

        When the block raises on any rank, it raises on all of them: the failing rank with its own
        error, the others with a `PeerError` that names it. The block must hold no collective of its
        own, unless every rank leaves that collective in the same way.

        Args:
            stage: what is being done, for the error message (a participle: "computing ...").

        Raises:
            PeerError: when another rank failed and this one did not.

        Example:
            >>> with Ranks().propagate_errors("collecting the batches"):
            ...     raise ValueError("empty")
            Traceback (most recent call last):
            ...
            ValueError: empty
        """
        error: Exception | None = None
        try:
            yield
        except (RankLostError, PeerError):
            raise  # The others know already, or are gone.
        except Exception as exception:
            error = exception
        failed = self.failed_ranks(error is not None)
        if error is not None:
            raise error
        if failed:
            raise PeerError(stage, failed)

    def failed_ranks(self, failed: bool) -> list[int]:
        """Tell all ranks whether this one failed; return the ranks that did."""
        flags = torch.zeros(self.world_size, dtype=torch.float64, device=self.control_device)
        flags[self.rank] = float(failed)
        return torch.nonzero(self.all_reduce(flags)).flatten().tolist()

    @property
    def control_device(self) -> torch.device:
        """The device on which this group's collectives take small tensors."""
        if self.group is not None and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _global_rank(self, group_rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, group_rank)


@contextmanager
def _lost_ranks_named() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        # Backends word it differently ("Connection closed by peer", "Connection reset", NCCL aborts ...).
        raise RankLostError(
            "a collective of the Hessian measurement broke, most likely because another rank's process has "
            f"ended; look for the first error or kill signal among the other ranks ({error})"
        ) from error
