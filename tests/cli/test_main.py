"""The command line: the examples, their TensorBoard files, help and errors, in processes of their own where it matters.

.ci/run runs the example of the README as well, by the console script.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hessian_callback.cli import main as cli
from hessian_callback.cli import training
from hessian_callback.cli.summary import print_report, stop_messages
from hessian_callback.demos import DigitsCNN, DigitsData
from tests.helpers.forks import run_module
from tests.helpers.lightning import CSVLogger, EarlyStopping, Trainer

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "example_configs"
EPOCHS = 2
MIN_TREND = 0.2


MODULE = "hessian_callback.cli.main"


def environment() -> dict[str, str]:
    return os.environ | {
        "COLUMNS": "100",
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }


def command(*args: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own, in a folder of its own."""
    return run_module(MODULE, *args, cwd=cwd, env=environment())


@dataclass
class Run:
    """A finished run of an example: what it printed, and the TensorBoard files it left."""

    folder: Path
    output: str

    @property
    def log_dir(self) -> Path:
        (found,) = re.findall(r"TensorBoard files: (\S+)", self.output)
        return self.folder / found

    @property
    def table(self) -> dict[str, tuple[float, float, int]]:
        """Slope, fit error and K by the name of the row."""
        row = re.compile(
            r"^ *(before training|epoch \d+|validation) +\d+ +[\d.]+ +([\d.]+) ± [\d.]+ +([\d.]+) +(\d+)"
            r" +\d+ +[\d.]+ *$",
            re.M,
        )
        return {name: (float(s), float(d), int(k)) for name, s, d, k in row.findall(self.output)}

    def board(self) -> Any:
        board = EventAccumulator(str(self.log_dir), size_guidance={"images": 0, "scalars": 0})
        board.Reload()
        return board


