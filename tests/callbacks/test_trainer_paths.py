"""Every way of Lightning's loops past the callback: where it measures, who sees the value, what is left behind."""

from __future__ import annotations

import copy
import csv
import datetime
import inspect
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hessian_callback.callbacks.edge import EdgeOfStabilityMonitor
from hessian_callback.measurement.errors import LossError
from tests.helpers.lightning import (
    Callback,
    CSVLogger,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    TensorBoardLogger,
    Trainer,
    Tuner,
)
from tests.helpers.observed import observable, same
from tests.helpers.toy_runs import NUM_EIGENVALUES, Net, loader, measure, seeded, trainer


class Stopper(EarlyStopping):
    """Notes at each check which value it saw and which one was measured last."""

    def __init__(self, measured: Any, **options: Any) -> None:
        super().__init__(monitor="hessian/slope", patience=1000, **options)
        self._measured = measured
        self.seen: list[tuple[float, float]] = []

    def _run_early_stopping_check(self, trainer: Any) -> None:
        if self.monitor in trainer.callback_metrics:
            last = next(m.slope for m in reversed(self._measured.history) if m.when == "epoch")
            self.seen.append((float(trainer.callback_metrics[self.monitor]), last))
        super()._run_early_stopping_check(trainer)


pytestmark = pytest.mark.filterwarnings("ignore:a measurement of the Hessian took")

# Trainer options, the epochs that are measured of four, checks that EarlyStopping makes.
PATHS = {
    "plain": ({}, [0, 1, 2, 3], 4),
    "sanity check": ({"num_sanity_val_steps": 2}, [0, 1, 2, 3], 4),
    "no validation": ({"limit_val_batches": 0}, [0, 1, 2, 3], 4),
    "check_val_every_n_epoch=2": ({"check_val_every_n_epoch": 2}, [0, 1, 2, 3], 2),
    "val_check_interval=.5": ({"val_check_interval": 0.5}, [0, 0, 1, 1, 2, 2, 3, 3], 8),
}


@pytest.mark.parametrize("stopper_first", [True, False], ids=["stopper first", "callback first"])
@pytest.mark.parametrize("path", PATHS)
def test_all_who_monitor_see_the_slope_of_the_same_epoch(path: str, stopper_first: bool, tmp_path: Any) -> None:
    options, epochs, num_checks = PATHS[path]
    callback = measure()
    stopper = Stopper(callback)
    checkpoint = ModelCheckpoint(tmp_path, monitor="hessian/slope", save_top_k=-1, filename="{epoch}-{step}")
    callbacks = [stopper, callback, checkpoint] if stopper_first else [callback, stopper, checkpoint]
    model = seeded(monitor="hessian/slope", strict=False)
    run = trainer(tmp_path, *callbacks, max_epochs=4, enable_checkpointing=True, **options)
    run.fit(model, loader(shuffle=True), loader(seed=1))

    assert [m.when for m in callback.history] == ["fit_start"] + ["epoch"] * len(epochs)
    assert [m.epoch for m in callback.history[1:]] == epochs
    assert all(m.logged for m in callback.history[1:])
    assert len(stopper.seen) == num_checks
    assert all(seen == measured for seen, measured in stopper.seen)
    # An epoch without validation is measured, and not seen by callbacks that look after validation.
    slopes = {m.slope for m in callback.history[1:] if path != "check_val_every_n_epoch=2" or m.epoch in (1, 3)}
    assert {measured for _, measured in stopper.seen} == slopes
    assert {float(score) for score in checkpoint.best_k_models.values()} == slopes
    assert model.scheduler.seen[-1] == pytest.approx(callback.history[-1].slope)
    if path != "check_val_every_n_epoch=2":
        last_of_epoch = {m.epoch: m.slope for m in callback.history[1:]}
        assert model.scheduler.seen == pytest.approx(list(last_of_epoch.values()))


