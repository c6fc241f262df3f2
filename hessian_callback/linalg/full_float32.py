"""Arithmetic of float32 that is that of float32, where a run or a library's default allows less."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

__all__ = ["full_float32"]


@contextmanager
def full_float32() -> Iterator[None]:
    """Keep matrix products and convolutions of float32 numbers from being rounded to TF32 or bfloat16.

    On GPUs from Ampere on, cuDNN's convolutions round their factors to ten bits by default, and
    ``torch.set_float32_matmul_precision("high")``, which Lightning recommends for training, lets matrix products do so.
    Error bounds that rest on the precision of float32 would then be untrue. When the block is left all settings read as
    before, and training keeps its speed. Also usable as a decorator.

    Only settings that allow less are touched. One of them that was inherited, from ``torch.backends.fp32_precision``
    or from a library's default, can't be told from one that was set, so from then on it is set to what it was: choose
    the generic setting before the block, and a later change of it no longer reaches those.

    Example:
        >>> torch.set_float32_matmul_precision("medium")
        >>> with full_float32():
        ...     torch.get_float32_matmul_precision()
        'highest'
        >>> torch.get_float32_matmul_precision()
        'medium'
        >>> torch.set_float32_matmul_precision("highest")
    """
    with _quiet():
        settings = list(_settings())
    try:
        with _quiet():
            for setting in settings:
                setting.bring_to(setting.full)
        yield
    finally:
        with _quiet():
            # In the same order: old names, which stand for several settings, before those themselves.
            for setting in settings:
                setting.bring_to(setting.before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that come with old names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class _Setting:
    get: Callable[[], object]
    put: Callable[[Any], None]
    before: object
    full: object

    def bring_to(self, value: object) -> None:
        # Read again, for an earlier one may stand for several. What can't be read, old names among new ones, is put.
        with suppress(RuntimeError):
            if self.get() == value:
                return
        self.put(value)


def _settings() -> Iterator[_Setting]:
    """What decides, under old names and new; torch compares the two and wants both."""
    backends = torch.backends
    # A run that mixes old and new names gets an error from the old ones, which then decide nothing.
    with suppress(RuntimeError):
        get = torch.get_float32_matmul_precision
        yield _Setting(get, torch.set_float32_matmul_precision, get(), "highest")
    with suppress(RuntimeError):
        yield _of(backends.cudnn, "allow_tf32", False)
    for place in (backends.cuda, backends.cudnn, backends.mkldnn):
        for operation in ("matmul", "conv", "rnn"):
            owner = getattr(place, operation, None)
            if owner is not None and hasattr(owner, "fp32_precision"):
                yield _of(owner, "fp32_precision", "ieee")


def _of(owner: object, name: str, full: object) -> _Setting:
    return _Setting(partial(getattr, owner, name), partial(setattr, owner, name), getattr(owner, name), full)
