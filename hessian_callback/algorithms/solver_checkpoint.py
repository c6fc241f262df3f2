"""A Lanczos run on disk: what it takes to go on after its process was killed, as if nothing had been.

Each rank keeps its own slices in a folder: ``rank0.basis`` holds the vectors of the basis one after the other and is
only ever appended to, so that a save costs the new vectors alone. ``rank0.state0`` and ``rank0.state1`` hold the small
rest, of the last save and of the one before: a save replaces the older one in a single step.

A process may be killed at any moment. Vectors beyond those that a state counts were being written then, and are
overwritten. Where the ranks were killed between their saves, some have one save more than others, and all go back to
the last that they have in common, whose vectors are all still there.

What it is for is a process that dies. So a run does not die of it: a save that fails is the last, on all ranks, and the
run goes on with the products that it has in memory.
"""

from __future__ import annotations

import io
import os
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hessian_callback._version import __version__
from hessian_callback.linalg.krylov_basis import KrylovBasis
from hessian_callback.linalg.linear_operator import SymmetricOperator

__all__ = ["DEFAULT_SECONDS", "CheckpointError", "SolverCheckpoint", "delete_files"]

# Seconds of a run that a killed process may lose.
DEFAULT_SECONDS = 300.0
# The ranks agree on whether to save, a short exchange, each time that the basis has grown by this part of itself.
_GROWTH = 50
_SUFFIXES = ("basis", "state0", "state1", "new")


class CheckpointError(ValueError):
    """Raised on all ranks, before a product is spent, when there is no going on with what the folder holds."""

    def __init__(self, reason: str, remedy: str) -> None:
        """Say why not, and what to do."""
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


