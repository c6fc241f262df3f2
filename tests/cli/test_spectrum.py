"""Measuring a checkpoint without training."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from hessian_callback.cli import main as cli
from hessian_callback.cli.spectrum import MeasuringTrainer
from tests.helpers.toy_runs import Net, loader, measure, seeded, trainer


class NoValidation(Net):
    """A module whose validation would fail."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        raise AssertionError("the validation step was called")

    def on_validation_epoch_end(self) -> None:
        raise AssertionError("the validation hook was called")

    def val_dataloader(self) -> Any:
        return loader(seed=3)


def measuring(tmp_path: Path, *callbacks: Any) -> MeasuringTrainer:
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
    return MeasuringTrainer(callbacks=list(callbacks), accelerator="cpu", default_root_dir=tmp_path, **quiet)


@pytest.mark.parametrize("ending", ["csv", "json"])
def test_checkpoint_has_the_spectrum_that_training_measured(tmp_path: Path, ending: str) -> None:
    callback = measure()
    trained = trainer(tmp_path, callback, max_epochs=1)
    trained.fit(seeded(), loader(), loader(seed=3))
    trained.save_checkpoint(tmp_path / "a.ckpt")
    model, output = seeded(NoValidation, seed=5), tmp_path / "new" / f"out.{ending}"
    (found,) = measuring(tmp_path, measure()).spectrum(model, ckpt_path=str(tmp_path / "a.ckpt"), output=str(output))
    last = callback.history[-1]
    assert found.slope == pytest.approx(last.slope, rel=1e-4)
    assert found.spectrum is not None
    text = output.read_text()
    rows = json.loads(text)["eigenvalues"] if ending == "json" else list(csv.DictReader(text.splitlines()))
    assert [float(row["eigenvalue"]) for row in rows] == found.spectrum.eigenvalues.tolist()
    assert [float(row["error_bound"]) for row in rows] == found.spectrum.error_bounds.tolist()
    assert not [name for name in vars(model) if name.startswith(("validation_step", "on_validation"))]


def test_no_callback_is_needed(tmp_path: Path) -> None:
    (found,) = measuring(tmp_path).spectrum(seeded(NoValidation), num_eigenvalues=3, num_samples=32)
    assert found.spectrum is not None
    assert (len(found.spectrum.eigenvalues), found.num_samples, found.when) == (3, 32, "validate")


def test_output_is_checked_before_the_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must end in \.csv or \.json"):
        measuring(tmp_path).spectrum(seeded(NoValidation), output="out.xlsx")
    with pytest.raises(ValueError, match="2 callbacks are configured"):
        measuring(tmp_path, measure(), measure(prefix="b")).spectrum(seeded(NoValidation), output="out.csv")


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


def test_report_is_a_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="no such folder"):
        run(monkeypatch, "report", str(tmp_path / "nowhere"))
