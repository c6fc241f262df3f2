"""The monitor of stability on two ranks: the same numbers on both, and training untouched."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.launched import launch_ranks


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: Any) -> dict[str, list[dict[str, Any]]]:
    out = tmp_path_factory.mktemp("edge")
    output = launch_ranks(2, "tests.helpers.edge_ranks", out).finish()
    files = {name: [out / f"{name}-{rank}.pt" for rank in (0, 1)] for name in ("with", "without")}
    assert all(file.exists() for pair in files.values() for file in pair), output[-4000:]
    return {name: [torch.load(file, weights_only=True) for file in pair] for name, pair in files.items()}


def test_ranks_agree_and_training_is_the_same_bit_for_bit(ranks: Any) -> None:
    one, other = ranks["with"]
    assert [entry["step"] for entry in one["history"]] == [2, 3]
    assert one["history"] == other["history"]
    assert {k: v for k, v in one["metrics"].items() if k.startswith("edge/")} == {
        k: v for k, v in other["metrics"].items() if k.startswith("edge/")
    }
    for monitored, plain in zip(ranks["with"], ranks["without"], strict=True):
        for key, value in plain["weights"].items():
            assert torch.equal(monitored["weights"][key], value), key
