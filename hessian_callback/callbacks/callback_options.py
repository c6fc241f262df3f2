"""Checks of the callback's options that are names, patterns or functions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from hessian_callback._options import check_callable, check_mapping, check_str, optional
from hessian_callback.callbacks.log_names import check_log_name
from hessian_callback.operators.parameters import compile_pattern

__all__ = ["checked_groups", "checked_parameters", "checked_prefix"]


def checked_prefix(prefix: str) -> str:
    """Return the beginning of logged names.

    Raises:
        ValueError: if it is not a name, or could lead a logger to another directory.
    """
    check_str("prefix", prefix)
    if prefix != prefix.strip("/"):
        raise ValueError(f"prefix must be a name without slashes at its ends, got {prefix!r}")
    check_log_name("prefix", prefix)
    return prefix


def checked_parameters(parameters: str | Callable[..., Any] | None) -> str | Callable[..., Any] | None:
    """Return a choice of parameters.

    Raises:
        ValueError: if it is neither a regular expression nor callable.
    """
    if isinstance(parameters, str):
        compile_pattern("parameters", parameters)
        return parameters
    return optional(check_callable, "parameters", parameters)


def checked_groups(groups: Mapping[str, str] | None) -> dict[str, str]:
    """Return groups of parameters by name.

    Raises:
        ValueError: if a name cannot be logged, or a pattern is not a regular expression.
    """
    checked = check_mapping("groups", groups)
    for group, expression in checked.items():
        if "/" in check_str("the names in groups", group):
            raise ValueError(f"the names in groups must not contain slashes, got {group!r}")
        check_log_name("the names in groups", group)
        compile_pattern(f"groups[{group!r}]", check_str(f"groups[{group!r}]", expression))
    return checked
