"""The commands ``fit``, ``validate`` and ``spectrum``: a LightningCLI of the package that the model belongs to."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from hessian_callback._version import __version__
from hessian_callback.callbacks.lightning_packages import PACKAGES, package_of
from hessian_callback.callbacks.power_law import PowerLawHessianCallback
from hessian_callback.callbacks.trainer_state import callbacks_of
from hessian_callback.cli.errors import HelpfulParser, ParserError, describe_refusal, describe_user_error, exit_with
from hessian_callback.cli.spectrum import check_output, measure_module, write_spectrum
from hessian_callback.cli.summary import print_history, print_report, relative_path

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
else:
    # Mixed with the classes of one package by `_of_package`.
    LightningArgumentParser = LightningCLI = object

__all__ = ["HessianCLI", "SpectrumCLI", "main"]

_DESCRIPTION = """\
Measure the power-law slope of a network's Hessian spectrum while it trains.

  fit        train a model, and measure it with PowerLawHessianCallback
  spectrum   measure a model or a checkpoint without training
  validate   validate a checkpoint, and measure it
  report     make an HTML page and a CSV of one run or several
  study      run a grid of trainings and compare their measurements with published figures
"""

_EPILOG = """\
a first run (a minute, no download; it writes below runs/):
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
        parser: LightningArgumentParser = _of_package(HelpfulParser, "LightningArgumentParser", package_of(self))(
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
            print_history(callback, [measurement])
        if output is not None:
            write_spectrum(measurement, output)
            print(f"Eigenvalues with error bounds: {relative_path(output)}")


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


def _of_package(kind: type, base: str, package: str) -> Any:
    """Derive a class from a class of a package's command line."""
    return type(kind.__name__, (kind, getattr(import_module(f"{package}.cli"), base)), {"__doc__": kind.__doc__})


def main(args: Sequence[str] | None = None) -> None:
    """Run a command of LightningCLI, as `hessian_callback.cli.main.main` does for all of them."""
    given = sys.argv[1:] if args is None else list(args)
    if find_spec("jsonargparse") is None:
        exit_with(
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
        sentence = describe_user_error(error)
        if sentence is None or "JSONARGPARSE_DEBUG" in os.environ:
            raise
        exit_with(sentence, remedy="With JSONARGPARSE_DEBUG=true in the environment the traceback is shown.")
    if refusals:
        message, remedy = describe_refusal(refusals)
        exit_with(message, remedy=remedy)


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
        except ParserError as error:  # noqa: PERF203
            refusals[package] = error.message
            # No other refusal is due to the package.
            if "subclass" not in error.message:
                return {package: error.message}
        else:
            return {}
    return refusals
