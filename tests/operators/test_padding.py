"""The padding row of an embedding is a constant for every engine, as it is for the gradient."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from hessian_callback import HessianOperator
from hessian_callback.operators.product_check import check_products
from tests.helpers.cases import dense


class Scaled(nn.Embedding):
    """As the embeddings of several language models."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


class Functional(nn.Module):
    def __init__(self, num: int, width: int, padding_idx: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.empty(num, width))
        self.padding_idx = padding_idx

    def forward(self, input: Tensor) -> Tensor:
        return F.embedding(input, self.table, padding_idx=self.padding_idx)


class LowLevel(Functional):
    def forward(self, input: Tensor) -> Tensor:
        return torch.embedding(self.table, input, self.padding_idx)


class Doubled(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def parametrized(num: int, width: int, padding_idx: int) -> nn.Module:
    layer = nn.Embedding(num, width, padding_idx=padding_idx)
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


EMBEDDINGS: dict[str, Any] = {
    "plain": nn.Embedding,
    "scaled": Scaled,
    "functional": Functional,
    "low-level": LowLevel,
    "functional, from the end": lambda num, width, padding_idx: Functional(num, width, padding_idx - num),
    "parametrized": parametrized,
}


class Network(nn.Module):
    def __init__(self, embedding: nn.Module) -> None:
        super().__init__()
        self.embedding = embedding
        self.layer = nn.Linear(3, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layer(torch.tanh(self.embedding(input=tokens))).mean(1)


def network(kind: str) -> Network:
    torch.manual_seed(0)
    model = Network(EMBEDDINGS[kind](5, 3, padding_idx=1))
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # The padding row is not zero, as in a pretrained model.
    return model


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    tokens = torch.randint(5, (6, 4))
    tokens[0, :2] = 1
    return tokens, torch.randint(2, (6,))


def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_engines_agree_with_double_backward(kind: str) -> None:
    model = network(kind).double()
    exact = dense(HessianOperator(model, loss_fn, [batch()], hvp="double_backward"))
    for hvp in ("linearize", "finite_difference"):
        found = dense(HessianOperator(model, loss_fn, [batch()], hvp=hvp))
        torch.testing.assert_close(found, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", EMBEDDINGS)
def test_products_in_float64_agree_and_the_check_passes(kind: str) -> None:
    operator = HessianOperator(network(kind), loss_fn, [batch()], hvp="double_backward")
    identity = torch.eye(operator.num_parameters)
    precise = operator.precise_products(identity)
    assert precise is not None
    torch.testing.assert_close(precise.float(), dense(operator), rtol=1e-4, atol=1e-5)
    check_products(operator, seed=0)


@pytest.mark.parametrize("hvp", ["double_backward", "linearize", "finite_difference"])
def test_the_padding_row_counts_in_an_explicit_penalty(hvp: str) -> None:
    embed = nn.Embedding(3, 1, padding_idx=0).double()

    def loss_fn(m: nn.Embedding, tokens: Tensor) -> Tensor:
        return m(tokens).square().mean() + 0.5 * m.weight.square().sum()

    operator = HessianOperator(embed, loss_fn, [torch.tensor([0, 1, 2, 2])], weights=[1.0], hvp=hvp)
    expected = torch.diag(torch.tensor([1.0, 1.5, 2.0], dtype=torch.float64))
    torch.testing.assert_close(dense(operator), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("hvp", ["linearize", "finite_difference"])
def test_a_padding_row_that_an_output_layer_shares(hvp: str) -> None:
    torch.manual_seed(0)
    embed = nn.Embedding(4, 3, padding_idx=0).double()
    nn.init.normal_(embed.weight)
    tokens = torch.tensor([[0, 1, 2], [3, 0, 1]])

    def loss_fn(m: nn.Embedding, tokens: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(m(tokens).tanh(), m.weight).flatten(0, 1), tokens.flatten())

    exact = dense(HessianOperator(embed, loss_fn, [tokens], hvp="double_backward"))
    torch.testing.assert_close(exact, exact.T, rtol=0, atol=1e-12)
    torch.testing.assert_close(dense(HessianOperator(embed, loss_fn, [tokens], hvp=hvp)), exact, rtol=1e-6, atol=1e-6)
