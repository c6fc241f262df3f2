"""Disable TF32 and other reduced-precision float32 modes inside a block."""

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
    """Disable TF32 and bfloat16 in float32 matrix products, convolutions and recurrent layers inside a block.

    On GPUs since Ampere, cuDNN's convolutions round their factors to ten bits by default. So do matrix products after
    ``torch.set_float32_matmul_precision("high")``, which Lightning recommends for training. Error bounds that rest on
    the precision of float32 would not hold then. After the block all settings read as before. Also usable as a
    decorator.

    Only settings that allow less than float32 are changed. If one of them was inherited, from
    ``torch.backends.fp32_precision`` or from a library's default, it is restored as an explicit setting, because torch
    does not report the difference. A later change of the generic setting no longer reaches it, so choose the generic
    setting before the block.

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
            # In the same order: old names, which set several settings at once, before those settings.
            for setting in settings:
                setting.bring_to(setting.before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Suppress the warnings of deprecated names."""
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
        # Read again, because an earlier one may have set this one too. torch refuses to read old names after new ones
        # were used; those are set without reading.
        with suppress(RuntimeError):
            if self.get() == value:
                return
        self.put(value)


def _settings() -> Iterator[_Setting]:
    """Yield the settings under their old and new names; torch compares the two and requires both."""
    backends = torch.backends
    # After a run has mixed old and new names, the old ones raise an error and have no effect.
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
