"""Errors of the command line: a sentence with the cause, and a line with the remedy."""

from __future__ import annotations

import re
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from hessian_callback.callbacks.lightning_packages import CONFIGURATION_ERRORS, PACKAGES, packages_of
from hessian_callback.callbacks.moved_options import MOVED_OPTIONS
from hessian_callback.measurement.errors import UserCodeError

if TYPE_CHECKING:
    from lightning.pytorch.cli import LightningArgumentParser
else:
    # Mixed with the parser of one package.
    LightningArgumentParser = object

__all__ = ["HelpfulParser", "ParserError", "describe_refusal", "describe_user_error", "exit_with"]

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


class HelpfulParser(LightningArgumentParser):
    """A parser whose errors are a sentence and a remedy."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Exit with the message and a remedy, without the list of all options."""
        if not getattr(self, "exit_on_error", True):
            super().error(message, ex)
        raise ParserError(message)


class ParserError(SystemExit):
    """An error of the parser; LightningCLI expects a SystemExit."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


def describe_refusal(refusals: dict[str, str]) -> tuple[str, str | None]:
    """Return the message for arguments that no package accepts, and its remedy if they mix classes of two packages.

    Args:
        refusals: the message of the parser by package.

    Example:
        >>> describe_refusal({"lightning.pytorch": "rtol is not a number. Given value: many"})[0]
        'rtol is not a number. Given value: many'
    """
    foreign = {package: _foreign_class(message, package) for package, message in refusals.items()}
    for package, name in foreign.items():
        if name is None:  # Another package would not accept the value either.
            return refusals[package], None
    refused = " and ".join(f"{name} is not one of {package}" for package, name in foreign.items())
    return (
        f"a Trainer accepts classes of one package, but {refused}",
        "Take the model, the data module and the callbacks from one package, lightning or pytorch_lightning.",
    )


def _foreign_class(message: str, package: str) -> str | None:
    """Return the name of the class that the parser of a package refused because it is of another package only."""
    found = re.search(r"Given value: (?:.*?class_path\W+)?([\w.]+)", message, re.S)
    if found is None:
        return None
    module, _, name = found[1].rpartition(".")
    # The parser has imported it.
    kind = getattr(sys.modules.get(module), name, None)
    packages = packages_of(kind) if isinstance(kind, type) else []
    return found[1] if packages and package not in packages else None


def exit_with(message: str, *, remedy: str | None = None) -> NoReturn:
    """End the process with status 2 and a sentence on standard error, with the remedy in a line of its own."""
    sentence = " ".join(message.split())
    if len(sentence) > _MOST_CHARACTERS:
        sentence = f"{sentence[:_MOST_CHARACTERS]}…"
    sys.stderr.write(f"hessian-callback: {sentence}\n{_remedy(message) if remedy is None else remedy}\n")
    sys.exit(2)


def describe_user_error(error: Exception) -> str | None:
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
    numbered = re.search(r"Parser key \"([\w.]+)\".*NestedArg\(key='\d+\.([\w.]+)'", message, re.S)
    if numbered:
        entries, option = numbered.groups()
        return (
            f"Entries of a list have no numbers on the command line: --{entries}.{option} sets the option of the last "
            f"{entries.rpartition('.')[2].removesuffix('s')}. Set those of others in a file."
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
