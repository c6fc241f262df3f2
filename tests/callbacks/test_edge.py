"""The monitor of stability in training runs: right numbers, everywhere logged, and training untouched."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hessian_callback import EdgeOfStabilityMonitor
from hessian_callback.measurement.preconditioners import UnsupportedOptimizerError
from tests.helpers.lightning import (
    Callback,
    CSVLogger,
    LightningModule,
    MisconfigurationException,
    ModelCheckpoint,
    TensorBoardLogger,
)
from tests.helpers.toy_runs import Net, loader, measure, seeded, trainer

KEYS = {
    "ratio",
    "ratio_error",
    "sharpness",
    "sharpness_error",
    "preconditioned_sharpness",
    "max_lr",
    "loss",
    "num_hvps",
    "seconds",
}


def monitor(**options: Any) -> EdgeOfStabilityMonitor:
    defaults: dict[str, Any] = {
        "every_n_train_steps": 3,
        "max_overhead": None,
        "num_samples": 32,
        "figures": False,
        "verbose": False,
        "on_error": "raise",
    }
    return EdgeOfStabilityMonitor(**{**defaults, **options})


class AdamNet(Net):
    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, weight_decay=0.1)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=12)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Line(LightningModule):
    """Linear regression, whose Hessian is the same everywhere."""

    def __init__(self, optimizer: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1, bias=False).double()
        self.make = optimizer

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return 0.5 * (self.layer(batch[0]) - batch[1]).square().mean()

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


def regression() -> tuple[DataLoader, float]:
    """Batches, and the largest eigenvalue of the Hessian."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(24, 4, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.5, 0.1])
    y = torch.randn(24, 1, generator=generator, dtype=torch.float64)
    return DataLoader(TensorDataset(x, y), batch_size=8), float(torch.linalg.eigvalsh(x.T @ x / 24)[-1])


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[str, Any]:
    """One run with the monitor, loggers and pictures, and the same run without it."""
    found: dict[str, Any] = {"folder": tmp_path_factory.mktemp("edge")}
    for name in ("with", "without"):
        callback = monitor(figures=True)
        loggers = [TensorBoardLogger(found["folder"], "board"), CSVLogger(found["folder"], "table")]
        checkpoint = ModelCheckpoint(found["folder"] / "checkpoints", every_n_train_steps=6, save_top_k=-1)
        run = trainer(
            found["folder"],
            *([callback, checkpoint] if name == "with" else []),
            logger=loggers if name == "with" else False,
            enable_checkpointing=name == "with",
            max_epochs=2,
        )
        model = seeded(AdamNet)
        run.fit(model, loader(num=48, shuffle=True), loader(num=16, seed=1))
        found[name] = (model, torch.get_rng_state(), run, callback)
    return found


def test_training_is_the_same_bit_for_bit(runs: Any) -> None:
    (ours, our_random, our_run, _), (theirs, their_random, their_run, _) = runs["with"], runs["without"]
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value), key
    assert torch.equal(our_random, their_random)
    assert ours.losses == theirs.losses
    assert ours.calls == theirs.calls
    one, other = (run.optimizers[0].state_dict()["state"] for run in (our_run, their_run))
    for number, state in other.items():
        for key, value in state.items():
            assert torch.equal(one[number][key], value), key


def test_an_adaptive_optimizer_is_measured_from_its_first_due_step(runs: Any) -> None:
    history = runs["with"][3].history
    assert [(m.when, m.step) for m in history] == [("step", 3), ("step", 6), ("step", 9), ("step", 12)]
    assert all(m.ratio > 0 and m.ratio_error <= 0.05 * m.ratio for m in history)
    # The rate of the next step.
    assert [m.lr for m in history] == pytest.approx([0.01 * (1 - 0.9 * step / 12) for step in (3, 6, 9, 12)])
    assert [m.max_lr for m in history] == pytest.approx([m.lr / m.ratio for m in history])


