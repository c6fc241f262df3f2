"""The command ``hessian-callback``: a LightningCLI that ends with a table of what was measured, and a report."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger

from hessian_callback._version import __version__
from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.cli.spectrum import check_output, measure_module, write_spectrum
from hessian_callback.measurement.measurement import Measurement

__all__ = ["HessianCLI", "main", "print_report", "stop_messages", "table_row"]

_DESCRIPTION = """\
Measure the power-law slope of a network's Hessian spectrum while it trains.

  fit        train a model, measuring as PowerLawHessianCallback is told to
  spectrum   measure a model or a checkpoint without training
  validate   validate a checkpoint, and measure it
  report     make an HTML page and a CSV of one run or several
  study      run a grid of trainings and compare what they measure with printed figures
"""

_EPILOG = """\
a first run (half a minute, no download; it writes below runs/):
  hessian-callback fit --config example_configs/digits_cnn.yaml

the same, changed on the command line; a later option overrides the file:
  hessian-callback fit --config example_configs/digits_cnn.yaml \\
      --trainer.max_epochs 3 --model.learning_rate 0.01

a run that stops by itself when the slope stops rising:
  hessian-callback fit --config example_configs/digits_early_stopping.yaml

the slope of a checkpoint, without training:
  hessian-callback spectrum --config example_configs/digits_cnn.yaml --ckpt_path FILE.ckpt \\
      --output eigenvalues.csv

what a run measured as a page to look at, beside its losses; or several runs side by side:
  hessian-callback report runs/digits_cnn/version_0
  hessian-callback report runs

a grid of runs, such as an experiment of the paper, and its table; --help has more:
  hessian-callback study example_configs/studies/mnist_width.yaml --processes 2

your own model and data, any LightningModule and LightningDataModule that Python can import:
  hessian-callback fit --model my_package.MyModel --data my_package.MyData \\
      --trainer.callbacks+=hessian_callback.PowerLawHessianCallback

what can be set, and the whole of it as a file to edit:
  hessian-callback fit --help
  hessian-callback fit --trainer.callbacks.help hessian_callback.PowerLawHessianCallback
  hessian-callback fit --config example_configs/digits_cnn.yaml --print_config > my.yaml

what the numbers mean, cost and hide: docs/statistics.md; several processes and machines: docs/distributed.md;
which models and precisions were tried: docs/compatibility.md
"""


class HessianCLI(LightningCLI):
    """A LightningCLI for any model and data module, reporting the measurements of its callbacks."""

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The trainer's methods that measure; ``test`` and ``predict`` do not."""
        return {name: skip for name, skip in LightningCLI.subcommands().items() if name in ("fit", "validate")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose errors say what to do."""
        kwargs.setdefault("dump_header", [f"hessian-callback {__version__}"])
        parser = _HelpfulParser(**kwargs)
        parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in yaml format.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add what concerns the process rather than model, data or trainer."""
        from jsonargparse.typing import PositiveInt

        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="Threads that torch uses on the CPU; its own choice unless given. One is often as fast for small "
            "networks, and does not wait for a core that another process holds.",
        )

    def before_instantiate_classes(self) -> None:
        """Set the number of threads before anything is computed, and check the checkpoint."""
        path = self._get(self.config, "ckpt_path")
        if path is not None and path not in ("best", "last", "hpc") and "://" not in path and not Path(path).exists():
            self.parser.error(f"ckpt_path: File does not exist: '{path}'")
        threads = self._get(self.config, "num_threads")
        if threads is not None:
            torch.set_num_threads(threads)

    def after_fit(self) -> None:
        """Report the measurements of the run."""
        print_report(self.trainer)

    def after_validate(self) -> None:
        """Report the measurement of the checkpoint."""
        print_report(self.trainer)


