"""Write the tables of logged keys into docs/logged.md: ``python -m tests.helpers.logged_keys``."""

from __future__ import annotations

import re
from pathlib import Path

from hessian_callback.measurement.extras.registry import EXTRAS
from hessian_callback.measurement.measurement import LOGGED_KEYS

__all__ = ["PAGE", "with_tables"]

PAGE = Path(__file__).parents[2] / "docs" / "logged.md"


def _tables() -> dict[str, str]:
    always = [f"| `hessian/{key}` | {text} |" for key, text in LOGGED_KEYS.items()]
    extras = [
        f'| `hessian/{key}` | `extras=["{name}"]` | {text} |'
        for name, extra in EXTRAS.items()
        for key, text in extra.keys.items()
    ]
    return {
        "keys of every measurement": "\n".join(["| key | value |", "|---|---|", *always]),
        "keys of extras": "\n".join(["| key | option | value |", "|---|---|---|", *extras]),
    }


def with_tables(page: str) -> str:
    """Return the text of the page with the tables that the code declares."""
    for name, rows in _tables().items():
        begin, end = f"<!-- {name} -->", "<!-- end -->"
        assert page.count(begin) == 1, name
        rows = rows.replace("``", "`")
        page = re.sub(rf"{begin}\n.*?{end}", lambda _, text=f"{begin}\n\n{rows}\n\n{end}": text, page, flags=re.S)
    return page


if __name__ == "__main__":
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
