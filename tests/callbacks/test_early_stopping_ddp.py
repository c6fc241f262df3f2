"""Stopping on two ranks: one decision."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.helpers.launched import launch_ranks


def test_two_ranks_stop_at_the_same_measurement(tmp_path: Path) -> None:
    process = launch_ranks(2, "tests.helpers.stopping_runs", tmp_path)
    output = process.finish()
    assert process.returncode == 0, output[-4000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one == other
    assert one["message"] is not None
    assert one["epoch"] < 19
    assert one["epoch"] % 2 == 0
    # Said once.
    assert output.count("PowerLawEarlyStopping stops the training") == 1
