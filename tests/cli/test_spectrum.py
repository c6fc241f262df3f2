"""Measuring a checkpoint without training."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hessian_callback.cli import main as cli
from hessian_callback.cli.spectrum import measure_module, write_spectrum
from tests.helpers.lightning import LightningDataModule, MisconfigurationException, Trainer
from tests.helpers.toy_runs import Net, loader, measure, seeded, trainer


class NoValidation(Net):
    """A module whose validation would fail."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("the validation step was called")

    def on_validation_epoch_end(self) -> None:
        raise AssertionError("the validation hook was called")

    def on_validation_start(self) -> None:
        raise AssertionError("the validation hook was called")

    def val_dataloader(self) -> Any:
        return loader(seed=3)


def quiet(tmp_path: Path) -> Trainer:
    off = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, **off)


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_checkpoint_has_the_spectrum_that_training_measured(tmp_path: Path, ending: str) -> None:
    callback = measure()
    trained = trainer(tmp_path, callback, max_epochs=1)
    trained.fit(seeded(), loader(), loader(seed=3))
    trained.save_checkpoint(tmp_path / "a.ckpt")
    model, output = seeded(NoValidation, seed=5), tmp_path / "new" / f"out.{ending}"
    found = measure_module(quiet(tmp_path), model, None, measure(), tmp_path / "a.ckpt")
    write_spectrum(found, output)
    last = callback.history[-1]
    assert found.slope == pytest.approx(last.slope, rel=1e-4)
    assert (found.epoch, found.step, found.when) == (1, 6, "validate")
    assert found.spectrum is not None
    text = output.read_text()
    rows = json.loads(text)["eigenvalues"] if ending == "json" else list(csv.DictReader(text.splitlines()))
    assert [float(row["eigenvalue"]) for row in rows] == found.spectrum.eigenvalues.tolist()
    assert [float(row["error_bound"]) for row in rows] == found.spectrum.error_bounds.tolist()


class Halved(LightningDataModule):
    """Halves the inputs on their way to the device."""

    def val_dataloader(self) -> Any:
        return loader(seed=3)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return x / 2, y


def test_transfer_hooks_of_the_data_module_run(tmp_path: Path) -> None:
    plain = measure_module(quiet(tmp_path), seeded(NoValidation), None, measure(num_samples=48))
    halved = measure_module(quiet(tmp_path), seeded(NoValidation), Halved(), measure(num_samples=48))
    run = trainer(tmp_path, callback := measure(num_samples=48))
    run.validate(seeded(), datamodule=Halved(), verbose=False)
    assert halved.slope == pytest.approx(callback.history[-1].slope, rel=1e-4)
    assert halved.slope != pytest.approx(plain.slope, rel=1e-4)


class BuiltLate(Net):
    """A module that builds its layers in a hook, from what the data module says."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.net = None  # type: ignore[assignment]
        self.hook = hook

    def build(self) -> None:
        if self.net is None:
            self.net = seeded(width=self.trainer.datamodule.width).net

    def setup(self, stage: str) -> None:
        if self.hook == "setup":
            self.build()

    def configure_model(self) -> None:
        if self.hook == "configure_model":
            self.build()


class Wide(LightningDataModule):
    """Data that exist after setup only."""

    def setup(self, stage: str) -> None:
        self.width = 7
        self.sets = {"fit": ("train", "val"), "validate": ("val",)}[stage]

    def train_dataloader(self) -> Any:
        assert "train" in self.sets
        return loader(shuffle=True)

    def val_dataloader(self) -> Any:
        assert "val" in self.sets
        return loader(seed=3)


@pytest.mark.parametrize("dataloader", ["val", "train"])
@pytest.mark.parametrize("hook", ["setup", "configure_model"])
def test_layers_that_are_built_in_a_hook(hook: str, dataloader: str, tmp_path: Path) -> None:
    callback = measure(dataloader=dataloader, num_samples=48)
    trained = trainer(tmp_path, callback, max_epochs=1)
    trained.fit(BuiltLate(hook), datamodule=Wide())
    trained.save_checkpoint(tmp_path / "a.ckpt")
    other = measure(dataloader=dataloader, num_samples=48)
    found = measure_module(quiet(tmp_path), BuiltLate(hook), Wide(), other, tmp_path / "a.ckpt")
    assert found.slope == pytest.approx(callback.history[-1].slope, rel=1e-4)


def test_a_module_without_a_loader_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MisconfigurationException, match=r"no validation loader.*Define val_dataloader"):
        measure_module(quiet(tmp_path), seeded(), None, measure())


@pytest.mark.parametrize("name", ["out.xlsx", "folder.csv", "file/out.csv"])
def test_an_output_that_cannot_be_written_is_refused_before_the_work(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "file").write_text("")
    monkeypatch.setattr("hessian_callback.cli.training.measure_module", lambda *_: pytest.fail("the work began"))
    model = ("--model", "hessian_callback.demos.DigitsCNN", "--data", "hessian_callback.demos.DigitsData")
    with pytest.raises(SystemExit) as ended:
        run(monkeypatch, "spectrum", *model, "--output", str(tmp_path / name))
    assert ended.value.code == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 2


def run(monkeypatch: pytest.MonkeyPatch, *args: str) -> None:
    monkeypatch.setattr(sys, "argv", ["hessian-callback", *args])
    cli.main()


def test_command_prints_a_table_and_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    model = ("--model", "hessian_callback.demos.DigitsCNN", "--data", "hessian_callback.demos.DigitsData")
    few = ("--num_eigenvalues", "3", "--num_samples", "40", "--output", "out.csv")
    run(monkeypatch, "spectrum", *model, *few, "--trainer.accelerator", "cpu")
    assert "Eigenvalues with error bounds: out.csv" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]
    assert len((tmp_path / "out.csv").read_text().splitlines()) == 4


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["fit", "--config", "nope.yaml"], ["nope.yaml", "Paths count from the current folder"]),
        (["fit"], ["fit.model", "--model package.MyModel"]),
        (["fit", "--model", "nowhere.Net"], ["No module named 'nowhere'", "package.module.MyClass"]),
        (["fitt"], ["fitt", "fit, spectrum, validate, report and study"]),
        (
            ["spectrum", "--model", "hessian_callback.demos.DigitsCNN", "--ckpt_path", "gone.ckpt"],
            ["gone.ckpt", "Paths count from the current folder"],
        ),
    ],
)
def test_errors_say_what_to_do(
    args: list[str], words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, *args)
    assert stopped.value.code == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in words), shown
    assert "usage:" not in shown


def test_report_is_a_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, "report", str(tmp_path / "nowhere"))
    assert stopped.value.code == 2
    assert "no such folder" in capsys.readouterr().err
