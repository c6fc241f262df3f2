"""Vectors that are cut over ranks, and collectives over them; the only module that imports ``torch.distributed``.

A vector of ``P`` coordinates is cut into ``W`` slices of equal length, the last ones padded with zeros. Rank ``r``
holds slice ``r``. A single process is the case ``W = 1``: its slice is the whole vector, and every collective is the
identity.

Each slice that is summed over the ranks carries one flag per rank. A rank that could not form its part of a product
sets its flag, so all ranks leave that product with an error instead of waiting for the process group's timeout.
"""

from __future__ import annotations

import hashlib
import socket
from collections.abc import Iterator, Sequence
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
    """Raised on the ranks that did not fail when another rank failed; names the failed ranks.

    Attributes:
        stage: the stage in which they failed, as a participle: "computing ...".
        failed: the failed ranks.
    """

    def __init__(self, stage: str, failed: list[int]) -> None:
        """Name the stage and the failed ranks."""
        self.stage = stage
        self.failed = failed
        ranks = f"rank {failed[0]}" if len(failed) == 1 else f"ranks {', '.join(map(str, failed))}"
        super().__init__(
            f"{ranks} failed while {stage}; the error itself is in the output of {ranks}. "
            "This rank stopped at the same point, so that none waits for the others."
        )


class RankLostError(RuntimeError):
    """Raised when a collective failed because another rank has ended or did not take part in it."""


@dataclass(frozen=True)
class Partition:
    """Partition of a vector of ``size`` coordinates over ``world_size`` ranks.

    Attributes:
        size: number of coordinates ``P`` of the whole vector.
        world_size: number of ranks ``W``.
        rank: the rank that holds coordinates ``start:stop``.

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
        """Length of every rank's slice, padding included: ``ceil(P / W)``."""
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
        """Length of this rank's slice without the padding; 0 is possible."""
        return self.stop - self.start

    def cut(self, vector: Tensor) -> Tensor:
        """Return this rank's slice of a whole vector, ``(P,) -> (slice_length,)``, zero padded."""
        if vector.shape != (self.size,):
            raise ValueError(f"expected a vector of shape ({self.size},), got {tuple(vector.shape)}")
        piece = vector.new_zeros(self.slice_length)
        piece[: self.length] = vector[self.start : self.stop]
        return piece