def test_every_logger_has_every_value(runs: Any) -> None:
    history = runs["with"][3].history
    board = EventAccumulator(str(runs["folder"] / "board" / "version_0"), size_guidance={"images": 0})
    board.Reload()
    with (runs["folder"] / "table" / "version_0" / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row.get("edge/ratio")]
    for name in KEYS:
        logged = [(event.step, event.value) for event in board.Scalars(f"edge/{name}")]
        assert [step for step, _ in logged] == [3, 6, 9, 12]
        expected = [getattr(m, name) for m in history]
        assert [value for _, value in logged] == pytest.approx(expected, rel=1e-6)
        assert [float(row[f"edge/{name}"]) for row in rows] == pytest.approx(expected, rel=1e-6)
    assert [event.step for event in board.Images("edge/stability")] == [12]
    metrics = runs["with"][2].callback_metrics
    assert {f"edge/{name}" for name in KEYS} <= metrics.keys()
    assert float(metrics["edge/ratio"]) == history[-1].ratio


def test_a_resumed_run_continues_the_history(runs: Any, tmp_path: Path) -> None:
    checkpoint = next(path for path in (runs["folder"] / "checkpoints").glob("*.ckpt") if "step=6" in path.name)
    resumed = monitor()
    trainer(tmp_path, resumed, max_epochs=2).fit(
        seeded(AdamNet, seed=5), loader(num=48, shuffle=True), loader(num=16, seed=1), ckpt_path=checkpoint
    )
    whole = runs["with"][3].history
    assert resumed.history[:2] == whole[:2]
    assert [m.step for m in resumed.history] == [3, 6, 9, 12]


# -- numbers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "threshold"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.2), 10.0),
        (lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.5), 15.0),
    ],
)
def test_the_ratio_of_a_quadratic_loss_is_known(optimizer: Any, threshold: float, tmp_path: Path) -> None:
    batches, sharpness = regression()
    callback = monitor(rtol=1e-6)
    trainer(tmp_path, callback, max_epochs=1).fit(Line(optimizer), batches)
    assert [(m.when, m.step) for m in callback.history] == [("fit_start", 0), ("step", 3)]
    for m in callback.history:
        assert m.ratio == pytest.approx(sharpness / threshold, rel=1e-5)
        assert m.sharpness == pytest.approx(sharpness, rel=1e-5)
        assert m.max_lr == pytest.approx(0.2 * threshold / sharpness, rel=1e-5)


def test_an_own_preconditioner_is_used(tmp_path: Path) -> None:
    batches, sharpness = regression()

    def halved(group: Any, state: Any, parameter: Any) -> Any:
        return (0.5, 2 / group["lr"]) if state else None

    callback = monitor(rtol=1e-6, preconditioner=halved)
    trainer(tmp_path, callback, max_epochs=1).fit(Line(lambda p: torch.optim.Rprop(p, lr=0.2)), batches)
    assert [m.step for m in callback.history] == [3]
    assert callback.history[0].ratio == pytest.approx(0.2 * sharpness, rel=1e-5)


def test_a_limited_share_of_time_leaves_measurements_out(tmp_path: Path) -> None:
    callback = monitor(every_n_train_steps=1, max_overhead=1e-6)
    run = trainer(tmp_path, callback, max_epochs=2)
    run.fit(seeded(AdamNet), loader(num=48), loader(num=16, seed=1))
    assert [(m.when, m.step) for m in callback.history] == [("step", 1), ("fit_end", 12)]
    assert 0 < float(run.callback_metrics["edge/overhead"]) <= 1


def test_a_rise_above_the_edge_is_printed_once(tmp_path: Path, capsys: Any) -> None:
    batches, sharpness = regression()
    callback = monitor(every_n_train_steps=1, verbose=True)
    trainer(tmp_path, callback, max_epochs=1).fit(Line(lambda p: torch.optim.SGD(p, lr=2.2 / sharpness)), batches)
    assert [m.ratio for m in callback.history] == pytest.approx([1.1] * 4, rel=0.06)
    assert capsys.readouterr().out.count("edge: above the edge of stability. epoch 0, step 0: 1.") == 1


# -- failures ---------------------------------------------------------------------------------------------


def test_a_failed_measurement_is_noted_and_training_goes_on(tmp_path: Path) -> None:
    def loss(module: Any, batch: Any) -> torch.Tensor:
        factor = float("nan") if module.trainer.global_step == 3 else 1.0
        return factor * nn.functional.cross_entropy(module(batch[0]), batch[1])

    callback = monitor(loss_fn=loss, on_error="warn")
    run = trainer(tmp_path, callback, max_epochs=1)
    with pytest.warns(UserWarning, match="the edge of stability could not be measured"):
        run.fit(seeded(AdamNet), loader(num=48), loader(num=16, seed=1))
    assert [m.ratio is None for m in callback.history] == [True, False]
    assert run.global_step == 6


