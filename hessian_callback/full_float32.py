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
    Error bounds that rest on the precision of float32 would then be untrue. All settings are as before when the block
    is left, and training keeps its speed. Also usable as a decorator.

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
                setting.put(setting.full)
        yield
    finally:
        with _quiet():
            # In the same order: old names, which stand for several settings, before those themselves.
            for setting in settings:
                setting.put(setting.before)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warnings that come with old names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@dataclass(frozen=True)
class _Setting:
    put: Callable[[Any], None]
    before: object
    full: object


def _settings() -> Iterator[_Setting]:
    """What decides, under old names and new; torch compares the two and wants both."""
    backends = torch.backends
    # A run that mixes old and new names gets an error from the old ones, which then decide nothing.
    with suppress(RuntimeError):
        yield _Setting(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision(), "highest")
    with suppress(RuntimeError):
        yield _Setting(partial(setattr, backends.cudnn, "allow_tf32"), backends.cudnn.allow_tf32, False)
    for place in (backends.cuda, backends.cudnn, backends.mkldnn):
        for operation in ("matmul", "conv", "rnn"):
            owner = getattr(place, operation, None)
            if owner is not None and hasattr(owner, "fp32_precision"):
                yield _Setting(partial(setattr, owner, "fp32_precision"), owner.fp32_precision, "ieee")
