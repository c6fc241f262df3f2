"""Callbacks that are used in several runs, and states that Lightning loads without resuming a run."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hessian_callback import EdgeOfStabilityMonitor, PowerLawEarlyStopping
from hessian_callback.measurement.history import FILE_NAME
from hessian_callback.operators.product_check import WrongProductError
from tests.helpers.lightning import (
    BatchSizeFinder,
    Callback,
    CSVLogger,
    LearningRateFinder,
    LightningDataModule,
    ModelCheckpoint,
)
from tests.helpers.toy_runs import Net, loader, measure, seeded, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:a measurement of the Hessian took"),
    pytest.mark.filterwarnings("ignore:32 held-out samples are few"),
]


class Tuned(Net):
    """A module whose learning rate can be found; a rate of its own, which is the finder's, leads to the same steps."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lr = 0.1


class Batches(LightningDataModule):
    def __init__(self, seed: int) -> None:
        super().__init__()
        self.batch_size, self.seed = 8, seed

    def train_dataloader(self) -> Any:
        return loader(batch_size=8, seed=self.seed)

    def val_dataloader(self) -> Any:
        return loader(batch_size=8, seed=self.seed + 1)


def edge(**options: Any) -> Any:
    defaults = {"every_n_train_steps": 3, "max_overhead": None, "num_samples": 32, "figures": False, "verbose": False}
    return EdgeOfStabilityMonitor(**{**defaults, **options})


CALLBACKS = {"power law": (measure, "hessian/slope"), "edge": (edge, "edge/ratio")}


def places(callback: Any) -> list[tuple[str, int, int]]:
    return [(entry.when, entry.epoch, entry.step) for entry in callback.history]


def values(callback: Any) -> list[float]:
    return [entry.ratio if hasattr(entry, "ratio") else entry.slope for entry in callback.history]


class Look(Callback):
    """Notes what callbacks that monitor a key see at the first batch."""

    def __init__(self, key: str) -> None:
        self.key, self.seen = key, []

    def on_train_batch_start(self, run: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if not self.seen:
            self.seen.append(run.callback_metrics.get(self.key))


# -- finders ---------------------------------------------------------------------------------------------------


FINDERS = {
    "none": lambda: [],
    "learning rate": lambda: [LearningRateFinder(num_training_steps=4, update_attr=False)],
    "batch size": lambda: [BatchSizeFinder(steps_per_trial=1, max_trials=1, init_val=8)],
}


@pytest.mark.parametrize("finder", FINDERS)
@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_used_callback_starts_afresh_whatever_tunes_the_run(kind: str, finder: str, tmp_path: Path) -> None:
    make, key = CALLBACKS[kind]

    def fold(number: int, callback: Any) -> Any:
        look = Look(key)
        run = trainer(tmp_path, callback, look, *FINDERS[finder](), max_epochs=1)
        run.fit(seeded(Tuned, seed=number), datamodule=Batches(10 * number))
        # The monitor's own start may be seen.
        assert look.seen[0] in (None, values(callback)[0])
        return values(callback)

    used = make()
    first, second = fold(1, used), fold(2, used)
    assert len(second) >= 2
    assert second == fold(2, make())
    assert first != second


class Milestones(LearningRateFinder):
    """Finds a learning rate at several epochs, as Lightning's documentation shows it."""

    def on_fit_start(self, *_: Any) -> None:
        pass

    def on_train_epoch_start(self, run: Any, module: Any) -> None:
        if run.current_epoch in (0, 2):
            self.lr_find(run, module)


@pytest.mark.parametrize("kind", CALLBACKS)
def test_a_finder_in_the_middle_of_a_run_changes_nothing(kind: str, tmp_path: Path) -> None:
    make, _ = CALLBACKS[kind]
    kept = []

    class Keep(Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            assert callback.schedule.time.elapsed > callback.schedule.time.spent
            kept.append(list(callback.history))

    callback, logger = make(max_overhead=1.0), CSVLogger(tmp_path)
    finder = Milestones(num_training_steps=2, update_attr=False)
    run = trainer(tmp_path, callback, finder, Keep(), max_epochs=4, logger=logger)
    run.fit(seeded(Tuned), loader(), loader(seed=1))
    alone = make(max_overhead=1.0)
    whole = trainer(tmp_path, alone, max_epochs=4)
    whole.fit(seeded(Tuned), loader(), loader(seed=1))
    if run.global_step != whole.global_step:
        bare = trainer(tmp_path, Milestones(num_training_steps=2, update_attr=False), max_epochs=4)
        bare.fit(seeded(Tuned), loader(), loader(seed=1))
        assert run.global_step == bare.global_step
        pytest.skip("this Lightning leaves out the batches that a finder has trained on")
    assert places(callback) == places(alone)
    # The measurements stay the same objects, so nobody takes them for those of another run.
    assert all(one is other for histories in kept for one, other in zip(histories, callback.history, strict=False))
    if kind == "power law":
        assert (Path(logger.log_dir) / FILE_NAME).read_text().count('"begins"') == 1


def test_a_checkpoint_that_is_loaded_in_the_middle_of_a_run_is_gone_on_with(tmp_path: Path) -> None:
    class Back(Callback):
        """Goes back to the end of the first epoch, once."""

        def on_train_epoch_start(self, run: Any, module: Any) -> None:
            if run.current_epoch == 2 and not hasattr(self, "elapsed"):
                callback.load_state_dict(torch.load(tmp_path / "epoch=0.ckpt")["callbacks"][callback.state_key])
                self.elapsed = callback.schedule.time.elapsed

    callback, back = measure(), Back()
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, callback, back, saving, max_epochs=3, enable_checkpointing=True)
    run.fit(seeded(), loader(), loader(seed=1))
    assert places(callback) == [("fit_start", 0, 0), ("epoch", 0, 6), ("epoch", 2, 18)]
    assert callback.schedule.time.elapsed > back.elapsed + callback.history[-1].seconds


# -- other runs between ----------------------------------------------------------------------------------------


def test_a_run_goes_on_after_another_module_was_validated(tmp_path: Path) -> None:
    callback, module = measure(), seeded()
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, loader(), loader(seed=1))
    run.validate(copy.deepcopy(module), loader(seed=1), verbose=False)
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader(seed=1))
    assert [when for when, *_ in places(callback)] == ["fit_start", "epoch", "validate", "epoch"]


