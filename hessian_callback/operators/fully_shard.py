"""Models whose parameters ``fully_shard`` (FSDP2) keeps in pieces: two ways to a Hessian-vector product.

Its hooks have no double backward. `unsharded` puts the whole parameters on every rank and the hooks to rest, so that
exact engines work as on any model. `ShardedFiniteDifference` leaves the pieces where they are and takes differences
of the gradients that the hooks deliver.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hessian_callback.linalg.distributed import Partition, Ranks
from hessian_callback.operators.loss import BatchLoss
from hessian_callback.operators.products import FiniteDifference

__all__ = ["ShardedFiniteDifference", "is_sharded", "reshard", "unsharded"]

# What the public setters change and nothing public reads.
_SETTINGS = ("reshard_after_backward", "reduce_grads", "all_reduce_grads", "post_forward_mesh_info")


def _sharded_modules(model: nn.Module) -> list[Any]:
    # Whoever sharded the model has imported this. The import takes a second.
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return []
    return [module for module in model.modules() if isinstance(module, fsdp.FSDPModule)]


def is_sharded(model: nn.Module) -> bool:
    """Whether ``fully_shard`` was applied to the model or a part of it.

    Example:
        >>> is_sharded(nn.Linear(2, 2))
        False
    """
    return bool(_sharded_modules(model))


def reshard(model: nn.Module) -> None:
    """Give every rank its pieces again where a forward pass left the outermost module whole."""
    for module in _sharded_modules(model):
        module.reshard()


@contextmanager
def unsharded(model: nn.Module) -> Iterator[None]:
    """Keep the whole parameters on every rank inside the block, and gradients where they are formed.

    A collective on entry. Parameters are plain tensors inside; outside, pieces again, with their settings as before.
    """
    modules = _sharded_modules(model)
    groups = [module._get_fsdp_state()._fsdp_param_group for module in modules]
    saved = [
        (group, {name: getattr(group, name) for name in _SETTINGS if hasattr(group, name)})
        for group in groups
        if group is not None
    ]
    reshard(model)  # so that all modules start alike, whatever the last forward pass left
    try:
        for module in modules:
            module.set_reshard_after_forward(False, recurse=False)
            module.set_reshard_after_backward(False, recurse=False)
            module.set_requires_gradient_sync(False, recurse=False)
            module.unshard()
        yield
    finally:
        reshard(model)
        for group, settings in saved:
            for name, value in settings.items():
                setattr(group, name, value)
            # Which order to prefetch in, as noted by forward passes. Ranks with and without batches have different
            # notes now, and in the training's next backward their collectives would not match.
            group._post_forward_indices.clear()
            group.comm_ctx.post_forward_order.clear()


class ShardedFiniteDifference(FiniteDifference):
    r"""Central differences of sharded gradients; see `FiniteDifference` for the step and its error.

    Each rank moves its own pieces of the parameters along its own pieces of the direction. The hooks average
    gradients over the ranks, so weights are multiplied by their number. Since every forward and backward is a
    collective, all ranks go through equally many batches: those with fewer repeat one at weight zero. For the same
    reason an error on one rank leaves the others waiting for the process group's timeout, which exact products
    don't.

    Raises:
        ValueError: if a rank has no batch, or parameters are sharded other than by rows over all ranks.
    """

    def __init__(self, loss: BatchLoss, batches: Sequence[Any], weights: Sequence[float], ranks: Ranks) -> None:
        with ranks.propagate_errors("preparing differences of sharded gradients"):
            if not batches:
                raise ValueError(
                    "this rank has no batch, and hvp='finite_difference' on sharded parameters needs one on every "
                    "rank; pass more batches than there are ranks"
                )
            self._rows = [_rows(parameter, ranks) for parameter in loss.parameters]
        missing = int(ranks.gather([len(batches)]).max()) - len(batches)
        batches = [*batches, *[batches[0]] * missing]
        scaled = [weight * ranks.world_size for weight in weights]
        super().__init__(loss, batches, [*scaled, *[0.0] * missing])
        self._ranks = ranks

    def product(self, vector: Tensor) -> Tensor:
        """Form two gradients a batch; the result holds this rank's rows, and zeros elsewhere."""
        parameters = self.loss.parameters
        reshard(self.loss.model)
        with self.loss.differentiable():
            total = torch.zeros_like(vector)
            length = float(vector.norm())
            if length == 0:
                return total
            own = [_local(parameter) for parameter in parameters]
            directions = self._own_rows(vector)
            results = self._own_rows(total)
            originals = [piece.clone() for piece in own]
            squares = torch.stack([piece.to(torch.float64).square().sum() for piece in originals]).sum()
            scale = float(self._ranks.all_reduce(squares.to(self._ranks.control_device)).sqrt())
            step = torch.finfo(vector.dtype).eps ** 0.5 * max(1.0, scale) / length
            # The hooks accumulate into .grad, which is the training's.
            gradients = {parameter: parameter.grad for parameter in self.loss.model.parameters()}
            try:
                for sign in (1.0, -1.0):
                    # A module that a forward pass left whole would continue with the unmoved parameters.
                    reshard(self.loss.model)
                    for parameter in gradients:
                        parameter.grad = None
                    for piece, original, direction in zip(own, originals, directions, strict=True):
                        piece.copy_(original).add_(direction, alpha=sign * step)
                    for batch, weight in zip(self.batches, self.weights, strict=True):
                        (weight * self.loss.value(batch)).backward()
                    for result, parameter in zip(results, parameters, strict=True):
                        if parameter.grad is not None:
                            result.add_(_local(parameter.grad), alpha=sign / (2 * step))
            finally:
                reshard(self.loss.model)
                for piece, original in zip(own, originals, strict=True):
                    piece.copy_(original)
                for parameter, gradient in gradients.items():
                    parameter.grad = gradient
        return total

    def _own_rows(self, vector: Tensor) -> list[Tensor]:
        """This rank's rows of each parameter's part of a whole vector, as views."""
        return [whole[rows] for whole, rows in zip(self.loss.split(vector), self._rows, strict=True)]


def _local(tensor: Tensor) -> Tensor:
    """The piece of a sharded tensor that this rank holds, outside autograd."""
    local = tensor.detach()
    return local.to_local() if hasattr(local, "to_local") else local


def _rows(parameter: Any, ranks: Ranks) -> slice:
    """Which rows of a parameter this rank holds."""
    placements = tuple(getattr(parameter, "placements", ()))
    if len(placements) != 1 or not placements[0].is_shard(0) or parameter.device_mesh.size() != ranks.world_size:
        raise ValueError(
            "hvp='finite_difference' needs parameters that fully_shard cut by rows over all ranks, in a mesh of one "
            f"dimension; one has placements {placements}. Use hvp='double_backward', or leave it out with parameters="
        )
    rows = Partition(parameter.shape[0], ranks.world_size, ranks.rank)
    return slice(rows.start, rows.stop)
