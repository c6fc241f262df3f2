"""The command ``hessian-callback``: a LightningCLI that prints a table of the measurements at the end."""

from __future__ import annotations

import os
import re
import shutil
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch

from hessian_callback._version import __version__
from hessian_callback.callbacks.lightning_packages import CONFIGURATION_ERRORS, PACKAGES, Trainer, is_a, package_of
from hessian_callback.callbacks.moved_options import MOVED_OPTIONS
from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.callbacks.trainer_state import callbacks_of
from hessian_callback.cli.spectrum import check_output, measure_module, write_spectrum
from hessian_callback.measurement.errors import UserCodeError
from hessian_callback.measurement.measurement import Measurement

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    # Mixed with the classes of one package by `_of_package`.
    LightningArgumentParser = LightningCLI = object

__all__ = ["HessianCLI", "main", "print_report", "stop_messages", "table_row"]

_MOST_CHARACTERS = 600
# The modules of Lightning that load checkpoints.
_CHECKPOINTS = tuple(f"{package}.trainer.connectors.checkpoint_connector" for package in PACKAGES)
_CALLBACKS = tuple(f"{package}.callbacks." for package in PACKAGES)
# Packages whose own checks refuse options and files.
_CHECKING = (
    *("hessian_callback.", "lightning.", "pytorch_lightning.", "lightning_fabric."),
    *("torch.optim.", "torch.utils.data."),
)
# Types of errors by which a class refuses its options.
_REFUSALS: tuple[type[Exception], ...] = (
    ValueError,
    TypeError,
    RuntimeError,
    OSError,
    ImportError,
    *CONFIGURATION_ERRORS,
)

_DESCRIPTION = """\
Measure the power-law slope of a network's Hessian spectrum while it trains.

  fit        train a model, and measure it with PowerLawHessianCallback
  spectrum   measure a model or a checkpoint without training
  validate   validate a checkpoint, and measure it
  report     make an HTML page and a CSV of one run or several
  study      run a grid of trainings and compare their measurements with published figures
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

the measurements of a run as a page, beside its losses; or several runs side by side:
  hessian-callback report runs/digits_cnn/version_0
  hessian-callback report runs

a grid of runs, such as an experiment of the paper, and its table; --help has more:
  hessian-callback study example_configs/studies/mnist_width.yaml --processes 2

your own model and data, any LightningModule and LightningDataModule that Python can import:
  hessian-callback fit --model my_package.MyModel --data my_package.MyData \\
      --trainer.callbacks+=hessian_callback.PowerLawHessianCallback

all options, and all of them as a file to edit:
  hessian-callback fit --help
  hessian-callback fit --trainer.callbacks.help hessian_callback.PowerLawHessianCallback
  hessian-callback fit --config example_configs/digits_cnn.yaml --print_config > my.yaml

meaning, cost and limits of the numbers: docs/statistics.md; several processes and machines: docs/distributed.md;
tested models and precisions: docs/compatibility.md
"""


