"""A Lanczos run saved in a folder, so that a killed process can be continued with the same result.

Each rank saves its own slices. ``rank0.basis`` holds the basis vectors one after the other. It is only appended to, so
a save writes the new vectors only. After a restart of the solver, which replaces its vectors, the next save writes all
of them to ``rank0.basis1``, and after the next restart to ``rank0.basis`` again, so that the file of the save before
stays. ``rank0.state0`` and ``rank0.state1`` hold the small remaining state of the last two saves. A save writes
``rank0.new`` and replaces the older state by it in a single step.

A process may be killed at any moment. Vectors beyond those that a state counts belong to an unfinished save and are
overwritten. If the ranks were killed between their saves, all go back to the last save that they have in common; its
vectors are still there. A state is written before the first vector, so a basis without a state is a file of another
program and is never overwritten. No file is opened through a symbolic link.

A save that fails does not end the run. It is the last one, on all ranks.
"""

from __future__ import annotations

import errno
import io
import os
import re
import stat
import time
import warnings
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from hessian_callback._version import __version__
from hessian_callback.linalg.krylov_basis import KrylovBasis
from hessian_callback.linalg.linear_operator import SymmetricOperator

__all__ = ["DEFAULT_SECONDS", "CheckpointError", "SolverCheckpoint", "delete_files"]

# Longest loss of computation by a killed process.
DEFAULT_SECONDS = 300.0
# The ranks agree on whether to save each time that the basis has grown by this part of itself.
_GROWTH = 50
# The basis comes first: deletion in this order leaves no basis without a state.
_BASES = ("basis", "basis1")
_SUFFIXES = (*_BASES, "state0", "state1", "new")
_OWN_NAME = re.compile(rf"rank(0|[1-9][0-9]*)\.({'|'.join(_SUFFIXES)})")
# Neither follow a symbolic link nor wait for the other end of a pipe; 0 on systems without the flag.
_OPEN_SAFELY = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
_TYPES = {
    "number": int,
    "run": dict,
    "vectors": int,
    "generation": int,
    "restarts": int,
    "checksum": int,
    "solver": dict,
}


class CheckpointError(ValueError):
    """Raised on all ranks, before a product is spent, if the run cannot be continued from the folder.

    Attributes:
        reason: the message without its remedy.
    """

    def __init__(self, reason: str, remedy: str) -> None:
        """Join the reason and the remedy."""
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason


