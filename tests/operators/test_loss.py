"""The loss of a batch: random draws, changes of state, changed batches, and parameters that were not chosen."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessian_callback import HessianOperator
from hessian_callback.operators.loss import BatchLoss
from hessian_callback.operators.memory import count_saved_tensors
from hessian_callback.operators.products import DoubleBackward
from tests.helpers.cases import CASES, classify, dense, dense_hessian
from tests.helpers.ranks import run_ranks

# -- draws -----------------------------------------------------------------------------------------

DRAWS: dict[str, Callable[[], float]] = {
    "python": random.random,
    "numpy": lambda: float(np.random.random()),
    "torch": lambda: float(torch.rand(1)),
}


def global_states() -> tuple[Any, ...]:
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.mark.parametrize("hvp", ["double_backward", "finite_difference"])
@pytest.mark.parametrize("generator", DRAWS)
def test_draws_are_fixed_for_each_batch_and_generators_restored(generator: str, hvp: str) -> None:
    case = CASES["mlp"]()
    drawn: list[float] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        drawn.append(DRAWS[generator]())
        return (1 + drawn[-1]) * classify(model, batch)

    before = global_states()
    operator = HessianOperator(case.model, loss_fn, case.batches, weights=case.weights, hvp=hvp, memory_budget=0)
    assert operator.draws
    vector = torch.linspace(-1, 1, 57, dtype=torch.float64)
    assert torch.equal(operator.matvec(vector), operator.matvec(vector))
    assert global_states() == before
    assert len(set(drawn)) == 2, "each of two batches has one draw"
    # The Hessian is that of the loss with these two numbers in place of the draws.
    one, other = ((1 + value) * weight for value, weight in zip(drawn, case.weights, strict=False))
    case.weights = [one, other]
    expected = dense_hessian(case) * (one + other) / 7.0
    tolerance = 1e-9 if operator.exact else 1e-5
    torch.testing.assert_close(dense(operator), expected, rtol=tolerance, atol=tolerance)


def test_a_draw_that_hardly_changes_the_loss_is_noticed() -> None:
    case = CASES["mlp"](torch.float32)
    operator = HessianOperator(case.model, lambda m, b: classify(m, b) + 1e-9 * torch.rand(()), case.batches)
    assert operator.draws


def test_a_draw_in_one_of_the_later_batches_is_noticed() -> None:
    case = CASES["mlp"]()
    operator = HessianOperator(
        case.model, lambda m, b: classify(m, b) * (torch.rand(()) if len(b[0]) == 4 else 1.0), case.batches
    )
    assert operator.draws
    assert not HessianOperator(case.model, classify, case.batches).draws


def test_dropout_in_train_mode_has_a_symmetric_hessian() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Tanh(), nn.Linear(6, 3)).double()
    batch = (torch.randn(7, 5).double(), torch.randint(3, (7,)))
    operator = HessianOperator(model, classify, [batch, (batch[0].clone(), batch[1])], memory_budget=0)
    hessian = dense(operator)
    torch.testing.assert_close(hessian, hessian.T, rtol=0, atol=1e-12)
    # The two batches are equal, their masks are not.
    alone = dense(HessianOperator(model, classify, [batch]))
    assert float((hessian - alone).norm()) > 1e-3 * float(alone.norm())


def test_a_drawing_loss_is_not_traced() -> None:
    case = CASES["mlp"]()
    with pytest.raises(RuntimeError, match=r"draws random numbers: use hvp='double_backward'"):
        HessianOperator(case.model, lambda m, b: classify(m, b) * torch.rand(()), case.batches, hvp="linearize")


def draws_on_rank(rank: int) -> tuple[bool, list[float]]:
    case = CASES["mlp"]()
    values: list[float] = []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        values.append(float(torch.rand(())) if rank == 1 else 0.0)
        return classify(model, batch) * (1 + values[-1])

    operator = HessianOperator(
        case.model, loss_fn, case.batches[rank : rank + 1], process_group=torch.distributed.group.WORLD
    )
    return operator.draws, values


def test_all_ranks_report_a_draw_on_one() -> None:
    outcomes = run_ranks(draws_on_rank, 2)
    assert [outcome.value[0] for outcome in outcomes] == [True, True]


# -- state -----------------------------------------------------------------------------------------


class Counting:
    """A loss with a weight that grows by each evaluation."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, model: nn.Module, batch: Any) -> Tensor:
        self.count += 1
        return self.count * classify(model, batch)

    def reset(self) -> None:
        self.count = 0


def test_a_loss_that_changes_state_is_told_apart_from_one_that_draws() -> None:
    case = CASES["mlp"]()
    with pytest.raises(ValueError, match=r"no global random generator moved.*some state.*Pass restore_state="):
        HessianOperator(case.model, Counting(), case.batches)
    counting = Counting()
    with pytest.raises(ValueError, match=r"random generators were in the same state.*Pass restore_state="):
        HessianOperator(case.model, lambda m, b: counting(m, b) + torch.rand(()), case.batches)


@pytest.mark.slow
@pytest.mark.parametrize("hvp", ["double_backward", "linearize", "finite_difference"])
def test_restored_state_makes_it_a_function(hvp: str) -> None:
    case, counting = CASES["mlp"](), Counting()
    operator = HessianOperator(
        case.model, counting, case.batches, weights=case.weights, hvp=hvp, restore_state=counting.reset
    )
    tolerance = 1e-9 if operator.exact else 1e-5
    torch.testing.assert_close(dense(operator), dense_hessian(case), rtol=tolerance, atol=tolerance)
    assert counting.count == 0


