"""How the documentation is built: ``python -m sphinx -W docs FOLDER`` from the root, without a network.

Formulas become MathML, which browsers draw by themselves: a page needs no script and no font from elsewhere, opens
from disk, and follows the reader's colours. MathJax would have to be fetched or vendored (megabytes), images of
formulas need a LaTeX installation. An unknown command is an error of the build.
"""

from __future__ import annotations

import re
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

extensions = ["sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode", "myst_parser"]

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
    """Turn links to the benchmarks' reports into links to their pages, and list the modules without a page."""
    source[0] = re.sub(r"\]\(\.\./benchmarks/(\w+\.md)", r"](benchmarks/\1", source[0])
    if page == "reference/rooms":
        source[0] += "\n".join(map(_module_section, _modules_without_a_page(app)))


def _module_section(name: str) -> str:
    return f"\n{name}\n{'-' * len(name)}\n\n.. automodule:: hessian_callback.{name}\n"


def _modules_without_a_page(app: Sphinx) -> list[str]:
    pages = (path.read_text(encoding="utf-8") for path in (app.srcdir / "reference").glob("*.rst"))
    shown = {name for page in pages for name in re.findall(r"automodule:: hessian_callback\.(\w+)", page)}
    modules = (module.name for module in iter_modules(hessian_callback.__path__))
    return sorted(name for name in modules if name not in shown and not name.startswith("_"))


def _resolve_short_name(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: nodes.Element) -> Any:
    """Link a name without its module, if only one object has it; what stays unknown is shown as code."""
    if node.get("reftype") != "obj":
        return None
    python = env.domains.python_domain
    found = [name for name in python.objects if name.endswith(f".{node['reftarget']}")]
    if len(found) != 1:
        return None
    return python.resolve_xref(env, node["refdoc"], app.builder, "obj", found[0], node, text)


def setup(app: Sphinx) -> dict[str, Any]:
    """Register what the project adds to Sphinx."""
    app.add_html_math_renderer("mathml", (_inline_formula, None), (_displayed_formula, None))
    app.connect("source-read", _read_source)
    # What is on that page follows from the others, so no cached reading of it is right.
    app.connect("env-get-outdated", lambda *_: ["reference/rooms"])
    app.connect("missing-reference", _resolve_short_name)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