class Reader(Callback):
    """Reads the logged slope after each validation, as pruners of tuning libraries do."""

    def __init__(self, measured: Any, key: str = "hessian/slope", value: str = "slope") -> None:
        self.seen: list[tuple[float, float]] = []
        self._measured, self._key, self._value = measured, key, value

    def on_validation_end(self, run: Any, module: Any) -> None:
        if not run.sanity_checking:
            last = getattr(self._measured.history[-1], self._value)
            self.seen.append((float(run.callback_metrics[self._key]), last))


WITHIN = {"val_check_interval": datetime.timedelta(microseconds=1)}
# Callbacks that look after validation, and the trainer's options.
READERS: dict[str, tuple[Callable[[Any, Any], Callback], dict[str, Any]]] = {
    "EarlyStopping": (lambda source, path: Stopper(source, check_on_train_epoch_end=False), {}),
    "ModelCheckpoint": (
        lambda source, path: ModelCheckpoint(
            path, monitor="hessian/slope", save_top_k=-1, save_on_train_epoch_end=False
        ),
        {"enable_checkpointing": True},
    ),
    "another hook": (lambda source, path: Reader(source), {"num_sanity_val_steps": 2}),
    "hook of an instance": (
        lambda source, path: LambdaCallback(on_validation_end=Reader(source).on_validation_end),
        {},
    ),
    "intervals of time": (lambda source, path: Reader(source), WITHIN),
    "intervals of time, told": (lambda source, path: Stopper(source, check_on_train_epoch_end=False), WITHIN),
}


@pytest.mark.parametrize("case", READERS)
def test_a_reader_after_validation_sees_the_slope_of_the_same_epoch(case: str, tmp_path: Any) -> None:
    make, options = READERS[case]
    intervals = inspect.signature(Trainer.__init__).parameters["val_check_interval"].annotation
    if options is WITHIN and "timedelta" not in str(intervals):
        pytest.skip("this version of Lightning has no intervals of time")
    callback = measure()
    reader = make(callback, tmp_path)
    logger = CSVLogger(tmp_path)
    # Neither may a callback that looks after the training epoch see an old value.
    later = Stopper(callback, mode="max", check_on_train_epoch_end=True)
    run = trainer(tmp_path, reader, callback, later, max_epochs=3, logger=logger, **options)
    run.fit(seeded(), loader(shuffle=True), loader(seed=1))

    measured = [m for m in callback.history if m.when == "epoch"]
    assert {m.epoch for m in measured} == {0, 1, 2}
    assert len(measured) == (18 if options is WITHIN else 3)
    assert len(later.seen) == 3
    assert all(seen == last for seen, last in later.seen)
    if isinstance(reader, ModelCheckpoint):
        assert {float(score) for score in reader.best_k_models.values()} == {m.slope for m in measured}
    else:
        looked = reader if hasattr(reader, "seen") else reader.on_validation_end.__self__
        assert looked.seen == [(m.slope, m.slope) for m in measured]
    # The training loss is that of the same epoch as well.
    in_epochs = dict(written(logger, "train_loss_epoch"))
    last_of_epoch = {m.epoch: m.train_loss for m in measured}
    assert list(last_of_epoch.values()) == pytest.approx(list(in_epochs.values()), rel=1e-6)


@pytest.mark.parametrize("prefix", ["hessian", "edge"])
def test_a_measurement_of_a_step_is_seen_after_the_next_validation(prefix: str, tmp_path: Any) -> None:
    options = {"every_n_train_steps": 2, "num_samples": 32, "figures": False, "verbose": False}
    value = {"hessian": "slope", "edge": "ratio"}[prefix]
    source: Any = measure(**options) if prefix == "hessian" else EdgeOfStabilityMonitor(max_overhead=None, **options)
    reader = Reader(source, f"{prefix}/{value}", value)
    stopper = EarlyStopping(f"{prefix}/{value}", patience=100, check_on_train_epoch_end=False)
    trainer(tmp_path, reader, stopper, source).fit(seeded(), loader(shuffle=True), loader(seed=1))
    assert len(reader.seen) == 2
    assert [seen for seen, _ in reader.seen] == pytest.approx([last for _, last in reader.seen], rel=1e-6)


