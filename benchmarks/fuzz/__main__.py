"""Fuzz one parser for some time, and print how many inputs it read and refused, and every finding.

    python -m benchmarks.fuzz history --seconds 600
    python -m benchmarks.fuzz history --seconds 600 --atheris      # guided by coverage; needs atheris

Exit status 1 if there is a finding.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

NAMES = ("state", "history", "csv", "events", "report", "study", "options")


def decorated(inputs: Any, run: Callable[[Any], object], number: int, max_examples: int) -> Any:
    """Make a hypothesis test of a function that takes one input."""
    quiet = settings(
        max_examples=max_examples,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.generate, Phase.shrink],
        print_blob=False,
        report_multiple_bugs=False,
    )
    return seed(number)(quiet(given(inputs)(run)))  # type: ignore[no-untyped-call]


def fuzz(target: Any, seconds: float, first_seed: int = 0, rounds: int | None = None) -> tuple[Counter[str], list[str]]:
    """Try inputs until the time is over, in rounds of 500, each of which ends at its first new finding.

    Returns:
        How often the parser read and refused, and the findings, one for each type of exception and line of code.
    """
    outcomes: Counter[str] = Counter()
    findings: dict[tuple[str, str], str] = {}
    end = time.monotonic() + seconds

    shrinking = False

    def one(value: Any) -> None:
        nonlocal shrinking
        if time.monotonic() > end and not shrinking:
            return
        try:
            outcomes[target.run(value)] += 1
        except Exception as error:
            place = str(traceback.extract_tb(error.__traceback__)[-1])
            if (type(error).__name__, place) not in findings:
                outcomes["found"] += 1
                shrinking = True
                raise
            outcomes["found again"] += 1

    number = first_seed
    while time.monotonic() < end and (rounds is None or number < first_seed + rounds):
        shrinking = False
        try:
            decorated(target.inputs, one, number, 500)()
        except Exception as error:
            place = str(traceback.extract_tb(error.__traceback__)[-1])
            notes = "\n".join(getattr(error, "__notes__", []))
            findings[type(error).__name__, place] = "".join(traceback.format_exception(error)) + notes
            print(
                f"FINDING {type(error).__name__} at {place}\n{findings[type(error).__name__, place][-6000:]}",
                flush=True,
            )
        number += 1
    return outcomes, list(findings.values())


def guided(name: str, seconds: float) -> None:
    """Let atheris choose the inputs by the coverage that they reach; it ends the process."""
    import atheris

    with atheris.instrument_imports(include=["hessian_callback"]):
        from benchmarks.fuzz.targets import TARGETS
    target = TARGETS[name]()
    corpus = tempfile.mkdtemp(prefix="fuzz-")
    for number, data in enumerate(target.seeds):
        Path(corpus, str(number)).write_bytes(data)
    run = target.run if target.seeds else decorated(target.inputs, target.run, 0, 1).hypothesis.fuzz_one_input
    options = [f"-max_total_time={seconds:.0f}", "-max_len=20000", f"-artifact_prefix={corpus}/finding-"]

    def one(data: bytes) -> None:
        run(data)

    atheris.Setup([sys.argv[0], *options, corpus], one)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--atheris", action="store_true", help="choose inputs by the coverage that they reach")
    chosen = parser.parse_args()
    if chosen.atheris:
        guided(chosen.name, chosen.seconds)
    from benchmarks.fuzz.targets import TARGETS

    outcomes, findings = fuzz(TARGETS[chosen.name](), chosen.seconds, chosen.seed)
    counts = ", ".join(f"{name} {count}" for name, count in sorted(outcomes.items()))
    print(f"{chosen.name}: {outcomes.total()} inputs in {chosen.seconds:.0f} s ({counts}), {len(findings)} finding(s)")
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
