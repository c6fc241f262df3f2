"""Readers for images in files: IDX (the format of MNIST and Fashion-MNIST) and both versions of CIFAR-10.

Files are not trusted. Sizes are checked against the header, and contents against a checksum if one is known. Pickles
are read without calling the functions that they name.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import math
import os
import pickle
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

__all__ = ["FASHION_MNIST_FOLDER", "FASHION_MNIST_SHA256", "read_cifar10", "read_idx", "read_idx_folder"]

FASHION_MNIST_FOLDER = "/usr/share/datasets/fashion-mnist"

# Of the unpacked bytes, so that they do not depend on the compression.
FASHION_MNIST_SHA256: Mapping[str, str] = {
    "train-images": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}

_GZIP_MAGIC = b"\x1f\x8b"
_UNSIGNED_BYTES = 0x08
_FETCH_AGAIN = "replace it by a fresh copy"

_CIFAR_SHAPE = (3, 32, 32)
_CIFAR_CLASSES = 10

_NAMES_IN_A_PICKLED_ARRAY = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
}


# -- IDX ---------------------------------------------------------------------------------------------


def read_idx(path: str | os.PathLike[str], *, sha256: str | None = None) -> Tensor:
    """Read an IDX file of unsigned bytes, plain or packed by gzip.

    The format: two zero bytes, a byte for the type, one for the number of dimensions, each dimension as a big-endian
    32-bit number, and the values, last dimension fastest.

    Args:
        path: the file; its content, not its name, determines whether it is packed.
        sha256: checksum of the unpacked file; default: any content.

    Returns:
        Values in uint8, shaped as the header says.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not an IDX file of unsigned bytes, is cut off, or has another checksum.

    Source:
        LeCun, Cortes and Burges, "The MNIST database of handwritten digits", file formats.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "labels-idx1-ubyte"
        ...     _ = path.write_bytes(bytes([0, 0, 8, 1, 0, 0, 0, 3, 5, 0, 4]))
        ...     read_idx(path)
        tensor([5, 0, 4], dtype=torch.uint8)
    """
    path = Path(path)
    content = _unpacked(path)
    if len(content) < 4 or content[:2] != b"\0\0" or content[3] == 0:
        raise ValueError(
            f"{path} is not an IDX file: it begins with {content[:4].hex(' ') or 'nothing'}, not with 00 00, a type "
            f"and a number of dimensions; {_FETCH_AGAIN}"
        )
    if content[2] != _UNSIGNED_BYTES:
        raise ValueError(
            f"{path} holds IDX values of type 0x{content[2]:02x}, and images and labels are unsigned bytes (0x08); "
            "write it with that type"
        )
    num_dimensions = content[3]
    header = 4 + 4 * num_dimensions
    if len(content) < header:
        raise ValueError(f"{path} is cut off within its header; {_FETCH_AGAIN}")
    shape = [int(size) for size in np.frombuffer(content, ">u4", num_dimensions, offset=4)]
    if len(content) != header + math.prod(shape):
        raise ValueError(
            f"{path} has {len(content) - header} bytes of values, and its header promises "
            f"{' x '.join(map(str, shape))} = {math.prod(shape)}; {_FETCH_AGAIN}"
        )
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ValueError(
            f"{path} has another content than the published file (SHA-256 of the unpacked bytes); {_FETCH_AGAIN}, or "
            "read a data set of your own with source='idx'"
        )
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=header).reshape(shape).copy())


def read_idx_folder(
    folder: str | os.PathLike[str],
    part: Literal["train", "t10k"],
    *,
    sha256: Mapping[str, str] | None = None,
) -> tuple[Tensor, Tensor]:
    """Read the images and labels of a folder laid out like MNIST's.

    The files are ``train-images-idx3-ubyte`` and ``train-labels-idx1-ubyte``, and the same with ``t10k``. A dot before
    ``idx`` and a final ``.gz`` are accepted.

    Args:
        folder: the folder.
        part: ``"train"`` or ``"t10k"``, the test images.
        sha256: checksums by the beginning of the files' names, such as ``"train-images"``; default: any content.

    Returns:
        Images ``(N, 1, H, W)`` in uint8 and labels ``(N,)`` in int64.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file can't be read, or the two don't belong together.
    """
    checksums = sha256 or {}
    names = [f"{part}-images", f"{part}-labels"]
    images_path, labels_path = _idx_path(folder, names[0], "idx3"), _idx_path(folder, names[1], "idx1")
    images = read_idx(images_path, sha256=checksums.get(names[0]))
    labels = read_idx(labels_path, sha256=checksums.get(names[1]))
    if images.dim() != 3 or labels.dim() != 1 or len(images) != len(labels) or not len(labels):
        raise ValueError(
            f"{images_path} has shape {tuple(images.shape)} and {labels_path.name} {tuple(labels.shape)}; they must be "
            "(N, H, W) and (N,) with the same N: take both from the same data set"
        )
    return images.unsqueeze(1), labels.long()


def _idx_path(folder: str | os.PathLike[str], name: str, kind: str) -> Path:
    for spelling in (f"{name}-{kind}-ubyte", f"{name}.{kind}-ubyte"):
        for packing in ("", ".gz"):
            path = Path(folder) / f"{spelling}{packing}"
            if path.is_file():
                return path
    raise FileNotFoundError(
        f"no {name}-{kind}-ubyte in {folder}, plain or as .gz; put the four files of a data set in MNIST's format "
        "there: train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte, t10k-labels-idx1-ubyte"
    )


def _unpacked(path: Path) -> bytes:
    content = path.read_bytes()
    if not content.startswith(_GZIP_MAGIC):
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, OSError, zlib.error) as error:
        raise ValueError(f"{path} is cut off or damaged ({error}); {_FETCH_AGAIN}") from error


# -- CIFAR-10 ----------------------------------------------------------------------------------------


def read_cifar10(folder: str | os.PathLike[str], part: Literal["train", "test"]) -> tuple[Tensor, Tensor]:
    """Read CIFAR-10's images and labels from the unpacked folder of its binary or its Python version.

    If a folder has both, the binary version is read. Its records are a byte for the label and 3072 for the image. The
    files of the Python version are pickles, which are read without calling the functions that they name.

    Args:
        folder: the folder with ``data_batch_1.bin`` or ``data_batch_1`` to 5, and ``test_batch.bin`` or ``test_batch``.
        part: ``"train"`` or ``"test"``.

    Returns:
        Images ``(N, 3, 32, 32)`` in uint8 and labels ``(N,)`` in int64.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file is not one of CIFAR-10's.

    Source:
        Krizhevsky, "Learning multiple layers of features from tiny images" (2009), and the data set's own description.
    """
    names = ["test_batch"] if part == "test" else [f"data_batch_{number}" for number in range(1, 6)]
    binary = [Path(folder) / f"{name}.bin" for name in names]
    python = [Path(folder) / name for name in names]
    paths = binary if any(path.is_file() for path in binary) else python
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"no {', '.join(missing)} in {folder}; it must be the folder cifar-10-batches-bin or cifar-10-batches-py "
            "that the archive of CIFAR-10's binary or Python version unpacks to"
        )
    read = _cifar_records if paths is binary else _cifar_pickle
    batches = [read(path) for path in paths]
    images = torch.from_numpy(np.concatenate([pixels for pixels, _ in batches])).reshape(-1, *_CIFAR_SHAPE)
    return images, torch.from_numpy(np.concatenate([labels for _, labels in batches]))


def _cifar_records(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    content = np.frombuffer(path.read_bytes(), np.uint8)
    size = 1 + math.prod(_CIFAR_SHAPE)
    if not len(content) or len(content) % size:
        raise ValueError(f"{path} has {len(content)} bytes, which is not a multiple of {size}; {_FETCH_AGAIN}")
    records = content.reshape(-1, size)
    return records[:, 1:], _checked_cifar_labels(path, records[:, 0].tolist())


def _cifar_pickle(path: Path) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    try:
        content = _Recording(io.BytesIO(path.read_bytes()), encoding="bytes").load()
    except Exception as error:  # A damaged pickle may raise anything.
        raise ValueError(
            f"{path} can't be read as a file of CIFAR-10's Python version ({error}); {_FETCH_AGAIN}"
        ) from error
    # Strings are bytes in the published files, which Python 2 wrote.
    entries = content if isinstance(content, dict) else {}
    labels = entries.get(b"labels", entries.get("labels"))
    size = math.prod(_CIFAR_SHAPE)
    match entries.get(b"data", entries.get("data")):
        case _Recorded(
            state=(_, (int(num), int(width)), _Recorded(arguments=(b"u1" | "u1", *_)), bool(fortran), bytes(values))
        ) if (
            isinstance(labels, list)
            and 0 < num == len(labels)
            and width == size
            and len(values) == num * size
            and all(type(label) is int for label in labels)
        ):
            pixels = np.frombuffer(values, np.uint8).reshape((num, size), order="F" if fortran else "C")
            return pixels, _checked_cifar_labels(path, labels)
    raise ValueError(
        f"{path} holds no 'data' of shape (N, {size}) in uint8 with N whole numbers as 'labels', as CIFAR-10's Python "
        f"version does; {_FETCH_AGAIN}"
    )


def _checked_cifar_labels(path: Path, labels: list[int]) -> np.ndarray[Any, Any]:
    if min(labels) < 0 or max(labels) >= _CIFAR_CLASSES:
        raise ValueError(f"{path} has labels from {min(labels)} to {max(labels)}, not 0 to 9; {_FETCH_AGAIN}")
    return np.array(labels, dtype=np.int64)


class _Recorded:
    """The arguments and the state of a numpy object in a pickle."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Recording(pickle.Unpickler):
    """Records the arguments of numpy's functions in a pickle without calling any.

    Not even numpy is called, because a damaged state of an array or a dtype crashes the process.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _NAMES_IN_A_PICKLED_ARRAY:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which image files do not contain")
        return _Recorded