def test_the_start_is_in_history_and_logger_but_not_monitored(tmp_path: Any) -> None:
    seen = {}

    class Look(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            seen.setdefault("metrics", dict(trainer.callback_metrics))

    callback = measure()
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, callback, Look(), max_epochs=1, logger=logger)
    run.fit(seeded(), loader(), loader(seed=1))
    assert "train_loss" in seen["metrics"]
    assert not [key for key in seen["metrics"] if key.startswith("hessian/")]
    rows = written(logger, "hessian/slope")
    assert [step for step, _ in rows] == [0, 5]
    assert [value for _, value in rows] == pytest.approx([m.slope for m in callback.history])


def written(logger: CSVLogger, key: str) -> list[tuple[int, float]]:
    with open(Path(logger.log_dir) / "metrics.csv") as file:
        return [(int(row["step"]), float(row[key])) for row in csv.DictReader(file) if row.get(key)]


# -- training untouched --------------------------------------------------------------------------------------


CADENCES = {
    "epochs": {},
    "steps": {"every_n_train_steps": 2},
    "training data": {"dataloader": "train"},
    "failing": {"loss_fn": "fails"},
    "within the budget": {"max_overhead": 0.9},
}


@pytest.mark.parametrize(
    ("cadence", "options"),
    [
        *((cadence, {}) for cadence in CADENCES),
        ("epochs", {"val_check_interval": 0.5}),
        ("failing", {"val_check_interval": 0.5}),
        ("steps", {"accumulate_grad_batches": 4}),
    ],
    ids=str,
)
def test_training_is_the_same_bit_for_bit(cadence: str, options: dict[str, Any], tmp_path: Any) -> None:
    def outcome(*callbacks: Any) -> dict[str, Any]:
        model = seeded()
        run = trainer(tmp_path, *callbacks, **options)
        run.fit(model, loader(shuffle=True), loader(seed=1))
        return observable(run, model)

    choice = dict(CADENCES[cadence])
    if "loss_fn" in choice:
        calls = iter(range(10**6))

        def fails(module: Any, batch: Any) -> torch.Tensor:
            torch.rand(1), random.random(), np.random.rand()
            loss = module.training_step(batch, 0)["loss"]
            return loss * (math.nan if next(calls) > 6 else 1)

        choice["loss_fn"] = fails
    callback = measure(**choice)
    with_callback = outcome(callback)
    without = outcome()
    assert len(callback.history) > 1
    for name in without:
        assert same(with_callback[name], without[name]), name


class Interrupted(Callback):
    """Stops the run in the middle of the second measurement."""

    def __init__(self) -> None:
        self.before: Any = None
        self.armed = False

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.armed = True
        self.before = observable(trainer, pl_module)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
def test_what_an_interrupted_measurement_leaves(error: type[BaseException], tmp_path: Any) -> None:
    model = seeded()
    products = iter(range(10**6))

    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        if watcher.armed and next(products) == 9:
            torch.rand(3)
            raise error("now")
        return module.training_step(batch, 0)["loss"]

    callback = measure(loss_fn=loss_fn, memory_budget=0, on_error="raise", dataloader="train")
    watcher = Interrupted()
    # Without validation, which clears gradients.
    run = trainer(tmp_path, watcher, callback, limit_val_batches=0)
    expected = {KeyboardInterrupt: SystemExit, RuntimeError: LossError}.get(error, error)
    with pytest.raises(expected):
        run.fit(model, loader(shuffle=True), loader(seed=1))
    assert next(products) >= 10, "the measurement was not interrupted"
    after = observable(run, model)
    for name in ("weights and buffers", "gradients", "losses", "calls", "attributes", "optimizer"):
        assert same(after[name], watcher.before[name]), name


