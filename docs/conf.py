"""How the documentation is built: ``python -m sphinx -W docs FOLDER`` from the root, without a network.

Formulas become MathML, which browsers draw by themselves: a page needs no script and no font from elsewhere, opens
from disk, and follows the reader's colours. MathJax would have to be fetched or vendored (megabytes), images of
formulas need a LaTeX installation. An unknown command is an error of the build.
"""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

from docutils import nodes
from math_core import LatexToMathML
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.errors import SphinxError

import hessian_callback

project = "hessian-callback"
author = "the authors of hessian-callback"
version = release = hessian_callback.__version__

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_nb"]

# Docstrings refer to each other as `Spectrum`, from any module; see `_resolve_short_name`.
default_role = "py:obj"
autodoc_member_order = "bysource"
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_default_options = {"members": True, "show-inheritance": True}
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# The notebook is stored without outputs and runs at every build. A cell that raises ends the build.
nb_execution_mode = "force"
nb_execution_raise_on_error = True
nb_execution_timeout = 300

html_theme = "furo"
html_title = f"hessian-callback {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_math_renderer = "mathml"
html_copy_source = False

_MATHML = LatexToMathML()


def _mathml(latex: str, *, display: bool) -> str:
    aligned = display and "&" in latex and r"\begin" not in latex
    try:
        return _MATHML.convert_with_local_state(
            rf"\begin{{aligned}}{latex}\end{{aligned}}" if aligned else latex, displaystyle=display
        )
    except Exception as error:
        raise SphinxError(f"a formula that math-core cannot convert: {latex!r}: {error}") from error


def _inline_formula(translator: Any, node: nodes.math) -> None:
    translator.body.append(_mathml(node.astext(), display=False))
    raise nodes.SkipNode


def _displayed_formula(translator: Any, node: nodes.math_block) -> None:
    translator.body.append(f'<div class="formula">{_mathml(node.astext(), display=True)}</div>')
    raise nodes.SkipNode


def _read_source(app: Sphinx, page: str, source: list[str]) -> None:
    """Turn links to the benchmarks' reports into links to their pages, and fill the reference."""
    source[0] = re.sub(r"\]\((?:\.\./)+benchmarks/(\w+\.md)", r"](/benchmarks/\1", source[0])
    folder, _, subpackage = page.partition("/")
    if folder == "reference":
        source[0] += "".join(map(_module_section, _modules_of(subpackage)))


def _module_section(name: str) -> str:
    title = name.rpartition(".")[2]
    return f"\n{title}\n{'-' * len(title)}\n\n.. automodule:: hessian_callback.{name}\n"


def _modules_of(subpackage: str) -> list[str]:
    """Return the names of a subpackage's modules; none if it is a single module."""
    folders = getattr(import_module(f"hessian_callback.{subpackage}"), "__path__", [])
    names = (f"{subpackage}.{module.name}" for module in iter_modules(folders))
    return sorted(name for name in names if "._" not in name)


def _resolve_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> Any:
    """Link a name without its module, if only one object has it; what stays unknown is shown as code."""
    if node.get("reftype") != "obj":
        return None
    python = env.domains.python_domain
    found = [name for name in python.objects if name.endswith(f".{node['reftarget']}")]
    if len(found) != 1:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, text)


def _is_foreign(app: Sphinx, what: str, name: str, thing: Any, skip: bool, options: Any) -> bool | None:
    """Leave out classes that a module imports from another package and exports."""
    foreign = what == "module" and isinstance(thing, type) and not thing.__module__.startswith("hessian_callback")
    return True if foreign else None


def _reference_pages(app: Sphinx) -> list[Path]:
    return list((app.srcdir / "reference").glob("*.rst"))


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what the project adds to Sphinx."""
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_displayed_formula, None))
    app.connect("source-read", _read_source)
    # These pages depend on the modules that exist, so a cached reading is never valid.
    app.connect("env-get-outdated", lambda *_: [f"reference/{page.stem}" for page in _reference_pages(app)])
    app.connect("missing-reference", _resolve_short_name)
    app.connect("autodoc-skip-member", _is_foreign)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
