"""What a user gets from an import, and whether the README keeps its word."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hessian_callback
from tests.helpers.forks import run_code
from tests.helpers.lightning import PACKAGE

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = re.findall(r"```python\n(.*?)```", README, re.S)


def python(code: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=cwd,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )


def test_import_brings_nothing_heavy(tmp_path: Path) -> None:
    code = """
import sys
import hessian_callback
heavy = {"matplotlib", "tensorboard", "sklearn", "jsonargparse", "rich", "lightning", "pytorch_lightning"}
print(sorted(heavy & {name.split(".")[0] for name in sys.modules}))
"""
    done = python(code, tmp_path)
    assert done.stdout == "[]\n", done.stderr


def test_callback_brings_no_optional_dependency(tmp_path: Path) -> None:
    """Lightning itself imports some of them where they are installed; the callback must not add any."""
    code = f"""
import sys
import {PACKAGE}
before = set(sys.modules)
from hessian_callback import *
added = {{name.split(".")[0] for name in set(sys.modules) - before}}
print(sorted({{"matplotlib", "sklearn", "jsonargparse"}} & added))
"""
    done = python(code, tmp_path)
    assert done.stdout == "[]\n", done.stderr


@pytest.mark.parametrize("name", [name for name in hessian_callback.__all__ if name != "__version__"])
def test_public_names(name: str) -> None:
    assert name in dir(hessian_callback)
    assert getattr(hessian_callback, name).__doc__


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = hessian_callback.no_such_name


def test_types_are_published() -> None:
    assert (ROOT / "hessian_callback" / "py.typed").exists()


def test_callback_of_the_readme_runs_in_ten_lines(tmp_path: Path) -> None:
    code, _ = CODE
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    assert "max_epochs=20" in code
    # With one of seventy seeds an input of a rectifier has another sign in float64 than in float32, which counts as an
    # error of the products, and too few eigenvalues are known.
    seeded = "from lightning.pytorch import seed_everything\nseed_everything(0)\n"
    done = run_code(seeded + code.replace("max_epochs=20", "max_epochs=1"), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    summaries = [line for line in done.stdout.splitlines() if line.startswith("epoch ")]
    assert len(summaries) == 2
    assert all("K = 50" in line for line in summaries), summaries


def test_core_of_the_readme_runs_without_lightning(tmp_path: Path) -> None:
    _, code = CODE
    done = python(f"{code}\nimport sys\nprint('lightning' in sys.modules)", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "False"


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 120


@pytest.mark.parametrize("page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_pictures_and_files_that_are_linked_exist(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        assert (ROOT / target).exists(), target


@pytest.mark.parametrize("marker", ["main job", "tests"])
def test_readme_commands_stand_on_one_line_each(marker: str) -> None:
    """`.ci/run` reads them from the README by these markers."""
    (block,) = re.findall(rf"<!-- {marker} -->\n```bash\n(.*?)\n```", README, re.S)
    assert block.startswith("python3 -m venv ")
    assert "\n" not in block
