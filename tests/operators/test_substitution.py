"""Other tensors in the places of parameters: each place gets them, and each gets its own back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hessian_callback.operators.hessian import HessianOperator
from hessian_callback.operators.product_check import check_products
from hessian_callback.operators.substitution import substituted


class Recurrent(nn.Module):
    """A recurrent layer with two names, as encoder and decoder share it."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.LSTM(2, 2, batch_first=True)
        self.decoder = self.encoder

    def forward(self, x: Tensor) -> Tensor:
        hidden, state = self.encoder(x)
        return self.decoder(hidden, state)[0]


def listed_twice() -> nn.Module:
    layer = nn.Linear(2, 2)
    return nn.Sequential(layer, nn.Tanh(), nn.BatchNorm1d(2), layer)


def shared_below_others() -> nn.Module:
    layer = nn.Sequential(nn.Linear(2, 2), nn.Tanh())
    return nn.ModuleDict({"a": nn.Sequential(layer, nn.Linear(2, 2)), "b": nn.Sequential(layer), "c": layer})


def tied_parameters() -> nn.Module:
    first, second = nn.Linear(2, 2), nn.Linear(2, 2)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second)


def shared_buffers() -> nn.Module:
    norm = nn.BatchNorm1d(2)
    return nn.Sequential(norm, nn.Linear(2, 2), norm)


MODELS = {
    "layer listed twice": listed_twice,
    "layer below several others": shared_below_others,
    "recurrent layer with two names": Recurrent,
    "tied parameters": tied_parameters,
    "shared buffers": shared_buffers,
}


def output(model: nn.Module, x: Tensor) -> Tensor:
    if isinstance(model, nn.ModuleDict):
        return model["a"](x) + model["b"](x) * model["c"](x)
    return model(x)


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    return (output(model, batch) - 1).square().mean()


def identities(model: nn.Module) -> list[tuple[str, int]]:
    named = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [(name, id(tensor)) for name, tensor in named]


def inputs(model: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*((4, 3, 2) if isinstance(model, Recurrent) else (4, 2)), generator=generator)


@pytest.mark.parametrize("name", MODELS)
def test_every_place_is_replaced_and_put_back(name: str) -> None:
    model, other = (MODELS[name]().eval() for _ in range(2))
    x, before = inputs(model), identities(model)
    values = {**dict(other.named_parameters()), **dict(other.named_buffers())}
    own, expected = output(model, x), output(other, x)
    with substituted(model, values):
        assert torch.equal(output(model, x), expected)
    assert identities(model) == before
    assert torch.equal(output(model, x), own)
    with pytest.raises(ZeroDivisionError), substituted(model, values):
        1 / 0  # noqa: B018
    assert identities(model) == before


def test_a_name_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(KeyError), substituted(nn.Linear(1, 1), {"heavy": torch.ones(1)}):
        pass


@pytest.mark.parametrize("engine", ["double_backward", "linearize"])
@pytest.mark.parametrize("name", MODELS)
def test_products_and_their_check_leave_shared_modules_as_they_are(name: str, engine: Any) -> None:
    torch.manual_seed(1)
    model = MODELS[name]().eval()
    if engine == "linearize" and isinstance(model, Recurrent):
        pytest.skip("recurrent layers have no forward derivative")
    x, before = inputs(model), identities(model)
    with HessianOperator(model, loss, [x], hvp=engine) as operator:
        first = operator.matvec(torch.ones(operator.num_parameters))
        assert check_products(operator, seed=0).precision == "float64"
        assert identities(model) == before
        assert torch.equal(operator.matvec(torch.ones(operator.num_parameters)), first)
    parameters = list(model.parameters())
    gradient = torch.cat([g.flatten() for g in torch.autograd.grad(loss(model, x), parameters, create_graph=True)])
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(gradient.sum(), parameters)])
    torch.testing.assert_close(first, expected)
