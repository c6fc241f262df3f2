"""Names under which quantities are logged."""

from __future__ import annotations

import re

__all__ = ["check_log_name"]

# Loggers and checkpoints use these names in the names of files.
_LOG_NAME = re.compile(r"(?=.*[^.])[\w .\-]+")


def check_log_name(option: str, name: str) -> None:
    """Check a name under which quantities are logged: words, joined by slashes.

    Args:
        option: the option that the name was given in, for the message.
        name: the name.

    Raises:
        ValueError: if the name could lead a logger to another directory.

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
