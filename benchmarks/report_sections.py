"""Reports in sections: each is written as soon as it is made, so a later one that fails loses none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def with_sections(text: str, sections: Iterable[str]) -> str:
    """Replace the sections of a report that have the same headings, and add the others at its end."""
    found = {part.partition("\n")[0]: part for part in text.strip().split("\n\n## ")}
    found |= {part.partition("\n")[0]: part for part in (section.removeprefix("## ") for section in sections)}
    return "\n\n## ".join(found.values()) + "\n"


def write_sections(output: Path | None, text: str, sections: Iterable[str]) -> None:
    """Write a report after each of its new sections; without an output only make them.

    Args:
        output: the file.
        text: the report to begin with, a title alone or an earlier report.
        sections: the new sections, each beginning with its heading.
    """
    for section in sections:
        text = with_sections(text, [section])
        if output is not None:
            output.write_text(text, encoding="utf-8")
