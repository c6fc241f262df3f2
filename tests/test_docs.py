"""Whether the documentation runs, and names what the code logs."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any
from unittest import SkipTest

import pytest
from sybil import Document, Example
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser, SkipParser

from hessian_callback import Density, FrobeniusNorm, OutlierRatio, Subspace, Trace, __version__
from hessian_callback import measure as measure_problem
from hessian_callback.cli.main import main
from tests.helpers.logged_keys import PAGE, with_tables
from tests.helpers.problems import batches, cross_entropy, network
from tests.helpers.toy_runs import Net, loader, measure, seeded, trainer

ROOT = Path(__file__).parents[1]
# statistics.md and distributed.md speak of an operator that the reader has: their blocks are only compiled.
EXCERPTS = {"statistics.md", "distributed.md"}
COMMAND = re.compile(r"hessian-callback |-m hessian_callback\.cli\.main ")


def examples(page: Path) -> list[Example]:
    return list(Document.parse(str(page), PythonCodeBlockParser(), SkipParser()).examples())


def pages(pattern: str) -> list[Any]:
    found = [ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [pytest.param(page, id=page.name) for page in found if re.search(pattern, page.read_text("utf-8"), re.M)]


@pytest.mark.parametrize("page", pages(r"^```python"))
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = 0
    for example in examples(page):
        code = str(example.parsed)
        if page.name in EXCERPTS:
            compile(code, f"{page.name}:{example.line}", "exec")
            ran += 1
            continue
        try:
            example.evaluate()
        except SkipTest:
            compile(code, f"{page.name}:{example.line}", "exec")
        ran += 1
    assert ran


def test_the_extra_of_the_contributors_guide_measures() -> None:
    (example,) = examples(ROOT / "CONTRIBUTING.md")
    example.evaluate()
    extra = example.namespace["SpectralGap"]()
    measurement = measure_problem(network(), cross_entropy, batches(), num_eigenvalues=3, extras=[extra])
    first, second = measurement.spectrum.eigenvalues[:2].tolist()
    assert measurement.comparisons["spectral_gap"] == pytest.approx(first - second, rel=1e-12)


def test_the_citation_has_the_version() -> None:
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text("utf-8")


def commands() -> list[Any]:
    found = {}
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for block in Document.parse(str(page), CodeBlockParser("bash", lambda example: None)).examples():
            for line in str(block.parsed).replace("\\\n", " ").splitlines():
                # A chain that builds an environment is .ci/run's to run; my_package is the reader's.
                if (match := COMMAND.search(line)) and "&&" not in line and "my_package" not in line:
                    found[f"{page.name}: {line}"] = shlex.split(line[match.end() :], comments=True)
    return [pytest.param(arguments, id=name) for name, arguments in found.items()]


@pytest.mark.parametrize("arguments", commands())
def test_commands_parse(arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.chdir(ROOT)
    stop = arguments.index(">") if ">" in arguments else None
    given = arguments[:stop]
    configured = given[0] in ("fit", "spectrum", "validate")
    with pytest.raises(SystemExit) as ended:
        main([*given, "--print_config"] if configured else [given[0], "--help"])
    assert ended.value.code in (0, None), capsys.readouterr().err


def documented_keys(text: str) -> set[str]:
    return set(re.findall(r"^\| `hessian/(\w+)` \|", text, re.M))


def test_the_tables_of_keys_are_those_of_the_code() -> None:
    text = PAGE.read_text("utf-8")
    assert with_tables(text) == text, "run python -m tests.helpers.logged_keys"


def test_keys_of_a_plain_run_are_those_of_the_table(tmp_path: Path) -> None:
    text = PAGE.read_text("utf-8")
    always = documented_keys(text.split("## On request")[0])
    spectra = measure()
    run = trainer(tmp_path, spectra, max_epochs=1)
    run.fit(seeded(Net), loader(), loader(seed=1))
    logged = {key.removeprefix("hessian/") for key in run.callback_metrics if key.startswith("hessian/")}
    assert logged == always


def test_keys_of_a_full_run_are_in_the_table(tmp_path: Path) -> None:
    documented = documented_keys(PAGE.read_text("utf-8"))
    spectra = measure(
        extras=[
            *(Trace(num_hvps=4), FrobeniusNorm(num_hvps=4), Density(num_hvps=8), Subspace(dimension=1)),
            *("norms", "numerical_interval", "split_half", OutlierRatio(num_classes=2)),
        ],
        max_hvps=200,
        max_overhead=0.99,
    )
    run = trainer(tmp_path, spectra, max_epochs=2)
    run.fit(seeded(Net), loader(), loader(seed=1))
    logged = {key.removeprefix("hessian/") for key in run.callback_metrics if key.startswith("hessian/")}
    assert logged <= documented
    assert {"trace", "negative_mass", "subspace_angle", "slope_half_1", "outlier_ratio", "overhead"} <= logged
