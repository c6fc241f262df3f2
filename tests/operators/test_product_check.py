"""Products that are not those of a Hessian are refused, all others are not; errors of products are measured."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessian_callback import HessianOperator
from hessian_callback.operators.derivatives import DoubleBackwardError
from hessian_callback.operators.functional_loss import FunctionalLoss
from hessian_callback.operators.product_check import WrongProductError, check_products
from tests.helpers.cases import CASES, classify, dense
from tests.helpers.model_zoo import KINDS, Decoder, Recurrent, Trained, resnet
from tests.helpers.ranks import run_ranks

# -- wrong products --------------------------------------------------------------------------------


class FusedCrossEntropy(torch.autograd.Function):
    """Computes its gradient in forward and scales it in backward, as fused kernels do."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        gradient = logits.softmax(-1)
        gradient[torch.arange(len(labels)), labels] -= 1
        ctx.save_for_backward(gradient / len(labels))
        return F.cross_entropy(logits, labels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.saved_tensors[0], None


class DetachedBackward(torch.autograd.Function):
    """A cube whose backward leaves autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 3 * ctx.saved_tensors[0].detach() ** 2 * grad


class Adjoint(torch.autograd.Function):
    """A linear map whose backward computes derivatives from detached inputs, as adjoint solvers do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return (x @ weight.T).tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight = (tensor.detach().requires_grad_() for tensor in ctx.saved_tensors)
        with torch.enable_grad():
            y = (x @ weight.T).tanh()
        return torch.autograd.grad(y, (x, weight), grad, create_graph=True)


class OneSided(torch.autograd.Function):
    """A linear map whose backward has a second derivative with respect to one of its inputs only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return x @ weight.T

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, weight = ctx.saved_tensors
        return grad @ weight.detach(), grad.T @ x


class Rounded(torch.autograd.Function):
    """A straight-through estimator."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return (8 * x).round() / 8

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))


def relu_network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 20), nn.ReLU(), nn.Linear(20, 3))


