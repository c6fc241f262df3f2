"""A real browser and a real TensorBoard server, for the tests that look at a page.

Use the fixtures ``browser`` (a Chromium without a screen) and ``tensorboard`` (starts a server on a folder, returns its
address). Both end their processes whatever the test does. Without Chromium such tests are skipped, except where
HESSIAN_CALLBACK_CI=1, as .ci/run sets it: there they fail.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote
from urllib.request import ProxyHandler, build_opener

import pytest

from tests.helpers.launched import kill_group

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

# What a page may take on a machine that does other things as well.
PATIENCE = 90

_OPTIONS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--no-proxy-server",
    "--window-size=1280,900",
]

# Every element below a root, through the shadow roots that hide a component's insides from selectors.
_DEEP = """
    const found = [];
    const visit = root => {
        for (const element of root.querySelectorAll('*')) {
            if (element.matches(arguments[0])) found.push(element);
            if (element.shadowRoot) visit(element.shadowRoot);
        }
    };
    visit(document);
    return found;
"""

_LOOPBACK = build_opener(ProxyHandler({}))


def required_or_skip(what: str) -> None:
    """Skip the test for want of something, or fail it where nothing may be wanting."""
    if os.environ.get("HESSIAN_CALLBACK_CI") == "1":
        pytest.fail(f"{what}, and under .ci/run the browser tests must run", pytrace=False)
    pytest.skip(what)


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Return the first true value of a condition; fail when it does not come."""
    deadline = time.monotonic() + patience
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {patience:g} s in vain for {what}"
        time.sleep(0.2)
    return found


def elements(browser: Chrome, selector: str) -> list[Any]:
    """Elements that match a CSS selector, in shadow roots too."""
    found: list[Any] = browser.execute_script(_DEEP, selector)
    return found


def console_errors(browser: Chrome) -> list[str]:
    """What the page has complained of in the browser's console since the last call."""
    return [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    """A Chromium that the tests of one module share."""
    binary, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if binary is None or driver is None:
        required_or_skip("chromium and chromedriver are not installed (on Debian: apt-get install chromium-driver)")
    try:
        from selenium import webdriver
    except ModuleNotFoundError:
        required_or_skip("selenium is not installed (pip install 'hessian-callback[test]')")
    options = webdriver.ChromeOptions()
    options.binary_location = str(binary)
    profile = tmp_path_factory.mktemp("chromium")
    for option in (*_OPTIONS, f"--user-data-dir={profile}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    # In a session of its own, so that whatever the driver starts can be ended with it.
    service = webdriver.ChromeService(str(driver), popen_kw={"start_new_session": True})
    with ExitStack() as at_the_end:
        at_the_end.callback(_end, service, profile)
        chrome = webdriver.Chrome(options=options, service=service)
        at_the_end.callback(chrome.quit)
        yield chrome


def _end(service: Any, profile: Path) -> None:
    process = getattr(service, "process", None)
    if process is not None:
        kill_group(process)
    # A browser that outlived its driver, by the folder that is its alone.
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if f"--user-data-dir={profile}".encode() in entry.read_bytes():
                os.kill(int(entry.parent.name), signal.SIGKILL)


class TensorBoard:
    """A running server: its address, and what its plugins answer."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self.process, self.log = process, log
        self.url = wait_for(self._address, f"TensorBoard, which said {self._said()}")

    def _said(self) -> str:
        return self.log.read_text()[-2000:]

    def _address(self) -> str | None:
        assert self.process.poll() is None, f"TensorBoard ended: {self._said()}"
        found = re.search(r"http://127\.0\.0\.1:\d+", self._said())
        return found.group() if found else None

    def get(self, path: str, **parameters: str) -> Any:
        """Answer of a plugin, such as ``get("data/plugin/scalars/scalars", run=".", tag="loss")``."""
        query = "&".join(f"{name}={quote(value, safe='')}" for name, value in parameters.items())
        with _LOOPBACK.open(f"{self.url}/{path}?{query}", timeout=PATIENCE) as answer:
            return json.load(answer)

    def scalars(self, run: str, tag: str) -> list[tuple[int, float]]:
        """Steps and values of a curve as the server gives them to the page."""
        return [(step, value) for _, step, value in self.get("data/plugin/scalars/scalars", run=run, tag=tag)]


@pytest.fixture(scope="module")
def tensorboard(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Path], TensorBoard]]:
    """A function that serves a folder of runs on a free port of the loopback, once its runs are loaded."""
    with ExitStack() as at_the_end:

        def serve(folder: Path) -> TensorBoard:
            log = tmp_path_factory.mktemp("tensorboard") / "output"
            command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
            with log.open("w") as output:
                process = subprocess.Popen(
                    [*command, "--port", "0", "--load_fast=false", "--reload_interval", "1"],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    text=True,
                    start_new_session=True,
                )
            at_the_end.callback(kill_group, process)
            board = TensorBoard(process, log)
            wait_for(lambda: board.get("data/runs"), "the runs to be loaded")
            return board

        yield serve
