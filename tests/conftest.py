"""What holds for the whole suite: one thread a process, and runs that several tests look at made once."""

from __future__ import annotations

import os

import pytest

from tests.browser import browser, tensorboard

__all__ = ["browser", "pytest_itemcollected", "pytest_xdist_auto_num_workers", "tensorboard"]

# Read by torch when it is imported, in this process and in those that tests start, which share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers for the whole suite; none, and so no start-up, where files are named."""
    return 2 if config.args_source == pytest.Config.ArgsSource.TESTPATHS else 0


def pytest_itemcollected(item: pytest.Item) -> None:
    """Keep tests that share a fixture of their module on one worker: on two it would be made twice."""
    fixtures = getattr(item, "_fixtureinfo", None)
    used = fixtures.name2fixturedefs.values() if fixtures is not None else ()
    if any(definitions[-1].scope == "module" for definitions in used):
        item.add_marker(pytest.mark.xdist_group(item.path.stem))
