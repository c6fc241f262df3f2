"""What a run leaves behind, and whether two of those are the same bit for bit."""

from __future__ import annotations

import copy
import random
from typing import Any

import numpy as np
import torch


def observable(run: Any, model: Any) -> dict[str, Any]:
    return {
        "weights and buffers": copy.deepcopy(model.state_dict()),
        "optimizer": copy.deepcopy(run.optimizers[0].state_dict()),
        "gradients": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "modes": [module.training for module in model.modules()],
        "generators": (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()),
        "logged": {k: v for k, v in run.callback_metrics.items() if not k.startswith("hessian/")},
        "losses": list(model.losses),
        "calls": model.calls,
        "grad mode": torch.is_grad_enabled(),
        "attributes": sorted(vars(model)),
    }


def same(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
