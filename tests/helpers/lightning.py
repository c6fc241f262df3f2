"""Classes of Lightning for the tests, of the package that ``HESSIAN_CALLBACK_TEST_LIGHTNING`` names.

The variable is ``lightning`` or ``pytorch_lightning``. The default is ``lightning`` if it is installed.
"""

from __future__ import annotations

import os
from importlib import import_module
from importlib.util import find_spec
from typing import Any

_FABRIC = {"lightning": "lightning.fabric", "pytorch_lightning": "lightning_fabric"}
_CHOSEN = os.environ.get("HESSIAN_CALLBACK_TEST_LIGHTNING") or next(filter(find_spec, _FABRIC))

#: The package's name as it is imported.
PACKAGE = {"lightning": "lightning.pytorch"}.get(_CHOSEN, _CHOSEN)

# The modules that are searched for a name.
_MODULES = [
    *(
        f"{PACKAGE}{module}"
        for module in (
            *("", ".callbacks", ".loggers", ".loggers.logger", ".strategies", ".trainer.states", ".tuner"),
            ".utilities.combined_loader",
        )
    ),
    *(
        f"{_FABRIC[_CHOSEN]}.{module}"
        for module in ("utilities.exceptions", "utilities.distributed", "plugins.environments")
    ),
]

# Imported before the package under test, whose first package is then this one.
import_module(PACKAGE)


def __getattr__(name: str) -> Any:
    if not name.startswith("__"):
        for module in map(import_module, _MODULES):
            if hasattr(module, name):
                return getattr(module, name)
    raise AttributeError(f"{PACKAGE} has no {name}")
