"""Where vectors are kept, and what a graph holds against what is known of it."""

from __future__ import annotations

import pytest
import torch

from hessian_callback import HessianOperator
from hessian_callback.operators import memory
from hessian_callback.operators.memory import count_saved_tensors


def test_shared_storage_counts_once_and_parameters_do_not() -> None:
    weight = torch.ones(50, 50, requires_grad=True)
    x = torch.ones(20, 50)
    with count_saved_tensors([weight]) as saved:
        hidden = x @ weight  # saves x and the weight
        (hidden.view(40, 25).exp() * hidden.view(40, 25).exp()).sum()
    # x, and the two exponentials, which exp and the product both save.
    assert saved.num_bytes == 4 * (20 * 50 + 2 * 20 * 50)


@pytest.mark.filterwarnings("ignore:Sparse .* tensor support is in beta")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc], ids=str)
def test_a_loss_that_saves_a_sparse_matrix_has_products(layout: torch.layout) -> None:
    """A graph network multiplies with the matrix of the edges."""
    torch.manual_seed(0)
    model, features = torch.nn.Linear(5, 3), torch.randn(7, 5)
    edges = (torch.rand(7, 7) > 0.5).float()
    sparse = edges.to_sparse(layout=layout)

    def operator(matrix: torch.Tensor) -> HessianOperator:
        return HessianOperator(model, lambda m, x: (matrix @ m(x)).tanh().square().mean(), [features])

    dense = operator(edges)
    vector = torch.randn(dense.num_parameters)
    with operator(sparse) as products:
        torch.testing.assert_close(products.matvec(vector), dense.matvec(vector))
        # The values of the edges, with one index each at least.
        assert products.bytes_per_graph >= edges.count_nonzero() * (4 + 8)


def test_a_basis_goes_to_the_cpu_where_the_device_lacks_room(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert memory.device_with_room(cpu, 1e20) == cpu
    assert memory.device_with_room(gpu, 1e6, budget=10**6) == gpu
    assert memory.device_with_room(gpu, 1e6 + 1, budget=10**6) == cpu
    monkeypatch.setattr(memory, "free_memory", lambda device: 4000)
    assert memory.device_with_room(gpu, 1000) == gpu
    assert memory.device_with_room(gpu, 1001) == cpu
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert memory.device_with_room(gpu, 1e20) == gpu
