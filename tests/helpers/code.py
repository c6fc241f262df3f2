"""Run a text as a program: ``python -m tests.helpers.code TEXT``."""

from __future__ import annotations

import sys

if __name__ == "__main__":
    exec(compile(sys.argv[1], "<string>", "exec"), {"__name__": "__main__"})
