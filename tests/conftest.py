"""What holds for the whole suite: one thread a process, and runs that several tests look at made once."""

from __future__ import annotations

import inspect
import os
import re
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.helpers.browser import browser, tensorboard

__all__ = ["browser", "pytest_xdist_auto_num_workers", "pytest_xdist_make_scheduler", "tensorboard"]

ROOT = Path(__file__).parents[1]

# Read by torch when it is imported, in this process and in those that tests start, which share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# .ci/run draws the same cases each time, so that a change never fails for a case that it did not touch. Other runs draw
# new ones, and a finding becomes a test of its own.
settings.register_profile("same cases", derandomize=True)
if os.environ.get("HESSIAN_CALLBACK_CI") == "1":
    settings.load_profile("same cases")


def pytest_configure(config: pytest.Config) -> None:
    """Import Lightning before all modules of the package, but not to hand tests out: it takes ten seconds."""
    hands_tests_out = config.option.tx and not hasattr(config, "workerinput")
    if not hands_tests_out:
        import_module("tests.helpers.lightning")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers for the whole suite; none, and so no start-up, where files are named."""
    return 2 if config.args_source == pytest.Config.ArgsSource.TESTPATHS else 0


class SharedRunsTogether(LoadScopeScheduling):
    """Hands tests out one by one, but those of a file with fixtures for the whole module to one worker.

    A fixture is made on every worker that has a test with it, and some of ours are training runs of a minute.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::")[0]
        return file if _shares_runs(file) else nodeid


@cache
def _shares_runs(file: str) -> bool:
    return 'scope="module"' in (ROOT / file).read_text(encoding="utf-8")


# Unit tests without a Trainer and without processes are the fast tier: pytest -m "not slow and not distributed".
FAST_FOLDERS = {"linalg", "algorithms", "operators", "power_law", "measurement", "plots"}
FAST_FILES = {"test_imports.py", "test_metrics.py", "test_options.py"}
STARTS_PROCESSES = re.compile(r"\b(run_ranks|run_code|run_module|launch|launch_ranks|subprocess)\b")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests with process groups or other processes, and tests above the numerical subpackages."""
    for item in items:
        path = item.path.relative_to(ROOT)
        # A folder of the tests or, for doctests, of the package.
        if path.parts[1] not in FAST_FOLDERS | FAST_FILES:
            item.add_marker(pytest.mark.slow)
        function = getattr(item, "function", None)
        if inspect.isfunction(function) and STARTS_PROCESSES.search(_source(function)):
            item.add_marker(pytest.mark.distributed)


@cache
def _source(function: Any) -> str:
    return inspect.getsource(function)


@pytest.hookimpl(tryfirst=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> SharedRunsTogether:
    """Distribute by the class above, whatever --dist says."""
    return SharedRunsTogether(config, log)