class SpectrumCLI(HessianCLI):
    """Measures a model or a checkpoint, without training or validating."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the checkpoint, the output file, and the measurement's size."""
        from jsonargparse.typing import PositiveInt

        super().add_arguments_to_parser(parser)
        parser.add_argument("--ckpt_path", type=str | None, default=None, help="The checkpoint; default: none.")
        parser.add_argument(
            "--output",
            type=str | None,
            default=None,
            help="A .csv or .json file for the eigenvalues with their error bounds.",
        )
        parser.add_argument(
            "--num_eigenvalues",
            type=PositiveInt,
            default=50,
            help="How many eigenvalues, if no PowerLawHessianCallback is configured.",
        )
        parser.add_argument(
            "--num_samples",
            type=PositiveInt,
            default=1024,
            help="How many samples, if no PowerLawHessianCallback is configured.",
        )

    def before_instantiate_classes(self) -> None:
        """Open the output before the work."""
        super().before_instantiate_classes()
        # The measurement is printed, and written to the output: a folder of logs would be empty.
        self.config["trainer.logger"] = False
        output = self._get(self.config, "output")
        if output is not None:
            try:
                check_output(output)
            except (OSError, ValueError) as error:
                self.parser.error(str(error))

    def run(self) -> None:
        """Measure once for each configured callback, print and write the result."""
        callbacks = [one for one in self.trainer.callbacks if isinstance(one, PowerLawHessianCallback)]  # type: ignore[attr-defined]
        output = self._get(self.config, "output")
        if output is not None and len(callbacks) > 1:
            self.parser.error(
                f"output={output!r} holds one spectrum, and {len(callbacks)} callbacks are configured; keep one"
            )
        if not callbacks:
            chosen = {name: self._get(self.config, name) for name in ("num_eigenvalues", "num_samples")}
            callbacks = [PowerLawHessianCallback(**chosen)]
        for callback in callbacks:
            measurement = measure_module(
                self.trainer, self.model, self.datamodule, callback, self._get(self.config, "ckpt_path")
            )
            _print_history(callback, [measurement])
        if output is not None:
            write_spectrum(measurement, output)
            print(f"Eigenvalues with error bounds: {_shown(output)}")


class _HelpfulParser(LightningArgumentParser):
    """A parser that says in a few lines what is wrong and what to do."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """End with the message and a remedy, without the hundred options in between."""
        if not getattr(self, "exit_on_error", True):
            super().error(message, ex)
        sys.stderr.write(f"hessian-callback: {message.strip()}\n{_remedy(message)}\n")
        sys.exit(2)


def _remedy(message: str) -> str:
    """What helps against an error of the parser.

    Example:
        >>> _remedy("the following arguments are required: fit.model")
        'Name a model with --model package.MyModel, or a file of settings with --config FILE.yaml.'
    """
    if "File does not exist" in message:
        return f"Paths count from the current folder, {Path.cwd()}; the examples lie in example_configs/ of a clone."
    if "arguments are required" in message and ".model" in message:
        return "Name a model with --model package.MyModel, or a file of settings with --config FILE.yaml."
    if "No module named" in message or "has no attribute" in message:
        return (
            "A class is named with its module, as in package.module.MyClass. Installed packages and the current folder "
            "are searched."
        )
    if "invalid choice" in message:
        return "The commands are fit, spectrum, validate, report and study; hessian-callback --help has examples."
    return "All options: hessian-callback fit --help; those of a class: --trainer.callbacks.help or --model.help CLASS."


def main(args: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        args: the arguments behind the program's name; ``None`` for those of the process.
    """
    given = sys.argv[1:] if args is None else list(args)
    if given[:1] == ["report"]:
        from hessian_callback.reports import report

        report.main(given[1:])
        return
    if given[:1] == ["study"]:
        from hessian_callback.studies import command

        command.main(given[1:])
        return
    if find_spec("jsonargparse") is None:
        sys.exit(
            "hessian-callback: the command line needs jsonargparse, which is not installed; "
            "pip install 'hessian-callback[demo]'. The callback itself works without it."
        )
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Keeps the line breaks of the examples; wraps everything else as usual."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            if text in (_DESCRIPTION, _EPILOG):
                return text
            return super()._fill_text(text, width, indent)

    if str(Path.cwd()) not in sys.path:
        # `python -m` finds modules in the current directory, a console script does not; one's own model is there.
        sys.path.append(str(Path.cwd()))
    if args is None and len(sys.argv) == 1:
        # Without a sub-command there is nothing to do but to explain them.
        args = ["--help"]
    options: dict[str, Any] = {
        "parser_kwargs": {
            "prog": "hessian-callback",
            "version": __version__,
            "description": _DESCRIPTION,
            "epilog": _EPILOG,
            "formatter_class": Formatter,
        },
    }
    if given[:1] == ["spectrum"]:
        SpectrumCLI(run=False, save_config_callback=None, args=given[1:], **options).run()
        return
    HessianCLI(
        # A run's folder is new for each run, but not where a logger is told its version.
        save_config_kwargs={"overwrite": True},
        args=None if args is None else list(args),
        **options,
    )


# -- the report ------------------------------------------------------------------------------------


def print_report(trainer: Trainer) -> None:
    """Print what a trainer's callbacks measured, why it stopped early and where its curves are."""
    if not trainer.is_global_zero:
        return
    measuring = [c for c in trainer.callbacks if isinstance(c, PowerLawHessianCallback)]  # type: ignore[attr-defined]
    for callback in measuring:
        _print_history(callback)
    if not measuring:
        print(
            "Nothing was measured: no PowerLawHessianCallback is among the trainer's callbacks. Add it with\n"
            "  --trainer.callbacks+=hessian_callback.PowerLawHessianCallback"
        )
    for message in stop_messages(trainer):
        print(f"\n{message}")
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            print(f"\nTensorBoard files: {_shown(logger.log_dir)}")
            print(f"Look at them with: {_tensorboard()} --logdir {_shown(logger.root_dir)}")


