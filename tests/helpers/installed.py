"""Modules where installed libraries lie: the guard treats objects of libraries in another way than the user's."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def installed(folder: Path, name: str, source: str) -> Iterator[Any]:
    """Yield the module ``name`` with this source, imported from a folder ``site-packages``."""
    packages = folder / "site-packages"
    packages.mkdir()
    (packages / f"{name}.py").write_text(source)
    sys.path.insert(0, str(packages))
    try:
        yield importlib.import_module(name)
    finally:
        sys.path.remove(str(packages))
        sys.modules.pop(name, None)
