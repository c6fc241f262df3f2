"""The state guard of a training run: state of the module, of the trainer, and signals."""

from __future__ import annotations

import copy
import os
import queue
import random
import shutil
import signal
import threading
from collections import Counter, defaultdict, deque
from contextlib import nullcontext, suppress
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torchmetrics
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from hessian_callback.callbacks.state_guard import (
    defer_saving_signals,
    defer_sigterm,
    preserve_training_state,
)
from hessian_callback.measurement import state_guard
from hessian_callback.measurement.state_records import UnrestorableStateError
from tests.helpers.lightning import (
    PACKAGE,
    Callback,
    CSVLogger,
    LightningDataModule,
    LightningModule,
    Logger,
    SLURMEnvironment,
    TensorBoardLogger,
)
from tests.helpers.toy_runs import Net, loader, measure, seeded, trainer


class Meter:
    def __init__(self) -> None:
        self.total, self.values = 0.0, [1.0]


class Hoarder(LightningModule):
    """Keeps state in every place in which training code was seen to keep it."""

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
    """Everything observable of a module and the process."""
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


def test_inside_the_block(attached: Hoarder) -> None:
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
    monkeypatch.setattr(state_guard, "_COPIED_BYTES", 8)
    with (
        pytest.raises(RuntimeError, match=r"changed the tensor Hoarder\..* in place.*Pass loss_fn="),
        preserve_training_state(attached.trainer, attached),
        torch.no_grad(),
    ):
        attached.net[0].weight.add_(1)


def test_compute_groups_of_metrics_are_restored(attached: Hoarder) -> None:
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


def test_graphs_of_the_user_stay_usable(attached: Hoarder) -> None:
    loss = attached.net[0](torch.ones(1, 3)).square().sum()
    with preserve_training_state(attached.trainer, attached):
        attached.net[0](torch.ones(1, 3)).sum()
    loss.backward()
    assert attached.net[0].weight.grad is not None


def test_a_queue_that_another_thread_fills_is_left_alone(attached: Hoarder) -> None:
    attached.queue = queue.Queue()
    with preserve_training_state(attached.trainer, attached):
        thread = threading.Thread(target=lambda: attached.queue.put(1))
        thread.start()
        thread.join()
    assert attached.queue.qsize() == 1


def test_sigterm_is_handled_after_the_block() -> None:
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


# -- the trainer -------------------------------------------------------------------------------------


class Folders(Net):
    """Writes a file beside the logs, as many steps do with their first batch."""

    names = ("save_dir", "log_dir", "name", "version")

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        logger = self.logger
        found = [self.trainer.log_dir, *(getattr(logger, name, None) for name in self.names)]
        with open("folders", "a") as file:
            print(*found, isinstance(logger, (CSVLogger, TensorBoardLogger)), file=file)
        logger.log_metrics({"from the step": 1.0}, step=self.trainer.global_step)
        os.makedirs(os.path.join(self.trainer.log_dir, "images"), exist_ok=True)
        return super().training_step(batch, batch_idx)


class Elsewhere(Logger):
    """A logger that is none of Lightning's."""

    name, version, experiment = "other", 7, None

    def __init__(self, folder: Any) -> None:
        super().__init__()
        self.folder = str(folder / "elsewhere")
        self.written: list[dict[str, float]] = []

    @property
    def save_dir(self) -> str:
        return self.folder

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        pass

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.written.append(dict(metrics))


@pytest.mark.parametrize("make", [CSVLogger, TensorBoardLogger, Elsewhere])
def test_a_step_finds_the_folders_of_its_logger_and_logs_nothing(make: Any, tmp_path: Any, monkeypatch: Any) -> None:
    found = {}
    for name in ("without", "with"):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "folders").write_text("")
        logger = make(tmp_path / "same")
        callbacks = [measure(on_error="raise")] if name == "with" else []
        trainer(tmp_path, *callbacks, max_epochs=1, logger=logger).fit(seeded(Folders), loader(), loader(seed=1))
        found[name] = set((tmp_path / "folders").read_text().splitlines())
        if isinstance(logger, Elsewhere):
            assert sum("from the step" in row for row in logger.written) == 6
        shutil.rmtree(tmp_path / "same")
    assert len(found["without"]) == 1
    assert found["with"] == found["without"]


