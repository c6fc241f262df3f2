"""Stopping on two ranks: one decision."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import torch


def test_two_ranks_stop_at_the_same_measurement(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "MASTER_PORT", "WORLD_SIZE")}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.stopping_runs", str(tmp_path)],
        cwd=Path(__file__).parents[1],
        env={**environment, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=200)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert process.returncode == 0, output[-4000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one == other
    assert one["message"] is not None
    assert one["epoch"] < 19
    assert one["epoch"] % 2 == 0
    # Said once.
    assert output.count("PowerLawEarlyStopping stops the training") == 1
