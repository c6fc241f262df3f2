"""``hvp="auto"``: the rule, the change-over in the middle of a run, what cannot be traced, and several ranks."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from hessian_callback import HessianOperator, top_eigenvalues
from hessian_callback.operators.engine_selection import (
    TIMED_PRODUCTS,
    Timing,
    TracingStatistics,
    tracing_pays,
    trial_pays,
)
from hessian_callback.operators.products import DoubleBackward
from hessian_callback.operators.tracing import TracedProduct
from tests.helpers.cases import CASES, classify, dense_hessian
from tests.helpers.ranks import run_ranks

# Enough that any trace pays, whatever the machine.
MANY = 10**7

seconds = st.floats(1e-6, 1e3)


@given(seconds, seconds, seconds, st.integers(0, 10**5), st.floats(0.01, 3))
def test_a_change_over_saves_time_by_the_numbers_it_rests_on(
    product: float, trace: float, rest: float, left: int, ratio: float
) -> None:
    if tracing_pays(Timing(product, trace, rest), left, ratio):
        assert trace + rest + left * ratio * product < left * product
    if ratio >= 1:
        assert not tracing_pays(Timing(product, trace, rest), left, ratio)
    if trial_pays(Timing(product, trace, rest, gain=0.2), left, TracingStatistics()):
        assert trace <= 0.2 * left * product
    assert not trial_pays(Timing(product, trace, rest), left, TracingStatistics(failure="no forward derivative"))


def fast_traces() -> TracingStatistics:
    """As if an earlier measurement had found traced products at a tenth of the time."""
    return TracingStatistics(trace_seconds=1e-3, ratio=0.1)


def always_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    # Which engine is quicker on toys depends on the machine; that the products agree must not.
    monkeypatch.setattr("hessian_callback.operators.engine_selection.tracing_pays", lambda *_: True)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_bounds_hold_across_a_change_over(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    always_pays(monkeypatch)
    case = CASES[name](dtype)
    double = CASES[name](torch.float64)
    double.model.load_state_dict(case.model.state_dict())
    double.batches = [_in_double(batch) for batch in case.batches]
    truth = torch.linalg.eigvalsh(dense_hessian(double)).flip(0)

    def solved(**options: Any) -> tuple[Any, HessianOperator]:
        operator = HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights, **options)
        if options["hvp"] == "auto":
            operator.expect_products(MANY)
        return top_eigenvalues(operator, k=5, rtol=1e-2), operator

    changed, operator = solved(hvp="auto", tracing_statistics=fast_traces())
    plain, _ = solved(hvp="double_backward")
    assert operator.engine == "linearize"
    assert "of double backward's time" in operator.engine_reason
    assert changed.num_matvecs > TIMED_PRODUCTS
    assert changed.num_matvecs == plain.num_matvecs
    assert ((changed.eigenvalues - truth[:5]).abs() <= changed.error_bounds).all()
    # The engines differ by rounding, so the measured asymmetry stays at that of rounding.
    level = 100 * torch.finfo(dtype).eps * float(truth.abs().max())
    assert changed.symmetry_defect <= level
    torch.testing.assert_close(changed.eigenvalues, plain.eigenvalues, rtol=0, atol=level)


def _in_double(batch: Any) -> Any:
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, dict):
        return {key: _in_double(value) for key, value in batch.items()}
    return tuple(_in_double(value) for value in batch)


def branching(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    loss = classify(model, batch)
    return loss if float(loss) > -1 else 2 * loss


def test_what_cannot_be_traced_is_noted_once_and_double_backward_goes_on() -> None:
    case = CASES["mlp"]()
    known = TracingStatistics()
    operator = HessianOperator(case.model, branching, case.batches, hvp="auto", tracing_statistics=known)
    operator.expect_products(MANY)
    plain = HessianOperator(case.model, classify, case.batches, hvp="double_backward")
    for _ in range(TIMED_PRODUCTS + 2):
        vector = torch.randn(57, dtype=torch.float64)
        assert torch.equal(operator.matvec(vector), plain.matvec(vector))
    assert operator.engine == "double_backward"
    assert operator.engine_reason == known.failure
    assert "tracing failed" in operator.engine_reason
    again = HessianOperator(case.model, branching, case.batches, hvp="auto", tracing_statistics=known)
    again.expect_products(MANY)
    for _ in range(TIMED_PRODUCTS + 1):
        again.matvec(vector)
    assert again.engine_reason == known.failure


def test_few_products_are_not_worth_a_trial() -> None:
    case = CASES["mlp"]()
    known = TracingStatistics()
    operator = HessianOperator(case.model, case.loss_fn, case.batches, tracing_statistics=known)
    operator.expect_products(20)
    for _ in range(10):
        operator.matvec(torch.ones(57, dtype=torch.float64))
    assert operator.engine == "double_backward"
    assert "too few products" in operator.engine_reason
    assert known.product_seconds > 0
    assert known == TracingStatistics(product_seconds=known.product_seconds)


def test_a_trial_that_many_measurements_share_is_made_in_a_later_one() -> None:
    timing = Timing(product=0.1, trace=1.0, gain=0.1)
    known = TracingStatistics()
    tried = []
    for _ in range(5):
        tried.append(trial_pays(timing, 40, known))
        known.product_seconds += 40 * timing.product
    assert tried == [False, False, True, True, True]


def test_convolutions_are_tried_earlier_and_normalisation_takes_longer_to_trace() -> None:
    nodes = ["MulBackward0"] * 30
    import torch._dynamo  # whose import would count otherwise

    plain = TracingStatistics().expected_trace_seconds(nodes)
    assert TracingStatistics().expected_trace_seconds([*nodes, "NativeBatchNormBackwardBackward0"]) > 2 * plain
    convolutional = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(2, 2)).double().eval()
    batch = (torch.randn(4, 1, 3, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 1]))
    with HessianOperator(convolutional, classify, [batch], hvp="double_backward") as operator:
        assert isinstance(operator._engine, DoubleBackward)
        names = operator._engine.nodes
    assert any("Convolution" in name for name in names)
    assert any("BatchNorm" in name for name in names)


def test_the_imports_of_a_first_trace_count_where_nobody_has_made_them() -> None:
    program = """