class Renames(Net):
    """Calls `log` by other names than ``self.log``."""

    def __init__(self) -> None:
        super().__init__()
        self.log_epoch = partial(self.log, on_epoch=True)
        self.log_it = self.log

    def log(self, *values: Any, **options: Any) -> None:
        super().log(*values, **options)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)["loss"]
        self.log_epoch("by partial", loss)
        self.log_it("by method", loss, on_step=True)
        super().log("by super", loss, on_step=True, on_epoch=True)
        # What was logged before is read as in training.
        return loss * (1 + 0.1 * self.trainer.callback_metrics.get("by super_step", 0.0))


def test_log_by_another_name_logs_nothing(tmp_path: Any) -> None:
    metrics = []
    for callbacks in ([], [measure(on_error="raise"), measure(prefix="steps", every_n_train_steps=2)]):
        run = trainer(tmp_path, *callbacks, max_epochs=2)
        run.fit(seeded(Renames), loader(), loader(seed=1))
        own = {name: value for name, value in run.callback_metrics.items() if not name.startswith(("hessian", "steps"))}
        metrics.append(own)
    assert {"by partial", "by method", "by super_step", "by super_epoch"} <= metrics[0].keys()
    assert metrics[0] == metrics[1]


class Data(LightningDataModule):
    def __init__(self) -> None:
        super().__init__()
        self.seen, self.scores, self.history = 0, torch.ones(48), []

    def train_dataloader(self) -> Any:
        return loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(seed=1)