class Normed(nn.Linear):
    """Forms its weight by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch._weight_norm(self.weight, torch.ones(3, 1, dtype=x.dtype)), self.bias)


def normed() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 12), nn.Tanh(), nn.Linear(12, 12), nn.Tanh(), Normed(12, 3))


def rounded_by_detach(m: Any, b: Any) -> Tensor:
    weight = m[0].weight
    return F.cross_entropy(m[2](F.linear(b[0], weight + ((8 * weight).round() / 8 - weight).detach()).tanh()), b[1])


def without_grad(m: Any, b: Any) -> Tensor:
    with torch.no_grad():
        target = m(b[0] + 1)
    return F.mse_loss(m(b[0]), target)


LOSES_CURVATURE: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "fused loss": (network, lambda m, b: FusedCrossEntropy.apply(m(b[0]), b[1]), "FusedCrossEntropy"),
    "fused loss, kinks": (relu_network, lambda m, b: FusedCrossEntropy.apply(m(b[0]), b[1]), "FusedCrossEntropy"),
    "backward detaches": (network, lambda m, b: DetachedBackward.apply(m(b[0])).mean(), "DetachedBackward"),
    "adjoint": (
        network,
        lambda m, b: F.cross_entropy(m[2](Adjoint.apply(b[0], m[0].weight)), b[1]),
        "Function Adjoint",
    ),
    "asymmetric backward": (
        network,
        lambda m, b: F.cross_entropy(OneSided.apply(m[0](b[0]).tanh(), m[2].weight), b[1]),
        "not symmetric .*Function OneSided",
    ),
    "weight_norm": (normed, classify, "weight_norm, whose second derivative is wrong in PyTorch on the CPU"),
}
NO_DERIVATIVE: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "detached target": (
        network,
        lambda m, b: F.mse_loss(m(b[0]), m(b[0] + 1).detach()),
        "detach at test_product_check",
    ),
    "data": (network, lambda m, b: F.mse_loss(m(b[0]), m(b[0] + 1).data), "data at test_product_check"),
    "no_grad": (network, without_grad, "linear at|at test_product_check"),
    "straight-through function": (
        network,
        lambda m, b: F.cross_entropy(m[2](F.linear(b[0], Rounded.apply(m[0].weight)).tanh()), b[1]),
        "Function Rounded",
    ),
    "straight-through detach": (network, rounded_by_detach, "detach at test_product_check"),
}


def built(build: Callable[[], nn.Module], dtype: torch.dtype) -> tuple[nn.Module, list[Any]]:
    torch.manual_seed(0)
    model = build().to(dtype)
    return model, [(torch.randn(n, 5, dtype=dtype), torch.randint(3, (n,))) for n in (20, 15)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="weight_norm is right on a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", LOSES_CURVATURE)
def test_products_that_miss_curvature_are_refused(name: str, dtype: torch.dtype) -> None:
    build, loss_fn, named = LOSES_CURVATURE[name]
    model, batches = built(build, dtype)
    for seed in range(3):
        with (
            HessianOperator(model, loss_fn, batches) as operator,
            pytest.raises(WrongProductError, match=rf"(?s){named}.*would be measured lacks.*hvp='finite_difference'"),
        ):
            check_products(operator, seed=seed)
    # The remedy that the message names.
    with HessianOperator(model, loss_fn, batches, hvp="finite_difference") as operator:
        assert check_products(operator, seed=0).asymmetry < 1e-4


@pytest.mark.parametrize("hvp", ["auto", "finite_difference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NO_DERIVATIVE)
def test_a_gradient_that_is_no_derivative_is_refused(name: str, dtype: torch.dtype, hvp: str) -> None:
    build, loss_fn, named = NO_DERIVATIVE[name]
    model, batches = built(build, dtype)
    with (
        HessianOperator(model, loss_fn, batches, hvp=hvp) as operator,
        pytest.raises(WrongProductError, match=rf"(?s)not the derivative of a function.*({named}).*Pass a loss_fn"),
    ):
        check_products(operator, seed=0)


def test_a_wrong_function_is_found_in_float32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """As with a kernel for float32 only, or without room for float64."""
    monkeypatch.setattr(FunctionalLoss, "of", classmethod(lambda *_, **__: None))
    model, batches = built(network, torch.float32)
    loss_fn = LOSES_CURVATURE["fused loss"][1]
    with HessianOperator(model, loss_fn, batches) as operator, pytest.raises(WrongProductError, match="FusedCross"):
        check_products(operator, seed=0)
    with HessianOperator(model, classify, batches) as operator:
        result = check_products(operator, seed=0)
        assert result.precision == "float32"
        assert result.difference is not None
        assert result.difference < 0.1


def test_a_function_for_float32_only_is_checked_in_float32() -> None:
    class OnlyFloat32(FusedCrossEntropy):
        @staticmethod
        def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
            if logits.dtype != torch.float32:
                raise TypeError("float32 only")
            return FusedCrossEntropy.forward(ctx, logits, labels)

    model, batches = built(network, torch.float32)
    with HessianOperator(model, lambda m, b: OnlyFloat32.apply(m(b[0]), b[1]), batches) as operator:
        with pytest.raises(WrongProductError, match="OnlyFloat32"):
            check_products(operator, seed=0)
        assert product_error(operator, torch.eye(operator.num_parameters)[:, :1]) is None


def refused_on_rank(rank: int) -> None:
    model, batches = built(network, torch.float32)
    loss_fn = LOSES_CURVATURE["fused loss"][1] if rank == 1 else classify
    operator = HessianOperator(model, loss_fn, batches[rank : rank + 1], process_group=torch.distributed.group.WORLD)
    check_products(operator, seed=0)


class Listed(nn.Module):
    """A product of which one factor is detached; its parameter is used from a list, which no substitution reaches."""

    def __init__(self, *, detached: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3))
        self.used = [self.weight]
        self.detached = detached

    def forward(self, x: Tensor) -> Tensor:
        weight = self.used[0]
        return torch.tanh(x @ weight) * (x @ (weight.detach() if self.detached else weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_out_of_reach_are_not_checked_against_zeros(dtype: torch.dtype) -> None:
    x = torch.randn(5, 3, dtype=dtype)
    model = Listed(detached=False)
    model.weight.data = model.weight.data.to(dtype)
    operator = HessianOperator(model, lambda m, x: m(x).square().mean(), [x])
    result = check_products(operator, seed=0)
    assert result.difference is not None
    assert 0 < result.difference < (0.1 if dtype == torch.float32 else 1e-3)
    assert operator.precise_products(torch.ones(9, 1, dtype=dtype)) is None
    model.detached = True
    wrong = HessianOperator(model, lambda m, x: m(x).square().mean(), [x])
    with pytest.raises(WrongProductError, match="differ"):
        check_products(wrong, seed=0)


class Averaging(nn.Module):
    """Updates running statistics that are plain attributes, by several operations in place."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(3, 2)
        self.mean, self.count, self.last = torch.zeros(3), torch.zeros(1), torch.zeros(2)

    def forward(self, x: Tensor) -> Tensor:
        self.mean.mul_(0.5).add_(x.detach().mean(0), alpha=0.5)
        self.count += 1
        self.last[0] = 2.0
        torch.add(self.last, 1.0, out=self.last)
        return torch.tanh(self.layer(x + self.mean * self.count)) * self.last.sum()


