"""Random numbers on GPUs for the time of a block, from a state of its own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

__all__ = ["own_cuda_state", "own_cuda_states"]


@contextmanager
def own_cuda_state(generator: torch.Generator, seed: int | None = None) -> Iterator[None]:
    """Let a GPU's generator draw from another state inside the block.

    The states are exchanged, because a generator whose seed or state is set tells recurrent layers to make their
    dropout masks from a new beginning. They draw that from the generator, and the training takes another course.

    Args:
        generator: the default generator of a GPU.
        seed: of the other state; ``None`` to begin with a copy of the present one.
    """
    own = generator.graphsafe_get_state()
    other = torch.Generator(generator.device)
    if seed is None:
        other.set_state(generator.get_state())
    else:
        other.manual_seed(seed)
    generator.graphsafe_set_state(other)
    try:
        yield
    finally:
        generator.graphsafe_set_state(own)


@contextmanager
def own_cuda_states() -> Iterator[None]:
    """Let the default generators of all GPUs draw from copies of their states inside the block."""
    with ExitStack() as stack:
        # A call to a device that is not in use would initialise it, which a forked process must not do.
        if torch.cuda.is_available() and torch.cuda.is_initialized():
            for generator in torch.cuda.default_generators:
                stack.enter_context(own_cuda_state(generator))
        yield