class Unfreezes(Callback):
    """Lets more layers train in the second epoch, and puts other weights in when training ends."""

    def on_train_start(self, run: Any, module: Any) -> None:
        self.count = 0
        self.set(module, trained=False)

    def on_train_epoch_start(self, run: Any, module: Any) -> None:
        self.set(module, trained=run.current_epoch > 0)

    def set(self, module: Any, *, trained: bool) -> None:
        next(module.parameters()).requires_grad_(trained)

    def on_train_end(self, run: Any, module: Any) -> None:
        self.trained = [parameter.detach().clone() for parameter in module.parameters()]
        for parameter in module.parameters():
            parameter.data.zero_()


def test_layers_that_are_unfrozen_start_anew_and_the_trained_weights_are_measured(tmp_path: Path) -> None:
    last, module = monitor(num_samples=40), seeded(Net)
    other = Unfreezes()
    trainer(tmp_path, other, last, max_epochs=2).fit(module, loader(num=40), loader())
    assert [entry.reason for entry in last.history] == [None] * len(last.history)
    assert len({entry.loss for entry in last.history}) == len(last.history) > 3
    for parameter, value in zip(module.parameters(), other.trained, strict=True):
        parameter.data.copy_(value)
    module.eval()
    losses = [float(nn.functional.cross_entropy(module(x), y)) * len(x) for x, y in loader(num=40)]
    assert last.history[-1].when == "fit_end"
    assert last.history[-1].loss == pytest.approx(sum(losses) / 40, rel=1e-5)


class TwoOptimizers(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(nn.functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        first, last = self.net[0], self.net[-1]
        return [torch.optim.Adam(first.parameters(), lr=0.01), torch.optim.SGD(last.parameters(), lr=0.1)]


def cross_entropy(module: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


def test_each_of_several_optimizers_has_a_monitor(tmp_path: Path) -> None:
    monitors = [monitor(optimizer=n, prefix=f"edge/{n}", loss_fn=cross_entropy, every_n_train_steps=4) for n in (0, 1)]
    trainer(tmp_path, *monitors, max_epochs=1).fit(seeded(TwoOptimizers), loader(num=16))
    assert [m.step for m in monitors[0].history] == [4]
    assert [m.step for m in monitors[1].history] == [0, 4]
    assert monitors[0].history[0].lr == 0.01
    assert monitors[1].history[0].lr == 0.1


def test_one_of_several_optimizers_must_be_chosen(tmp_path: Path) -> None:
    run = trainer(tmp_path, monitor(loss_fn=cross_entropy), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="the run has 2 optimizers; choose one"):
        run.fit(seeded(TwoOptimizers), loader(num=16))


def test_an_unknown_optimizer_is_refused_before_training(tmp_path: Path) -> None:
    batches, _ = regression()
    run = trainer(tmp_path, monitor(on_error="warn"), max_epochs=1)
    with pytest.raises(UnsupportedOptimizerError, match="the stability of LBFGS is not known"):
        run.fit(Line(torch.optim.LBFGS), batches)
    assert run.global_step == 0


def test_two_callbacks_need_two_prefixes(tmp_path: Path) -> None:
    run = trainer(tmp_path, monitor(), measure(prefix="edge"), max_epochs=1)
    with pytest.raises(MisconfigurationException, match="give one of them another prefix"):
        run.fit(seeded(), loader(num=16))


def test_a_damaged_checkpoint_is_refused() -> None:
    state = monitor().state_dict()
    with pytest.raises(ValueError, match="resume with another prefix"):
        monitor().load_state_dict({**state, "edge": [{"epoch": "one"}]})


@pytest.mark.parametrize(
    "options",
    [{"every_n_train_steps": 0}, {"rtol": 0.0}, {"optimizer": -1}, {"preconditioner": 1.0}, {"prefix": "../edge"}],
)
def test_options_out_of_range_are_refused(options: Any) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        EdgeOfStabilityMonitor(**options)
