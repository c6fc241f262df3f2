"""A guest leaves no trace, wherever a step keeps its state and however the visit ends."""

from __future__ import annotations

import copy
import queue
import random
import signal
from collections import defaultdict, deque
from contextlib import nullcontext, suppress
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch import LightningModule
from torch import nn

import hessian_callback.callbacks.state_guard as guard
from hessian_callback.callbacks.state_guard import defer_sigterm, preserve_training_state
from tests.helpers.toy_runs import trainer


class Meter:
    def __init__(self) -> None:
        self.total, self.values = 0.0, [1.0]


class Hoarder(LightningModule):
    """Keeps state in every place that training code was seen to."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Dropout(0.5))
        self.frozen = nn.Linear(2, 2).requires_grad_(False)
        self.register_buffer("count", torch.zeros(3))
        self.kind = torchmetrics.MetricCollection(
            [torchmetrics.Precision("binary"), torchmetrics.Recall("binary"), torchmetrics.AUROC("binary")]
        )
        self.hidden_metric = {"mean": torchmetrics.MeanMetric()}
        self.running = torch.ones(4)
        self.outputs: list[Any] = []
        self.table: dict[str, list[int]] = defaultdict(list)
        self.recent: deque[int] = deque([1, 2, 3], maxlen=3)
        self.seen = {1, 2}
        self.meter = Meter()
        self.array = np.zeros(3)
        self.rng = np.random.default_rng(0)
        self.old_rng = np.random.RandomState(0)
        self.python_rng = random.Random(0)
        self.torch_rng = torch.Generator().manual_seed(0)
        self.tensors = [torch.zeros(2), (torch.zeros(2),)]
        self.calls = 0
        self.net.eval()
        self.net[0].train()

    def disturb(self, which: int) -> None:
        actions = DISTURBANCES
        actions[which % len(actions)](self)


def update_metrics(module: Hoarder) -> None:
    module.kind.update(torch.rand(5), torch.randint(0, 2, (5,)))
    module.hidden_metric["mean"].update(3.0)


DISTURBANCES: list[Any] = [
    lambda m: setattr(m, "calls", m.calls + 1),
    lambda m: m.outputs.append(torch.ones(1)),
    lambda m: m.table["new"].append(1),
    lambda m: m.recent.append(9),
    lambda m: m.seen.add(9),
    lambda m: (setattr(m.meter, "total", 5.0), m.meter.values.append(2.0)),
    lambda m: m.array.__iadd__(1),
    lambda m: m.rng.normal(),
    lambda m: m.old_rng.normal(),
    lambda m: m.python_rng.random(),
    lambda m: torch.rand(2, generator=m.torch_rng),
    lambda m: (random.random(), np.random.rand(), torch.rand(1)),
    lambda m: m.running.add_(1),
    lambda m: setattr(m, "running", torch.zeros(1)),
    lambda m: m.count.add_(1),
    lambda m: setattr(m, "count", m.count + 1),
    lambda m: m.tensors[1][0].fill_(7),
    lambda m: m.net[0].weight.data.mul_(2),
    lambda m: m.net.train(),
    lambda m: (m.train(), torch.enable_grad()(lambda: m.net(torch.randn(4, 3)).sum().backward())()),
    lambda m: m.frozen.requires_grad_(True),
    update_metrics,
    lambda m: m.register_buffer("extra", torch.zeros(1)),
    lambda m: m.add_module("more", nn.Linear(1, 1)),
    lambda m: setattr(m.trainer, "should_stop", True),
    lambda m: m.log("x", 1.0),
    lambda m: torch.set_grad_enabled(False),
]


LOGGING = len(DISTURBANCES) - 2


def picture(module: Hoarder) -> Any:
    """All that can be seen of a module and the process."""
    return (
        describe(vars(module)),
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        module.trainer.should_stop,
        module.trainer.state.stage,
    )


def describe(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        grad = None if not value.is_leaf or value.grad is None else value.grad.tolist()
        return ("tensor", id(value), value.detach().tolist(), value.requires_grad, grad)
    if isinstance(value, torch.Generator):
        return value.get_state().tolist()
    if isinstance(value, np.random.Generator):
        return repr(value.bit_generator.state)
    if isinstance(value, np.random.RandomState):
        return value.get_state()[1].tolist()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, (nn.Module, Meter)):
        return type(value).__name__, {k: describe(v) for k, v in vars(value).items() if k != "_trainer"}
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items() if key != "_trainer"}
    if isinstance(value, (list, tuple, deque)):
        return type(value).__name__, [describe(item) for item in value]
    if isinstance(value, set):
        return sorted(value)
    return value if isinstance(value, (int, float, str, bool, type(None))) else type(value).__name__


@pytest.fixture
def attached(tmp_path: Any) -> Hoarder:
    module = Hoarder()
    run = trainer(tmp_path, logger=True)
    module.trainer = run
    return module


@pytest.mark.parametrize("which", range(len(DISTURBANCES)))
def test_each_kind_of_state_is_restored(which: int, attached: Hoarder) -> None:
    before = picture(attached)
    with preserve_training_state(attached.trainer, attached):
        attached.disturb(which)
    torch.set_grad_enabled(True)
    assert picture(attached) == before


@given(
    st.lists(st.integers(0, len(DISTURBANCES) - 1), max_size=8),
    st.sampled_from([None, ValueError, KeyboardInterrupt, SystemExit, MemoryError]),
    st.lists(st.integers(0, len(DISTURBANCES) - 1), max_size=4),
)
@settings(max_examples=60, deadline=None)
def test_restoration_is_a_property(visit: list[int], error: Any, earlier: list[int]) -> None:
    module = Hoarder()
    module.trainer = SHARED
    torch.set_grad_enabled(True)
    SHARED.should_stop = False
    for which in earlier:
        if which != LOGGING:  # Which Lightning refuses outside of its loops.
            module.disturb(which)
    torch.set_grad_enabled(True)
    before = picture(module)
    expected = nullcontext() if error is None else pytest.raises(error)
    with expected, preserve_training_state(SHARED, module):
        for which in visit:
            module.disturb(which)
        if error is not None:
            raise error
    torch.set_grad_enabled(True)
    assert picture(module) == before


SHARED = trainer(None)


def test_inside(attached: Hoarder) -> None:
    with torch.inference_mode(), preserve_training_state(attached.trainer, attached):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        assert not any(module.training for module in attached.modules())
        attached.log("x", 1.0, on_step=True, on_epoch=True)
        attached.log_dict({"y": torch.ones(1)})
        attached.logger.experiment.add_scalar("z", 1.0)
        assert attached.trainer.training
    assert attached.net[0].training
    assert not attached.net.training


def test_a_large_tensor_is_watched(attached: Hoarder, monkeypatch: Any) -> None:
    monkeypatch.setattr(guard, "_COPIED_BYTES", 8)
    with (
        pytest.raises(RuntimeError, match=r"changed the tensor Hoarder\..* in place.*Pass loss_fn="),
        preserve_training_state(attached.trainer, attached),
        torch.no_grad(),
    ):
        attached.net[0].weight.add_(1)


def test_compute_groups_are_found_out_about_again(attached: Hoarder) -> None:
    groups = copy.deepcopy(attached.kind._groups)
    with preserve_training_state(attached.trainer, attached):
        update_metrics(attached)
    assert attached.kind._groups == groups
    preds, target = torch.rand(20), torch.randint(0, 2, (20,))
    fresh = Hoarder().kind
    attached.kind.update(preds, target)
    fresh.update(preds, target)
    assert {k: float(v) for k, v in attached.kind.compute().items()} == {
        k: float(v) for k, v in fresh.compute().items()
    }


def test_graphs_of_the_users_stay_usable(attached: Hoarder) -> None:
    loss = attached.net[0](torch.ones(1, 3)).square().sum()
    with preserve_training_state(attached.trainer, attached):
        attached.net[0](torch.ones(1, 3)).sum()
    loss.backward()
    assert attached.net[0].weight.grad is not None


def test_machinery_of_others_is_let_alone(attached: Hoarder) -> None:
    attached.queue = queue.Queue()
    with preserve_training_state(attached.trainer, attached):
        attached.queue.put(1)  # As another thread would.
    assert attached.queue.qsize() == 1


def test_very_long_lists_lose_what_was_appended(attached: Hoarder, monkeypatch: Any) -> None:
    monkeypatch.setattr(guard, "_COPIED_ITEMS", 10)
    attached.outputs.extend(range(50))
    with preserve_training_state(attached.trainer, attached):
        attached.outputs.append(0)
    assert attached.outputs == list(range(50))


def test_sigterm_is_handed_on_afterwards() -> None:
    events: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: events.append("handled"))
    try:
        with defer_sigterm():
            signal.raise_signal(signal.SIGTERM)
            events.append("went on")
        assert events == ["went on", "handled"]
        with suppress(ValueError), defer_sigterm():
            signal.raise_signal(signal.SIGTERM)
            raise ValueError
        assert events == ["went on", "handled", "handled"]
    finally:
        signal.signal(signal.SIGTERM, before)