class SolverCheckpoint:
    """Saves a Lanczos run at intervals, and loads the run that an earlier process saved.

    Args:
        folder: folder of this run alone; created if it does not exist.
        operator: the matrix; its ranks, size and dtype must be those of the saved run.
        run: further arguments of the run, numbers and strings by name. They must be those of the saved run.
        every: seconds between two saves, and before the first.

    Raises:
        ValueError: if ``every`` is negative or NaN.

    Example:
        >>> import tempfile
        >>> from hessian_callback.linalg.linear_operator import MatvecOperator
        >>> operator = MatvecOperator(lambda v: 2 * v, 3)
        >>> folder = tempfile.mkdtemp()
        >>> basis = KrylovBasis(operator)
        >>> checkpoint = SolverCheckpoint(folder, operator, {"k": 1}, every=0)
        >>> checkpoint.load(basis)  # nothing is saved
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
            raise ValueError(f"checkpoint_every must be a number of seconds, at least 0, got {every}")
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
        self._number = 0  # number of saves, those of earlier processes included
        self._vectors = 0  # number of saved vectors
        self._checksum = 0  # checksum of their bytes
        self._generation = 0  # number of times that all vectors were replaced and written again
        self._restarts = 0  # restarts of the solver before the last save
        self._failed = False

    # -- loading -------------------------------------------------------------------------------

    def load(self, basis: KrylovBasis) -> dict[str, Any] | None:
        """Append the vectors of the last save that all ranks have to an empty basis, and return its state.

        Returns:
            The state that `save` was given, tensors on the CPU; ``None`` if nothing was saved.

        Raises:
            CheckpointError: if the save is damaged or of another run, or the folder cannot be used.
        """
        found: dict[int, dict[str, Any]] = {}
        with self._together("opening the solver's checkpoint"), self._usable():
            self.folder.mkdir(parents=True, exist_ok=True)
            for suffix in ("state0", "state1"):
                if os.path.lexists(self._path(suffix)):
                    state = self._read_state(suffix)
                    found[state["number"]] = state
        number = self._last_in_common(sorted(found))
        with self._together("reading the solver's checkpoint"), self._usable():
            if number == 0:
                self._begin(found)
                return None
            for other in found:
                if other > number:  # This rank was killed later than the others.
                    self._path(f"state{other % 2}").unlink()
            self._read_basis(basis, found[number])
        self._number, self._vectors = number, found[number]["vectors"]
        self._generation, self._restarts = found[number]["generation"], found[number]["restarts"]
        self._next_look = _next_after(self._vectors)
        solver: dict[str, Any] = found[number]["solver"]
        return solver

    def _begin(self, found: Mapping[int, Any]) -> None:
        """Write a state and a basis without vectors, so that an unusable folder is found before the first product."""
        path = self._path("basis")
        if not found and os.path.lexists(path) and path.lstat().st_size > 0:
            raise CheckpointError(
                f"{path} is not a solver's checkpoint: no saved state is beside it",
                "move it elsewhere, or use another folder",
            )
        try:
            self._write_state(0, {})
            if 1 in found:  # Other ranks were killed within their first save.
                self._path("state1").unlink()
            self._replace("basis", b"")
        except OSError:
            with suppress(OSError):
                delete_files(self.folder, self._ranks.rank)
            raise

    def _read_basis(self, basis: KrylovBasis, state: Mapping[str, Any]) -> None:
        if basis.most is not None and state["vectors"] > basis.most:
            raise CheckpointError(
                f"the solver's checkpoint in {self.folder} has {state['vectors']} vectors, and {basis.most} are "
                "allowed",
                "allow more, or delete the folder to start over",
            )
        suffix = _BASES[state["generation"] % 2]
        vector = torch.empty_like(self._like, device="cpu")
        data = memoryview(_bytes_of(vector))
        try:
            with self._open(suffix, os.O_RDONLY, "rb") as file:
                for _ in range(state["vectors"]):
                    if file.readinto(data) < len(data):  # type: ignore[attr-defined]
                        raise self._damaged(suffix)
                    self._checksum = zlib.crc32(data, self._checksum)
                    basis.append(vector)
        except FileNotFoundError:
            raise self._damaged(suffix) from None
        if self._checksum != state["checksum"]:
            raise self._damaged(suffix)

    def _read_state(self, suffix: str) -> dict[str, Any]:
        with self._open(suffix, os.O_RDONLY, "rb") as file:
            data = file.read()
        if zlib.crc32(data[4:]).to_bytes(4, "big") != data[:4]:
            raise self._damaged(suffix)
        try:
            # Earlier versions lack these.
            added = {"generation": 0, "restarts": 0}
            state: dict[str, Any] = {**added, **torch.load(io.BytesIO(data[4:]), weights_only=True)}
            complete = all(type(state[name]) is kind for name, kind in _TYPES.items())
            complete = complete and min(state["number"], state["generation"], state["restarts"]) >= 0
        except Exception as error:  # torch.load documents no types; what it raises depends on the bytes.
            raise self._damaged(suffix) from error
        if not complete:
            raise self._damaged(suffix)
        stored = state["run"]
        differ = [name for name in {**stored, **self._run} if stored.get(name) != self._run.get(name)]
        if differ and state["number"] > 0:
            then, now = (", ".join(f"{name}={run.get(name)}" for name in differ) for run in (stored, self._run))
            raise CheckpointError(
                f"the solver's checkpoint in {self.folder} is of a run with {then}, and this one has {now}",
                "run it with the original arguments, or delete the folder to start over",
            )
        return state

    def _last_in_common(self, numbers: list[int]) -> int:
        """Return the number of the last save that all ranks have; 0 if there is none."""
        table = self._ranks.gather([*numbers, 0, 0][:2]).tolist()
        of_ranks = [{int(number) for number in row if number > 0} for row in table]
        common = set.intersection(*of_ranks)
        # Without a common save, either all ranks were killed within the first one or none has saved anything.
        if not common and max(set.union(*of_ranks), default=0) > 1:
            lacking = [str(rank) for rank, found in enumerate(of_ranks) if not found]
            raise CheckpointError(
                f"the solver's checkpoint in {self.folder} lacks files"
                + (f" of rank {', '.join(lacking)}" if lacking else ": no save is available on all ranks"),
                "restore them, or delete the folder to start over",
            )
        return max(common, default=0)

    def _damaged(self, suffix: str) -> CheckpointError:
        return CheckpointError(f"{self._path(suffix)} is cut off or damaged", "delete the folder to start over")

    # -- saving --------------------------------------------------------------------------------

    def is_due(self, size: int) -> bool:
        """Return whether to save a basis of ``size`` vectors now; rank 0's clock decides, and all ranks must call."""
        if self._failed or size < self._next_look:
            return False
        self._next_look = _next_after(size)
        return bool(self._ranks.agreed(time.monotonic() - self._saved_at >= self._every))

    def save(self, basis: KrylovBasis, solver: Mapping[str, Any], *, restarts: int = 0) -> None:
        """Save a run, on all ranks together.

        If a rank cannot write its files, a warning is issued and `is_due` returns false from then on. The previous
        save stays.

        Args:
            basis: the basis; it begins with the vectors of the previous save if there was no restart since then.
            solver: the remaining state, of types that ``torch.load(weights_only=True)`` accepts.
            restarts: number of times that the solver has replaced its vectors.
        """
        if restarts != self._restarts:
            self._generation, self._restarts = self._generation + 1, restarts
            self._vectors = self._checksum = 0
        vectors = self._vectors
        error: OSError | None = None
        with self._ranks.propagate_errors("saving the solver's checkpoint"):
            try:
                self._append(basis)
                self._write_state(self._number + 1, solver)
            except OSError as exception:
                error = exception
                with suppress(OSError):  # If the disk is full, the rest of the run may need the space.
                    self._path("new").unlink(missing_ok=True)
                    with self._open(self._basis, os.O_RDWR, "r+b") as file:
                        file.truncate(vectors * self._like.nbytes)
        self._saved_at = time.monotonic()
        failed = self._ranks.failed_ranks(error is not None)
        if failed:
            self._failed = True
            self._warn_unsaved(error, failed)

    def _warn_unsaved(self, error: OSError | None, failed: list[int]) -> None:
        # If warnings are errors, the error must be raised on all ranks.
        with self._ranks.propagate_errors("warning of the solver's checkpoint"):
            if error is not None or self._ranks.rank == 0:
                why = _reason_of(error) if error is not None else f"see rank {', '.join(map(str, failed))}"
                warnings.warn(
                    f"the solver's checkpoint in {self.folder} could not be saved: {why}. The computation continues "
                    "without further saves: if its process is killed, the work since the last save is lost. Correct "
                    "this before the next run",
                    stacklevel=3,
                )

    def _append(self, basis: KrylovBasis) -> None:
        if self._generation > 0 and self._vectors == 0:
            self._replace(self._basis, b"")
        with self._open(self._basis, os.O_RDWR, "r+b") as file:
            # Vectors beyond these belong to an unfinished save.
            file.seek(self._vectors * self._like.nbytes)
            file.truncate()
            for vector in basis.rows(self._vectors):
                data = _bytes_of(vector.cpu().contiguous())
                file.write(data)
                self._checksum = zlib.crc32(data, self._checksum)
            file.flush()
            os.fsync(file.fileno())
        self._vectors = basis.size

    def _write_state(self, number: int, solver: Mapping[str, Any]) -> None:
        buffer = io.BytesIO()
        state = {
            "number": number,
            "run": self._run,
            "vectors": self._vectors,
            "generation": self._generation,
            "restarts": self._restarts,
            "checksum": self._checksum,
            "solver": dict(solver),
        }
        torch.save(state, buffer)
        data = buffer.getvalue()
        self._replace(f"state{number % 2}", zlib.crc32(data).to_bytes(4, "big") + data)
        self._number = number

    def delete(self) -> None:
        """Delete the files, on all ranks together, and the folder if it is empty then.

        A warning is issued if that fails.
        """
        with self._ranks.propagate_errors("deleting the solver's checkpoint"):
            try:
                delete_files(self.folder, self._ranks.rank)
            except OSError as error:  # The result of the run must not be lost for it.
                warnings.warn(
                    f"the solver's checkpoint could not be deleted: {_reason_of(error)}; delete {self.folder} yourself",
                    stacklevel=2,
                )

    # -- files ---------------------------------------------------------------------------------

    @property
    def _basis(self) -> str:
        return _BASES[self._generation % 2]

    def _path(self, suffix: str) -> Path:
        return self.folder / f"rank{self._ranks.rank}.{suffix}"

    def _open(self, suffix: str, flags: int, mode: str) -> IO[bytes]:
        """Open one of this rank's files if it is a regular file; symbolic links are not followed."""
        path = self._path(suffix)
        descriptor = os.open(path, flags | _OPEN_SAFELY, 0o666)
        try:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "not a regular file", str(path))
            return os.fdopen(descriptor, mode)
        except BaseException:
            os.close(descriptor)
            raise

    def _replace(self, suffix: str, data: bytes) -> None:
        """Write a new file, and put it in the place of an old one or of a link in a single step."""
        new = self._path("new")
        if os.path.lexists(new):
            new.unlink()
        with self._open("new", os.O_WRONLY | os.O_CREAT | os.O_EXCL, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, self._path(suffix))

    @contextmanager
    def _usable(self) -> Iterator[None]:
        """Turn an `OSError` into a `CheckpointError`."""
        try:
            yield
        except OSError as error:
            raise CheckpointError(
                f"the folder {self.folder} can't be used for the solver's checkpoint: {_reason_of(error)}",
                "make it readable and writable, or use another folder",
            ) from error

    @contextmanager
    def restoring(self) -> Iterator[None]:
        """Turn a `ValueError` while a loaded state is applied into a `CheckpointError`, on all ranks together."""
        with self._together("restoring the solver's checkpoint"):
            try:
                yield
            except CheckpointError:
                raise
            except ValueError as error:
                raise CheckpointError(
                    f"the state of the solver's checkpoint in {self.folder} can't be used: {error}",
                    "delete the folder to start over",
                ) from error

    @contextmanager
    def _together(self, stage: str) -> Iterator[None]:
        """Like `Ranks.propagate_errors`, but all ranks raise a `CheckpointError`, so that all can start over."""
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
            ranks = f"rank {', '.join(map(str, failed))}"
            raise CheckpointError(
                f"{ranks} could not load the solver's checkpoint in {self.folder}", f"see the error message of {ranks}"
            )