def test_the_users_loaders_are_not_touched(tmp_path: Any) -> None:
    class Counting(torch.utils.data.Dataset):
        def __init__(self) -> None:
            self.reads: list[int] = []
            self.noise = np.random.default_rng(0)

        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> Any:
            self.reads.append(index)
            return torch.tensor(self.noise.normal(size=5), dtype=torch.float32), index % 3

    def run_with(*callbacks: Any) -> tuple[list[int], Any]:
        dataset = Counting()
        model = seeded()
        batches = torch.utils.data.DataLoader(
            dataset, batch_size=6, shuffle=True, generator=torch.Generator().manual_seed(5)
        )
        trainer(tmp_path, *callbacks).fit(model, batches)
        return dataset.reads, copy.deepcopy(model.state_dict())

    assert same(run_with(measure(dataloader="train", num_samples=20)), run_with())


# -- modes of the trainer ------------------------------------------------------------------------------------


def test_fast_dev_run_measures_and_says_so_nowhere(tmp_path: Any) -> None:
    callback = measure(figures=True)
    trainer(tmp_path, callback, fast_dev_run=True, logger=True).fit(seeded(), loader(), loader(seed=1))
    assert [m.when for m in callback.history] == ["fit_start", "epoch"]


def test_barebones_is_left_alone(tmp_path: Any) -> None:
    callback = measure()
    Trainer(barebones=True, max_epochs=1, callbacks=[callback], accelerator="cpu", default_root_dir=tmp_path).fit(
        seeded(), loader(), loader(seed=1)
    )
    assert callback.history == []


def test_no_logger(tmp_path: Any) -> None:
    callback = measure(figures=True)
    run = trainer(tmp_path, callback, logger=False)
    run.fit(seeded(), loader(), loader(seed=1))
    assert len(callback.history) == 3
    assert float(run.callback_metrics["hessian/slope"]) == callback.history[-1].slope


def test_lr_find_sets_up_twice_and_leaves_no_measurement(tmp_path: Any) -> None:
    class WithRate(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lr = 0.1

    callback = measure()
    run = trainer(tmp_path, callback, max_epochs=2)
    model = seeded(WithRate)
    Tuner(run).lr_find(model, loader(shuffle=True), loader(seed=1), num_training=6, update_attr=False)
    run.fit(model, loader(shuffle=True), loader(seed=1))
    assert [(m.when, m.epoch, m.step) for m in callback.history] == [
        ("fit_start", 0, 0),
        ("epoch", 0, 6),
        ("epoch", 1, 12),
    ]


def test_validate_examines_a_model_without_training(tmp_path: Any) -> None:
    callback = measure()
    model = seeded()
    before = copy.deepcopy(model.state_dict())
    run = trainer(tmp_path, callback)
    (returned,) = run.validate(model, loader(seed=1), verbose=False)
    assert [m.when for m in callback.history] == ["validate"]
    assert returned["hessian/slope"] == pytest.approx(callback.history[0].slope)
    assert same(model.state_dict(), before)
    fitted = measure()
    trainer(tmp_path, fitted).fit(seeded(), loader(), loader(seed=1))
    # The same weights on the same samples: the same eigenvalues as at the start of fit.
    torch.testing.assert_close(fitted.history[0].spectrum.eigenvalues, callback.history[0].spectrum.eigenvalues)


# -- steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_train_steps": 4}, [0, 4, 8, 12]),
        ({"at_steps": [0, 1, 7]}, [0, 1, 7]),
        ({"at_steps": [3, 100]}, [3]),
    ],
    ids=str,
)
def test_measured_at_optimizer_steps(options: dict[str, Any], steps: list[int], tmp_path: Any) -> None:
    callback = measure(**options)
    logger = CSVLogger(tmp_path)
    # Far fewer rows from Lightning: every measurement must be logged all the same.
    run = trainer(tmp_path, callback, logger=logger, log_every_n_steps=50)
    run.fit(seeded(), loader(shuffle=True), loader(seed=1))
    assert [m.step for m in callback.history] == steps
    assert [step for step, _ in written(logger, "hessian/slope")] == steps


