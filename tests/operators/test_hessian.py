"""The operator against closed forms, ``torch.func.hessian`` and curvlinops; its errors; what it leaves behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from hessian_callback import HessianOperator
from hessian_callback.operators.derivatives import DoubleBackwardError
from hessian_callback.operators.parameters import select_parameters
from tests.helpers.cases import CASES, Case, classify, dense, dense_hessian

EXACT = {
    "kept": {"hvp": "double_backward"},
    "rebuilt": {"hvp": "double_backward", "memory_budget": 0},
    "linearized": {"hvp": "linearize"},
}


def operator_of(case: Case, **kwargs: Any) -> HessianOperator:
    return HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights, **kwargs)


# -- closed forms ----------------------------------------------------------------------------------


def test_mean_squared_error() -> None:
    torch.manual_seed(0)
    X, y = torch.randn(9, 4, dtype=torch.float64), torch.randn(9, 1, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    operator = HessianOperator(model, lambda m, batch: F.mse_loss(m(batch[0]), batch[1]), [(X, y)])
    torch.testing.assert_close(dense(operator), 2 / 9 * X.T @ X, rtol=1e-8, atol=1e-12)


def test_logistic_regression() -> None:
    torch.manual_seed(1)
    X, y = torch.randn(9, 4, dtype=torch.float64), torch.rand(9, 1, dtype=torch.float64)
    model = nn.Linear(4, 1, bias=False).double()
    operator = HessianOperator(model, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]), [(X, y)])
    p = torch.sigmoid(model(X)).detach()
    torch.testing.assert_close(dense(operator), X.T @ (p * (1 - p) * X) / 9, rtol=1e-8, atol=1e-12)


def test_softmax_regression() -> None:
    torch.manual_seed(2)
    X, y = torch.randn(6, 3, dtype=torch.float64), torch.randint(4, (6,))
    model = nn.Linear(3, 4, bias=False).double()
    p = torch.softmax(model(X), dim=1).detach()
    expected = sum(torch.kron(torch.diag(q) - torch.outer(q, q), torch.outer(x, x)) for q, x in zip(p, X, strict=True))
    torch.testing.assert_close(dense(HessianOperator(model, classify, [(X, y)])), expected / 6, rtol=1e-8, atol=1e-12)


# -- oracles ---------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", EXACT)
@pytest.mark.parametrize("name", CASES)
def test_torch_func_hessian(name: str, engine: str) -> None:
    case = CASES[name]()
    operator = operator_of(case, **EXACT[engine])
    torch.testing.assert_close(dense(operator), dense_hessian(case), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", CASES)
def test_finite_differences(name: str) -> None:
    case = CASES[name]()
    truth = dense_hessian(case)
    error = torch.linalg.matrix_norm(dense(operator_of(case, hvp="finite_difference")) - truth, 2)
    assert error < 1e-5 * torch.linalg.matrix_norm(truth, 2)


def test_a_transformer_layer_against_finite_differences() -> None:
    torch.manual_seed(4)
    model = nn.Sequential(nn.TransformerEncoderLayer(4, 2, 6, activation="gelu", batch_first=True), nn.Linear(4, 2))
    model = model.double().eval()
    batch = (torch.randn(3, 5, 4, dtype=torch.float64), torch.randint(2, (3, 2)))

    def loss_fn(m: nn.Module, b: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m(b[0])[:, :2].transpose(1, 2), b[1])

    exact, differences = (HessianOperator(model, loss_fn, [batch], hvp=hvp) for hvp in ("auto", "finite_difference"))
    vector = torch.randn(exact.num_parameters, dtype=torch.float64)
    torch.testing.assert_close(exact.matvec(vector), differences.matvec(vector), rtol=1e-5, atol=1e-6)


def test_the_last_layer_of_a_transformer_with_padding() -> None:
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
    model = nn.ModuleDict({"encoder": nn.TransformerEncoder(layer, 2), "head": nn.Linear(4, 2)}).double().eval()
    padded = torch.tensor([[False, False, False], [False, False, True]])
    batch = (torch.randn(2, 3, 4, dtype=torch.float64), padded, torch.randint(2, (2,)))

    def loss_fn(m: Any, b: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(m["head"](m["encoder"](b[0], src_key_padding_mask=b[1])[:, 0]), b[2])

    whole = HessianOperator(model, loss_fn, [batch])
    last = HessianOperator(model, loss_fn, [batch], parameters=r"layers\.1\.")
    names = whole.parameter_names
    first = sum(model.get_parameter(name).numel() for name in names[: names.index(last.parameter_names[0])])
    block = slice(first, first + last.num_parameters)
    torch.testing.assert_close(dense(last), dense(whole)[block, block], rtol=1e-8, atol=1e-10)


def test_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    case = CASES["mlp"]()
    oracle = curvlinops.HessianLinearOperator(
        case.model, nn.CrossEntropyLoss(), list(case.model.parameters()), case.batches, check_deterministic=False
    )
    vector = torch.randn(oracle.shape[0], dtype=torch.float64)
    torch.testing.assert_close(operator_of(case).matvec(vector), oracle @ vector, rtol=1e-8, atol=1e-10)


def test_float32_products_carry_float32_accuracy() -> None:
    case, precise = CASES["attention"](torch.float32), CASES["attention"](torch.float64)
    precise.model.load_state_dict(case.model.state_dict())
    vector = torch.randn(operator_of(case).num_parameters)
    truth = operator_of(precise).matvec(vector.double())
    operator = operator_of(case)
    error = (operator.matvec(vector).double() - truth).norm() / truth.norm()
    assert error < operator.relative_error


def test_the_same_vector_gives_the_same_product() -> None:
    operator = operator_of(CASES["cnn"](torch.float32))
    vector = torch.randn(operator.num_parameters)
    assert torch.equal(operator.matvec(vector), operator.matvec(vector))


# -- parameters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("parameters", [r"^2\.", lambda name, parameter: name.startswith("2.")])
def test_chosen_parameters_give_the_block_of_the_hessian(parameters: Any) -> None:
    case = CASES["mlp"]()
    operator = operator_of(case, parameters=parameters)
    assert operator.parameter_names == ["2.weight", "2.bias"]
    torch.testing.assert_close(
        dense(operator), dense_hessian(case, lambda name: name.startswith("2.")), rtol=1e-8, atol=1e-10
    )


def test_a_tied_parameter_counts_once_and_answers_to_each_name() -> None:
    model = CASES["attention"]().model
    assert list(select_parameters(model, "head")) == ["head.weight"]
    assert select_parameters(model, "head")["head.weight"] is model.embed.weight
    assert sum(p.numel() for p in select_parameters(model).values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("engine", EXACT)
def test_unused_frozen_and_linear_parameters(engine: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {"used": nn.Linear(3, 1), "unused": nn.Linear(2, 1), "frozen": nn.Linear(3, 1), "linear": nn.Linear(3, 1)}
    ).double()
    model["frozen"].requires_grad_(False)

    def loss_fn(m: nn.ModuleDict, x: Tensor) -> Tensor:
        return (m["used"](x) ** 2).mean() + m["linear"](x).mean() + m["frozen"](x).mean()

    x = torch.randn(5, 3, dtype=torch.float64)
    operator = HessianOperator(model, loss_fn, [x], **EXACT[engine])
    assert not any(name.startswith("frozen") for name in operator.parameter_names)
    extended = torch.cat([x, torch.ones(5, 1, dtype=torch.float64)], dim=1)
    expected = torch.zeros(operator.num_parameters, operator.num_parameters, dtype=torch.float64)
    first = operator.parameter_names.index("used.weight")
    assert first == 0
    expected[:4, :4] = 2 / 5 * extended.T @ extended
    torch.testing.assert_close(dense(operator), expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("engine", ["kept", "rebuilt"])
def test_a_loss_that_is_linear_in_all_parameters_has_the_zero_hessian(engine: str) -> None:
    model = nn.Linear(2, 1).double()
    operator = HessianOperator(model, lambda m, x: m(x).mean(), [torch.ones(3, 2).double()], **EXACT[engine])
    assert torch.equal(operator.matvec(torch.ones(3).double()), torch.zeros(3).double())


# -- weights ---------------------------------------------------------------------------------------


def test_batches_weigh_by_their_leading_dimension() -> None:
    case = CASES["mlp"]()
    vector = torch.randn(57, dtype=torch.float64)
    implicit = HessianOperator(case.model, case.loss_fn, case.batches).matvec(vector)
    torch.testing.assert_close(implicit, operator_of(case).matvec(vector), rtol=1e-12, atol=0)
    counted = HessianOperator(case.model, case.loss_fn, case.batches, batch_weight=lambda b: 10 * len(b[1]))
    torch.testing.assert_close(counted.matvec(vector), implicit, rtol=1e-12, atol=1e-16)


def test_an_ambiguous_batch_is_not_guessed_at() -> None:
    case = CASES["mlp"]()
    with pytest.raises(ValueError, match="Pass batch_weight="):
        HessianOperator(case.model, case.loss_fn, [(torch.zeros(2, 5), torch.zeros(4))] * 2)


@pytest.mark.parametrize("weights", [[1.0], [1.0, -2.0], [1.0, float("nan")]])
def test_weights_must_fit(weights: list[float]) -> None:
    case = CASES["mlp"]()
    with pytest.raises(ValueError, match=r"one per batch|positive and finite"):
        HessianOperator(case.model, case.loss_fn, case.batches, weights=weights)


# -- memory ----------------------------------------------------------------------------------------


def test_the_memory_budget_decides_how_many_graphs_are_kept() -> None:
    case = CASES["mlp"]()
    case.batches, case.weights = [case.batches[1]] * 6, [1.0] * 6
    everything = operator_of(case)
    assert everything.num_cached_graphs == 6
    assert everything.bytes_per_graph > 0
    some = operator_of(case, memory_budget=4 * everything.bytes_per_graph)
    assert 0 < some.num_cached_graphs < 6
    none = operator_of(case, memory_budget=0)
    assert none.num_cached_graphs == 0
    vector = torch.randn(57, dtype=torch.float64)
    assert torch.equal(everything.matvec(vector), some.matvec(vector))
    assert torch.equal(everything.matvec(vector), none.matvec(vector))


# -- what is left behind ---------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["double_backward", "linearize", "finite_difference"])
def test_nothing_is_left_behind(engine: str) -> None:
    case = CASES["attention"](torch.float32)
    for parameter in case.model.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = copy.deepcopy(case.model)
    gradients = [parameter.grad.clone() for parameter in case.model.parameters()]
    flags = (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        operator = operator_of(case, hvp=engine)
        assert operator.matvec(torch.randn(operator.num_parameters)).dtype == torch.float32
    for one, other, gradient in zip(case.model.parameters(), before.parameters(), gradients, strict=True):
        assert torch.equal(one, other)
        assert torch.equal(one.grad, gradient)
    assert flags == (
        torch.is_grad_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.backends.cuda.flash_sdp_enabled(),
        torch.backends.cudnn.enabled,
        torch.backends.mha.get_fastpath_enabled(),
    )


@pytest.mark.parametrize("engine", ["double_backward", "linearize", "finite_difference"])
def test_hooks_on_gradients_are_neither_called_nor_removed(engine: str) -> None:
    case, plain = CASES["mlp"](), CASES["mlp"]()
    called = []

    def halve(gradient: Tensor) -> Tensor:
        called.append(gradient)
        return gradient / 2

    for parameter in case.model.parameters():
        parameter.register_hook(halve)
    case.model[0].register_full_backward_hook(lambda *arguments: called.append(arguments))
    vector = torch.ones(57, dtype=torch.float64)
    operator = operator_of(case, hvp=engine)
    torch.testing.assert_close(operator.matvec(vector), operator_of(plain, hvp=engine).matvec(vector))
    assert not called
    case.loss_fn(case.model, case.batches[0]).backward()
    assert len(called) == 5


def test_a_graph_that_somebody_keeps_stays_valid_while_parameters_are_displaced() -> None:
    case = CASES["mlp"]()
    kept = case.loss_fn(case.model, case.batches[0])
    expected = torch.autograd.grad(kept, list(case.model.parameters()), retain_graph=True)
    operator = operator_of(case, hvp="finite_difference")
    operator.matvec(torch.ones(operator.num_parameters, dtype=torch.float64))
    assert all(map(torch.equal, torch.autograd.grad(kept, list(case.model.parameters())), expected))


def test_autocast_around_the_call_does_not_reach_the_hessian() -> None:
    case = CASES["mlp"](torch.float32)
    vector = torch.randn(57)
    plain = operator_of(case).matvec(vector)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(operator_of(case).matvec(vector), plain)


def test_it_works_inside_inference_mode() -> None:
    case = CASES["mlp"]()
    vector = torch.randn(57, dtype=torch.float64)
    plain = operator_of(case).matvec(vector)
    with torch.inference_mode():
        assert torch.equal(operator_of(case).matvec(vector), plain)


# -- bad input -------------------------------------------------------------------------------------


class NoSecondDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 2

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


def squared(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) ** 2).mean()


@pytest.mark.parametrize(
    ("loss_fn", "error", "remedy"),
    [
        (lambda m, x: m(x), ValueError, "return its mean over the batch"),
        (lambda m, x: float(squared(m, x)), TypeError, "return the mean loss"),
        (lambda m, x: squared(m, x).detach(), ValueError, "do not detach it"),
        (lambda m, x: squared(m, x) / 0, ArithmeticError, "Check the batch"),
        (lambda m, x: squared(m, x) * float("nan"), ArithmeticError, "Check the batch"),
        (lambda m, x: (NoSecondDerivative.apply(m(x)) ** 2).mean(), DoubleBackwardError, "hvp='finite_difference'"),
        (
            lambda m, x: (checkpoint(torch.tanh, m(x), use_reentrant=True) ** 2).mean(),
            DoubleBackwardError,
            "use_reentrant=False",
        ),
        (
            lambda m, x: F.ctc_loss(
                m(x).view(4, 1, 2).log_softmax(-1), torch.tensor([[1]]), torch.tensor([4]), torch.tensor([1])
            ),
            DoubleBackwardError,
            r"ctc_loss.* has no double backward: replace it, or use hvp='finite_difference'",
        ),
    ],
    ids=["vector", "float", "detached", "infinite", "nan", "once", "reentrant", "ctc"],
)
def test_bad_losses(loss_fn: Any, error: type[Exception], remedy: str) -> None:
    with pytest.raises(error, match=remedy):
        HessianOperator(nn.Linear(3, 2), loss_fn, [torch.ones(4, 3)]).matvec(torch.ones(8))


@pytest.mark.parametrize("budget", [None, 0], ids=["kept", "rebuilt"])
def test_a_function_without_second_derivative_is_found_in_every_batch(budget: int | None) -> None:
    """Autograd prunes the branch that leads to it; only the larger batch has none."""
    model = nn.Linear(3, 2)

    def loss_fn(m: nn.Module, x: Tensor) -> Tensor:
        value = m(x)
        return ((value if len(x) > 2 else NoSecondDerivative.apply(value)) ** 2).mean()

    with pytest.raises(DoubleBackwardError, match="once_differentiable"):
        HessianOperator(model, loss_fn, [torch.ones(4, 3), torch.ones(2, 3)], memory_budget=budget).matvec(
            torch.ones(8)
        )


def test_finite_differences_do_without_second_derivatives() -> None:
    model = nn.Linear(3, 1, bias=False).double()
    operator = HessianOperator(
        model,
        lambda m, x: (NoSecondDerivative.apply(m(x)) ** 2).mean(),
        [torch.eye(3).double()],
        hvp="finite_difference",
    )
    torch.testing.assert_close(dense(operator), 8 / 3 * torch.eye(3).double(), rtol=1e-6, atol=1e-6)


def test_no_parameter_matches() -> None:
    with pytest.raises(ValueError, match=r"chooses no trainable parameter; there are: 0\.weight, 0\.bias"):
        HessianOperator(nn.Sequential(nn.Linear(1, 1)), squared, [torch.ones(1, 1)], parameters="conv")


def test_an_invalid_expression_is_named() -> None:
    with pytest.raises(ValueError, match="not a valid regular expression"):
        select_parameters(nn.Linear(1, 1), "(")


def test_everything_frozen() -> None:
    with pytest.raises(ValueError, match="unfreeze"):
        HessianOperator(nn.Linear(1, 1).requires_grad_(False), squared, [torch.ones(1, 1)])


def test_no_batches() -> None:
    with pytest.raises(ValueError, match="pass at least one batch"):
        HessianOperator(nn.Linear(1, 1), squared, [])


def test_half_precision_names_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"deepcopy\(model\)\.float\(\)"):
        HessianOperator(nn.Linear(1, 1).bfloat16(), squared, [torch.ones(1, 1)])


def test_an_unknown_engine_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match="'linearize'"):
        HessianOperator(nn.Linear(1, 1), squared, [torch.ones(1, 1)], hvp="fast")


def test_a_vector_of_the_wrong_size() -> None:
    with pytest.raises(ValueError, match=r"expected a vector of shape \(2,\)"):
        HessianOperator(nn.Linear(1, 1), squared, [torch.ones(1, 1)]).matvec(torch.ones(3))