def delete_files(folder: Path, rank: int) -> None:
    """Delete the files of a checkpoint, and the folder if it is empty then.

    Files of other names stay, and so does a non-empty basis without a state, which `SolverCheckpoint` never writes.

    Args:
        folder: folder of the checkpoint; it need not exist.
        rank: the calling rank. Rank 0 deletes the files of all ranks, another one its own.
    """
    try:
        names = {path.name for path in folder.iterdir()}
    except FileNotFoundError:
        return
    owners = {int(match[1]) for match in map(_OWN_NAME.fullmatch, names) if match}
    for owner in owners if rank == 0 else owners & {rank}:
        has_state = not names.isdisjoint({f"rank{owner}.state0", f"rank{owner}.state1"})
        for suffix in _SUFFIXES:
            path = folder / f"rank{owner}.{suffix}"
            with suppress(FileNotFoundError):  # Rank 0 may have been faster.
                if suffix not in _BASES or has_state or path.lstat().st_size == 0:
                    path.unlink()
    with suppress(OSError):  # It is not empty, or another rank was faster.
        folder.rmdir()


def _reason_of(error: OSError) -> str:
    if isinstance(error, FileNotFoundError):
        return f"a file has vanished ({error.filename}): do two runs share this folder? Give each its own"
    if error.errno == errno.ELOOP:
        return f"{error.filename} is a symbolic link, and links are not followed"
    at = "" if error.filename is None else f" ({error.filename})"
    return f"{error.strerror or error}{at}"


def _next_after(size: int) -> int:
    return size + max(1, size // _GROWTH)


def _bytes_of(vector: Tensor) -> Any:
    """Return the memory of a vector on the CPU as bytes, without a copy; also for dtypes that NumPy lacks."""
    return vector.detach().view(torch.uint8).numpy()
