"""Train models of other libraries with the callback and without, and write what differs and what was measured.

    python -m benchmarks.libraries zuko transformers --output docs/libraries.md
    python -m benchmarks.libraries --interpreter zuko=FOLDER/bin/python darts=OTHER/bin/python

Each library runs in a process of its own, by default with this interpreter. Libraries that can't share an environment
get interpreters of their own. A library that is not installed is left out. Results of earlier runs can be kept in a
folder, from which the page is written without running them again (``--results``).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.libraries.library import MODULES
from benchmarks.libraries.report import report
from benchmarks.libraries.trial import Trial, trial_from_json

_NOT_INSTALLED = 3
_ASK = (
    "import sys; from importlib import metadata\n"
    "try: metadata.version(sys.argv[1])\n"
    f"except metadata.PackageNotFoundError: sys.exit({_NOT_INSTALLED})"
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"libraries; default: all of {', '.join(MODULES)}")
    parser.add_argument("--interpreter", nargs="+", default=[], metavar="NAME=PYTHON", help="for single libraries")
    parser.add_argument("--results", type=Path, help="a folder for the results, one file a library; kept")
    parser.add_argument("--only-report", action="store_true", help="run nothing: write the page from --results")
    parser.add_argument("--output", type=Path, help="write the page there")
    options = parser.parse_args(arguments)
    unknown = [name for name in options.names if name not in MODULES]
    if unknown:
        parser.error(f"unknown libraries: {', '.join(unknown)}; known are {', '.join(MODULES)}")
    interpreters = dict(pair.split("=", 1) for pair in options.interpreter)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.results or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        failed = False
        for name in [] if options.only_report else options.names or MODULES:
            failed |= not _run(name, interpreters.get(name, sys.executable), folder / f"{name}.json")
        trials: list[Trial] = [
            trial_from_json(json.loads(file.read_text("utf-8")))
            for name in MODULES
            if (file := folder / f"{name}.json").exists()
        ]
    text = report(trials, not_run=[name for name in MODULES if name not in {trial.name for trial in trials}])
    print(text)
    if options.output is not None:
        options.output.write_text(text, encoding="utf-8")
    return int(failed)


def _run(name: str, interpreter: str, result: Path) -> bool:
    """Run a library in a process of its own; return whether it ran or is not installed."""
    if subprocess.run([interpreter, "-c", _ASK, name], check=False).returncode == _NOT_INSTALLED:
        print(f"{name}: not installed", flush=True)
        return True
    root = Path(__file__).parents[2]
    command = [interpreter, "-m", "benchmarks.libraries.trial", name, str(result)]
    # Nothing is to be found by a download.
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        print(f"{name}: failed\n{ended.stderr[-4000:]}", flush=True)
    return ended.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
