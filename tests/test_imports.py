"""The import rule: a subpackage imports only the ones below it, and one module imports Lightning."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import hessian_callback

PACKAGE = Path(hessian_callback.__file__).parent

# For each subpackage the others that it may import; docs/design.md has the reasons.
NUMERICAL = {"linalg", "algorithms", "operators", "power_law"}
ALLOWED: dict[str, set[str]] = {
    "linalg": set(),
    "algorithms": {"linalg"},
    "operators": {"linalg"},
    "power_law": set(),
    "measurement": NUMERICAL,
    "metrics": {"power_law"},
    "plots": NUMERICAL | {"measurement"},
    "reports": NUMERICAL | {"measurement", "plots"},
    "callbacks": NUMERICAL | {"measurement", "metrics", "plots", "reports"},
    "demos": NUMERICAL | {"measurement", "metrics", "plots", "reports", "callbacks"},
    "studies": NUMERICAL | {"measurement", "metrics", "plots", "reports", "callbacks", "demos", "cli"},
    "cli": NUMERICAL | {"measurement", "metrics", "plots", "reports", "callbacks", "demos", "studies"},
}
WITH_LIGHTNING = {"callbacks", "studies", "demos", "cli"}
LIGHTNING = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"}
# Either of these may be missing, so one module imports them for all others.
PACKAGES = LIGHTNING - {"lightning_utilities"}


def modules() -> list[Path]:
    return sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE or path.stem == "metrics")


def imported(path: Path, *, for_types: bool = True) -> Iterator[str]:
    """All names of modules that a file imports, at its top or in a function, or for type checkers only."""
    nodes = [ast.parse(path.read_text(encoding="utf-8"))]
    for node in nodes:
        if for_types or not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
            nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def subpackage(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_what_its_subpackage_may(path: Path) -> None:
    own = subpackage(path)
    allowed = ALLOWED[own] | {own, "_version", "_options"}
    for name in imported(path):
        root, *rest = name.split(".")
        if root == "hessian_callback":
            assert rest, f"{path} imports hessian_callback itself"
            assert rest[0] in allowed, f"{own} must not import {name}"
        assert root not in LIGHTNING or own in WITH_LIGHTNING, f"{own} must not import {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_one_module_imports_the_packages_of_lightning(path: Path) -> None:
    names = {name for name in imported(path, for_types=False) if name.partition(".")[0] in PACKAGES}
    assert not names or path.name == "lightning_packages.py"


def test_every_subpackage_has_a_rule_and_a_page() -> None:
    docs = PACKAGE.parent / "docs" / "reference"
    assert {subpackage(path) for path in modules()} == set(ALLOWED)
    assert {path.stem for path in docs.glob("*.rst")} == set(ALLOWED)


def test_the_rule_has_no_cycles_but_between_studies_and_the_command_line() -> None:
    cyclic = {
        (one, other) for one, allowed in ALLOWED.items() for other in allowed if one in ALLOWED[other] and one < other
    }
    assert cyclic == {("cli", "studies")}