def test_validations_of_another_module_are_no_part_of_a_run(tmp_path: Path) -> None:
    callback, module = measure(), seeded()
    run = trainer(tmp_path, callback, max_epochs=1)
    run.validate(seeded(seed=2), loader(seed=1), verbose=False)
    run.fit(module, loader(), loader(seed=1))
    assert [when for when, *_ in places(callback)] == ["fit_start", "epoch"]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: Any) -> Path:
    """A checkpoint of one epoch without the state of a callback."""
    path = tmp_path_factory.mktemp("plain") / "plain.ckpt"
    run = trainer(path.parent, max_epochs=1)
    run.fit(seeded(), loader(), loader(seed=1))
    run.save_checkpoint(path)
    return path


@pytest.mark.parametrize("same_trainer", [False, True], ids=["another trainer", "same trainer"])
@pytest.mark.parametrize("kind", CALLBACKS)
def test_nothing_is_left_in_a_run_from_a_checkpoint_without_a_history(
    kind: str, same_trainer: bool, plain: Path, tmp_path: Path
) -> None:
    make, key = CALLBACKS[kind]
    used, alone = make(), make()
    module, look = seeded(seed=5), Look(key)
    run = trainer(tmp_path, used, max_epochs=2)
    run.fit(module, loader(seed=7), loader(seed=8))
    assert len(used.history) >= 3
    if not same_trainer:
        module, run = seeded(), trainer(tmp_path, used, look, max_epochs=2)
    run.fit(module, loader(), loader(seed=1), ckpt_path=plain)
    trainer(tmp_path, alone, max_epochs=2).fit(seeded(), loader(), loader(seed=1), ckpt_path=plain)
    assert places(used) == places(alone)
    assert places(used)[-1][2] == 12
    assert same_trainer or look.seen == [None]


@pytest.mark.parametrize("kind", CALLBACKS)
def test_the_loss_of_another_module_is_checked_again(kind: str, tmp_path: Path) -> None:
    class Detached(Net):
        """A part of its gradient is not that of its loss."""

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            logits = self(batch[0])
            return nn.functional.cross_entropy(logits, batch[1]) + Quarter.apply(logits).square().mean()

    class Quarter(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return 3 * x

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient.detach()

    callback = CALLBACKS[kind][0](dataloader="train", on_error="raise")
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(dropout=0.0), loader(), loader(seed=1))
    with pytest.raises(WrongProductError, match="they differ by"):
        trainer(tmp_path, callback, max_epochs=1).fit(seeded(Detached, dropout=0.0), loader(), loader(seed=1))


# -- evaluations -----------------------------------------------------------------------------------------------


class WithTest(Net):
    def test_step(self, batch: Any, batch_idx: int) -> None:
        pass


