"""Copies in the place of inference tensors."""

from __future__ import annotations

import torch
from torch import nn

from hessian_callback.measurement.inference_tensors import ordinary_tensors


def test_shared_tensors_stay_shared_and_what_the_block_sets_stays() -> None:
    layer = nn.Linear(2, 1)
    with torch.inference_mode():
        mask = torch.ones(2)
    ordinary = torch.ones(2)
    layer.kept = [mask, (mask, ordinary), mask]
    layer.again = {"mask": mask}
    layer.again["layer"] = layer
    tuple_before = layer.kept[1]
    with ordinary_tensors(layer):
        assert layer.kept[0] is layer.again["mask"] is layer.kept[1][0]
        assert not layer.kept[0].is_inference()
        assert layer.kept[1][1] is ordinary
        layer.again["mask"] = ordinary
        layer.kept.pop()
    assert layer.again["mask"] is ordinary
    assert layer.kept[0] is mask
    assert layer.kept[1] is tuple_before
    assert len(layer.kept) == 2
