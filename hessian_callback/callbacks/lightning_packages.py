"""The two packages of PyTorch Lightning, ``lightning`` and ``pytorch_lightning``.

Both contain the same classes, and an object of one package is no instance of the other's class. This module finds the
installed packages, defines base classes for callbacks that Trainers of both accept, and replaces ``isinstance`` by a
comparison of class names. All other modules import Lightning through it.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

__all__ = [
    "CONFIGURATION_ERRORS",
    "PACKAGES",
    "CallbackBase",
    "EarlyStoppingBase",
    "LightningDataModule",
    "LightningModule",
    "MisconfigurationException",
    "RunningStage",
    "Trainer",
    "TrainerFn",
    "base_of",
    "is_a",
    "package_of",
    "packages_of",
    "sibling",
]

# The name of each package, and that of the Fabric which it uses.
_FABRIC = {"lightning.pytorch": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
_PREFIXES = tuple(f"{name}." for name in (*_FABRIC, *_FABRIC.values()))


def _importable() -> tuple[str, ...]:
    """Import the installed packages; those that are imported already come first, then ``lightning``.

    A package that fails to import has no Trainer, so it matters only if there is no other.
    """
    found, errors = [], []
    for name in sorted(_FABRIC, key=lambda name: name not in sys.modules):
        try:
            import_module(name)
        except Exception as error:  # noqa: PERF203
            errors.append(f"{name}: {error}")
        else:
            found.append(name)
    if not found:
        raise ImportError(
            f"PyTorch Lightning cannot be imported ({'; '.join(errors)}); install it with "
            "pip install lightning or pip install pytorch-lightning"
        )
    return tuple(found)


#: Names of the importable packages. The first one is that of the demos' modules.
PACKAGES = _importable()


def _from_each(module: str, name: str) -> tuple[Any, ...]:
    """Return the class of each package, by its name."""
    return tuple(getattr(import_module(f"{package}.{module}"), name) for package in PACKAGES)


#: The configuration error of each package, for ``except``.
CONFIGURATION_ERRORS: tuple[type[Exception], ...] = tuple(
    import_module(f"{_FABRIC[package]}.utilities.exceptions").MisconfigurationException for package in PACKAGES
)

if TYPE_CHECKING:
    # For a type checker there is one package.
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from lightning.pytorch import Callback as CallbackBase
    from lightning.pytorch import LightningDataModule, LightningModule, Trainer
    from lightning.pytorch.callbacks import EarlyStopping as EarlyStoppingBase
    from lightning.pytorch.trainer.states import RunningStage, TrainerFn
else:

    class MisconfigurationException(*CONFIGURATION_ERRORS):
        """Options, module and trainer don't go together; an instance of each package's class of this name."""

    # The names begin with an underscore so that the command line's help does not list these classes.
    class _CallbackBase(*_from_each("callbacks", "Callback")):
        """Base of callbacks for Trainers of all packages."""

    class _EndOfInit:
        """Ends the chain of ``__init__`` between two packages' classes, because the second needs arguments."""

        def __init__(self) -> None:
            pass

    _first, *_others = _from_each("callbacks", "EarlyStopping")

    class _EarlyStoppingBase(_first, _EndOfInit, *_others):
        """Base of early stopping for Trainers of all packages, with the methods of the first one."""

    CallbackBase, EarlyStoppingBase = _CallbackBase, _EarlyStoppingBase
    LightningModule, LightningDataModule, Trainer = (
        getattr(import_module(PACKAGES[0]), name) for name in ("LightningModule", "LightningDataModule", "Trainer")
    )
    # Enumerations of text: members of both packages compare equal.
    RunningStage, TrainerFn = (
        getattr(import_module(f"{PACKAGES[0]}.trainer.states"), name) for name in ("RunningStage", "TrainerFn")
    )


def base_of(kind: type, *names: str) -> type[Any] | None:
    """Return the first class along a class's ancestry that is Lightning's and has one of some names.

    Args:
        kind: the class; the search begins with itself.
        names: names of classes of Lightning.

    Example:
        >>> class Net(LightningModule): ...
        >>> base_of(Net, "LightningModule") is LightningModule, base_of(Net, "Callback")
        (True, None)
    """
    return next(
        (base for base in kind.__mro__ if base.__name__ in names and base.__module__.startswith(_PREFIXES)), None
    )


def is_a(instance: object, *names: str) -> bool:
    """Return whether an object is an instance of a class of Lightning, of either package.

    Args:
        instance: the object.
        names: names of classes of Lightning; one of them suffices.

    Example:
        >>> class EarlyStopping: ...
        >>> is_a(EarlyStoppingBase("val_loss"), "EarlyStopping"), is_a(EarlyStopping(), "EarlyStopping")
        (True, False)
    """
    return base_of(type(instance), *names) is not None


def package_of(instance: object) -> str:
    """Return the name of the package that an object's class is derived from; the first one if it is of none.

    Example:
        >>> package_of(Trainer(logger=False, barebones=True)) == PACKAGES[0]
        True
    """
    return next(iter(packages_of(type(instance))), PACKAGES[0])


def packages_of(kind: type) -> list[str]:
    """Return the names of the packages that a class is derived from, the nearest first.

    Example:
        >>> packages_of(Trainer) == [PACKAGES[0]], set(packages_of(CallbackBase)) == set(PACKAGES), packages_of(int)
        (True, True, [])
    """
    modules = [base.__module__ for base in kind.__mro__]
    found = (package for module in modules for package in PACKAGES if f"{module}.".startswith(f"{package}."))
    return list(dict.fromkeys(found))


def sibling(instance: object, module: str, name: str, *, fabric: bool = False) -> Any:
    """Return a class or function of the package that an object's class is derived from.

    Args:
        instance: an object such as a trainer.
        module: name of a module below the package, such as ``"loggers.logger"``.
        name: name in the module.
        fabric: whether the module is one of the package's Fabric.

    Raises:
        ImportError: if the package has no such module.
        AttributeError: if the module has no such name.

    Example:
        >>> sibling(LightningDataModule(), "trainer.states", "TrainerFn") is TrainerFn
        True
    """
    package = package_of(instance)
    return getattr(import_module(f"{_FABRIC[package] if fabric else package}.{module}"), name)