class HessianCLI(LightningCLI):
    """A LightningCLI for any model and data module, reporting the measurements of its callbacks.

    `main` derives it from the LightningCLI of the package that the model belongs to.
    """

    # Lightning calls its static method of this name on the instance.
    @classmethod
    def subcommands(cls) -> dict[str, set[str]]:
        """Return the trainer's methods that measure; ``test`` and ``predict`` do not."""
        return {name: skip for name, skip in super().subcommands().items() if name in ("fit", "validate")}

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Make a parser whose errors name a remedy."""
        kwargs.setdefault("dump_header", [f"hessian-callback {__version__}"])
        parser: LightningArgumentParser = _of_package(_HelpfulParser, "LightningArgumentParser", package_of(self))(
            **kwargs
        )
        parser.add_argument("-c", "--config", action="config", help="Path to a configuration file in yaml format.")
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add options of the process."""
        from jsonargparse.typing import PositiveInt

        parser.add_argument(
            "--num_threads",
            type=PositiveInt | None,
            default=None,
            help="Number of CPU threads of torch; default: torch's own choice. One is often as fast for small "
            "networks, and does not wait for a core that another process uses.",
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
        callbacks = [one for one in callbacks_of(self.trainer) if isinstance(one, PowerLawHessianCallback)]
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


def _formatter() -> type[Any]:
    """Make the formatter of the help; jsonargparse is optional, so it is imported when it is used."""
    from jsonargparse import DefaultHelpFormatter

    class Formatter(DefaultHelpFormatter):
        """Keeps the line breaks of the examples; wraps all other texts as usual."""

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            if text in (_DESCRIPTION, _EPILOG):
                return text
            return super()._fill_text(text, width, indent)

    return Formatter


class _HelpfulParser(LightningArgumentParser):
    """A parser whose errors are a sentence and a remedy."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message and a remedy, without the list of all options."""
        if not getattr(self, "exit_on_error", True):
            super().error(message, ex)
        raise _ParserError(message)


class _ParserError(SystemExit):
    """An error of the parser; LightningCLI expects a SystemExit."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


def _of_package(kind: type, base: str, package: str) -> Any:
    """Derive a class of this module from a class of a package's command line."""
    return type(kind.__name__, (kind, getattr(import_module(f"{package}.cli"), base)), {"__doc__": kind.__doc__})


def _refusal(refusals: dict[str, str]) -> tuple[str, str | None]:
    """Return the message for arguments that no package accepts, and its remedy if they mix classes of two packages.

    Example:
        >>> _refusal({"one": "no subclass. Given value: a.Net", "two": "no subclass. Given value: b.Data"})[0]
        'a Trainer accepts classes of one package, but a.Net is not one of one and b.Data is not one of two'
    """
    message, *_ = refusals.values()
    names = [_refused_class(refusal) for refusal in refusals.values()]
    if None in names or len(set(names)) == 1:
        # The same class is refused by all packages, so they are not the reason.
        return message, None
    refused = " and ".join(f"{name} is not one of {package}" for package, name in zip(refusals, names, strict=True))
    return (
        f"a Trainer accepts classes of one package, but {refused}",
        "Take the model, the data module and the callbacks from one package, lightning or pytorch_lightning.",
    )


def _refused_class(message: str) -> str | None:
    """Return the class that a message of the parser is about; ``None`` if it is about another kind of value.

    Example:
        >>> _refused_class("Given value: Namespace(class_path='a.Net', init_args=Namespace())")
        'a.Net'
        >>> _refused_class("Given value: NestedArg(key='0.init_args.seed', val=1)") is None
        True
    """
    found = re.search(r"Given value: (?:.*?class_path\W+)?([\w.]+)", message, re.S)
    # jsonargparse's mark of an option inside a value.
    return None if found is None or found[1] == "NestedArg" else found[1]


def _exit(message: str, *, remedy: str | None = None) -> NoReturn:
    """End the process with status 2 and a sentence on standard error, with the remedy in a line of its own."""
    sentence = " ".join(message.split())
    if len(sentence) > _MOST_CHARACTERS:
        sentence = f"{sentence[:_MOST_CHARACTERS]}…"
    sys.stderr.write(f"hessian-callback: {sentence}\n{_remedy(message) if remedy is None else remedy}\n")
    sys.exit(2)


def _user_error(error: Exception) -> str | None:
    """Describe an error that a user causes by options or files; ``None`` for any other one, whose traceback matters.

    An error counts as the user's if it was raised while objects were made from options, while a checkpoint was
    loaded, or by a check of this package, of Lightning, of an optimizer or of a loader.
    """
    frames = [
        (str(frame.f_globals.get("__name__")), frame.f_code.co_name)
        for frame, _ in traceback.walk_tb(error.__traceback__)
    ]
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, UserCodeError) and error.__cause__ is not None:
        return None  # A fault of the user's own code.
    if any(
        name == "_parse_ckpt_path"  # LightningCLI looks for hyperparameters in the checkpoint.
        or (module in _CHECKPOINTS and name.lstrip("_").startswith(("resume", "restore")))
        for module, name in frames
    ):
        return f"the checkpoint of --ckpt_path can't be loaded ({type(error).__name__}: {text})"
    if isinstance(error, _REFUSALS) and any(name == "instantiate_classes" for _, name in frames):
        return text
    innermost = frames[-1][0] if frames else ""
    if isinstance(error, (ValueError, OSError, ImportError, CONFIGURATION_ERRORS)):
        raised_by_check = innermost.startswith(_CHECKING)
    else:
        raised_by_check = type(error) is RuntimeError and innermost.startswith(_CALLBACKS)
    return text if raised_by_check or isinstance(error, CONFIGURATION_ERRORS) else None