class Reaching(Net):
    """Changes in its step what can be reached through the trainer."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.tau = 1.0
        self.own_optimizer = torch.optim.Adam([nn.Parameter(torch.ones(2))])
        self.change = change

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        CHANGES[self.change](self)
        return super().training_step(batch, batch_idx)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)]

    def picture(self, run: Any) -> Any:
        """Return everything that a change touches, without tensors, which have no truth value."""
        plain = {"lr": [group["lr"] for group in run.optimizers[0].param_groups]}
        plain["schedulers"] = [
            {k: v for k, v in config.scheduler.state_dict().items() if k != "_last_lr"}
            for config in run.lr_scheduler_configs
        ]
        plain["data"] = (run.datamodule.seen, list(run.datamodule.history), run.datamodule.scores.tolist())
        plain["hparams"] = dict(self.hparams)
        plain["hung"] = (list(run.notes), vars(run).get("last"), dict(run.counts))
        plain["settings"] = (run.accumulate_grad_batches, run.gradient_clip_val, run.fit_loop.max_epochs)
        plain["own"] = (
            [group["lr"] for group in self.own_optimizer.param_groups],
            [(k, float(v["step"])) for k, v in self.own_optimizer.state_dict()["state"].items()],
            self.own_optimizer.param_groups[0]["params"][0].tolist(),
        )
        plain["state"] = [
            {k: v.tolist() for k, v in entry.items()} for entry in run.optimizers[0].state_dict()["state"].values()
        ]
        return plain


def step_own(module: Any) -> None:
    module.own_optimizer.param_groups[0]["params"][0].grad = torch.ones(2)
    module.own_optimizer.step()


CHANGES: dict[str, Any] = {
    "lr": lambda m: [group.update(lr=0.9 * group["lr"]) for group in m.optimizers().param_groups],
    "scheduler": lambda m: m.lr_schedulers().step(),
    "data module": lambda m: setattr(m.trainer.datamodule, "seen", m.trainer.datamodule.seen + 1),
    "data module's list": lambda m: m.trainer.datamodule.history.append(1),
    "data module's tensor": lambda m: m.trainer.datamodule.scores.mul_(0.5),
    "hparams": lambda m: m.hparams.update(tau=m.hparams.tau * 2, new=1),
    "accumulation": lambda m: setattr(m.trainer, "accumulate_grad_batches", m.trainer.accumulate_grad_batches + 1),
    "clipping": lambda m: setattr(m.trainer, "gradient_clip_val", 1.0 + (m.trainer.gradient_clip_val or 0.0)),
    "epochs": lambda m: setattr(m.trainer.fit_loop, "max_epochs", m.trainer.fit_loop.max_epochs + 1),
    "list hung on the trainer": lambda m: m.trainer.notes.append(1),
    "counter hung on the trainer": lambda m: m.trainer.counts.update("a"),
    "attribute hung on the trainer": lambda m: setattr(m.trainer, "last", vars(m.trainer).get("last", 0) + 1),
    "list exchanged": lambda m: setattr(m.trainer, "notes", [*m.trainer.notes, 1]),
    "own optimizer": step_own,
    "another group": lambda m: m.own_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))]}),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*")
def test_changes_through_the_trainer_are_restored(change: str, tmp_path: Any) -> None:
    pictures: list[Any] = []

    class Look(Callback):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx not in (0, 3):  # Once without a state of the optimizers, and once with it.
                return
            before = module.picture(run)
            with preserve_training_state(run, module):
                module.training_step(batch, batch_idx)
                pictures.append(module.picture(run) != before)
            assert module.picture(run) == before
            pictures.append(True)

    run = trainer(tmp_path, Look(), max_epochs=9, max_steps=6)
    run.notes, run.counts = [], Counter()
    run.fit(seeded(Reaching, change=change), datamodule=Data())
    assert pictures == [True] * 4


def test_a_step_of_a_large_optimizer_is_refused(tmp_path: Any) -> None:
    """Its state is as large as the model, so it is not copied; to say nothing would change training."""

    class Large(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)["loss"]
            self.manual_backward(loss)
            self.optimizers().step()

    class Look(Callback):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 3:
                with preserve_training_state(run, module):
                    module.training_step(batch, batch_idx)

    model = seeded(Large, width=4000)
    model.automatic_optimization = False
    run = trainer(tmp_path, Look(), max_epochs=1)
    with pytest.raises(UnrestorableStateError, match=r"trainer\.optimizers\[0\]\.state.*in place"):
        run.fit(model, loader(), loader(seed=1))


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
def test_modules_of_both_packages_do_not_log(package: str, tmp_path: Any) -> None:
    pl = pytest.importorskip(package)
    events: list[str] = []

    class Logging(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 3)

        def log(self, name: str, *_: Any, **__: Any) -> None:
            events.append(name)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            self.log("loss", 1.0)
            return nn.functional.cross_entropy(self.layer(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 0.1)

    class Look(pl.Callback):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            with preserve_training_state(run, module):
                module.training_step(batch, batch_idx)
                assert run.logger is None or type(run.logger).__name__ == "DummyLogger"

    options = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    run = pl.Trainer(max_steps=3, logger=False, callbacks=[Look()], default_root_dir=tmp_path, **options)
    run.fit(Logging(), loader())
    assert events == ["loss"] * 3


# -- signals that save at once -----------------------------------------------------------------------


@pytest.mark.parametrize("hvp", ["finite_difference", "double_backward"])
@pytest.mark.filterwarnings("ignore:a measurement of the Hessian took")
def test_slurm_requeues_with_the_weights_of_training(hvp: str, tmp_path: Any, monkeypatch: Any) -> None:
    """Lightning's handler of SLURM's signal saves wherever it interrupts, also between two perturbed gradients."""
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setattr(f"{PACKAGE}.trainer.connectors.signal_connector.call", lambda command: 0)
    calls = iter(range(10**6))
    weights: dict[str, torch.Tensor] = {}

    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        call = next(calls)
        if call == 0:
            weights.update({name: value.clone() for name, value in module.state_dict().items()})
        if call == 14:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR2)
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    saved: list[Any] = []
    before = signal.signal(
        signal.SIGUSR2, lambda *_: saved.append({k: v.clone() for k, v in model.state_dict().items()})
    )
    model = seeded()
    run = trainer(
        tmp_path, measure(loss_fn=loss_fn, hvp=hvp, memory_budget=0), max_epochs=1, plugins=[SLURMEnvironment()]
    )
    try:
        run.fit(model, loader(), loader(seed=1))
    finally:
        signal.signal(signal.SIGUSR2, before)
    checkpoint = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)
    for states in (checkpoint["state_dict"], saved[0]):
        assert all(torch.equal(states[name], value) for name, value in weights.items())


def test_sigterm_is_deferred_on_one_rank_only_if_its_handler_may_save(tmp_path: Any) -> None:
    events: list[str] = []

    class Look(Callback):
        def on_train_start(self, run: Any, module: Any) -> None:
            with defer_saving_signals(run) as arrived:
                os.kill(os.getpid(), signal.SIGTERM)
                events.append(f"received: {run.received_sigterm}, deferred: {len(arrived)}")

    def fit() -> None:
        with pytest.raises(SystemExit):
            trainer(tmp_path, Look(), max_epochs=1).fit(seeded(), loader(), loader(seed=1))

    fit()
    assert events == ["received: True, deferred: 0"]
    before = signal.signal(signal.SIGTERM, lambda *_: events.append("saved"))
    try:
        fit()
    finally:
        signal.signal(signal.SIGTERM, before)
    assert events[1:] == ["received: False, deferred: 1", "saved"]