def test_what_a_loss_changes_in_place_is_changed_in_float64_as_well() -> None:
    model, x = Averaging(), torch.randn(5, 3)

    def restore() -> None:
        for constant in (model.mean, model.count, model.last):
            constant.zero_()

    operator = HessianOperator(model, lambda m, x: m(x).square().mean(), [x], restore_state=restore)
    precise = operator.precise_products(torch.eye(8))
    assert precise is not None
    torch.testing.assert_close(precise.float(), dense(operator), rtol=1e-4, atol=1e-5)
    assert not any(constant.any() for constant in (model.mean, model.count, model.last))


def test_all_ranks_refuse_together() -> None:
    outcomes = run_ranks(refused_on_rank, 3, expect_errors=True)
    assert [outcome.error for outcome in outcomes] == ["WrongProductError"] * 3


def test_the_error_is_one_of_missing_second_derivatives() -> None:
    assert issubclass(WrongProductError, DoubleBackwardError)


# -- no false alarms -------------------------------------------------------------------------------


def trained(model: nn.Module, loss_fn: Any, batch: Any, steps: int = 60) -> None:
    """Train to a small loss, where rounding is worst."""
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model, batch).backward()
        optimizer.step()


ORDINARY = [name for name in KINDS if "manual" not in name and "accumulation" not in name and "asks" not in name]


def step_loss(module: Any, batch: Any) -> Tensor:
    output = module.training_step(batch, 0)
    return output["loss"] if isinstance(output, dict) else output


@pytest.mark.slow
@pytest.mark.parametrize("name", ORDINARY)
def test_modules_of_the_zoo_pass(name: str) -> None:
    kind = KINDS[name]
    for seed in range(3):
        torch.manual_seed(seed)
        module = kind.build().eval()
        batches = list(kind.loaders()[1])[:1]
        module.log = lambda *_, **__: None
        with HessianOperator(module, step_loss, batches, weights=[1.0]) as operator:
            result = check_products(operator, seed=seed)
        assert result.precision == "float64"
        assert result.asymmetry < 1e-8
        assert result.difference is not None
        assert result.difference < 1e-3