def _remedy(message: str) -> str:
    """Return the remedy for an error of the parser.

    Example:
        >>> _remedy("the following arguments are required: fit.model")
        'Name a model with --model package.MyModel, or a file of settings with --config FILE.yaml.'
        >>> _remedy("Option 'rtol' is not accepted")
        'The option rtol of PowerLawHessianCallback is now solver=Lanczos(rtol=...).'
    """
    refused = re.search(r"Option '(\w+)' is not accepted", message)
    if refused and refused[1] in MOVED_OPTIONS:
        return f"The option {refused[1]} of PowerLawHessianCallback is now {MOVED_OPTIONS[refused[1]]}."
    numbered = re.search(r"NestedArg\(key='\d+\.([\w.]+)'", message)
    if numbered:
        return (
            f"Entries of a list have no numbers on the command line: --trainer.callbacks.{numbered[1]} sets the option "
            "of the last callback. Set those of others in a file."
        )
    if "File does not exist" in message:
        return f"Paths count from the current folder, {Path.cwd()}; the examples lie in example_configs/ of a clone."
    if "arguments are required" in message and ".model" in message:
        return "Name a model with --model package.MyModel, or a file of settings with --config FILE.yaml."
    if "subclass of Lightning" in message:
        return "A model is a LightningModule and data are a LightningDataModule, of lightning or of pytorch_lightning."
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

    Raises:
        SystemExit: with status 2, a sentence and a remedy, if options or files are not usable.
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
        _exit(
            "the command line needs jsonargparse, which is not installed",
            remedy="pip install 'hessian-callback[demo]'. The callback itself works without it.",
        )
    if str(Path.cwd()) not in sys.path:
        # `python -m` finds modules in the current directory, a console script does not; one's own model is there.
        sys.path.append(str(Path.cwd()))
    if args is None and len(sys.argv) == 1:
        # Without a sub-command, explain them.
        args = ["--help"]
    options: dict[str, Any] = {
        "parser_kwargs": {
            "prog": "hessian-callback",
            "version": __version__,
            "description": _DESCRIPTION,
            "epilog": _EPILOG,
            "formatter_class": _formatter(),
        },
    }
    try:
        refusals = _run(args, given, options)
    except Exception as error:
        sentence = _user_error(error)
        if sentence is None or "JSONARGPARSE_DEBUG" in os.environ:
            raise
        _exit(sentence, remedy="With JSONARGPARSE_DEBUG=true in the environment the traceback is shown.")
    if refusals:
        message, remedy = _refusal(refusals)
        _exit(message, remedy=remedy)


def _run(args: Sequence[str] | None, given: Sequence[str], options: dict[str, Any]) -> dict[str, str]:
    """Run a command with the package whose classes the arguments name.

    Returns:
        Why the arguments were refused, by package; empty if the command was run.
    """
    refusals: dict[str, str] = {}
    for package in PACKAGES:
        try:
            if given[:1] == ["spectrum"]:
                cli = _of_package(SpectrumCLI, "LightningCLI", package)
                cli(run=False, save_config_callback=None, args=given[1:], **options).run()
            else:
                _of_package(HessianCLI, "LightningCLI", package)(
                    # A run's folder is new for each run, unless a logger has a fixed version.
                    save_config_kwargs={"overwrite": True},
                    args=None if args is None else list(args),
                    **options,
                )
        except _ParserError as error:  # noqa: PERF203
            refusals[package] = error.message
            # No other refusal is due to the package.
            if "subclass" not in error.message:
                return {package: error.message}
        else:
            return {}
    return refusals


