"""Names and patterns that users give: they must not lead out of a log directory, nor keep a run from starting."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache

__all__ = ["check_log_name", "compile_pattern", "matching"]

# Loggers make file names of the names of what is logged, and checkpoints may.
_LOG_NAME = re.compile(r"(?=.*[^.])[\w .\-]+")

# Without repeated groups, and with a few repetitions only, backtracking is at worst a small power of a name's length.
_MAY_BACKTRACK = re.compile(r"\)(?:[*+]|\{)|(?:[*+}].*){5}", re.DOTALL)
_LIMIT_SECONDS = 10.0
_SEARCH = "import json, re, sys; pattern, names = json.load(sys.stdin); [re.search(pattern, name) for name in names]"


def check_log_name(option: str, name: str) -> None:
    """Check a name under which something is logged: words, joined by slashes.

    Raises:
        ValueError: if it could lead a logger to another directory.

    Example:
        >>> check_log_name("prefix", "curvature/hessian")
        >>> check_log_name("prefix", "../hessian")
        Traceback (most recent call last):
        ...
        ValueError: prefix must be made of letters, digits, '_', '-', '.' and blanks, joined by '/', got '../hessian'
    """
    if not all(_LOG_NAME.fullmatch(part) for part in name.split("/")):
        raise ValueError(
            f"{option} must be made of letters, digits, '_', '-', '.' and blanks, joined by '/', got {name!r}"
        )


def compile_pattern(option: str, pattern: str) -> re.Pattern[str]:
    """Compile a regular expression.

    Raises:
        ValueError: if it is not valid.

    Example:
        >>> compile_pattern("parameters", "(weight")
        Traceback (most recent call last):
        ...
        ValueError: parameters='(weight' is not a valid regular expression: missing ), unterminated ...
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{option}={pattern!r} is not a valid regular expression: {error}") from error


def matching(option: str, pattern: str, names: Sequence[str]) -> list[str]:
    r"""Return the names in which a regular expression is found.

    Python's ``re`` backtracks: a repetition inside of a repetition, such as ``(\w+\.?)+x``, may take longer than
    any run on a name of 40 characters. It cannot be stopped either, so a pattern that repeats a group is tried in a
    process of its own first, on the same names.

    Raises:
        ValueError: if the pattern is not valid, or takes too long.

    Example:
        >>> matching("parameters", r"\.weight$", ["0.weight", "0.bias"])
        ['0.weight']
    """
    compiled = compile_pattern(option, pattern)
    if _MAY_BACKTRACK.search(pattern) and not _ends_in_time(pattern, tuple(names)):
        raise ValueError(
            f"{option}={pattern!r} takes too long on the names of the parameters, because it repeats what repeats: "
            "write it without a repetition inside of a repetition, or pass a callable (name, parameter) -> bool"
        )
    return [name for name in names if compiled.search(name)]


@lru_cache(maxsize=256)
def _ends_in_time(pattern: str, names: tuple[str, ...]) -> bool:
    if not sys.executable:  # An embedded interpreter has no process to try it in.
        return True
    command = [sys.executable, "-I", "-S", "-c", _SEARCH]
    try:
        subprocess.run(
            command,
            input=json.dumps([pattern, names]).encode(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_LIMIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:  # It has been killed.
        return False
    return True
