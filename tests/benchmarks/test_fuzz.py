"""The fuzzer finds planted faults, and its inputs begin with files that are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "fuzz").exists(), reason="the benchmarks are not part of an installed package"
)

if (ROOT / "benchmarks" / "fuzz").exists():
    from benchmarks.fuzz.__main__ import NAMES, fuzz
    from benchmarks.fuzz.targets import TARGETS, Target, run_options, run_state, states


def test_a_planted_fault_is_found_once_for_each_place() -> None:
    def run(value: Any) -> str:
        if value % 3 == 0:
            raise KeyError(value)
        if value % 3 == 1:
            raise IndexError(value)
        return "read"

    outcomes, findings = fuzz(Target(st.integers(0, 1000), run), seconds=200, rounds=3)
    assert len(findings) == 2
    assert sorted(name for text in findings for name in ("IndexError: 1", "KeyError: 0") if name in text) == [
        "IndexError: 1",
        "KeyError: 0",
    ]
    assert outcomes["read"] > 0


def test_every_target_has_a_name_on_the_command_line() -> None:
    assert set(NAMES) == set(TARGETS)


@pytest.mark.parametrize("name", ["history", "csv", "events", "study"])
def test_unchanged_files_are_read(name: str) -> None:
    target = TARGETS[name]()
    assert target.seeds
    assert [target.run(data) for data in target.seeds] == ["read"] * len(target.seeds)


def test_unchanged_states_are_read_and_others_refused() -> None:
    assert [run_state(state) for state in states()] == ["read"] * len(states())
    assert run_state({"version": 1, "history": [{"epoch": "3"}], "time": {}}) == "refused"


def test_options_in_range_are_read_and_others_refused() -> None:
    assert run_options(("Lanczos", {"rtol": 0.1})) == "read"
    assert run_options(("Lanczos", {"rtol": "0.1"})) == "refused"
