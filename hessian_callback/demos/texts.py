"""Data of text as windows of characters or of other units, for language models."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, RandomSampler

from hessian_callback.callbacks.lightning_packages import LightningDataModule
from hessian_callback.demos.gathered import as_batch
from hessian_callback.demos.options import check_at_least

__all__ = ["TextData", "TextWindows", "WindowedText", "read_text"]

# One verse a line, without references, as release 4.38 of Debian's packages prints them.
_BIBLE_SHA256 = "b5c4940bcfeee072c0935b5200d0f9d88a00a0199cb0961d16133458fcdfae5d"


def read_text(source: str) -> str:
    r"""Return a text by its name, or the content of a file.

    The help texts are repetitive: with Python 3.11, 8 % of the windows of 65 characters in their last tenth also occur
    before it, which lowers a test loss. For the King James version the share is 0.06 %.

    Args:
        source: ``"pydoc_topics"``, the help texts of Python's own library in the order of their names (0.46 million
            characters, of which each release of Python has other ones); ``"bible_kjv"``, the King James version of
            Debian's packages bible-kjv and bible-kjv-text, one verse a line (4.1 million); or the path of a file in
            UTF-8.

    Returns:
        The text, with ``"\n"`` at the ends of lines.

    Raises:
        FileNotFoundError: if there is no such file, or the packages are missing.
        ValueError: if the file is empty or not in UTF-8, or the packages' text is another one.

    Example:
        >>> "assert" in read_text("pydoc_topics")
        True
    """
    if source == "pydoc_topics":
        from pydoc_data.topics import topics

        return "".join(topics[name] for name in sorted(topics))
    if source == "bible_kjv":
        return _bible()
    path = Path(source)
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no file {source}; source is 'pydoc_topics', 'bible_kjv' or the path of a file"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{source} is not in UTF-8 ({error}); convert it first") from error
    if not text:
        raise ValueError(f"{source} is empty; pass a file with text")
    return text


def _bible() -> str:
    remedy = "apt-get install bible-kjv bible-kjv-text"
    command = shutil.which("bible")
    if command is None:
        raise FileNotFoundError(
            f"source='bible_kjv' reads the text from the command bible, which is not installed: {remedy}"
        )
    # Without -p a bible.data in the working folder would come first; -f turns page layout off, which is on by default.
    process = subprocess.run(
        [command, "-p", "/usr/lib", "-f", "Gen1:1-Rev22:21"], stdin=subprocess.DEVNULL, capture_output=True, check=False
    )
    if process.returncode:
        raise FileNotFoundError(
            f"the command bible finds no text ({process.stderr.decode(errors='replace').strip()}): {remedy}"
        )
    verses = process.stdout.decode("ascii", errors="replace").splitlines()
    text = "".join(verse.partition(" ")[2] + "\n" for verse in verses)
    if _sha256(text) != _BIBLE_SHA256:
        raise ValueError(
            "the command bible prints another text than that of release 4.38 (SHA-256), with which the published "
            "results were made; save the text to a file and pass its path as the source"
        )
    return text


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


class TextWindows(Dataset[tuple[Tensor, Tensor]]):
    """Windows of T codes, and the same ones shifted by one, which are the targets.

    Args:
        codes: the text, ``(n,)``.
        starts: where the windows begin, ``(N,)``, at most n - T - 1.
        length: T.

    Example:
        >>> windows = TextWindows(torch.arange(10), starts=torch.tensor([0, 5]), length=4)
        >>> windows[1]
        (tensor([5, 6, 7, 8]), tensor([6, 7, 8, 9]))
    """

    def __init__(self, codes: Tensor, starts: Tensor, length: int) -> None:
        """Store the text; windows are cut on access."""
        self.codes = codes
        self.starts = starts
        self._offsets = torch.arange(length + 1)

    def __len__(self) -> int:
        """N."""
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return a window and its targets, ``(T,)`` each."""
        window = self.codes[self.starts[index] + self._offsets]
        return window[:-1], window[1:]

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, Tensor]:
        """Return a batch, ``(B, T)`` each; a loader calls this for all of its indices at once."""
        windows = self.codes[self.starts[torch.as_tensor(indices)].unsqueeze(1) + self._offsets]
        return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