class TwoSteps(Net):
    """Two optimizers, which both step in each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def hessian_loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            loss = self.hessian_loss(batch)
            self.manual_backward(loss)
            optimizer.step()
        self.log("train_loss", loss)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(self.net[number].parameters(), lr=0.1) for number in (0, 4)]


class EndsEarly(Callback):
    def on_train_epoch_end(self, run: Any, module: Any) -> None:
        run.should_stop = run.current_epoch == 1


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"every_n_epochs": 3, "at_end": True}, [0, 5, 12]),
        ({"every_n_train_steps": 12}, [0, 6, 12]),
        ({"at_steps": [0, 8], "at_end": True}, [0, 4, 12]),
    ],
    ids=str,
)
def test_curves_count_batches_as_lightnings_do(options: dict[str, Any], steps: list[int], tmp_path: Any) -> None:
    callback = measure(**options)
    monitor = EdgeOfStabilityMonitor(
        every_n_train_steps=8, optimizer=1, max_overhead=None, num_samples=32, figures=False
    )
    logger = CSVLogger(tmp_path)
    run = trainer(tmp_path, callback, monitor, EndsEarly(), max_epochs=3, logger=logger)
    run.fit(seeded(TwoSteps), loader(shuffle=True), loader(seed=1))
    assert run.global_step == 24
    assert [step for step, _ in written(logger, "val_loss")] == [5, 11]
    assert [step for step, _ in written(logger, "hessian/slope")] == steps
    assert [step for step, _ in written(logger, "edge/ratio")] == [0, 4, 8, 12]


def test_no_step_is_measured_inside_an_accumulation(tmp_path: Any) -> None:
    gradients = {}

    class Record(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            gradients[self.name, trainer.current_epoch, batch_idx] = [p.grad.clone() for p in pl_module.parameters()]

        def __init__(self, name: str) -> None:
            self.name = name

    callback = measure(every_n_train_steps=1)
    run = trainer(tmp_path, Record("before"), callback, Record("after"), accumulate_grad_batches=4)
    run.fit(seeded(), loader(shuffle=True), loader(seed=1))
    # Six batches an epoch: steps after the fourth and, because the epoch ends, the sixth.
    assert [(m.when, m.step) for m in callback.history] == [("fit_start", 0)] + [("step", i) for i in (1, 2, 3, 4)]
    for (name, *place), values in gradients.items():
        if name == "before":
            assert same(values, gradients["after", place[0], place[1]])


def test_a_step_measurement_can_be_monitored_at_once(tmp_path: Any) -> None:
    checkpoint = ModelCheckpoint(tmp_path, monitor="hessian/slope", save_top_k=-1, every_n_train_steps=3)
    callback = measure(every_n_train_steps=3)
    run = trainer(tmp_path, callback, checkpoint, enable_checkpointing=True)
    run.fit(seeded(), loader(shuffle=True), loader(seed=1))
    scores = sorted(float(score) for score in checkpoint.best_k_models.values())
    assert scores == pytest.approx(sorted(m.slope for m in callback.history[1:]), rel=1e-6)


# -- resuming ------------------------------------------------------------------------------------------------


def places(callback: Any) -> list[tuple[Any, ...]]:
    return [(m.when, m.epoch, m.step) for m in callback.history]


RESUMES = {
    "epoch end": ({}, {}, {"save_top_k": -1}),
    "after validation": ({}, {}, {"save_top_k": -1, "save_on_train_epoch_end": False}),
    "every second epoch": ({"every_n_epochs": 2}, {}, {"save_top_k": -1}),
    "split_half": ({}, {"val_check_interval": 0.5}, {"save_top_k": -1}),
    "steps": ({"every_n_train_steps": 2}, {}, {"save_top_k": -1, "every_n_train_steps": 4}),
}


@pytest.mark.parametrize("case", RESUMES)
def test_a_resumed_history_has_no_gap_and_no_duplicate(case: str, tmp_path: Any) -> None:
    choice, options, saving = RESUMES[case]

    def checkpointed(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, filename="{epoch}-{step}", **saving)

    whole = measure(**choice)
    run = trainer(tmp_path, whole, checkpointed("whole"), max_epochs=4, enable_checkpointing=True, **options)
    # Lightning does not save random states, so no dropout.
    model = seeded(dropout=0)
    run.fit(model, loader(), loader(seed=1))

    files = sorted((tmp_path / "whole").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    for file in files[:-1][:: max(1, len(files) // 3)]:
        torch.load(file, weights_only=True)
        resumed = measure(**choice)
        stopper = Stopper(resumed, strict=choice.get("every_n_train_steps") is None)
        callbacks = [resumed] if choice.get("every_n_train_steps") else [stopper, resumed]
        again = trainer(
            tmp_path, *callbacks, checkpointed(file.stem), max_epochs=4, enable_checkpointing=True, **options
        )
        other = seeded(seed=99, dropout=0)
        again.fit(other, loader(), loader(seed=1), ckpt_path=file)
        assert places(resumed) == places(whole), file.stem
        saved = int(file.stem.split("step=")[1])
        # Within an epoch Lightning itself cannot resume an ordinary loader where it was.
        same_until = math.inf if saved % 6 == 0 else saved
        for one, two in zip(resumed.history, whole.history, strict=True):
            if one.step <= same_until:
                assert torch.equal(one.spectrum.eigenvalues, two.spectrum.eigenvalues), (file.stem, one.step)
        if saved % 6 == 0:
            assert same(other.state_dict(), model.state_dict()), file.stem
        assert all(seen == measured for seen, measured in stopper.seen)


def test_a_callback_used_for_a_second_run_starts_afresh(tmp_path: Any) -> None:
    callback = measure()
    for _ in range(2):
        trainer(tmp_path, callback, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
        assert places(callback) == [("fit_start", 0, 0), ("epoch", 0, 6)]


@pytest.fixture(scope="module")
def without_callback(tmp_path_factory: Any) -> Any:
    """A checkpoint of one epoch without the callback's state."""
    folder = tmp_path_factory.mktemp("plain")
    run = trainer(folder, max_epochs=1)
    run.fit(seeded(), loader(), loader(seed=1))
    run.save_checkpoint(folder / "plain.ckpt")
    return folder / "plain.ckpt"


