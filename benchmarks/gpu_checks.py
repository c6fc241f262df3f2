"""The tests of tests/test_cuda.py in groups, those first that tell most, each with a time limit of its own.

    python -m benchmarks.gpu_checks --output FOLDER
    python -m benchmarks.gpu_checks --output FOLDER --only products memory
    HESSIAN_CALLBACK_TEST_DEVICE=cpu python -m benchmarks.gpu_checks --output FOLDER

Several processes of pytest run at once. Tests that look at times or at what is free on the device run alone afterwards.
Tests that no group names are the group "others". Each process has a share of a group's tests, and writes the result of
each to FOLDER/GROUP_NUMBER.jsonl as it comes, so that a process that is ended by its limit has told the rest. What
pytest prints is in FOLDER/GROUP_NUMBER.log.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.limited_processes import run_limited

ROOT = Path(__file__).parents[1]
FILE = ROOT / "tests" / "test_cuda.py"
# Environment variables that tell a process of pytest which tests are its own, and where results go.
SHARE, RESULTS = "GPU_CHECKS_SHARE", "GPU_CHECKS_RESULTS"


@dataclass(frozen=True)
class Group:
    """Tests by the names of their functions, without ``test_``."""

    tests: tuple[str, ...]
    seconds: float
    processes: int = 1
    alone: bool = False


GROUPS: dict[str, Group] = {
    "products": Group(
        (
            "the_dense_hessian",
            "the_dense_hessian_by_differences",
            "auto_changes_over_and_stays_right",
            "products_of_models_as_people_train_them",
            "auto_goes_on_where_recurrent_layers_cannot_be_traced",
            "the_same_product_twice",
            "the_same_product_twice_without_being_asked_to",
            "a_product_does_not_wait_for_the_gpu",
        ),
        seconds=150,
        processes=4,
    ),
    "eigenvalues": Group(
        (
            "a_lanczos_step_waits_once",
            "a_seed_means_the_same_vector_on_every_device",
            "eigenvalues_against_the_dense_hessian",
            "multiple_eigenvalues_are_not_missed",
            "the_same_eigenvalues_as_on_the_cpu",
        ),
        seconds=120,
        processes=2,
    ),
    "settings": Group(
        (
            "settings_operator_by_operator_are_no_obstacle",
            "products_carry_full_float32_accuracy",
            "a_traced_product_agrees_although_tensor_cores_are_allowed",
            "the_solver_in_full_float32",
            "long_inner_products_keep_their_digits",
        ),
        seconds=100,
    ),
    "training": Group(
        (
            "training_is_the_same_bit_for_bit",
            "metrics_lie_where_the_module_does_and_stop_the_run",
            "a_resumed_run_goes_on_where_it_was",
            "all_comparisons_agree_with_the_cpus",
            "each_protocol",
            "validate_measures_inside_inference_mode",
            "a_group_of_one_gives_the_same",
            "the_collectives_take_tensors_of_the_device",
        ),
        seconds=180,
        processes=4,
    ),
    "recorded": Group(
        (
            "a_small_traced_product_is_recorded",
            "double_backward_of_a_small_network_is_recorded",
            "whatever_is_recorded_is_right",
            "a_long_product_is_not_recorded",
            "a_recording_leaves_the_generators_alone",
            "a_recording_that_fails_does_no_damage",  # last, in case it does
        ),
        seconds=60,
        alone=True,
    ),
    "memory": Group(
        (
            "a_budget_holds",
            "when_memory_runs_out_batches_are_halved",
            "a_run_goes_on_when_memory_runs_out",
            "free_memory_counts_what_the_allocator_holds_unused",
            "memory_is_given_back",
            "a_budget_beyond_what_there_is",  # last, because it has failed to end before
        ),
        seconds=120,
        alone=True,
    ),
}


def groups() -> dict[str, Group]:
    """The groups, and one of the tests that none of them names."""
    names = re.findall(r"^def test_(\w+)", FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    named = {name for group in GROUPS.values() for name in group.tests}
    others = tuple(name for name in names if name not in named)
    return {**GROUPS, **({"others": Group(others, seconds=60, alone=True)} if others else {})}


# Hooks of pytest, of which this module is a plugin in the processes that it starts.


def _result(**fields: Any) -> None:
    with open(os.environ[RESULTS], "a", encoding="utf-8") as file:
        file.write(json.dumps(fields) + "\n")


def pytest_collection_modifyitems(items: list[Any]) -> None:
    number, count = map(int, os.environ[SHARE].split("/"))
    items[:] = items[number::count]


def pytest_runtest_logstart(nodeid: str) -> None:
    _result(test=nodeid, outcome="begun")


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        errors = [line[1:].strip() for line in report.longreprtext.splitlines() if line.startswith("E ")]
        _result(test=report.nodeid, outcome=report.outcome, seconds=round(report.duration, 2), error=errors[-1:])


# The processes.


@dataclass
class Outcome:
    """What a process found: the last result of each test."""

    group: str
    tests: dict[str, dict[str, Any]]
    seconds: float
    ending: str


def run_tests(group: str, tests: Sequence[str], output: Path, limit: float, share: str = "0/1") -> Outcome:
    """Run a share of some tests in a process, and end it with all its children at the limit."""
    stem = output / f"{group}_{share.split('/')[0]}"
    results, log = stem.with_suffix(".jsonl"), stem.with_suffix(".log")
    results.write_text("")
    command = [sys.executable, "-m", "pytest", *tests, "-q", "-rA", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["-p", "benchmarks.gpu_checks"]
    if find_spec("pytest_timeout"):
        command += ["--timeout", "60"]
    if not (find_spec("hypothesis") and find_spec("xdist")):
        command += ["--noconftest"]  # It imports both, and these tests need nothing else of it.
    environment = {"OMP_NUM_THREADS": "1", **os.environ, SHARE: share, RESULTS: str(results), "PYTHONUNBUFFERED": "1"}
    began = time.perf_counter()
    with log.open("w", encoding="utf-8") as file:
        status = run_limited(command, limit, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
    lines = map(json.loads, results.read_text().splitlines())
    found = {line["test"]: line for line in lines}
    ending = f"ended by its limit of {limit:g} s" if status is None else f"status {status}"
    outcome = Outcome(group, found, time.perf_counter() - began, ending)
    print(f"{stem.name}: {counts([outcome])} in {outcome.seconds:.0f} s, {ending}", flush=True)
    return outcome


def counts(outcomes: Sequence[Outcome]) -> str:
    number = Counter(test["outcome"] for outcome in outcomes for test in outcome.tests.values())
    text = f"{number['passed']} passed, {number['failed']} failed, {number['skipped']} skipped"
    return text + (f", {number['begun']} not finished" if number["begun"] else "")


def table(outcomes: Sequence[Outcome]) -> str:
    """Results by group, and those tests that failed, with the last line of each error."""
    lines = []
    for group in dict.fromkeys(outcome.group for outcome in outcomes):
        own = [outcome for outcome in outcomes if outcome.group == group]
        seconds = max(outcome.seconds for outcome in own)
        odd = {outcome.ending for outcome in own} - {"status 0", "status 1"}
        lines.append("; ".join([f"{group}: {counts(own)}; {seconds:.0f} s", *sorted(odd)]))
    for outcome in outcomes:
        for name, test in outcome.tests.items():
            if test["outcome"] in ("failed", "begun"):
                error = " ".join(test.get("error", [])) or "not finished"
                lines.append(f"{test['outcome'].upper()} {name.split('::')[-1]}: {error[:300]}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    known = groups()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--tests-workers", type=int, default=6, help="processes of pytest at once; default: 6")
    parser.add_argument("--only", nargs="+", choices=known, default=list(known), help="groups; default: all")
    options = parser.parse_args(arguments)
    output = options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)

    def run(job: tuple[str, int]) -> Outcome:
        group = known[job[0]]
        tests = [f"{FILE}::test_{name}" for name in group.tests]
        return run_tests(job[0], tests, output, group.seconds, f"{job[1]}/{group.processes}")

    outcomes: list[Outcome] = []
    for alone in (False, True):
        chosen = [name for name, group in known.items() if name in options.only and group.alone == alone]
        jobs = [(name, number) for name in chosen for number in range(known[name].processes)]
        with ThreadPoolExecutor(1 if alone else options.tests_workers) as pool:
            outcomes += pool.map(run, jobs)
    text = table(outcomes)
    (output / "checks.txt").write_text(text + "\n", encoding="utf-8")
    print(text, flush=True)
    well = all(outcome.ending == "status 0" for outcome in outcomes)
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