WITH_KINKS: dict[str, Callable[[], tuple[nn.Module, Any]]] = {
    "wide ReLU": lambda: (
        nn.Sequential(nn.Linear(5, 300), nn.ReLU(), nn.Linear(300, 300), nn.ReLU(), nn.Linear(300, 3)),
        (torch.randn(200, 5), torch.randint(3, (200,))),
    ),
    "max-pool": lambda: (
        nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(128, 3)),
        (torch.randn(64, 1, 10, 10), torch.randint(3, (64,))),
    ),
    "ResNet": lambda: (resnet(), (torch.randn(8, 3, 12, 12), torch.randint(3, (8,)))),
    "hard swish": lambda: (
        nn.Sequential(nn.Linear(5, 64), nn.Hardswish(), nn.Linear(64, 3)),
        (torch.randn(200, 5), torch.randint(3, (200,))),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", WITH_KINKS)
def test_kinks_are_no_error(name: str, dtype: torch.dtype) -> None:
    for seed in range(4):
        torch.manual_seed(seed)
        model, (x, y) = WITH_KINKS[name]()
        model = model.eval().to(dtype)
        for hvp in ("auto", "finite_difference"):
            with HessianOperator(model, classify, [(x.to(dtype), y)], hvp=hvp) as operator:
                assert check_products(operator, seed=seed).precision == "float64"


@pytest.mark.parametrize("name", ["wide ReLU", "max-pool"])
def test_kinks_are_no_error_without_float64(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FunctionalLoss, "of", classmethod(lambda *_, **__: None))
    for seed in range(4):
        torch.manual_seed(seed)
        model, batch = WITH_KINKS[name]()
        for hvp in ("auto", "finite_difference"):
            with HessianOperator(model, classify, [batch], hvp=hvp) as operator:
                assert check_products(operator, seed=seed).precision == "float32"


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("size", [30.0, 300.0])
def test_losses_near_zero_pass(size: float, float64: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if not float64:
        monkeypatch.setattr(FunctionalLoss, "of", classmethod(lambda *_, **__: None))
    for seed in range(5):
        torch.manual_seed(seed)
        model = network()
        x = torch.randn(40, 5)
        trained(model, classify, (x, x[:, :3].argmax(1)))
        with torch.no_grad():
            model[2].weight.mul_(size / model[2].weight.norm())
        with HessianOperator(model, classify, [(x, model(x).argmax(1))]) as operator:
            assert operator.mean_loss < 0.3
            check_products(operator, seed=seed)


# -- products in float64 ---------------------------------------------------------------------------


def product_error(operator: HessianOperator, vectors: Tensor) -> float | None:
    """Return the largest error norm of the products with the columns."""
    precise = operator.precise_products(vectors)
    if precise is None:
        return None
    products = torch.stack([operator.matvec_slice(column.contiguous()) for column in vectors.T], dim=1)
    squares = (products.double() - precise).square().sum(0)
    return float(operator.ranks.all_reduce(squares).max().sqrt())


@pytest.mark.slow
@pytest.mark.parametrize("hvp", ["double_backward", "linearize", "finite_difference"])
@pytest.mark.parametrize("name", CASES)
def test_products_in_float64_are_those_of_a_float64_copy(name: str, hvp: str) -> None:
    case, precise = CASES[name](torch.float32), CASES[name](torch.float64)
    precise.model.load_state_dict(case.model.state_dict())
    precise.batches = [_double(batch) for batch in case.batches]
    operator = HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights, hvp=hvp)
    truth = HessianOperator(precise.model, precise.loss_fn, precise.batches, weights=precise.weights)
    torch.manual_seed(0)
    vectors = torch.linalg.qr(torch.randn(operator.num_parameters, 3))[0]
    expected = max(
        float((operator.matvec(column).double() - truth.matvec(column.double())).norm()) for column in vectors.T
    )
    assert product_error(operator, vectors) == pytest.approx(expected, rel=1e-3 if operator.exact else 0.05)
    assert product_error(truth, vectors.double()) is None


def _double(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: _double(value) for key, value in batch.items()}
    return tuple(_double(value) for value in batch)


def test_a_symmetric_error_from_cancellation_is_measured() -> None:
    """The rounding level, 64 eps, is a hundred times too small here."""
    torch.manual_seed(0)
    x = torch.randn(50, 4)
    x[:, 0] = x[:, 0].sign() * (1 + x[:, 0].abs() / 4)
    y = (x[:, 0] > 0).float()
    model = nn.Linear(4, 1)
    with torch.no_grad():
        model.weight.copy_(torch.tensor([[12.0, 0, 0, 0]]))
        model.bias.fill_(0)

    def loss_fn(m: nn.Module, b: Any) -> Tensor:
        return F.binary_cross_entropy_with_logits(m(b[0])[:, 0], b[1])

    operator = HessianOperator(model, loss_fn, [(x, y)])
    truth = dense(HessianOperator(copy.deepcopy(model).double(), loss_fn, [(x.double(), y.double())]))
    errors = torch.linalg.vector_norm(dense(operator).double() - truth, dim=0)
    measured = product_error(operator, torch.eye(5))
    assert measured == pytest.approx(float(errors.max()), rel=1e-6)
    assert measured > 100 * operator.relative_error * float(torch.linalg.matrix_norm(truth, 2))


class Casting(nn.Module):
    """Computes a norm in float32 whatever its input, and makes tensors on the way, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 8), nn.Linear(8, 3)
        self.register_buffer("scale", torch.full((8,), 1.5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).to(torch.float32)
        hidden = hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + 1e-6)
        mask = torch.zeros(8, dtype=torch.float32, device=x.device)
        return self.second((hidden + mask) * self.scale).float()


def test_casts_inside_of_the_loss_go_to_float64() -> None:
    model, batches = built(Casting, torch.float32)
    operator = HessianOperator(model, classify, batches)
    error = product_error(operator, torch.eye(operator.num_parameters)[:, :3])
    assert error is not None
    assert 0 < error < 1e-5
    assert check_products(operator, seed=0).precision == "float64"


@pytest.mark.parametrize("build", [lambda: Recurrent(nn.LSTM), Decoder], ids=["LSTM", "attention"])
def test_nothing_of_the_model_is_changed(build: Callable[[], nn.Module]) -> None:
    module = Trained(build().eval(), classify)
    tokens = torch.randint(13, (4, 7))

    def loss_fn(m: Any, b: Tensor) -> Tensor:
        return F.cross_entropy(m.net(b[:, :-1]).flatten(0, 1), b[:, 1:].flatten())

    before = {name: (id(p), p.detach().clone()) for name, p in module.named_parameters()}
    operator = HessianOperator(module, loss_fn, [tokens])
    assert product_error(operator, torch.eye(operator.num_parameters)[:, :2]) is not None
    check_products(operator, seed=0)
    for name, parameter in module.named_parameters():
        assert id(parameter) == before[name][0]
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name][1])


def test_errors_that_cannot_be_measured_are_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = built(network, torch.float32)
    first = torch.eye(39)[:, :1]
    drawing = HessianOperator(model, lambda m, b: classify(m, (F.dropout(b[0]), b[1])), batches)
    assert product_error(drawing, first) is None
    operator = HessianOperator(model, classify, batches)
    assert product_error(operator, first) is not None
    monkeypatch.setattr("hessian_callback.operators.functional_loss.free_memory", lambda device: 1000)
    assert product_error(operator, first) is None
    with pytest.raises(ValueError, match=r"expected vectors of shape \(39, m\)"):
        product_error(operator, torch.ones(39))


def error_on_rank(rank: int) -> float | None:
    case = CASES["mlp"](torch.float32)
    operator = HessianOperator(
        case.model,
        case.loss_fn,
        case.batches[rank : rank + 1],
        weights=case.weights[rank : rank + 1],
        process_group=torch.distributed.group.WORLD,
    )
    columns = torch.eye(57)[:, :4]
    return product_error(operator, torch.stack([operator.partition.cut(column) for column in columns.T], dim=1))


def test_ranks_measure_the_same_error() -> None:
    errors = [outcome.value for outcome in run_ranks(error_on_rank, 3)]
    assert errors[0] == errors[1] == errors[2]
    case = CASES["mlp"](torch.float32)
    alone = HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights)
    assert errors[0] == pytest.approx(product_error(alone, torch.eye(57)[:, :4]), rel=1.0)
    assert errors[0] > 0