def example(name: str, folder: Path, *options: str) -> Run:
    done = command("fit", "--config", str(CONFIGS / name), *options, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(folder, done.stdout)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Run:
    # The README's command makes all eight epochs.
    return example("digits_cnn.yaml", tmp_path_factory.mktemp("digits_cnn"), f"--trainer.max_epochs={EPOCHS}")


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("digits_early_stopping")
    config = yaml.safe_load((CONFIGS / "digits_early_stopping.yaml").read_text())
    # As the example says, but a smaller network waits for a trend of 20 % instead of 2 %, which takes fewer epochs.
    config["model"]["init_args"]["channels"] = [2, 4]
    config["trainer"]["callbacks"][0]["init_args"] |= {"num_eigenvalues": 10, "num_samples": 128}
    config["trainer"]["callbacks"][1]["init_args"] |= {"patience": 2, "min_trend": MIN_TREND}
    (folder / "sooner.yaml").write_text(yaml.safe_dump(config))
    return example(str(folder / "sooner.yaml"), folder)


# -- the main job ----------------------------------------------------------------------------------


def test_table_has_a_line_for_each_measurement(digits: Run) -> None:
    assert list(digits.table) == ["before training", *(f"epoch {e}" for e in range(EPOCHS))]
    assert {k for _, _, k in digits.table.values()} == {50}


@pytest.mark.parametrize(("tag", "column"), [("hessian/slope", 0), ("hessian/fit_error", 1)])
def test_tensorboard_has_slope_and_fit_error_of_every_epoch(digits: Run, tag: str, column: int) -> None:
    logged = [(event.step, round(event.value, 3)) for event in digits.board().Scalars(tag)]
    # 75 steps an epoch; TensorBoard's step of an epoch is that of its last batch.
    steps = [0, *(75 * e - 1 for e in range(1, EPOCHS + 1))]
    expected = list(zip(steps, (row[column] for row in digits.table.values()), strict=True))
    assert [step for step, _ in logged] == steps
    assert [value for _, value in logged] == pytest.approx([value for _, value in expected], abs=6e-4)


def test_tensorboard_has_a_picture_of_every_spectrum(digits: Run) -> None:
    board = digits.board()
    pictures = board.Images("hessian/spectrum")
    assert [p.step for p in pictures] == [event.step for event in board.Scalars("hessian/slope")]
    assert {(p.width, p.height) for p in pictures} == {(512, 384)}


def test_output_says_where_the_curves_are(digits: Run) -> None:
    assert digits.log_dir == digits.folder / "runs" / "digits_cnn" / "version_0"
    assert re.search(r"tensorboard --logdir runs/digits_cnn$", digits.output, re.M)


def test_output_names_the_critical_value(digits: Run) -> None:
    assert "rejected above a fit error of 0.151 (K = 50, exponent fitted; the paper has 0.192)" in digits.output


def test_training_is_not_said_to_have_been_stopped(digits: Run) -> None:
    assert "stopped the training" not in digits.output


def test_validate_measures_a_checkpoint_as_training_did(digits: Run, tmp_path: Path) -> None:
    (checkpoint,) = digits.log_dir.glob("checkpoints/*.ckpt")
    done = command(
        "validate", "--config", str(CONFIGS / "digits_cnn.yaml"), "--ckpt_path", str(checkpoint), cwd=tmp_path
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert Run(tmp_path, done.stdout).table["validation"] == pytest.approx(
        digits.table[f"epoch {EPOCHS - 1}"], abs=2e-3
    )


# -- stopping on the slope ---------------------------------------------------------------------------


def test_example_stops_by_itself_and_says_so(stopped: Run) -> None:
    ((epoch, value, best, when, noise, wait),) = re.findall(
        r"^PowerLawEarlyStopping stopped the training at epoch (\d+): hessian/slope = ([\d.]+) \(epoch \d+, step \d+\) "
        r"is not above ([\d.]+) \(epoch (\d+), step \d+\) by more than the noise of the difference, ([\d.]+) "
        r"\(numerical [\d.e-]+, sample 2 x [\d.]+ from the halves of \d+ measurements\); "
        r"measurements without progress: (\d+) \(patience=2, mode='max'\)\.$",
        stopped.output,
        re.M,
    )
    slopes = [slope for slope, _, _ in stopped.table.values()][1:]
    assert int(epoch) == len(slopes) - 1 < 29
    assert float(value) == pytest.approx(slopes[-1], abs=1e-3)
    assert float(best) == pytest.approx(slopes[int(when)], abs=1e-3)
    assert float(value) - float(best) <= float(noise)
    assert int(wait) == int(epoch) - int(when) >= 2
    assert int(wait) * MIN_TREND * float(best) >= 2 * float(noise) - 1e-3


def fit(*callbacks: EarlyStopping, max_epochs: int = 3) -> Trainer:
    trainer = Trainer(
        max_epochs=max_epochs,
        limit_train_batches=1,
        limit_val_batches=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(DigitsCNN(), datamodule=DigitsData(val_batch_size=8))
    return trainer


def test_no_stop_no_message() -> None:
    assert stop_messages(fit(EarlyStopping("val_loss", patience=9))) == []


def test_patience_is_named_with_value_and_best() -> None:
    trainer = fit(EarlyStopping("val_loss", mode="max", min_delta=100.0, patience=2), max_epochs=9)
    (message,) = stop_messages(trainer)
    value = float(trainer.callback_metrics["val_loss"])
    assert message.startswith(f"EarlyStopping stopped the training at epoch 2: val_loss = {value:.3f}, not better")
    assert message.endswith("at 2 checks in a row (mode=max, patience=2).")


def test_threshold_in_the_first_epoch_is_a_stop_and_the_other_stopper_is_not_blamed() -> None:
    crossed = EarlyStopping("val_loss", stopping_threshold=100.0)
    waiting = EarlyStopping("train_loss", patience=9)
    first, *others = stop_messages(fit(crossed, waiting))
    assert re.fullmatch(
        r"EarlyStopping stopped the training at epoch 0: val_loss = [\d.]+ \(mode=min, patience=3\)\.", first
    )
    if hasattr(waiting, "stopping_reason_message"):  # Older ones cannot be told apart in the first epoch.
        assert not others


# -- words -----------------------------------------------------------------------------------------


def printed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *args: str) -> str:
    monkeypatch.setattr(sys, "argv", ["hessian-callback", *args])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("args", [[], ["--help"]])
def test_help_teaches_the_first_run(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, args: list[str]
) -> None:
    lines = printed(capsys, monkeypatch, *args).splitlines()
    assert "  hessian-callback fit --config example_configs/digits_cnn.yaml" in lines
    assert "  hessian-callback fit --config example_configs/digits_early_stopping.yaml" in lines


def test_help_of_the_callback_explains_its_options(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (line,) = [line for line in training._EPILOG.splitlines() if "callbacks.help" in line]
    text = printed(capsys, monkeypatch, *line.split()[1:])
    assert "num_eigenvalues" in text
    assert "how many of the largest eigenvalues to fit" in " ".join(text.split())
    assert "--trainer.callbacks.solver" in text


def test_model_in_the_current_directory_is_found(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As for a console script, which does not search the current directory."""
    source = "from hessian_callback.demos import DigitsCNN\nclass MyOwnNet(DigitsCNN):\n    pass\n"
    (tmp_path / "my_own_net.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert "learning_rate" in printed(capsys, monkeypatch, "fit", "--model.help", "my_own_net.MyOwnNet")


def test_examples_named_in_the_help_exist() -> None:
    named = set(re.findall(r"example_configs/\S+\.yaml", training._EPILOG))
    assert {f"example_configs/{path.name}" for path in CONFIGS.glob("digits_*.yaml")} <= named
    assert all((CONFIGS.parent / name).is_file() for name in named)


def test_bad_option_of_the_callback_is_refused_before_training(tmp_path: Path) -> None:
    """By a new interpreter, which imports everything by itself."""
    options = ("--config", str(CONFIGS / "digits_cnn.yaml"), "--trainer.callbacks.init_args.nun_eigenvalues", "20")
    done = subprocess.run(
        [sys.executable, "-m", MODULE, "fit", *options],
        cwd=tmp_path,
        env=environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 2
    assert "nun_eigenvalues" in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(("threads", "code"), [("2", 0), ("0", 2)])
def test_number_of_threads(tmp_path: Path, threads: str, code: int) -> None:
    source = """
        import torch
        from hessian_callback.demos import DigitsCNN
        class Telling(DigitsCNN):
            def on_fit_start(self):
                print("threads:", torch.get_num_threads())
    """
    (tmp_path / "telling.py").write_text(textwrap.dedent(source))
    done = command(
        *("fit", "--model", "telling.Telling", "--data", "hessian_callback.demos.DigitsData"),
        *("--trainer.fast_dev_run", "true", "--trainer.accelerator", "cpu", "--num_threads", threads),
        cwd=tmp_path,
    )
    assert done.returncode == code, done.stderr
    assert "threads: 2" in done.stdout if code == 0 else "num_threads" in done.stderr


def test_missing_jsonargparse_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    with pytest.raises(SystemExit) as stopped:
        cli.main(["fit"])
    assert stopped.value.code == 2
    assert "pip install 'hessian-callback[demo]'" in capsys.readouterr().err


CNN = ("fit", "--config", str(CONFIGS / "digits_cnn.yaml"), "--trainer.logger", "false")
CALLBACK = "--trainer.callbacks.init_args"


def refused(arguments: Sequence[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which the command line refuses arguments."""
    with pytest.raises(SystemExit) as stopped:
        cli.main(list(arguments))
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    sentences = [line for line in text.splitlines() if line.startswith("hessian-callback: ")]
    assert len(sentences) == 1, text
    assert "Traceback" not in text
    assert len(sentences[0]) < 800
    return sentences[0]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([f"{CALLBACK}.num_eigenvalues", "1"], "num_eigenvalues"),
        ([f"{CALLBACK}.solver", "hessian_callback.Lanczos", f"{CALLBACK}.solver.rtol", "2"], "rtol"),
        ([f"{CALLBACK}.num_samples", "-3"], "num_samples"),
        ([f"{CALLBACK}.every_n_epochs", "-1"], "every_n_epochs"),
        ([f"{CALLBACK}.num_eigenvalues", "many"], "num_eigenvalues"),
        (["--trainer.callbacks+=hessian_callback.NoSuchCallback"], "NoSuchCallback"),
        (["--model", "no_such_module.Model"], "no_such_module"),
        (["--model.learning_rat", "1"], "learning_rat"),
        (["--data.batch_size", "0"], "batch_size"),
        (["--trainer.max_epochs", "-7"], "max_epochs"),
        (["--trainer.accelerator", "abacus"], "abacus"),
        (["--trainer.devices", "0"], "devices"),
        (["--config", "missing.yaml"], "missing.yaml"),
        (["--ckpt_path", "missing.ckpt"], "File does not exist: 'missing.ckpt'"),
    ],
)
def test_an_option_out_of_range_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert words in refused([*CNN, *arguments], capsys)


@pytest.mark.parametrize(("name", "content"), [("bomb.yaml", "a: ["), ("binary.yaml", "\0"), ("list.yaml", "- 1")])
def test_a_bad_file_of_settings_is_one_sentence(
    name: str, content: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(content)
    assert refused(["fit", "--config", str(tmp_path / name)], capsys)


@pytest.mark.parametrize(
    ("command", "content"),
    # To validate needs no history.
    [*itertools.product(["fit", "validate"], ["", "random", "other model"]), ("fit", "foreign history")],
)
def test_an_unreadable_checkpoint_is_one_sentence(
    command: str, content: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "a.ckpt"
    if content in ("", "random"):
        path.write_bytes(content.encode())
    else:
        trainer = fit(max_epochs=1)
        trainer.save_checkpoint(path)
        state = torch.load(path, weights_only=True)
        if content == "other model":
            state["state_dict"] = {"other.weight": torch.zeros(3)}
        else:
            state["callbacks"]["PowerLawHessianCallback{'prefix': 'hessian'}"] = {"version": 1, "history": 3, "time": 0}
        torch.save(state, path)
    sentence = refused([command, *CNN[1:], "--ckpt_path", str(path)], capsys)
    assert "the checkpoint of --ckpt_path can't be loaded" in sentence
    if content == "foreign history":
        assert "resume with another prefix" in sentence


@pytest.mark.parametrize("where", ["training_step", "configure_optimizers"])
def test_an_error_of_the_users_own_code_keeps_its_traceback(
    where: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise ValueError("a bug of the model")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(DigitsCNN, where, broken)
    with pytest.raises(ValueError, match="a bug of the model"):
        cli.main([*CNN, "--trainer.max_epochs", "1"])


def test_the_traceback_can_be_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JSONARGPARSE_DEBUG", "true")
    with pytest.raises(ValueError, match="num_eigenvalues"):
        cli.main([*CNN, f"{CALLBACK}.num_eigenvalues", "1"])


# -- both packages ---------------------------------------------------------------------------------

# A model, data and a callback of one package, which a test writes into a file of their own.
THEIRS = """
import torch
import {package} as pl
from torch.utils.data import DataLoader, TensorDataset

class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(5, 3)

    def step(self, batch, batch_idx):
        return torch.nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    training_step = validation_step = step

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

class Data(pl.LightningDataModule):
    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(32, 5, generator=generator)
        return DataLoader(TensorDataset(x, x.argmax(1) % 3), batch_size=8)

    val_dataloader = train_dataloader

class Stop(pl.callbacks.EarlyStopping):
    pass

class Plain(torch.nn.Module):
    pass
"""


@pytest.fixture(scope="module", params=["lightning.pytorch", "pytorch_lightning"])
def theirs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The name of a module with classes of one package."""
    pytest.importorskip(request.param)
    folder, name = tmp_path_factory.mktemp("theirs"), f"theirs_{request.param.partition('.')[0]}"
    (folder / f"{name}.py").write_text(THEIRS.format(package=request.param))
    sys.path.append(str(folder))
    yield name
    sys.path.remove(str(folder))


@pytest.mark.parametrize("command", ["fit", "validate", "spectrum"])
def test_commands_take_models_of_each_package(
    command: str, theirs: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    options = ["--trainer.accelerator", "cpu", "--trainer.max_epochs", "1"]
    if command == "spectrum":
        options += ["--num_eigenvalues", "4"]
    else:
        options += ["--trainer.callbacks+=hessian_callback.PowerLawHessianCallback", f"{CALLBACK}.num_eigenvalues", "4"]
        # By its name alone it is that of the model's package.
        options += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.logger=CSVLogger", "--trainer.logger.save_dir=."]
    cli.main([command, "--model", f"{theirs}.Net", "--data", f"{theirs}.Data", *options])
    assert re.search(
        r"^ *(epoch 0|validation) +\d+ +[\d.]+ +[\d.]+ ± [\d.]+ +[\d.]+ +4 ", capsys.readouterr().out, re.M
    )


@pytest.mark.parametrize("mixed", [["--data", "OURS"], ["--trainer.callbacks+=STOP"]])
def test_classes_of_two_packages_are_refused_with_the_reason(
    mixed: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    names = []
    for package in ("lightning.pytorch", "pytorch_lightning"):
        pytest.importorskip(package)
        names.append(f"mixed_{package.partition('.')[0]}")
        (tmp_path / f"{names[-1]}.py").write_text(THEIRS.format(package=package))
    one, two = names
    given = [part.replace("OURS", f"{two}.Data").replace("STOP", f"{two}.Stop") for part in mixed]
    sys.path.append(str(tmp_path))
    try:
        sentence = refused(["fit", "--model", f"{one}.Net", "--data", f"{one}.Data", *given], capsys)
    finally:
        sys.path.remove(str(tmp_path))
    assert "a Trainer accepts classes of one package" in sentence
    assert f"{two}." in sentence
    assert f"{one}." in sentence


def test_a_class_of_no_package_is_not_blamed_on_the_packages(
    theirs: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sentence = refused(["fit", "--model", f"{theirs}.Plain", "--data", f"{theirs}.Data"], capsys)
    assert "of one package" not in sentence
    assert "Plain" in sentence


@pytest.mark.parametrize("arguments", [["report", "nowhere"], ["study", "nowhere.yaml"], ["study", "--help"]])
def test_commands_that_train_nothing_do_not_import_lightning(arguments: list[str]) -> None:
    program = f"""
import sys
from hessian_callback.cli.main import main
try:
    main({arguments!r})
except SystemExit:
    pass
sys.exit(any(name.partition('.')[0] in ('lightning', 'pytorch_lightning') for name in sys.modules))
"""
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment(), check=True, capture_output=True)


@pytest.mark.parametrize(
    ("option", "remedy"),
    [
        (
            "--trainer.callbacks.0.init_args.num_eigenvalues",
            "--trainer.callbacks.init_args.num_eigenvalues sets the option of the last callback",
        ),
        ("--trainer.logger.0.init_args.name", "--trainer.logger.init_args.name sets the option of the last logger"),
    ],
)
def test_a_number_in_a_list_is_refused_with_the_way_to_write_it(
    option: str, remedy: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        cli.main(["fit", "--config", str(CONFIGS / "digits_cnn.yaml"), option, "20"])
    text = capsys.readouterr().err
    assert "of one package" not in text
    assert remedy in text


@pytest.mark.parametrize(
    ("option", "value"),
    [(f"{CALLBACK}.solver.rtol", "2"), (f"{CALLBACK}.extras", "{a: 1}"), ("--trainer.callbacks", "{a: 1}")],
)
def test_a_value_that_no_package_accepts_is_not_blamed_on_the_packages(
    option: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = refused([*CNN, option, value], capsys)
    assert "of one package" not in sentence
    assert "trainer.callbacks" in sentence


def test_run_without_the_callback_says_how_to_add_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu"))
    assert "--trainer.callbacks+=hessian_callback.PowerLawHessianCallback" in capsys.readouterr().out


def test_a_run_with_the_monitor_alone_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    from hessian_callback import EdgeOfStabilityMonitor
    from hessian_callback.measurement.edge import EdgeMeasurement

    monitor = EdgeOfStabilityMonitor()
    for step, ratio in ((0, 0.5), (50, 1.25), (100, 0.75), (150, None)):
        reason = "the loss is NaN" if ratio is None else None
        monitor.history.append(
            EdgeMeasurement(0, step, "step", ratio=ratio, ratio_error=0.01, lr=0.1, max_lr=0.1, reason=reason)
        )
    print_report(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[monitor]))
    text = capsys.readouterr().out
    assert "Nothing was measured" not in text
    assert "edge: 4 measurements, 3 of them with a ratio" in text
    assert "the largest ratio: epoch 0, step 50: 1.250 ± 0.010 of the edge of stability" in text
    assert "the last one: epoch 0, step 150: no ratio (the loss is NaN)" in text


def test_other_loggers_are_not_passed_off_as_tensorboard(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    print_report(Trainer(logger=CSVLogger(tmp_path), enable_checkpointing=False, accelerator="cpu"))
    assert "TensorBoard" not in capsys.readouterr().out


def test_only_rank_zero_reports(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(SimpleNamespace(is_global_zero=False))  # type: ignore[arg-type]
    assert capsys.readouterr().out == ""


def test_wide_table_is_not_cut_in_a_narrow_log(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from hessian_callback import PowerLawHessianCallback
    from hessian_callback.measurement.measurement import Measurement

    callback = PowerLawHessianCallback()
    callback.history.append(Measurement(2, 123456789, "validate", None, None, "failed", 0.25, loss=12345.678))
    monkeypatch.setenv("COLUMNS", "30")
    print_report(Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", callbacks=[callback]))
    text = capsys.readouterr().out
    assert "123456789" in text
    assert "12345.6780" in text


def test_plain_table_where_rich_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from hessian_callback import PowerLawHessianCallback
    from hessian_callback.measurement.measurement import Measurement

    callback = PowerLawHessianCallback()
    callback.history.append(Measurement(2, 40, "epoch", None, None, "the loss is NaN", 0.25, loss=float("nan")))
    monkeypatch.setitem(sys.modules, "rich", None)
    print_report(Trainer(logger=False, enable_checkpointing=False, enable_progress_bar=False, callbacks=[callback]))
    lines = capsys.readouterr().out.splitlines()
    assert "   when  step  loss  slope  fit error  K  HVPs  seconds" in lines
    assert "epoch 2    40   nan      -          -  -     -      0.2" in lines
    assert "epoch 2, step 40: not logged, because the loss is NaN" in lines