def _print_history(callback: PowerLawHessianCallback, history: Sequence[Measurement] | None = None) -> None:
    history = callback.history if history is None else history
    print()
    if not history:
        print(f"{callback.prefix}: no measurement was made.")
        return
    header = ["when", "step", "loss", "slope", "fit error", "K", "HVPs", "seconds"]
    rows = [table_row(measurement) for measurement in history]
    title = f"Power law of the Hessian's largest eigenvalues ({callback.prefix}/*)"
    if find_spec("rich") is None:
        widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
        print(title)
        for row in [header, *rows]:
            print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))
    else:
        from rich import box
        from rich.console import Console
        from rich.table import Table

        table = Table(*header, title=title, title_justify="left", box=box.SIMPLE_HEAD)
        for column in table.columns:
            column.justify, column.no_wrap = "right", True
        for row in rows:
            table.add_row(*row)
        console = Console()
        # A log file counts as 80 columns wide, and rich would rather cut digits off than go beyond.
        needed = Console(width=1000).measure(table).maximum
        console.width = max(console.width, needed)
        console.print(table)
    for measurement in history:
        if measurement.reason is not None:
            print(f"{_place(measurement)}, step {measurement.step}: not logged, because {measurement.reason}")
    fits = [measurement.fit for measurement in history if measurement.fit is not None]
    if fits:
        last = fits[-1]
        print(
            f"At 5 % a power law is rejected above a fit error of {last.critical_distance_fitted:.3f} "
            f"(K = {last.num_eigenvalues}, exponent fitted; the paper has {last.critical_distance_paper:.3f})."
        )


def table_row(measurement: Measurement) -> list[str]:
    """Return a measurement as the cells of the table; what is not known is a dash.

    Example:
        >>> failed = Measurement(epoch=3, step=120, when="epoch", spectrum=None, fit=None,
        ...                      reason="the loss is NaN", seconds=0.21)
        >>> table_row(failed)
        ['epoch 3', '120', '-', '-', '-', '-', '-', '0.2']
    """
    m = measurement
    return [
        _place(m),
        str(m.step),
        "-" if m.loss is None else f"{m.loss:.4f}",
        "-" if m.slope is None else f"{m.slope:.3f} ± {m.slope_stderr:.3f}",
        "-" if m.fit_error is None else f"{m.fit_error:.3f}",
        "-" if m.num_fitted is None else str(m.num_fitted),
        "-" if m.num_hvps is None else str(m.num_hvps),
        f"{m.seconds:.1f}",
    ]


def _place(measurement: Measurement) -> str:
    names = {"fit_start": "start", "fit_end": "end", "validate": "validation"}
    return names.get(measurement.when, f"epoch {measurement.epoch}")


def stop_messages(trainer: Trainer) -> list[str]:
    """Say which early stopping ended the training, on what value and at which epoch; empty if none did."""
    if not trainer.should_stop:
        return []
    messages = []
    for stopper in trainer.early_stopping_callbacks:
        assert isinstance(stopper, EarlyStopping)
        # Lightning before 2.6 keeps no reason, and a stopper that did not stop says epoch 0.
        stopped = getattr(stopper, "stopping_reason_message", "unknown") is not None
        if not stopped or stopper.stopped_epoch != trainer.current_epoch - 1:
            continue
        if hasattr(stopper, "on_hessian_measured"):  # PowerLawEarlyStopping, which has words of its own.
            messages.append(
                f"{type(stopper).__name__} stopped the training at epoch {stopper.stopped_epoch}: "
                f"{stopper.stopping_reason_message}."
            )
            continue
        value, best = float(trainer.callback_metrics[stopper.monitor]), float(stopper.best_score)
        message = (
            f"{type(stopper).__name__} stopped the training at epoch {stopper.stopped_epoch}: "
            f"{stopper.monitor} = {value:.3f}"
        )
        if stopper.wait_count >= stopper.patience:
            message += f", not better than its best, {best:.3f}, at {stopper.wait_count} checks in a row"
        messages.append(f"{message} (mode={stopper.mode}, patience={stopper.patience}).")
    return messages


def _shown(path: str) -> str:
    """A path as one would type it: relative, if it lies below the current directory."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _tensorboard() -> str:
    """The command that starts TensorBoard, with a path where this environment's scripts are not on PATH."""
    own = Path(sys.executable).with_name("tensorboard")
    found = shutil.which("tensorboard")
    return _shown(str(own)) if own.exists() and (found is None or Path(found) != own) else "tensorboard"


if __name__ == "__main__":
    main()