@pytest.mark.parametrize("copied", [False, True], ids=["same object", "copy"])
def test_a_used_callback_brings_nothing_to_a_resumed_run(copied: bool, without_callback: Any, tmp_path: Any) -> None:
    callback = measure()
    run = trainer(tmp_path / "one", callback, max_epochs=1)
    run.fit(seeded(seed=5), loader(seed=7), loader(seed=8))
    first = callback.history
    assert len(first) == 2
    if copied:
        callback = copy.deepcopy(callback)
    seen: list[Any] = []

    class Look(Callback):
        def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
            seen.append(run.callback_metrics.get("hessian/slope"))

    run = trainer(tmp_path / "two", Look(), callback, max_epochs=2, logger=CSVLogger(tmp_path / "two"))
    run.fit(seeded(), loader(), loader(seed=1), ckpt_path=without_callback)
    assert places(callback) == [("epoch", 1, 12)]
    assert seen[0] is None
    with open(tmp_path / "two" / "lightning_logs" / "version_0" / "hessian_history.jsonl") as file:
        assert sum('"when"' in line for line in file) == 1
    alone = measure()
    trainer(tmp_path / "three", alone, max_epochs=2).fit(seeded(), loader(), loader(seed=1), ckpt_path=without_callback)
    assert torch.equal(callback.history[0].spectrum.eigenvalues, alone.history[0].spectrum.eigenvalues)


