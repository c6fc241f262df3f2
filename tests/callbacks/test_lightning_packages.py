"""One callback for the Trainers of ``lightning`` and ``pytorch_lightning``."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch

from hessian_callback.callbacks import lightning_packages
from hessian_callback.callbacks.early_stopping import PowerLawEarlyStopping
from hessian_callback.callbacks.lightning_packages import PACKAGES, MisconfigurationException, is_a, package_of, sibling
from tests.helpers.toy_runs import loader, measure

QUIET: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


def net_of(package: ModuleType, **attributes: Any) -> Any:
    """Return a seeded module of a package; keywords replace attributes of its class."""

    class Net(package.LightningModule):  # type: ignore[name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = torch.nn.Linear(5, 3)

        def loss(self, batch: Any) -> torch.Tensor:
            return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss = self.loss(batch)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    for name, value in attributes.items():
        setattr(Net, name, value)
    torch.manual_seed(0)
    return Net()


@pytest.fixture(params=["lightning.pytorch", "pytorch_lightning"])
def package(request: pytest.FixtureRequest) -> ModuleType:
    return pytest.importorskip(request.param)


@pytest.fixture
def other(package: ModuleType) -> ModuleType:
    (name,) = {"lightning.pytorch", "pytorch_lightning"} - {package.__name__}
    return pytest.importorskip(name)


def test_trainers_of_each_package_take_the_callbacks_for_their_own(package: ModuleType, tmp_path: Any) -> None:
    early_stopping = package.callbacks.EarlyStopping
    callback, stop = measure(), PowerLawEarlyStopping(mode="max", min_delta=10.0, patience=1)
    assert isinstance(callback, package.Callback)
    assert isinstance(stop, early_stopping)
    monitoring = early_stopping(monitor="hessian/slope", mode="max", strict=False, patience=9)
    trainer = package.Trainer(
        callbacks=[callback, stop, monitoring],
        max_epochs=9,
        default_root_dir=tmp_path,
        enable_checkpointing=False,
        **QUIET,
    )
    model = net_of(package)
    trainer.fit(model, loader(), loader(seed=1))
    assert [m.when for m in callback.history] == ["fit_start", "epoch", "epoch"]
    assert trainer.early_stopping_callbacks == [stop, monitoring]
    # The measurement of the second epoch was the first without progress.
    assert stop.stopped_epoch == 1
    reasons = getattr(package.callbacks.early_stopping, "EarlyStoppingReason", None)
    if reasons is not None:  # Lightning from 2.6 on.
        assert stop.stopping_reason is reasons.PATIENCE_EXHAUSTED
    assert monitoring.best_score == pytest.approx(max(m.slope for m in callback.history[1:]))


def test_weights_are_those_of_a_run_without_the_callback(package: ModuleType, tmp_path: Any) -> None:
    ends = []
    for callbacks in ([], [measure()]):
        trainer = package.Trainer(
            callbacks=callbacks, max_epochs=2, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET
        )
        model = net_of(package)
        trainer.fit(model, loader(shuffle=True), loader(seed=1))
        ends.append(model.state_dict())
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_run_begun_under_one_package_resumes_under_the_other(
    package: ModuleType, other: ModuleType, tmp_path: Any
) -> None:
    def run(part: ModuleType, epochs: int, ckpt_path: Any = None) -> tuple[Any, PowerLawEarlyStopping]:
        callback, stop = measure(), PowerLawEarlyStopping(mode="max", min_delta=10.0, patience=3)
        trainer = part.Trainer(
            callbacks=[callback, stop], max_epochs=epochs, default_root_dir=tmp_path, enable_checkpointing=True, **QUIET
        )
        trainer.fit(net_of(part), loader(), loader(seed=1), ckpt_path=ckpt_path)
        trainer.save_checkpoint(tmp_path / f"{epochs}.ckpt")
        return callback, stop

    begun, _ = run(package, 2)
    resumed, stop = run(other, 9, tmp_path / "2.ckpt")
    whole, stop_of_whole = run(package, 9)
    assert [m.slope for m in resumed.history[:3]] == [m.slope for m in begun.history]
    assert [m.slope for m in resumed.history] == pytest.approx([m.slope for m in whole.history], rel=1e-6)
    assert stop.stopped_epoch == stop_of_whole.stopped_epoch == 3
    assert (tmp_path / "9.ckpt").exists()


def test_errors_of_configuration_are_those_of_each_package(package: ModuleType, tmp_path: Any) -> None:
    error = import_module(f"{package.__name__}.utilities.exceptions").MisconfigurationException
    assert issubclass(MisconfigurationException, error)
    trainer = package.Trainer(
        callbacks=[measure()], max_epochs=1, default_root_dir=tmp_path, enable_checkpointing=False, **QUIET
    )
    with pytest.raises(error, match="optimises manually"):
        trainer.fit(net_of(package, automatic_optimization=False), loader(), loader(seed=1))


def test_a_module_without_a_training_step_is_found_out(package: ModuleType, tmp_path: Any) -> None:
    model = net_of(package, training_step=package.LightningModule.training_step)
    trainer = package.Trainer(callbacks=[measure()], default_root_dir=tmp_path, enable_checkpointing=False, **QUIET)
    with pytest.raises(MisconfigurationException, match="has no training_step"):
        trainer.validate(model, loader(seed=1), verbose=False)


def test_kinds_are_names_of_lightnings_classes(package: ModuleType, tmp_path: Any) -> None:
    class Own(package.loggers.CSVLogger):  # type: ignore[name-defined]
        pass

    class TensorBoardLogger:
        pass

    assert is_a(Own(tmp_path), "CSVLogger")
    assert is_a(Own(tmp_path), "TensorBoardLogger", "Logger")
    assert not is_a(TensorBoardLogger(), "TensorBoardLogger")
    assert not is_a(Own(tmp_path), "Own")
    assert package_of(Own(tmp_path)) == package.__name__
    assert sibling(Own(tmp_path), "loggers", "CSVLogger") is package.loggers.CSVLogger


def test_a_package_that_fails_to_import_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if one of them were installed without the other, or were too old for the installed torch."""
    present = PACKAGES[0]

    def import_only_present(name: str) -> ModuleType:
        if name != present:
            raise ImportError(f"no {name}")
        return import_module(name)

    monkeypatch.setattr(lightning_packages, "import_module", import_only_present)
    assert lightning_packages._importable() == (present,)
    monkeypatch.setattr(lightning_packages, "_FABRIC", {"neither": ""})
    with pytest.raises(ImportError, match=r"cannot be imported \(neither: no neither\); install it with pip install"):
        lightning_packages._importable()
