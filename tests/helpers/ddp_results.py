"""What ranks of `tests.helpers.ddp_runs` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from hessian_callback.measurement.measurement import Measurement


def results(out: Path, name: str, world_size: int = 2) -> list[dict[str, Any]]:
    files = [out / f"{name}-{rank}.pt" for rank in range(world_size)]
    assert all(file.exists() for file in files), (out / "output").read_text()[-4000:]
    loaded = [torch.load(file, weights_only=True) for file in files]
    for result in loaded:
        result["history"] = [Measurement.from_state(state) for state in result["history"]]
    return loaded
