"""Import what ranks and commands need, for `tests.helpers.forks`. A module that is absent is left out."""

from __future__ import annotations

import gc
import pkgutil
from contextlib import suppress
from importlib import import_module

from tests.helpers import lightning  # noqa: F401  # Before all modules of the package.

LIBRARIES = [
    *("hypothesis", "jsonargparse", "matplotlib.figure", "pytest", "rich.table", "scipy.stats", "sklearn.datasets"),
    *("torch.distributed.fsdp", "torch.distributed.tensor", "torch.utils.tensorboard", "yaml"),
]
OURS = [
    module.name for module in pkgutil.walk_packages(import_module("hessian_callback").__path__, "hessian_callback.")
]

for name in [*LIBRARIES, *OURS, "tests.helpers.toy_runs"]:
    with suppress(ImportError):
        import_module(name)

# The forks share what has been imported: a collection in a fork would copy it.
gc.freeze()