class SolverCheckpoint:
    """Saves a Lanczos run now and then, and finds what an earlier process saved of the same run.

    Args:
        folder: where to; made if need be. One for each run.
        operator: the matrix, for its ranks and the kind of its vectors.
        run: what else the run is defined by, by name: numbers and texts. A run with others is not gone on with.
        every: seconds between two saves, and before the first.

    Raises:
        ValueError: if ``every`` is negative.

    Example:
        >>> import tempfile
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> operator = MatvecOperator(lambda v: 2 * v, 3)
        >>> folder = tempfile.mkdtemp()
        >>> basis = KrylovBasis(operator)
        >>> checkpoint = SolverCheckpoint(folder, operator, {"k": 1}, every=0)
        >>> checkpoint.load(basis)  # there is none
        >>> basis.append(torch.tensor([0.6, 0.8, 0.0], dtype=torch.float64))
        >>> checkpoint.save(basis, {"products": 1})
        >>> basis = KrylovBasis(operator)  # another process
        >>> checkpoint = SolverCheckpoint(folder, operator, {"k": 1}, every=0)
        >>> checkpoint.load(basis), basis.vector(0)
        ({'products': 1}, tensor([0.6000, 0.8000, 0.0000], dtype=torch.float64))
        >>> checkpoint.delete()
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        operator: SymmetricOperator,
        run: Mapping[str, Any],
        every: float = DEFAULT_SECONDS,
    ) -> None:
        if not every >= 0:
            raise ValueError(f"checkpoint_every must be a number of seconds from 0 on, got {every}")
        self.folder = Path(folder)
        self._ranks = operator.ranks
        self._like = torch.empty(operator.partition.slice_length, dtype=operator.dtype, device="meta")
        self._run = {
            "parameters": operator.partition.size,
            "dtype": str(operator.dtype).removeprefix("torch."),
            "ranks": operator.ranks.world_size,
            "version": __version__,
            **run,
        }
        self._every = every
        self._saved_at = time.monotonic()
        self._next_look = 0
        self._number = 0  # saves so far, those of earlier processes included
        self._vectors = 0  # how many of the basis' vectors are saved,
        self._checksum = 0  # and the checksum of their bytes
        self._given_up = False

    # -- loading -------------------------------------------------------------------------------

    def load(self, basis: KrylovBasis) -> dict[str, Any] | None:
        """Append the vectors of the last save that all ranks have to an empty basis, and return the rest of it.

        Returns:
            What `save` was given, tensors on the CPU; ``None`` if nothing was saved.

        Raises:
            CheckpointError: if what was saved is of another run, or damaged, or the folder can't be used.
        """
        found: dict[int, dict[str, Any]] = {}
        with self._together("opening the solver's checkpoint"), self._usable():
            self.folder.mkdir(parents=True, exist_ok=True)
            for suffix in ("state0", "state1"):
                if self._path(suffix).exists():
                    state = self._read_state(suffix)
                    found[state["number"]] = state
        number = self._last_in_common(sorted(found))
        with self._together("reading the solver's checkpoint"), self._usable():
            for other in found:
                if other > number:  # Of ranks that were killed a little later than the others.
                    self._path(f"state{other % 2}").unlink()
            if number == 0:
                self._path("basis").write_bytes(b"")  # What cannot be written shows now, not after an hour.
                return None
            state = found[number]
            vector = torch.empty_like(self._like, device="cpu")
            data = memoryview(_bytes_of(vector))
            try:
                with self._path("basis").open("rb") as file:
                    for _ in range(state["vectors"]):
                        if file.readinto(data) < len(data):
                            raise self._damaged("basis")
                        self._checksum = zlib.crc32(data, self._checksum)
                        basis.append(vector)
            except FileNotFoundError:
                raise self._damaged("basis") from None
            if self._checksum != state["checksum"]:
                raise self._damaged("basis")
        self._number, self._vectors = number, state["vectors"]
        self._next_look = _next_after(self._vectors)
        solver: dict[str, Any] = state["solver"]
        return solver

    def _read_state(self, suffix: str) -> dict[str, Any]:
        data = self._path(suffix).read_bytes()
        if zlib.crc32(data[4:]).to_bytes(4, "big") != data[:4]:
            raise self._damaged(suffix)
        state: dict[str, Any] = torch.load(io.BytesIO(data[4:]), weights_only=True)
        stored = state["run"]
        differ = [name for name in {**stored, **self._run} if stored.get(name) != self._run.get(name)]
        if differ:
            then, now = (", ".join(f"{name}={run.get(name)}" for name in differ) for run in (stored, self._run))
            raise CheckpointError(
                f"the solver's checkpoint in {self.folder} is of a run with {then}, and this one has {now}",
                "run it as it was begun, or delete the folder to start over",
            )
        return state

    def _last_in_common(self, numbers: list[int]) -> int:
        """Return the number of the last save that all ranks have; 0 if there is none."""
        held = torch.zeros(self._ranks.world_size, 2, dtype=torch.float64, device=self._ranks.control_device)
        held[self._ranks.rank, : len(numbers)] = torch.tensor(numbers, dtype=torch.float64)
        of_ranks = [{int(number) for number in row if number > 0} for row in self._ranks.all_reduce(held).tolist()]
        common = set.intersection(*of_ranks)
        # All were killed within the first save, or none has saved anything.
        if not common and max(set.union(*of_ranks), default=0) > 1:
            lacking = [str(rank) for rank, found in enumerate(of_ranks) if not found]
            raise CheckpointError(
                f"the solver's checkpoint in {self.folder} lacks files"
                + (f" of rank {', '.join(lacking)}" if lacking else ", for no save is there of all ranks"),
                "put them back, or delete the folder to start over",
            )
        return max(common, default=0)

    def _damaged(self, suffix: str) -> CheckpointError:
        return CheckpointError(f"{self._path(suffix)} is cut off or damaged", "delete the folder to start over")

    # -- saving --------------------------------------------------------------------------------

    def is_due(self, size: int) -> bool:
        """Whether to save a basis of ``size`` vectors now; rank 0's clock decides for all ranks, which ask together."""
        if self._given_up or size < self._next_look:
            return False
        self._next_look = _next_after(size)
        due = time.monotonic() - self._saved_at >= self._every
        if self._ranks.world_size == 1:
            return due
        return bool(self._ranks.broadcast(torch.tensor([float(due)], device=self._ranks.control_device)))

    def save(self, basis: KrylovBasis, solver: Mapping[str, Any]) -> None:
        """Save a run, on all ranks together.

        A save that can't be written on one of them is warned of, and the last: `is_due` says no from then on. What was
        saved before stays.

        Args:
            basis: its basis, which begins with the vectors that were saved before.
            solver: all else, as ``torch.load(weights_only=True)`` accepts it.
        """
        vectors = self._vectors
        error: OSError | None = None
        with self._ranks.propagate_errors("saving the solver's checkpoint"):
            try:
                self._append(basis)
                self._replace_state(solver)
            except OSError as exception:
                error = exception
                with suppress(OSError):  # On a disk that is full, the rest of the run may need the room.
                    self._path("new").unlink(missing_ok=True)
                    os.truncate(self._path("basis"), vectors * self._like.nbytes)
        self._saved_at = time.monotonic()
        failed = self._ranks.failed_ranks(error is not None)
        if not failed:
            return
        self._given_up = True
        # Where warnings are errors, they must not be those of one rank alone.
        with self._ranks.propagate_errors("warning of the solver's checkpoint"):
            if error is not None or self._ranks.rank == 0:
                why = _reason_of(error) if error is not None else f"see rank {', '.join(map(str, failed))}"
                warnings.warn(
                    f"the solver's checkpoint in {self.folder} could not be saved: {why}. The computation goes on "
                    "without further saves, so a process that is killed now loses what it did since the last one; put "
                    "this right before the next run",
                    stacklevel=2,
                )

    def _append(self, basis: KrylovBasis) -> None:
        with self._path("basis").open("r+b") as file:
            # What lies beyond was written by a process that did not get as far as to its state.
            file.seek(self._vectors * self._like.nbytes)
            file.truncate()
            for vector in basis.rows(self._vectors):
                data = _bytes_of(vector.cpu().contiguous())
                file.write(data)
                self._checksum = zlib.crc32(data, self._checksum)
            file.flush()
            os.fsync(file.fileno())
        self._vectors = basis.size

    def _replace_state(self, solver: Mapping[str, Any]) -> None:
        number = self._number + 1
        buffer = io.BytesIO()
        state = {"number": number, "run": self._run, "vectors": self._vectors, "checksum": self._checksum}
        torch.save({**state, "solver": dict(solver)}, buffer)
        with self._path("new").open("wb") as file:
            file.write(zlib.crc32(buffer.getbuffer()).to_bytes(4, "big"))
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(self._path("new"), self._path(f"state{number % 2}"))
        self._number = number

    def delete(self) -> None:
        """Delete the files, on all ranks together, and the folder if nothing else is in it.

        What can't be deleted is warned of.
        """
        with self._ranks.propagate_errors("deleting the solver's checkpoint"):
            try:
                delete_files(self.folder, self._ranks.rank)
            except OSError as error:  # The result is worth more.
                warnings.warn(
                    f"the solver's checkpoint could not be deleted: {_reason_of(error)}; delete {self.folder} yourself",
                    stacklevel=2,
                )

    # -- files ---------------------------------------------------------------------------------

    def _path(self, suffix: str) -> Path:
        return self.folder / f"rank{self._ranks.rank}.{suffix}"

    @contextmanager
    def _usable(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"the folder {self.folder} can't be used for the solver's checkpoint: {_reason_of(error)}",
                "make it one that can be read and written, or name another",
            ) from error

    @contextmanager
    def _together(self, stage: str) -> Iterator[None]:
        """Like `Ranks.together`, but a `CheckpointError` of one rank is one on all, so that all can start over."""
        error: CheckpointError | None = None
        with self._ranks.propagate_errors(stage):
            try:
                yield
            except CheckpointError as exception:
                error = exception
        failed = self._ranks.failed_ranks(error is not None)
        if error is not None:
            raise error
        if failed:
            who = ", ".join(map(str, failed))
            raise CheckpointError(
                f"the solver's checkpoint in {self.folder} can't be gone on with, by the error of rank {who}",
                "do as it says there",
            )


def delete_files(folder: Path, rank: int) -> None:
    """Delete a rank's files of a checkpoint, by rank 0 those of all ranks, and the folder if nothing else is in it."""
    own = "*" if rank == 0 else str(rank)
    for suffix in _SUFFIXES:
        for path in folder.glob(f"rank{own}.{suffix}"):
            path.unlink(missing_ok=True)
    with suppress(OSError):  # Not empty, or another rank was quicker.
        folder.rmdir()


def _reason_of(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"a file that is gone ({error.filename}): do two runs share this folder? Give each its own"
    at = "" if error.filename is None else f" ({error.filename})"
    return f"{error.strerror or error}{at}"


def _next_after(size: int) -> int:
    return size + max(1, size // _GROWTH)


def _bytes_of(vector: Tensor) -> Any:
    """The memory of a vector on the CPU, as bytes; without a copy, and for dtypes that NumPy does not know too."""
    return vector.detach().view(torch.uint8).numpy()