class Ranks:
    """``W`` ranks that share one computation: a process group, or a single process.

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
            raise ValueError("this process is not a member of the process group; pass a group that contains it")

    @classmethod
    def default(cls) -> Ranks:
        """Return all ranks of the running ``torch.distributed`` job, or the single process if there is none."""
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return cls(dist.group.WORLD)
        return cls(None)

    def partition(self, size: int) -> Partition:
        """Return the partition of a vector of ``size`` coordinates over these ranks."""
        return Partition(size, self.world_size, self.rank)

    # -- collectives ---------------------------------------------------------------------------

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the ranks, in place, and return it."""
        if self.world_size > 1:
            with _lost_ranks_reported():
                dist.all_reduce(tensor, group=self.group)
        return tensor

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Overwrite a tensor, in place, with that of the group's first rank, and return it."""
        if self.world_size > 1:
            with _lost_ranks_reported():
                dist.broadcast(tensor, src=self._global_rank(0), group=self.group)
        return tensor

    def agreed(self, value: float) -> float:
        """Return the first rank's number on all ranks: clocks and libraries differ between machines. A collective.

        Example:
            >>> Ranks().agreed(0.5)
            0.5
        """
        if self.world_size == 1:
            return value
        return float(self.broadcast(torch.tensor([value], dtype=torch.float64, device=self.control_device)))

    def all_gather(self, piece: Tensor, partition: Partition) -> Tensor:
        """Join the ranks' slices, ``(slice_length,) -> (P,)``."""
        if self.world_size == 1:
            return piece
        whole = piece.new_empty(partition.slice_length * self.world_size)
        with _lost_ranks_reported():
            all_gather(whole, piece.contiguous(), group=self.group)
        return whole[: partition.size]

    def gather(self, values: Sequence[float] | Tensor) -> Tensor:
        """Return the values of all ranks, on all ranks.

        Args:
            values: this rank's numbers, n of them; n must be the same on all ranks.

        Returns:
            ``(W, n)``, float64 on the CPU; row r holds the values of rank r.

        Example:
            >>> Ranks().gather([1.0, 2.0])
            tensor([[1., 2.]], dtype=torch.float64)
        """
        row = torch.as_tensor(values, dtype=torch.float64, device=self.control_device)
        table = row.new_zeros(self.world_size, len(row))
        table[self.rank] = row
        return self.all_reduce(table).cpu()

    def num_on_host(self) -> int:
        """Return the number of these ranks on this machine. A collective.

        Example:
            >>> Ranks().num_on_host()
            1
        """
        # 48 bits of a hash are exact in float64.
        host = int.from_bytes(hashlib.sha256(socket.gethostname().encode()).digest()[:6], "big")
        return int((self.gather([float(host)]) == float(host)).sum())

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

        A single collective moves the data and the flags of failed ranks: the buffer of each slice ends in ``W`` flag
        slots, one per rank.

        Args:
            vector: this rank's contribution, shape ``(P,)``; ``None`` if this rank failed.
            partition: how vectors are cut.
            dtype: dtype of the vector, needed if ``vector`` is ``None``.
            device: device of the vector, needed if ``vector`` is ``None``.
            stage: current stage for the error message, as a participle: "computing ...".

        Returns:
            The slice of the sum, shape ``(slice_length,)``, zero padded.

        Raises:
            PeerError: on all ranks, if any rank passed ``None``.
            RankLostError: if another rank has ended or did not take part.
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
            # Full slices are copied at once; the last one of the vector is not full, and those after it are empty.
            full = partition.size // length
            buffer[:full, :length] = vector[: full * length].view(full, length)
            if full < width:
                rest = partition.size - full * length
                buffer[full, :rest] = vector[full * length :]
        piece = buffer.new_empty(length + width)
        with _lost_ranks_reported():
            reduce_scatter(piece, buffer.view(-1), group=self.group)
        failed = torch.nonzero(piece[length:]).flatten().tolist()
        if failed:
            raise PeerError(stage, failed)
        return piece[:length]

    # -- agreeing ------------------------------------------------------------------------------

    @contextmanager
    def propagate_errors(self, stage: str) -> Iterator[None]:
        """Run a block on all ranks, and leave it on all ranks together.

        If the block raises on any rank, it raises on all of them: on the failing rank its own error, on the others a
        `PeerError` that names it. The block must not contain a collective, unless every rank leaves that collective
        in the same way. `KeyboardInterrupt` and `SystemExit` are not propagated: they end the process, and its end is
        reported to the others by `RankLostError`.

        Args:
            stage: current stage for the error message, as a participle: "computing ...".

        Raises:
            PeerError: if another rank failed and this one did not.
            RankLostError: if another rank has ended or did not take part.

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
            raise  # The other ranks have left the block in the same way, or have ended.
        except Exception as exception:
            error = exception
        failed = self.failed_ranks(error is not None)
        if error is not None:
            raise error
        if failed:
            raise PeerError(stage, failed)

    def failed_ranks(self, failed: bool) -> list[int]:
        """Return the ranks that passed ``True``, on all ranks.

        Args:
            failed: whether this rank failed.

        Example:
            >>> Ranks().failed_ranks(True)
            [0]
        """
        return torch.nonzero(self.gather([float(failed)])[:, 0]).flatten().tolist()

    def any(self, flag: bool) -> bool:
        """Return whether any rank passed ``True``; the same on all ranks.

        All ranks must call it at the same point. If each rank passes a signal that it has received, all of them react
        to it at the same product, even if the signal arrived at different ones. Costs one all-reduce of 8 bytes; a
        single process costs none.

        Args:
            flag: this rank's flag.

        Raises:
            RankLostError: if another rank has ended or did not take part.

        Example:
            >>> Ranks().any(False)
            False
        """
        if self.world_size == 1:
            return bool(flag)
        return bool(self.all_reduce(torch.tensor([float(flag)], dtype=torch.float64, device=self.control_device)) > 0)

    @property
    def control_device(self) -> torch.device:
        """Device that small tensors of this group's collectives must be on."""
        if self.group is not None and dist.get_backend(self.group) == "nccl":
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("cpu")

    def _global_rank(self, group_rank: int) -> int:
        assert self.group is not None
        return dist.get_global_rank(self.group, group_rank)


@contextmanager
def _lost_ranks_reported() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RankLostError(
            f"a collective of the Hessian measurement failed: {_cause(str(error))} ({error})"
        ) from error


def _cause(message: str) -> str:
    """Return the likely cause and its remedy; the backends' own messages differ and name no rank."""
    text = message.lower()
    if "timed out" in text or "timeout" in text:
        return (
            "another rank did not take part in it before the process group's timeout. Its process may be stopped, "
            "slow, or wait in another collective; look at the output of the other ranks, or raise the timeout"
        )
    if any(word in text for word in ("closed", "reset", "broken pipe", "abort", "remote process exited")):
        return (
            "most likely another rank's process has ended; look for the first error or kill signal in the output of "
            "the other ranks"
        )
    return "its ranks may have called it with different data; look at the output of the other ranks"