# -- the report ------------------------------------------------------------------------------------


def print_report(trainer: Trainer) -> None:
    """Print the measurements of a trainer's callbacks, why it stopped early, and the paths of its curves."""
    if not trainer.is_global_zero:
        return
    measuring = [one for one in callbacks_of(trainer) if isinstance(one, PowerLawHessianCallback)]
    for callback in measuring:
        _print_history(callback)
    if not measuring:
        print(
            "Nothing was measured: no PowerLawHessianCallback is among the trainer's callbacks. Add it with\n"
            "  --trainer.callbacks+=hessian_callback.PowerLawHessianCallback"
        )
    for message in stop_messages(trainer):
        print(f"\n{message}")
    loggers: list[Any] = trainer.loggers
    for logger in loggers:
        if is_a(logger, "TensorBoardLogger"):
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
            print(f"{measurement.location}, step {measurement.step}: not logged, because {measurement.reason}")
    fits = [measurement.fit for measurement in history if measurement.fit is not None]
    if fits:
        last = fits[-1]
        print(
            f"At 5 % a power law is rejected above a fit error of {last.critical_distance_fitted:.3f} "
            f"(K = {last.num_eigenvalues}, exponent fitted; the paper has {last.critical_distance_paper:.3f})."
        )


def table_row(measurement: Measurement) -> list[str]:
    """Return a measurement as the cells of the table; unknown values are dashes.

    Example:
        >>> failed = Measurement(epoch=3, step=120, when="epoch", spectrum=None, fit=None,
        ...                      reason="the loss is NaN", seconds=0.21)
        >>> table_row(failed)
        ['epoch 3', '120', '-', '-', '-', '-', '-', '0.2']
    """
    m = measurement
    return [
        m.location,
        str(m.step),
        "-" if m.loss is None else f"{m.loss:.4f}",
        "-" if m.slope is None else f"{m.slope:.3f} ± {m.slope_stderr:.3f}",
        "-" if m.fit_error is None else f"{m.fit_error:.3f}",
        "-" if m.num_fitted is None else str(m.num_fitted),
        "-" if m.num_hvps is None else str(m.num_hvps),
        f"{m.seconds:.1f}",
    ]


def stop_messages(trainer: Trainer) -> list[str]:
    """Describe which early stopping ended the training, at which value and epoch; empty if none did."""
    if not trainer.should_stop:
        return []
    messages = []
    stoppers: list[Any] = trainer.early_stopping_callbacks
    for stopper in stoppers:
        # Lightning before 2.6 stores no reason, and the epoch of a stopper that did not stop is 0.
        stopped = getattr(stopper, "stopping_reason_message", "unknown") is not None
        if not stopped or stopper.stopped_epoch != trainer.current_epoch - 1:
            continue
        if hasattr(stopper, "on_hessian_measured"):  # PowerLawEarlyStopping, whose message is complete.
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
    """Return a path relative to the current directory if it lies below it."""
    absolute = Path(path).absolute()
    return str(absolute.relative_to(Path.cwd())) if absolute.is_relative_to(Path.cwd()) else str(absolute)


def _tensorboard() -> str:
    """Return the command that starts TensorBoard, with its path if this environment's scripts are not on PATH."""
    own = Path(sys.executable).with_name("tensorboard")
    found = shutil.which("tensorboard")
    return _shown(str(own)) if own.exists() and (found is None or Path(found) != own) else "tensorboard"


if __name__ == "__main__":
    main()