@pytest.mark.parametrize("kind", CALLBACKS)
def test_an_evaluation_of_a_checkpoint_leaves_the_history(kind: str, tmp_path: Path) -> None:
    callback = CALLBACKS[kind][0](max_overhead=1.0)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, callback, saving, max_epochs=2, enable_checkpointing=True)
    module = seeded(WithTest)
    run.fit(module, loader(), loader(seed=1))
    history, spent = list(callback.history), callback.schedule.time.spent
    for evaluate in (run.test, run.validate):
        evaluate(module, loader(seed=1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert callback.history[: len(history)] == history
    assert [entry.when for entry in callback.history[len(history) :]] == ["validate"] * (kind == "power law")
    # In fit the same checkpoint is gone on with.
    first = [place for place in places(callback) if 0 < place[2] <= 6]
    run.fit(module, loader(), loader(seed=1), ckpt_path=tmp_path / "epoch=0.ckpt")
    assert places(callback)[-1][2] == 12
    assert [place for place in places(callback) if 0 < place[2] <= 6] == first
    assert spent > 0


def test_the_time_between_two_parts_of_a_run_is_not_its_time(tmp_path: Path) -> None:
    callback = measure(max_overhead=1.0)
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
    elapsed = callback.schedule.time.elapsed
    assert callback.schedule.time.elapsed == elapsed > callback.schedule.time.spent


# -- the stopper -----------------------------------------------------------------------------------------------


def test_a_used_stopper_says_nothing_of_an_earlier_run(tmp_path: Path) -> None:
    callback, stopper = measure(), PowerLawEarlyStopping(mode="max", min_delta=1e6, patience=1)
    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    run = trainer(tmp_path, callback, stopper, saving, max_epochs=4, enable_checkpointing=True)
    run.fit(seeded(WithTest), loader(), loader(seed=1))
    stopped = stopper.stopped_epoch, stopper.stopping_reason_message, stopper.wait_count
    assert (stopped[0], stopped[2]) == (1, 1)
    assert stopped[1] is not None
    run.test(seeded(WithTest), loader(seed=1), ckpt_path=tmp_path / "epoch=0.ckpt", verbose=False)
    assert (stopper.stopped_epoch, stopper.stopping_reason_message, stopper.wait_count) == stopped
    fresh = PowerLawEarlyStopping(mode="max", min_delta=1e6, patience=1)
    for one in (stopper, fresh):
        trainer(tmp_path, measure(), one, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
    assert stopper.state_dict() == fresh.state_dict()
    assert getattr(stopper, "stopping_reason", None) == getattr(fresh, "stopping_reason", None)
    assert (stopper.stopped_epoch, stopper.stopping_reason_message) == (0, None)


# -- steps that are not counted --------------------------------------------------------------------------------


class Raw(Net):
    """Steps an optimizer that Lightning does not wrap."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers(use_pl_optimizer=False)
        optimizer.zero_grad()
        self.manual_backward(self.hessian_loss(batch))
        optimizer.step()

    def hessian_loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


UNCOUNTED = "global_step is still 0 after .* without use_pl_optimizer=False"


def test_the_end_of_training_is_measured_though_steps_are_not_counted(tmp_path: Path) -> None:
    callback = measure(every_n_epochs=3, at_end=True)
    run = trainer(tmp_path, callback, max_epochs=3)
    with pytest.warns(UserWarning, match=UNCOUNTED) as caught:
        run.fit(seeded(Raw), loader(), loader(seed=1))
    assert sum("global_step is still 0" in str(one.message) for one in caught) == 1
    assert run.global_step == 0
    assert places(callback) == [("fit_start", 0, 0), ("epoch", 0, 0), ("epoch", 2, 0)]


@pytest.mark.filterwarnings("ignore:trainer.global_step is still 0")
def test_a_run_whose_steps_are_not_counted_goes_on(tmp_path: Path) -> None:
    callback, module = measure(), seeded(Raw)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(module, loader(), loader(seed=1))
    run.fit_loop.max_epochs = 2
    run.fit(module, loader(), loader(seed=1))
    assert places(callback) == [("fit_start", 0, 0), ("epoch", 0, 0), ("epoch", 1, 0)]


@pytest.mark.filterwarnings("ignore:trainer.global_step is still 0")
def test_a_validation_of_earlier_weights_is_not_taken_for_a_new_one(tmp_path: Path) -> None:
    callback = measure(predict="val_loss")
    run = trainer(tmp_path, callback, max_epochs=3, check_val_every_n_epoch=2)
    run.fit(seeded(Raw), loader(), loader(seed=1))
    assert [(entry.epoch, entry.val_loss is not None) for entry in callback.history[1:]] == [
        (0, False),
        (1, True),
        (2, False),
    ]


@pytest.mark.parametrize("kind", CALLBACKS)
def test_steps_that_never_become_due_are_warned_of_in_the_first_epoch(kind: str, tmp_path: Path) -> None:
    callback = CALLBACKS[kind][0](every_n_train_steps=3)
    run = trainer(tmp_path, callback, max_epochs=1, limit_val_batches=0)
    with pytest.warns(UserWarning, match="after 100 batches"):
        run.fit(seeded(Raw), loader(num=808), loader(seed=1))
    ends = [("fit_end", 1, 0)] if kind == "edge" else []
    assert places(callback) == [("fit_start", 0, 0), *ends]
