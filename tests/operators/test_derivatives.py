"""Models that second derivatives usually fail on, and the words for those that they do fail on."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, parametrizations
from torch.utils.checkpoint import checkpoint

from hessian_callback import HessianOperator
from hessian_callback.operators.derivatives import (
    DoubleBackwardError,
    check_twice_differentiable,
    exact_derivatives,
    explained,
)


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3, padding_idx=0)
        self.recurrent = kind(3, 4, batch_first=True)
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(tokens))[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(checkpoint(lambda y: torch.tanh(self.first(y)), x, use_reentrant=False))


class Compiled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.compile(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)), backend="aot_eager")

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


TOKENS = torch.tensor([[1, 2, 3], [4, 1, 0]])
POINTS = torch.linspace(-1, 1, 6, dtype=torch.float64).view(2, 3)
MODELS: dict[str, tuple[Any, Tensor]] = {
    "rnn": (lambda: Recurrent(nn.RNN), TOKENS),
    "lstm": (lambda: Recurrent(nn.LSTM), TOKENS),
    "gru": (lambda: Recurrent(nn.GRU), TOKENS),
    "checkpointed": (Checkpointed, POINTS),
    "compiled": (Compiled, POINTS),
    "encoder": (
        lambda: nn.Sequential(nn.TransformerEncoderLayer(3, 1, 4, batch_first=True, dropout=0.5), nn.Linear(3, 2)),
        POINTS,
    ),
    "group norm": (lambda: nn.Sequential(nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.SiLU(), nn.Linear(4, 2)), POINTS),
}


def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
    return F.cross_entropy(model(x), torch.tensor([0, 1]))


@pytest.mark.parametrize("name", MODELS)
def test_models_that_others_fail_on(name: str) -> None:
    torch.manual_seed(0)
    build, batch = MODELS[name]
    model = build().double().eval()
    exact, differences = (
        HessianOperator(model, loss_fn, [batch], weights=[2.0], hvp=hvp) for hvp in ("auto", "finite_difference")
    )
    vector = torch.randn(exact.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(exact.matvec(vector), differences.matvec(vector), rtol=1e-5, atol=1e-6)


def test_the_padding_row_of_an_embedding_is_a_constant() -> None:
    torch.manual_seed(0)
    model = Recurrent(nn.GRU).double()
    operator = HessianOperator(model, loss_fn, [TOKENS])
    hessian = torch.stack([operator.matvec(row) for row in torch.eye(operator.num_parameters, dtype=torch.float64)])
    assert operator.parameter_names[0] == "embed.weight"
    assert hessian[:3].eq(0).all()
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-14)


def test_all_settings_are_put_back_after_an_error() -> None:
    def settings() -> tuple[bool, ...]:
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu"),
            torch.backends.cuda.flash_sdp_enabled(),
            torch.backends.cuda.mem_efficient_sdp_enabled(),
            torch.backends.cudnn.enabled,
        )

    def fail() -> None:
        with exact_derivatives(nn.LSTM(1, 1)):
            assert settings()[:4] == (True, False, False, False)
            raise ZeroDivisionError

    with torch.inference_mode(), torch.autocast("cpu"):
        before = settings()
        with pytest.raises(ZeroDivisionError):
            fail()
        assert settings() == before


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        ("derivative for aten::_foo_backward is not implemented", "aten::_foo_backward has no double backward"),
        ("torch.compile with aot_autograd does not currently support double backward", "uncompiled"),
        ("When use_reentrant=True, torch.utils.checkpoint is incompatible with .grad()", "use_reentrant=False"),
        ("trying to differentiate twice a function that was marked with @once_differentiable", "finite_difference"),
        ("sparse tensors are not supported: sparse.mm not implemented", "sparse=False"),
        ("one of the variables needed has been modified by an inplace operation", "in place"),
    ],
)
def test_what_autograd_says_is_translated(said: str, remedy: str) -> None:
    with pytest.raises(DoubleBackwardError, match=remedy) as caught, explained():
        raise RuntimeError(said)
    assert str(caught.value.__cause__) == said


def test_other_errors_pass_unchanged() -> None:
    with pytest.raises(RuntimeError, match=r"^mat1 and mat2") as caught, explained():
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    assert type(caught.value) is RuntimeError


def test_a_pruned_branch_is_found() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            return 3 * ctx.saved_tensors[0] ** 2 * grad

    x = torch.tensor(2.0, requires_grad=True)
    (gradient,) = torch.autograd.grad(Once.apply(x) ** 2, [x], create_graph=True)
    # Left to itself, autograd returns zero for the second derivative, which is 480.
    (second,) = torch.autograd.grad(gradient, [x], retain_graph=True, materialize_grads=True)
    assert second == 0
    with pytest.raises(DoubleBackwardError, match="once_differentiable"):
        check_twice_differentiable([gradient])


def test_parameters_behind_a_reentrant_checkpoint_are_missed() -> None:
    """Left to itself, autograd gives them a gradient of zero."""
    first, second = nn.Linear(3, 4), nn.Linear(4, 2)

    def loss_fn(model: nn.Module, x: Tensor) -> Tensor:
        inside = checkpoint(lambda y: torch.tanh(first(y)), x.clone().requires_grad_(), use_reentrant=True)
        return second(inside).square().mean()

    model = nn.ModuleList([first, second])
    loss = loss_fn(model, torch.ones(2, 3))
    assert torch.autograd.grad(loss, [first.weight], materialize_grads=True)[0].eq(0).all()
    for hvp in ("double_backward", "linearize", "finite_difference"):
        with pytest.raises(DoubleBackwardError, match="pass use_reentrant=False"):
            HessianOperator(model, loss_fn, [torch.ones(2, 3)], hvp=hvp)


@pytest.mark.parametrize("parameters", [None, "block|head", "block"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_chosen_parameters_inside_a_reentrant_checkpoint_are_refused(parameters: str | None, reentrant: bool) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"embed": nn.Embedding(6, 3), "block": nn.Linear(3, 4), "head": nn.Linear(4, 2)}).double()
    plain, checkpointed = (
        lambda m, batch: F.cross_entropy(m["head"](torch.tanh(m["block"](m["embed"](batch[0])))), batch[1]),
        lambda m, batch: F.cross_entropy(
            m["head"](torch.tanh(checkpoint(m["block"], m["embed"](batch[0]), use_reentrant=reentrant))), batch[1]
        ),
    )
    # Only the second batch is checkpointed.
    batches = [(torch.tensor([0, 1, 5]), torch.tensor([0, 1, 1])), (torch.tensor([2, 3]), torch.tensor([1, 0]))]

    def loss_fn(m: Any, batch: tuple[Tensor, Tensor]) -> Tensor:
        return (plain if len(batch[0]) == 3 else checkpointed)(m, batch)

    if reentrant:
        with pytest.raises(DoubleBackwardError, match="pass use_reentrant=False"):
            HessianOperator(model, loss_fn, batches, parameters=parameters)
    else:
        exact, expected = (HessianOperator(model, one, batches, parameters=parameters) for one in (loss_fn, plain))
        vector = torch.ones(exact.num_parameters, dtype=torch.float64)
        torch.testing.assert_close(exact.matvec(vector), expected.matvec(vector))


def test_a_reentrant_checkpoint_without_chosen_parameters_is_no_obstacle() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).double()

    def loss_fn(m: Any, x: Tensor) -> Tensor:
        return m[1](checkpoint(m[0], x, use_reentrant=True)).square().mean()

    x = torch.ones(2, 3, dtype=torch.float64)
    head = HessianOperator(model, loss_fn, [x], parameters="1")
    expected = HessianOperator(model, lambda m, x: m(x).square().mean(), [x], parameters="1")
    vector = torch.ones(head.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(head.matvec(vector), expected.matvec(vector))


def jacobian_penalty(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.jacrev(lambda one: model(one[None])[0]))(x).square().mean()


def gradient_penalty(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.vmap(torch.func.grad(lambda one: model(one[None]).sum()))(x).square().mean()


def directional_penalty(model: nn.Module, x: Tensor) -> Tensor:
    return torch.func.jvp(model, (x,), (torch.ones_like(x),))[1].square().mean()


@pytest.mark.parametrize("hvp", ["double_backward", "linearize", "auto"])
@pytest.mark.parametrize("penalty", [jacobian_penalty, gradient_penalty, directional_penalty])
def test_losses_that_transform_functions_by_torch_func(penalty: Any, hvp: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    x, y = torch.randn(12, 3, dtype=torch.float64), torch.randint(2, (12,))

    def loss(model: Any, batch: Any) -> Tensor:
        return F.cross_entropy(model(batch[0]), batch[1]) + penalty(model, batch[0])

    operator = HessianOperator(model, loss, [(x[:6], y[:6]), (x[6:], y[6:])], hvp=hvp)
    hessian = torch.stack([operator.matvec(row) for row in torch.eye(operator.num_parameters, dtype=torch.float64)])
    parameters = list(model.parameters())
    gradient = parameters_to_vector(torch.autograd.grad(loss(model, (x, y)), parameters, create_graph=True))
    rows = [torch.autograd.grad(entry, parameters, retain_graph=True, materialize_grads=True) for entry in gradient]
    torch.testing.assert_close(hessian, torch.stack([parameters_to_vector(row) for row in rows]))


def by_hook(layer: nn.Module, dim: int | None) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return torch.nn.utils.weight_norm(layer, dim=dim)


@pytest.mark.parametrize("hvp", ["double_backward", "linearize"])
@pytest.mark.parametrize("dim", [0, 1, None])
@pytest.mark.parametrize("normed", [parametrizations.weight_norm, by_hook], ids=["parametrization", "hook"])
def test_weight_norm(normed: Any, dim: int | None, hvp: str) -> None:
    """The oracle is the same function of the same numbers, written with other operations."""
    torch.manual_seed(0)
    model = nn.Sequential(normed(nn.Linear(3, 4), dim=dim), nn.Tanh(), normed(nn.Linear(4, 2), dim=dim)).double()
    x, y = torch.randn(8, 3, dtype=torch.float64), torch.randint(2, (8,))
    operator = HessianOperator(model, lambda m, batch: F.cross_entropy(m(batch), y), [x], hvp=hvp)
    sizes = [parameter.shape for parameter in model.parameters()]
    names = [name.rpartition(".")[2] for name, _ in model.named_parameters()]
    split = [shape.numel() for shape in sizes]

    def loss(flat: Tensor) -> Tensor:
        values = [piece.view(shape) for piece, shape in zip(flat.split(split), sizes, strict=True)]
        outputs = x
        for number in (0, 3):
            named = dict(zip(names[number : number + 3], values[number : number + 3], strict=True))
            g, v = (named.get("original0", named.get("weight_g")), named.get("original1", named.get("weight_v")))
            assert g is not None
            assert v is not None
            length = v.square().sum().sqrt() if dim is None else v.square().sum(1 - dim, keepdim=True).sqrt()
            outputs = F.linear(outputs, g * v / length, named["bias"])
            outputs = outputs.tanh() if number == 0 else outputs
        return F.cross_entropy(outputs, y)

    expected = torch.autograd.functional.hessian(loss, parameters_to_vector(model.parameters()).detach())
    hessian = torch.stack([operator.matvec(row) for row in torch.eye(operator.num_parameters, dtype=torch.float64)])
    torch.testing.assert_close(hessian, expected)
