"""Hessians of models under ``fully_shard``, against the same model in one piece."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hessian_callback import HessianOperator, top_eigenvalues
from tests.helpers.cases import assign_to_ranks
from tests.helpers.ranks import needs_sharding, run_ranks

pytestmark = needs_sharding


def sharded_and_whole(
    rank: int, hvp: str, dtype: torch.dtype, holders: int, layers: tuple[int, ...] = (0, 2)
) -> tuple[float, Tensor, Tensor]:
    world = dist.get_world_size()
    whole, batches, weights = assign_to_ranks("mlp", dtype, 0, 1, 1)
    reference = HessianOperator(whole.model, whole.loss_fn, batches, weights=weights, process_group=_own_group(rank))
    case, batches, weights = assign_to_ranks("mlp", dtype, rank, world, holders)
    model = case.model
    mesh = init_device_mesh("cpu", (world,))
    for module in (*[model[layer] for layer in layers], model):
        fully_shard(module, mesh=mesh)
    # A training step's leftovers, which a measurement must neither lose nor use.
    case.loss_fn(model, whole.batches[0]).backward()
    before = {name: (p.to_local().clone(), p.grad.to_local().clone()) for name, p in model.named_parameters()}
    with torch.no_grad():  # leaves the outermost module whole
        case.loss_fn(model, whole.batches[0])
    vector = torch.linspace(-1, 1, reference.num_parameters, dtype=dtype)
    with HessianOperator(
        model, case.loss_fn, batches, weights=weights, process_group=dist.group.WORLD, hvp=hvp
    ) as operator:
        product = operator.matvec(vector)
        eigenvalues = top_eigenvalues(operator, 5).eigenvalues
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter.to_local(), before[name][0])
        assert torch.equal(parameter.grad.to_local(), before[name][1])
    expected = reference.matvec(vector)
    # Training continues as on a copy that was never measured.
    untouched = copy.deepcopy(whole.model)
    untouched.zero_grad()
    model.zero_grad()
    case.loss_fn(model, whole.batches[0]).backward()
    whole.loss_fn(untouched, whole.batches[0]).backward()
    for one, other in zip(model.parameters(), untouched.parameters(), strict=True):
        torch.testing.assert_close(one.grad.full_tensor(), other.grad)
    return float((product - expected).norm() / expected.norm()), eigenvalues, top_eigenvalues(reference, 5).eigenvalues


def _own_group(rank: int) -> dist.ProcessGroup:
    groups = [dist.new_group([member]) for member in range(dist.get_world_size())]
    return groups[rank]


# Without layers the outermost module holds the parameters, and a forward pass leaves those whole.
@pytest.mark.parametrize("layers", [(0, 2), ()], ids=["layers", "whole"])
@pytest.mark.parametrize(
    ("hvp", "dtype", "tolerance"),
    [
        ("double_backward", torch.float64, 1e-12),
        ("double_backward", torch.float32, 1e-5),
        ("finite_difference", torch.float64, 1e-6),
        ("finite_difference", torch.float32, 5e-2),
    ],
    ids=str,
)
def test_sharded_parameters_have_the_same_hessian(
    hvp: str, dtype: torch.dtype, tolerance: float, layers: tuple[int, ...]
) -> None:
    for outcome in run_ranks(sharded_and_whole, 2, hvp, dtype, 2, layers):
        error, eigenvalues, expected = outcome.value
        assert error < tolerance
        torch.testing.assert_close(eigenvalues, expected, rtol=tolerance, atol=0)


def test_ragged_shares_and_a_rank_without_a_batch() -> None:
    for outcome in run_ranks(sharded_and_whole, 3, "double_backward", torch.float64, 2):
        assert outcome.value[0] < 1e-12


def test_differences_of_sharded_gradients_need_a_batch_on_every_rank() -> None:
    lucky, bare = run_ranks(sharded_and_whole, 2, "finite_difference", torch.float64, 1, expect_errors=True)
    assert bare.error == "ValueError"
    assert "pass more batches than there are ranks" in bare.message
    assert lucky.error == "PeerError"