class WindowedText(LightningDataModule):
    """A text as codes, with its end held out: the base of `TextData` and `TokenData`.

    Subclasses define ``encode``. Options and batches are those of `TextData`.
    """

    #: The word for what a code stands for, in messages and in the name of an option.
    unit = "characters"

    def __init__(
        self,
        source: str,
        context_length: int,
        batch_size: int,
        eval_batch_size: int,
        val_fraction: float,
        num_train: int | None,
        steps_per_epoch: int | None,
        val_sequences: int | None,
    ) -> None:
        """Check and store the options; the text is read on its first use."""
        super().__init__()
        sizes = {
            "context_length": context_length,
            "batch_size": batch_size,
            "eval_batch_size": eval_batch_size,
            f"train_{self.unit}": num_train,
            "steps_per_epoch": steps_per_epoch,
            "val_sequences": val_sequences,
        }
        check_at_least(1, **sizes)
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction must lie between 0 and 1, got {val_fraction}")
        self.source = source
        self.context_length = context_length
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.val_fraction = val_fraction
        self.steps_per_epoch = steps_per_epoch
        self.val_sequences = val_sequences
        self._num_train = num_train
        self._train: TextWindows | None = None
        self._val: TextWindows | None = None

    def encode(self, text: str) -> Tensor:
        """Return the codes of a text, ``(n,)`` in int64."""
        raise NotImplementedError

    @cached_property
    def text(self) -> str:
        """The whole text, read on its first use."""
        return read_text(self.source)

    @cached_property
    def sha256(self) -> str:
        """Checksum of the text in UTF-8, which identifies the text of a run."""
        return _sha256(self.text)

    def setup(self, stage: str) -> None:
        """Encode the text and cut its end off."""
        if self._train is not None:
            return
        codes = self.encode(self.text)
        num_train = len(codes) - round(self.val_fraction * len(codes))
        train, val = codes[:num_train], codes[num_train:]
        if self._num_train is not None:
            if self._num_train > num_train:
                raise ValueError(
                    f"train_{self.unit}={self._num_train}, but only {num_train} are not held out; use fewer, a "
                    "longer text or a smaller val_fraction"
                )
            train = train[: self._num_train]
        for part, part_codes in (("training", train), ("held-out", val)):
            if len(part_codes) <= self.context_length:
                raise ValueError(
                    f"the {part} part has {len(part_codes)} {self.unit}, and one window and its last target take "
                    f"{self.context_length + 1}; use a smaller context_length or a longer text"
                )
        starts = torch.arange(0, len(val) - self.context_length, self.context_length)
        if self.val_sequences is not None:
            if self.val_sequences > len(starts):
                raise ValueError(
                    f"val_sequences={self.val_sequences}, but the held-out part has {len(starts)} windows that don't "
                    "overlap; use fewer or hold out more"
                )
            starts = starts[torch.arange(self.val_sequences) * len(starts) // self.val_sequences]
        self._train = TextWindows(train, torch.arange(len(train) - self.context_length), self.context_length)
        self._val = TextWindows(val, starts, self.context_length)

    def train_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of windows that begin anywhere in the training part."""
        windows = self._ready(self._train)
        steps = self.steps_per_epoch or math.ceil(len(windows.codes) / (self.batch_size * self.context_length))
        sampler = RandomSampler(windows, replacement=True, num_samples=steps * self.batch_size)
        return self._loader(windows, batch_size=self.batch_size, sampler=sampler)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, Tensor]]:
        """Batches of the held-out windows, in a fixed order."""
        return self._loader(self._ready(self._val), batch_size=self.eval_batch_size)

    @staticmethod
    def _ready(windows: TextWindows | None) -> TextWindows:
        if windows is None:
            raise RuntimeError("call setup('fit') before asking for a loader; a Trainer does so itself")
        return windows

    @staticmethod
    def _loader(windows: TextWindows, **options: Any) -> DataLoader[tuple[Tensor, Tensor]]:
        return DataLoader(windows, collate_fn=as_batch, **options)


class TextData(WindowedText):
    """A text as characters, with its end held out.

    Batches are inputs and targets in int64, ``(B, T)`` each; a target is the character after its input. Training
    windows begin anywhere in the training part, drawn by the run's global generator. The held-out windows are the same
    in every run and share no character with the training part.

    Args:
        source: what `read_text` takes.
        context_length: T.
        batch_size: windows in a training batch.
        eval_batch_size: windows in a validation batch.
        val_fraction: share of the text, at its end, that is held out.
        train_characters: number of training characters, from the beginning of the text; default: all that are not held
            out. With few of them a model overfits.
        steps_per_epoch: training batches in an epoch; default: as many as have the training part's number of
            characters. This holds for one process. With several, Lightning's sampler uses each start once an epoch;
            limit the number of batches by the Trainer's ``limit_train_batches``.
        val_sequences: number of held-out windows, evenly spaced; default: all that don't overlap.

    Raises:
        ValueError: if an option is out of range, or the text is too short for it; from the text's own properties and
            ``setup`` also what `read_text` raises.

    Example:
        >>> data = TextData(context_length=32, batch_size=8, steps_per_epoch=2)
        >>> data.setup("fit")
        >>> [(tuple(inputs.shape), tuple(targets.shape)) for inputs, targets in data.train_dataloader()]
        [((8, 32), (8, 32)), ((8, 32), (8, 32))]
        >>> data.decode(data.encode("A yield expression"))
        'A yield expression'
    """

    def __init__(
        self,
        source: str = "pydoc_topics",
        context_length: int = 64,
        batch_size: int = 16,
        eval_batch_size: int = 64,
        val_fraction: float = 0.1,
        train_characters: int | None = None,
        steps_per_epoch: int | None = None,
        val_sequences: int | None = None,
    ) -> None:
        """Check and store the options; the text is read on its first use."""
        super().__init__(
            source,
            context_length,
            batch_size,
            eval_batch_size,
            val_fraction,
            train_characters,
            steps_per_epoch,
            val_sequences,
        )

    @cached_property
    def vocabulary(self) -> str:
        """The characters that occur in the whole text, sorted; a character's position is its code."""
        return "".join(sorted(set(self.text)))

    @property
    def vocab_size(self) -> int:
        """Number of different characters."""
        return len(self.vocabulary)

    def encode(self, text: str) -> Tensor:
        """Return the codes of characters, ``(n,)`` in int64.

        Raises:
            ValueError: if a character does not occur in the vocabulary.
        """
        characters, vocabulary = _code_points(text), _code_points(self.vocabulary)
        codes = np.searchsorted(vocabulary, characters).clip(max=len(vocabulary) - 1)
        unknown = vocabulary[codes] != characters
        if unknown.any():
            strangers = "".join(sorted({chr(point) for point in characters[unknown]}))
            raise ValueError(f"the characters {strangers!r} don't occur in the text of source={self.source!r}")
        return torch.from_numpy(codes)

    def decode(self, codes: Tensor | Iterable[int]) -> str:
        """Return the characters of codes, ``(n,)``.

        Raises:
            IndexError: if a code is not one of the vocabulary's.
        """
        numbers = codes.tolist() if isinstance(codes, Tensor) else codes
        return "".join(self.vocabulary[number] for number in numbers)


def _code_points(text: str) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