def test_state_is_restored_after_an_error() -> None:
    case, restored = CASES["mlp"](), []

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        raise KeyError("label")

    with pytest.raises(KeyError):
        HessianOperator(case.model, loss_fn, case.batches, restore_state=lambda: restored.append(True))
    assert restored


@pytest.mark.parametrize(
    "change",
    [
        lambda batch: batch["x"].mul_(0.999),
        lambda batch: batch["x"].div_(2),
        lambda batch: batch.update(x=batch["x"] / 2),
        lambda batch: batch.pop("spare"),
    ],
    ids=["slightly in place", "in place", "entry replaced", "entry removed"],
)
@pytest.mark.parametrize("hvp", ["double_backward", "finite_difference"])
def test_a_loss_that_changes_its_batch(hvp: str, change: Callable[[Any], Any]) -> None:
    case = CASES["mlp"]()
    x, y = case.batches[0]
    batch = {"x": x.clone(), "y": y, "spare": torch.zeros(len(x))}

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        change(batch)
        return classify(model, (batch["x"], batch["y"]))

    own = {**batch, "x": x.clone()}
    change(own)
    expected = dense(HessianOperator(case.model, classify, [(own["x"], y)]))
    operator = HessianOperator(case.model, loss_fn, [batch], hvp=hvp)
    for _ in range(2):
        torch.testing.assert_close(dense(operator), expected, rtol=1e-5, atol=1e-5 if hvp[0] == "f" else 1e-12)
    assert torch.equal(batch["x"], x)
    assert "spare" in batch


# -- parameters that were not chosen ---------------------------------------------------------------


def deep(layers: int = 6, width: int = 16) -> nn.Sequential:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(layers)]
    return nn.Sequential(*blocks, nn.Linear(width, 3)).double()


def test_the_graph_of_a_last_block_does_not_grow_with_the_layers_before_it() -> None:
    sizes = []
    for layers in (2, 12):
        batch = (torch.randn(64, 16, dtype=torch.float64), torch.randint(3, (64,)))
        with HessianOperator(deep(layers), classify, [batch], parameters=rf"^({layers - 1}|{layers})\.") as operator:
            sizes.append(operator.bytes_per_graph)
    assert sizes[0] == sizes[1] > 0


def test_only_operations_behind_the_chosen_parameters_are_recorded() -> None:
    model, recorded = deep(4), []
    model[2].register_forward_hook(lambda module, inputs, output: recorded.append(output.requires_grad))
    batch = (torch.randn(5, 16, dtype=torch.float64), torch.randint(3, (5,)))
    operator = HessianOperator(model, classify, [batch], parameters=r"^3\.")
    operator.matvec(torch.ones(operator.num_parameters, dtype=torch.float64))
    assert recorded
    assert not any(recorded)
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_requires_grad_is_restored_after_an_error() -> None:
    model = deep(2)
    model[0].requires_grad_(False)
    before = [parameter.requires_grad for parameter in model.parameters()]

    def loss_fn(model: nn.Module, batch: Any) -> Tensor:
        assert [parameter.requires_grad for parameter in model.parameters()] == [False] * 4 + [True] * 2
        raise KeyError("label")

    with pytest.raises(KeyError):
        HessianOperator(model, loss_fn, [torch.ones(2, 16).double()], parameters=r"^2\.")
    assert [parameter.requires_grad for parameter in model.parameters()] == before


@pytest.mark.parametrize("inner", ["all", "trainable"])
@pytest.mark.parametrize("hvp", ["double_backward", "finite_difference"])
def test_a_gradient_penalty_sees_the_parameters_that_were_not_chosen(hvp: str, inner: str) -> None:
    """The block must be that of the whole Hessian, which is formed with all parameters requiring grad."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    batch = (torch.randn(5, 3, dtype=torch.float64), torch.randint(2, (5,)))

    def penalised(m: nn.Module, b: Any) -> Tensor:
        value = classify(m, b)
        some = [p for p in m.parameters() if inner == "all" or p.requires_grad]
        gradients = torch.autograd.grad(value, some, create_graph=True)
        return value + sum(gradient.square().sum() for gradient in gradients)

    whole = dense(HessianOperator(model, penalised, [batch], hvp="double_backward"))
    block = dense(HessianOperator(model, penalised, [batch], hvp=hvp, parameters=r"^2\."))
    tolerance = 1e-10 if hvp == "double_backward" else 1e-5
    torch.testing.assert_close(block, whole[-10:, -10:], rtol=tolerance, atol=tolerance)


def test_the_kept_graph_excludes_weights_of_the_model() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4000, bias=False), nn.Tanh(), nn.Linear(4000, 1))
    loss = BatchLoss(model, lambda m, x: F.softplus(m(x)).mean(), list(model[0].parameters()))
    batch = torch.randn(2, 4)
    with count_saved_tensors([]) as everything, loss.differentiable():
        loss.gradient(batch, create_graph=True)
    assert DoubleBackward.graph_size(loss, batch) + 4 * 4 * 4000 <= everything.num_bytes