def test_a_trainer_that_goes_on_keeps_the_history(tmp_path: Any) -> None:
    callback, module = measure(), seeded()
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, loader(), loader(seed=1))
    trainer(tmp_path, callback).validate(module, loader(seed=1), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader(seed=1))
    assert [when for when, *_ in places(callback)] == ["fit_start", "epoch", "validate", "epoch"]


# -- what is written -----------------------------------------------------------------------------------------


def test_tensorboard_holds_every_epoch_and_a_picture(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    callback = measure(figures=True)
    logger = TensorBoardLogger(tmp_path, name="tb")
    trainer(tmp_path, callback, logger=logger).fit(seeded(), loader(shuffle=True), loader(seed=1))
    events = EventAccumulator(logger.log_dir).Reload()
    names = ("slope", "fit_error", "slope_stderr", "density_exponent", "lambda_max", "num_fitted", "num_hvps")
    for name in (*names, "seconds"):
        scalars = events.Scalars(f"hessian/{name}")
        assert [s.step for s in scalars] == [0, 5, 11], name
        expected = [m.scalars()[name] for m in callback.history]
        assert [s.value for s in scalars] == pytest.approx(expected, rel=1e-5), name
    assert [image.step for image in events.Images("hessian/spectrum")] == [0, 5, 11]
    assert {m.num_fitted for m in callback.history} == {NUM_EIGENVALUES}


@pytest.mark.parametrize("bar", ["tqdm", "rich", None])
def test_progress_beside_the_trainers_bar(bar: str | None, tmp_path: Any, capsys: Any) -> None:
    from tests.helpers.lightning import RichProgressBar, TQDMProgressBar

    bars = {"tqdm": [TQDMProgressBar()], "rich": [RichProgressBar()], None: []}[bar]
    callback = measure(verbose=True)
    run = trainer(tmp_path, callback, *bars, enable_progress_bar=bar is not None)
    run.fit(seeded(), loader(shuffle=True), loader(seed=1))
    printed = capsys.readouterr()
    text = printed.out + printed.err
    assert text.count("slope 0") >= 2
    assert text.count("first measurement: 58 parameters, 32 samples in 4 batch") == 1
    assert ("eigenvalues" in text.replace("num_eigenvalues", "")) == (bar == "tqdm") or bar == "rich"


def test_silent_when_told_so(tmp_path: Any, capsys: Any) -> None:
    trainer(tmp_path, measure(verbose=False)).fit(seeded(), loader(), loader(seed=1))
    assert "slope" not in capsys.readouterr().out


# -- losses --------------------------------------------------------------------------------------------------


class Manual(Net):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.manual_backward(loss)
        optimizer.step()


class ManualWithLoss(Manual):
    def hessian_loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def test_manual_optimisation_is_refused_without_a_loss(tmp_path: Any) -> None:
    with pytest.raises(Exception, match=r"optimises manually.*Pass loss_fn=.*hessian_loss"):
        trainer(tmp_path, measure()).fit(seeded(Manual), loader(), loader(seed=1))


def test_all_losses_give_the_same_hessian(tmp_path: Any) -> None:
    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    spectra = []
    for make, options in ((Net, {}), (ManualWithLoss, {}), (Manual, {"loss_fn": loss_fn})):
        callback = measure(**options)
        trainer(tmp_path, callback, max_epochs=1).fit(seeded(make), loader(), loader(seed=1))
        spectra.append(callback.history[0].spectrum.eigenvalues)
    for other in spectra[1:]:
        torch.testing.assert_close(other, spectra[0], rtol=1e-5, atol=1e-7)