import torch
from hessian_callback import HessianOperator
from hessian_callback.operators.engine_selection import TracingStatistics

def multiply(engine):
    case = torch.nn.Linear(1, 1), lambda m, x: m(x).square().mean(), [torch.ones(1, 1)]
    HessianOperator(*case, hvp=engine).matvec(torch.ones(2))
    return TracingStatistics().expected_trace_seconds([])

assert multiply("double_backward") > multiply("linearize")
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_constants_that_do_not_fit_the_budget_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    always_pays(monkeypatch)
    case = CASES["mlp"]()
    operator = HessianOperator(case.model, case.loss_fn, case.batches, memory_budget=1)
    operator.expect_products(MANY)
    for _ in range(TIMED_PRODUCTS + 1):
        operator.matvec(torch.ones(57, dtype=torch.float64))
    assert operator.engine == "double_backward"
    assert "memory budget" in operator.engine_reason


class Opaque:
    """A batch that PyTorch's trees don't look into."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self.pair = x, y


def test_batches_of_unknown_kind_are_traced_one_by_one() -> None:
    case = CASES["mlp"]()
    batches = [Opaque(*case.batches[0]), Opaque(case.batches[0][0] + 1, case.batches[0][1])]

    def loss_fn(model: nn.Module, batch: Opaque) -> Tensor:
        return classify(model, batch.pair)

    vector = torch.randn(57, dtype=torch.float64)
    traced, plain = (
        HessianOperator(case.model, loss_fn, batches, weights=[1.0, 2.0], hvp=hvp).matvec(vector)
        for hvp in ("linearize", "double_backward")
    )
    torch.testing.assert_close(traced, plain, rtol=1e-10, atol=1e-12)


def choose(rank: int, untraceable: int | None, world_size: int) -> tuple[str, str, Tensor, float]:
    case = CASES["mlp"]()
    loss_fn = branching if rank == untraceable else classify
    batches, weights = case.batches[rank : rank + 1], case.weights[rank : rank + 1]  # none on the third rank
    import hessian_callback.operators.engine_selection

    hessian_callback.operators.engine_selection.tracing_pays = lambda *_: True
    operator = HessianOperator(
        case.model,
        loss_fn,
        batches,
        weights=weights,
        process_group=torch.distributed.group.WORLD,
        tracing_statistics=fast_traces(),
    )
    operator.expect_products(MANY)
    vector = torch.linspace(-1, 1, 57, dtype=torch.float64)
    for _ in range(TIMED_PRODUCTS + 2):
        product = operator.matvec(vector)
    return operator.engine, operator.engine_reason, product, operator.mean_loss


@pytest.mark.parametrize("untraceable", [None, 1])
def test_ranks_choose_alike(untraceable: int | None) -> None:
    case = CASES["mlp"]()
    alone = HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights)
    expected = alone.matvec(torch.linspace(-1, 1, 57, dtype=torch.float64))
    for rank, outcome in enumerate(run_ranks(choose, 3, untraceable, 3)):
        engine, reason, product, loss = outcome.value
        assert engine == ("linearize" if untraceable is None else "double_backward")
        if untraceable is not None:
            assert ("another rank" in reason) == (rank != untraceable)
        torch.testing.assert_close(product, expected, rtol=1e-10, atol=1e-12)
        assert loss == pytest.approx(alone.mean_loss, rel=1e-12)


class ForbidHostReads(torch.utils._python_dispatch.TorchDispatchMode):
    """Fails where a number is read from a tensor, for which a GPU would have to be waited for."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
