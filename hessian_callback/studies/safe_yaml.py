"""YAML from files of unknown origin, refused before it grows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

__all__ = ["MAX_NODES", "read_yaml"]

#: Values and keys of a document, with those that aliases repeat.
MAX_NODES = 10_000
_MAX_BYTES = 1_000_000
_MAX_DEPTH = 50


def read_yaml(text: str | Path) -> Any:
    """Read YAML with plain values only.

    Aliases and merge keys are allowed, but count as the values that they repeat.

    Args:
        text: the document, or the path of a file in UTF-8 with one.

    Raises:
        ValueError: if it is no YAML, has a key twice, or is larger, deeper or longer than a study can be.
        OSError: if the file can't be read.

    Example:
        >>> read_yaml("{a: [1, 2.5, yes]}")
        {'a': [1, 2.5, True]}
        >>> read_yaml("{a: 1, a: 2}")
        Traceback (most recent call last):
        ...
        ValueError: the key 'a' occurs twice in line 1
    """
    if isinstance(text, Path):
        if text.exists() and not text.is_file():
            raise ValueError("it is no file")
        with text.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
        if len(data) > _MAX_BYTES:
            raise ValueError(f"it is larger than {_MAX_BYTES} bytes")
        text = data.decode("utf-8")  # A UnicodeDecodeError is a ValueError.
    try:
        loader = _ShallowLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _measure(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())[:300]}") from error
    except (OverflowError, TypeError, AttributeError) as error:  # Of numbers and dates that don't exist.
        raise ValueError(f"it has a value that can't be read ({error})") from error


class _ShallowLoader(yaml.SafeLoader):  # type: ignore[misc]  # PyYAML has no types.
    """A loader that stops at the first node that is too deep, because it takes time quadratic in the depth."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._depth += 1
        _check_depth(self._depth)
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node


def _check_depth(levels: int) -> None:
    if levels > _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")


def _measure(node: yaml.Node, known: dict[int, tuple[int, int] | None]) -> tuple[int, int]:
    """Count the nodes and the levels of a document with the repetitions that its aliases make.

    The time is linear in the document's own size.
    """
    if id(node) in known:
        repeated = known[id(node)]
        if repeated is None:
            raise ValueError("it contains itself")
        return repeated
    known[id(node)] = None
    size = levels = 1
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    else:
        size += len(node.value) // 200  # A long text counts as several values.
    for part in parts:
        size_of_part, levels_of_part = _measure(part, known)
        size, levels = size + size_of_part, max(levels, levels_of_part + 1)
    if size > MAX_NODES:
        raise ValueError(f"it has more than {MAX_NODES} values")
    _check_depth(levels)
    known[id(node)] = size, levels
    return size, levels


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        if name in seen:
            raise ValueError(f"the key {key.value!r:.60} occurs twice in line {key.start_mark.line + 1}")
        seen.add(name)
