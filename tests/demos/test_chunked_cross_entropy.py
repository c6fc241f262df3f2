"""The loss in chunks of tokens: its value, its two derivatives, and the size of what it computes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hessian_callback.demos.chunked_cross_entropy import chunked_cross_entropy

TOKENS, WIDTH, CLASSES = 7, 3, 11


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(rows, WIDTH, generator=generator, dtype=dtype) for rows in (TOKENS, CLASSES))
    # The first and the last class, and one that occurs twice.
    return hidden, weight, torch.tensor([0, 10, 4, 4, 2, 9, 1])


@pytest.mark.parametrize("chunk", [1, 3, 7, 100])
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=["hidden", "weight", "both"])
def test_derivatives_agree_with_differences(chunk: int, wanted: tuple[bool, bool]) -> None:
    hidden, weight, targets = arguments()
    tensors = tuple(tensor.requires_grad_(want) for tensor, want in zip((hidden, weight), wanted, strict=True))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        # The factor tells a gradient that ignores the one from above.
        return 3 * chunked_cross_entropy(hidden, weight, targets, chunk) ** 2

    assert torch.autograd.gradcheck(loss, tensors)
    assert torch.autograd.gradgradcheck(loss, tensors)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_hessian_is_that_of_the_plain_loss(dtype: torch.dtype, tied: bool) -> None:
    hidden, weight, targets = arguments(dtype)
    inputs = hidden if not tied else hidden[:, :0]

    def hessian(loss: Any) -> Tensor:
        def of_flat(flat: Tensor) -> Tensor:
            matrix = flat[: weight.numel()].view_as(weight)
            # A language model's embedding is the head's weight as well.
            states = torch.tanh(matrix[targets]) if tied else flat[weight.numel() :].view_as(hidden)
            return loss(states, matrix)

        return torch.autograd.functional.hessian(of_flat, torch.cat([weight.flatten(), inputs.flatten()]))

    expected = hessian(lambda states, matrix: F.cross_entropy(states @ matrix.T, targets))
    found = hessian(lambda states, matrix: chunked_cross_entropy(states, matrix, targets, 2))
    torch.testing.assert_close(found, expected)


def test_half_precision_rounds_the_logits_and_nothing_after_them() -> None:
    hidden, weight, targets = arguments(torch.bfloat16)
    loss = chunked_cross_entropy(hidden, weight, targets, 3)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy((hidden @ weight.T).float(), targets))


def test_a_target_outside_of_the_classes_is_refused() -> None:
    hidden, weight, targets = arguments()
    with pytest.raises((IndexError, RuntimeError), match="out of bounds"):
        chunked_cross_entropy(hidden, weight, targets + 1, 3)


def test_probabilities_of_a_large_vocabulary_add_up_to_one() -> None:
    """On a CPU softmax adds in order, and derivatives of the plain loss are off by 80 roundings."""
    classes, width = 50_000, 16
    hidden, direction = torch.randn(2, 4, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(classes, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.tensor([0, 7, 7, classes - 1])

    def product(dtype: torch.dtype, loss: Any) -> Tensor:
        states = hidden.to(dtype).requires_grad_()
        (gradient,) = torch.autograd.grad(loss(states, weight.to(dtype)), states, create_graph=True)
        return torch.autograd.grad(gradient, states, grad_outputs=direction.to(dtype))[0].double()

    exact = product(torch.float64, lambda states, matrix: F.cross_entropy(states @ matrix.T, targets))
    found = product(torch.float32, lambda states, matrix: chunked_cross_entropy(states, matrix, targets, 4))
    assert (found - exact).norm() < 30 * torch.finfo(torch.float32).eps * exact.norm()


class LargestResult(TorchDispatchMode):
    """Counts the numbers in the largest tensor that any operation returns, forwards and backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.numbers = max([self.numbers, *(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))])
        return result


def largest_in_a_product(loss: Any) -> int:
    tokens, width, classes = 64, 4, 50
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(classes, width, requires_grad=True)
    targets = torch.arange(tokens) % classes
    with LargestResult() as largest:
        gradients = torch.autograd.grad(loss(hidden, weight, targets), (hidden, weight), create_graph=True)
        directions = [torch.ones_like(gradient) for gradient in gradients]
        torch.autograd.grad(gradients, (hidden, weight), grad_outputs=directions)
    return largest.numbers


def test_nothing_as_large_as_all_logits_is_computed() -> None:
    all_logits = 64 * 50
    assert (
        largest_in_a_product(lambda hidden, weight, targets: F.cross_entropy(hidden @ weight.T, targets)) == all_logits
    )
    assert largest_in_a_product(lambda *arguments: chunked_cross_entropy(*arguments, 8)) == all_logits // 8
