"""The page of what has been run names every case that there is, and no failure."""

from __future__ import annotations

import inspect
import re

import pytest

from tests.callbacks import test_faults as test_faults
from tests.helpers.compatibility import PAGE, SECTIONS, situations, words
from tests.helpers.field_kinds import SITUATIONS
from tests.helpers.model_zoo import KINDS


def test_words() -> None:
    assert words("tests/callbacks/test_faults.py::test_a_loader_that_is_empty[list]") == "a loader that is empty: list"
    assert words("tests/callbacks/test_faults.py::test_killed_and_resumed") == "killed and resumed"


def test_the_page_is_of_today() -> None:
    """Otherwise run ``python -m tests.helpers.compatibility``."""
    text = PAGE.read_text()
    for heading, promise, _ in SECTIONS:
        assert f"## {heading}\n\n{promise}\n" in text
    for name in KINDS:
        assert f"| {name} | passed |" in text, name
    for name, function in vars(test_faults).items():
        if name.startswith("test_") and inspect.isfunction(function):
            assert f"| {words(f'::{name}')}" in text, name
    assert situations() in text
    assert "failed" not in text


@pytest.mark.parametrize("test", sorted({test for *_, test in SITUATIONS}))
def test_every_situation_names_a_test_that_exists(test: str) -> None:
    path, _, name = test.partition("::")
    assert re.search(rf"^def {name}\(", (PAGE.parents[1] / path).read_text(), re.MULTILINE)
