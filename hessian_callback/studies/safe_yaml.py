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
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _size(node, {}, depth=0)
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML: {' '.join(str(error).split())[:300]}") from error
    except RecursionError as error:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep") from error
    except (OverflowError, TypeError, AttributeError) as error:  # Of numbers and dates that don't exist.
        raise ValueError(f"it has a value that can't be read ({error})") from error


def _size(node: yaml.Node, known: dict[int, int | None], depth: int) -> int:
    """Count the nodes of a document with the repetitions that its aliases make, in time linear in its own size."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"it is nested more than {_MAX_DEPTH} levels deep")
    if id(node) in known:
        repeated = known[id(node)]
        if repeated is None:
            raise ValueError("it contains itself")
        return repeated
    known[id(node)] = None
    size = 1
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.MappingNode):
        _check_keys(node)
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = node.value
    else:
        size += len(node.value) // 200  # A long text counts as several values.
    size += sum(_size(part, known, depth + 1) for part in parts)
    if size > MAX_NODES:
        raise ValueError(f"it has more than {MAX_NODES} values")
    known[id(node)] = size
    return size


def _check_keys(node: yaml.MappingNode) -> None:
    seen = set()
    for key, _ in node.value:
        name = (key.tag, key.value) if isinstance(key, yaml.ScalarNode) else id(key)
        if name in seen:
            raise ValueError(f"the key {key.value!r:.60} occurs twice in line {key.start_mark.line + 1}")
        seen.add(name)
