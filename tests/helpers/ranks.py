"""Real processes in a real gloo group, each on one thread."""

from __future__ import annotations

import datetime
import io
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from hessian_callback.linalg.distributed import Ranks
from tests.helpers.forks import context

needs_sharding = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="fully_shard of this PyTorch does not run on a CPU"
)


class DiagonalOperator:
    """A diagonal matrix, cut over the ranks, whose products cost little time and memory."""

    def __init__(self, size: int) -> None:
        self.ranks = Ranks(dist.group.WORLD)
        self.partition = self.ranks.partition(size)
        self.dtype, self.device, self.relative_error = torch.float32, torch.device("cpu"), 1e-6
        self._diagonal = self.partition.cut(torch.arange(1.0, size + 1) ** -0.2)

    def matvec_slice(self, vector: Tensor) -> Tensor:
        return self._diagonal * vector


@dataclass
class Outcome:
    """The value that a rank returned, or the error that ended it."""

    value: Any = None
    error: str | None = None
    message: str = ""
    seconds: float = 0.0
    exitcode: int | None = None


def run_ranks(
    function: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, expect_errors: bool = False
) -> list[Outcome]:
    """Call ``function(rank, *args)`` on every rank of a group; the test fails if a rank hangs.

    Errors of a rank fail the test as well, unless ``expect_errors``.
    """
    with tempfile.TemporaryDirectory() as folder:
        forks, pipes, processes = context(), [], []
        for rank in range(world_size):
            receiver, sender = forks.Pipe(duplex=False)
            process = forks.Process(target=_main, args=(function, rank, world_size, args, folder, sender))
            process.start()
            sender.close()
            pipes.append(receiver)
            processes.append(process)
        deadline = time.monotonic() + timeout
        outcomes = []
        try:
            for rank, (pipe, process) in enumerate(zip(pipes, processes, strict=True)):
                assert pipe.poll(max(0.0, deadline - time.monotonic())), f"rank {rank} still runs after {timeout} s"
                try:
                    # As bytes: a tensor would be sent as a handle that ends with its process.
                    outcomes.append(torch.load(io.BytesIO(pipe.recv_bytes()), weights_only=False))
                except EOFError:
                    process.join()
                    outcomes.append(Outcome(error="Killed", exitcode=process.exitcode))
            for process in processes:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in processes:
                if process.is_alive():
                    process.kill()
                    process.join()
    if not expect_errors:
        assert all(outcome.error is None for outcome in outcomes), [(one.error, one.message) for one in outcomes]
    return outcomes


def _main(
    function: Callable[..., Any], rank: int, world_size: int, args: tuple[Any, ...], folder: str, sender: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.pop("MASTER_ADDR", None)
    store = dist.FileStore(str(Path(folder) / "store"), world_size)
    # Twice the time that a test waits: none may depend on the group's timeout.
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=datetime.timedelta(seconds=240)
    )
    started = time.monotonic()
    try:
        outcome = Outcome(value=function(rank, *args))
    except Exception as error:
        outcome = Outcome(error=type(error).__name__, message=str(error))
    outcome.seconds = time.monotonic() - started
    buffer = io.BytesIO()
    torch.save(outcome, buffer)
    sender.send_bytes(buffer.getvalue())
    sender.close()
    if outcome.error is None:
        dist.destroy_process_group()
