"""Files that are replaced as a whole."""

from __future__ import annotations

import os
import uuid
from pathlib import Path

__all__ = ["write_atomically"]


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    r"""Write a text file beside its place and move it there, so that readers find the old file or the whole new one.

    A symbolic link at ``path`` is replaced and not followed, so that a link in a folder of unknown origin cannot
    direct the text elsewhere. The text is written in UTF-8 with the line ends that it has. Lone surrogates, as in
    undecodable file names, are written as ``\udcXX``.

    Args:
        path: the file. Its folder is made if it does not exist.
        text: its new content.

    Raises:
        OSError: if the file can't be written; an older file is left as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_atomically(Path(folder, "a", "table.csv"), "K,slope\n")
        ...     [path.name for path in Path(folder, "a").iterdir()]
        ['table.csv']
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that nobody can foresee, opened only if it is new: no link can lie in wait there.
    beside = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        with beside.open("xb") as file:
            file.write(text.encode("utf-8", errors="backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise
