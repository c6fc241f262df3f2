"""The contract of every engine: the dense Hessian, linear if exact, within the tolerance it declares, no traces.

tests/linalg/test_distributed.py compares numbers of ranks.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from hessian_callback import HessianOperator

ENGINES = ("double_backward", "linearize", "finite_difference")


class Network(nn.Module):
    """Two layers, with batch normalisation and dropout in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


def loss_fn(model: Any, batch: Any) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def make() -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = Network().double().eval()
    batches = [(torch.randn(n, 3).double(), torch.randint(2, (n,))) for n in (5, 8)]
    model(batches[0][0]).sum().backward()  # so that there are gradients to be left alone
    return model, batches


def dense(model: nn.Module, batches: list[Any]) -> torch.Tensor:
    """The Hessian of the mean over samples, by ``torch.func``."""
    names = [name for name, _ in model.named_parameters()]
    point = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    sizes = [parameter.shape for parameter in model.parameters()]

    def mean_loss(flat: torch.Tensor) -> torch.Tensor:
        pieces = flat.split([size.numel() for size in sizes])
        values = {name: piece.view(size) for name, piece, size in zip(names, pieces, sizes, strict=True)}
        outputs = [torch.func.functional_call(model, values, (x,)) for x, _ in batches]
        return nn.functional.cross_entropy(torch.cat(outputs), torch.cat([y for _, y in batches]))

    return torch.func.hessian(mean_loss)(point)


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def test_products_are_those_of_the_dense_hessian(engine: str) -> None:
    model, batches = make()
    matrix = dense(model, batches)
    norm = float(torch.linalg.matrix_norm(matrix, 2))
    with HessianOperator(model, loss_fn, batches, hvp=engine) as operator:
        columns = torch.stack([operator.matvec(one) for one in torch.eye(len(matrix)).double()], 1)
        # The declared error is relative to the largest eigenvalue, for vectors of length 1.
        tolerance = operator.relative_error if operator.exact else 1e-6
        assert float((columns - matrix).norm(dim=0).max()) <= max(tolerance, 64 * 2.0**-52) * norm
        if operator.exact:
            first, second = torch.randn(2, len(matrix)).double()
            combined = 2 * operator.matvec(first) - 3 * operator.matvec(second)
            torch.testing.assert_close(operator.matvec(2 * first - 3 * second), combined, rtol=1e-12, atol=1e-12 * norm)


def test_nothing_is_left_behind(engine: str) -> None:
    model, batches = make()

    def everything() -> list[Any]:
        tensors = [*model.parameters(), *model.buffers(), *(part for batch in batches for part in batch)]
        return [
            [(id(tensor), tensor.clone(), tensor.requires_grad) for tensor in tensors],
            [(id(p.grad), p.grad.clone()) for p in model.parameters() if p.grad is not None],
            [module.training for module in model.modules()],
            [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
            (torch.get_rng_state(), random.getstate(), np.random.get_state()[1]),  # type: ignore[index]
            (torch.is_grad_enabled(), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        ]

    before = everything()
    with HessianOperator(model, loss_fn, batches, hvp=engine) as operator:
        for _ in range(3):
            operator.matvec(torch.randn(operator.num_parameters, generator=torch.Generator().manual_seed(1)).double())
    after = everything()
    assert str(before) == str(after)  # The text of small tensors has all elements; identities are numbers.
    for (_, old, _), (_, new, _) in zip(before[0], after[0], strict=True):
        assert torch.equal(old, new)
    assert torch.equal(before[4][0], after[4][0])


def test_a_loss_that_fails_leaves_nothing_behind(engine: str) -> None:
    model, batches = make()
    values = [parameter.clone() for parameter in model.parameters()]
    left = 7

    def failing(model: Any, batch: Any) -> torch.Tensor:
        nonlocal left
        left -= 1
        if left == 0:
            raise RuntimeError("the loss fails")
        return loss_fn(model, batch)

    def multiply() -> None:
        with HessianOperator(model, failing, batches, hvp=engine, memory_budget=0) as operator:
            for _ in range(9):
                operator.matvec(torch.ones(operator.num_parameters).double())

    with pytest.raises(RuntimeError, match="the loss fails"):
        multiply()
    for parameter, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(parameter, value)
        assert parameter.requires_grad