@pytest.mark.parametrize("hvp", ["double_backward", "linearize", "finite_difference"])
@pytest.mark.parametrize("name", ["cnn", "attention"])
def test_a_product_reads_nothing_back_from_the_device(name: str, hvp: str) -> None:
    case = CASES[name]()
    operator = HessianOperator(case.model, case.loss_fn, case.batches, weights=case.weights, hvp=hvp)
    vector = torch.randn(operator.num_parameters, dtype=torch.float64)
    with ForbidHostReads():
        operator.matvec(vector)
    with pytest.raises(AssertionError, match="_local_scalar_dense"), ForbidHostReads():
        float(vector.norm())


@pytest.mark.slow
@pytest.mark.parametrize("scale", [8.0, 14.0, 16.0])
def test_traced_products_are_accepted_at_small_losses(scale: float) -> None:
    """At losses of 1e-6 to 1e-7 the products of both engines are wrong by some percent; float64 decides."""
    for seed in range(3):
        torch.manual_seed(seed)
        x = torch.randn(50, 4)
        x[:, 0] = x[:, 0].sign() * (1 + x[:, 0].abs() / 4)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
        with torch.no_grad():
            model[0].weight.copy_(2 * torch.eye(4) + 0.1 * torch.randn(4, 4))
            model[2].weight.mul_(0.1)
            model[2].weight[0, 0] = scale
            model[2].bias.zero_()
        batch = (x, (x[:, :1] > 0).float())
        operator = HessianOperator(
            model, lambda m, b: F.binary_cross_entropy_with_logits(m(b[0]), b[1]), [batch], hvp="linearize"
        )
        assert operator.engine == "linearize"


def test_values_that_are_read_are_named_with_a_remedy() -> None:
    case = CASES["mlp"]()
    with pytest.raises(RuntimeError, match=r"cannot trace the loss.*\.item\(\), float\(\).*hvp='double_backward'"):
        HessianOperator(case.model, branching, case.batches, hvp="linearize")


@pytest.mark.slow
def test_a_wrong_forward_derivative_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["mlp"](torch.float32)
    product = TracedProduct.product
    monkeypatch.setattr(
        TracedProduct, "product", lambda self, *args: [None if p is None else 1.01 * p for p in product(self, *args)]
    )
    with pytest.raises(RuntimeError, match="wrong or missing forward derivative"):
        HessianOperator(case.model, case.loss_fn, case.batches, hvp="linearize")


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_mean_squared_error_is_traced(reduction: str) -> None:
    """PyTorch's own would end the process."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
    batches = [(torch.randn(8, 5).double(), torch.randn(8, 2).double()) for _ in range(2)]

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return torch.nn.functional.mse_loss(model(batch[0]), batch[1], reduction=reduction).mean()

    def module_loss(model: Any, batch: Any) -> torch.Tensor:
        return torch.nn.MSELoss(reduction=reduction)(model(batch[0]), batch[1]).mean()

    expected = HessianOperator(model, loss, batches, hvp="double_backward")
    vector = torch.randn(expected.num_parameters).double()
    for one in (loss, module_loss):
        traced = HessianOperator(model, one, batches, hvp="linearize")
        torch.testing.assert_close(traced.matvec(vector), expected.matvec(vector), rtol=1e-12, atol=1e-14)
