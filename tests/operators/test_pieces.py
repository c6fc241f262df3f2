"""Products in higher precision on the piece of a piecewise smooth loss on which float32 lies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessian_callback import HessianOperator, top_eigenvalues
from hessian_callback.operators.functional_loss import FunctionalLoss

EPS = torch.finfo(torch.float32).eps


class TwoNumbers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = nn.Parameter(torch.ones(2))


def near_zero(model: TwoNumbers) -> tuple[Tensor, Tensor]:
    """Two numbers: in float32 the first is smaller by an eps, in float64 larger by half of one."""
    one, other = model.numbers
    for _ in range(4):
        one = one + EPS / 4  # lost in float32
    return one, other + 0.55 * EPS  # rounded up in float32


def by_difference(function: Callable[[Tensor], Tensor], kink: float = 0.0) -> Callable[[TwoNumbers], Tensor]:
    def value(model: TwoNumbers) -> Tensor:
        one, other = near_zero(model)
        # Scaled, so that float32 tells it from the kink, and in a vector, as an operation meets it.
        return function(8 * (one - other) * torch.ones(3, dtype=one.dtype) + kink).sum()

    return value


def in_place(function: Callable[[Tensor], Any]) -> Callable[[Tensor], Tensor]:
    def call(x: Tensor) -> Tensor:
        y = x + 0
        function(y)
        return y

    return call


def _masked_by_largest(x: Tensor) -> Tensor:
    mask = x == x.max(dim=0, keepdim=True)[0]
    return (mask * x).sum() / mask.sum()


KINKS: dict[str, Callable[[TwoNumbers], Tensor]] = {
    "F.relu": by_difference(F.relu),
    "nn.ReLU(inplace=True)": by_difference(in_place(nn.ReLU(inplace=True))),
    "torch.relu": by_difference(torch.relu),
    "Tensor.relu_": by_difference(in_place(Tensor.relu_)),
    "leaky_relu": by_difference(lambda x: F.leaky_relu(x, 0.2)),
    "prelu": by_difference(lambda x: F.prelu(x, x.new_tensor([0.1]))),
    "elu": by_difference(lambda x: F.elu(x, 2.0)),
    "selu": by_difference(F.selu),
    "celu": by_difference(lambda x: F.celu(x, 3.0)),
    "relu6, below": by_difference(F.relu6),
    "relu6, above": by_difference(F.relu6, 6.0),
    "hardtanh": by_difference(lambda x: F.hardtanh(x, -2.0, 0.5), 0.5),
    "threshold": by_difference(lambda x: F.threshold(x, 0.5, 0.5), 0.5),
    "hardswish": by_difference(F.hardswish, -3.0),
    "softshrink": by_difference(lambda x: F.softshrink(x, 0.25), 0.25),
    "clamp": by_difference(lambda x: x.clamp(-1, 1), 1.0),
    "clamp(min=...)": by_difference(lambda x: torch.clamp(x, min=0.0)),
    "clamp_min_": by_difference(in_place(lambda x: x.clamp_min_(0.0))),
    "clamp_max": by_difference(lambda x: x.clamp_max(1.5), 1.5),
    "l1_loss": by_difference(lambda x: F.l1_loss(x, torch.zeros_like(x)) + x.sum()),
    "smooth_l1_loss": by_difference(lambda x: F.smooth_l1_loss(x, torch.zeros_like(x)), 1.0),
    "smooth_l1_loss, beta": by_difference(lambda x: F.smooth_l1_loss(x, torch.zeros_like(x), beta=0.5), -0.5),
    "huber_loss": by_difference(lambda x: nn.HuberLoss(delta=2.0)(x, torch.zeros_like(x)), 2.0),
    "a comparison": by_difference(lambda x: torch.where(x > 0, x, 3 * x)),
    "a reflected comparison": by_difference(lambda x: torch.where(x.new_zeros(()) >= x, x, 3 * x)),
    "maximum": lambda model: torch.maximum(*near_zero(model)),
    "minimum": lambda model: torch.minimum(*near_zero(model)),
    "max along": lambda model: torch.stack(near_zero(model)).max(dim=0).values,
    "min along": lambda model: torch.min(torch.stack(near_zero(model)), 0)[0],
    "amax": lambda model: torch.stack(near_zero(model)).amax(0),
    "amin": lambda model: torch.stack(near_zero(model)).amin(dim=(0,)),
    "max of two": lambda model: torch.max(*near_zero(model)),
    "Tensor.min of two": lambda model: Tensor.min(*near_zero(model)),
    "max of all": lambda model: torch.stack(near_zero(model)).max(),
    "a mask of the largest": lambda model: _masked_by_largest(torch.stack(near_zero(model))),
    "argmax": lambda model: (stacked := torch.stack(near_zero(model)))[stacked.argmax()],
    "max_pool1d": lambda model: F.max_pool1d(torch.stack(near_zero(model)).view(1, 1, 2), 2),
    "max_pool2d": lambda model: F.max_pool2d(torch.stack(near_zero(model)).view(1, 1, 1, 2), (1, 2)),
    "adaptive_max_pool2d": lambda model: F.adaptive_max_pool2d(torch.stack(near_zero(model)).view(1, 1, 1, 2), 1),
    "max_pool3d": lambda model: F.max_pool3d(torch.stack(near_zero(model)).view(1, 1, 1, 1, 2), (1, 1, 2)),
}
# Slopes that come in another way than by the operation's own input: abs, whose square is smooth.
KINKS["abs"] = by_difference(lambda x: x.abs() + 0.5 * x)


def loss_of(kink: Callable[[TwoNumbers], Tensor]) -> Callable[[TwoNumbers, Any], Tensor]:
    weights = torch.tensor([1.0, 2.0])

    def loss(model: TwoNumbers, _: Any) -> Tensor:
        value = kink(model).sum()
        return (value - 3.0).square() + 0.1 * (weights.to(value) * model.numbers).pow(2).sum()

    return loss


@pytest.mark.parametrize("name", KINKS)
def test_float64_follows_float32_over_a_kink(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator = HessianOperator(TwoNumbers(), loss_of(KINKS[name]), [0], weights=[1.0])
    identity = torch.eye(2)
    own = torch.stack([operator.matvec(row) for row in identity], dim=1).double()
    precise = operator.precise_products(identity)
    assert precise is not None
    torch.testing.assert_close(precise, own, rtol=1e-5, atol=1e-5)
    # Otherwise the two lie on different sides, so this test shows something.
    monkeypatch.setattr(FunctionalLoss, "_decisions", lambda *_: [])
    other_side = operator.precise_products(identity)
    assert other_side is not None
    assert float((other_side - own).abs().max()) > 1e-2


def at_kinks(seed: int) -> tuple[nn.Module, Callable[[Any, Any], Tensor], list[Any]]:
    """A network each of whose first units has an input that is zero up to rounding."""
    torch.manual_seed(seed)
    convolution, linear = nn.Conv2d(1, 6, 3), nn.Linear(96, 4)
    images, labels = torch.randn(40, 1, 10, 10), torch.randint(4, (40,))
    with torch.no_grad():
        inputs = convolution(images)
        convolution.bias -= torch.stack([inputs[2 * unit, unit, 3, unit] for unit in range(6)])
    model = nn.Sequential(convolution, nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten(), linear)
    return model.eval(), lambda m, batch: F.cross_entropy(3 * m(batch[0]), batch[1]), [(images, labels)]


def differing_products(seed: int) -> float:
    model, loss, batches = at_kinks(seed)
    operator = HessianOperator(model, loss, batches)
    vector = torch.randn(operator.num_parameters, 1, generator=torch.Generator().manual_seed(seed))
    precise = operator.precise_products(vector)
    assert precise is not None
    own = operator.matvec(vector[:, 0]).double()
    return float((own - precise[:, 0]).norm() / precise.norm())


def test_products_of_networks_differ_by_rounding_alone() -> None:
    """Without the pieces two of these networks differ by 2e-3 and 4e-3 (on one CPU; others round in other ways)."""
    assert max(differing_products(seed) for seed in range(16)) < 20 * EPS


def test_eigenvalues_are_known_although_units_are_at_kinks() -> None:
    model, loss, batches = at_kinks(9)
    spectrum = top_eigenvalues(HessianOperator(model, loss, batches), 5, rtol=1e-3)
    assert spectrum.rounding_basis == "measured"
    assert spectrum.all_converged


ON_THE_KINK: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "clamp, below": lambda x: x.clamp(0.0, 3.0),
    "clamp_min": lambda x: x.clamp_min(0.0),
    "clamp_max": lambda x: (x + 1).clamp_max(1.0),
    "hardtanh, below": lambda x: F.hardtanh(x, 0.0, 3.0),
    "hardtanh, above": lambda x: F.hardtanh(x - 1, -3.0, -1.0),
    "relu6, above": lambda x: F.relu6(x + 6),
    "hardswish, above": lambda x: F.hardswish(x + 3),
    "hardswish, below": lambda x: F.hardswish(x - 3),
    "threshold": lambda x: F.threshold(x, 0.0, 0.0),
    "softshrink, above": lambda x: F.softshrink(x + 0.5),
    "hardshrink, below": lambda x: F.hardshrink(x - 0.5),
    "maximum": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "minimum": lambda x: torch.minimum(2 * x, torch.zeros_like(x)),
}


@pytest.mark.parametrize("name", ON_THE_KINK)
@pytest.mark.parametrize("exact", ["float32", "float64"])
def test_numbers_that_lie_exactly_on_a_kink(name: str, exact: str) -> None:
    """The side is the one whose derivative autograd takes there."""
    if "hardswish" in name and float(torch.ops.aten.hardswish_backward(torch.tensor(1.0), torch.tensor(3.0))) != 1.0:
        pytest.skip("this torch takes the first derivative of one side and the second of the other")

    def loss(model: TwoNumbers, _: Any) -> Tensor:
        one, other = model.numbers
        if exact == "float32":  # In float64 the difference is half an eps, of either sign.
            x = torch.stack([(one + EPS / 4) - other, (one - EPS / 8) - other])
        else:  # In float32 it is half an eps or an eps, of either sign.
            shift = 0.0 if one.dtype == torch.float64 else EPS
            x = torch.stack([(one + shift) - other, (one - shift) - other])
        value = ON_THE_KINK[name](x) * x.new_tensor([1.0, 3.0])
        return (value.sum() - 3.0).square() + 0.1 * model.numbers.square().sum()

    operator = HessianOperator(TwoNumbers(), loss, [0], weights=[1.0])
    identity = torch.eye(2)
    own = torch.stack([operator.matvec(row) for row in identity], dim=1).double()
    precise = operator.precise_products(identity)
    torch.testing.assert_close(precise, own, rtol=1e-5, atol=1e-5)


def test_decisions_that_belong_to_other_operations_are_not_followed() -> None:
    """A layer that iterates until a tolerance, which float32 never meets, and then a head of the same shape."""

    def loss(model: TwoNumbers, _: Any) -> Tensor:
        x = model.numbers
        for _ in range(60):
            following = F.relu(0.5 * x + torch.tensor([0.7, 0.3], dtype=x.dtype))
            if float((following - x).abs().max()) < 1e-9 and x.dtype == torch.float64:
                break
            x = following
        return (F.relu(x - 1.0) + x).pow(2).sum() + (x[0] * model.numbers[1]).square()

    operator = HessianOperator(TwoNumbers(), loss, [0], weights=[1.0])
    own = torch.stack([operator.matvec(row) for row in torch.eye(2)], dim=1).double()
    torch.testing.assert_close(operator.precise_products(torch.eye(2)), own, rtol=1e-4, atol=1e-4)


def test_pieces_are_followed_in_inference_mode_as_well() -> None:
    model, loss, batches = at_kinks(9)
    operator = HessianOperator(model, loss, batches)
    vector = torch.ones(operator.num_parameters, 1)
    own = operator.matvec(vector[:, 0]).double()
    with torch.inference_mode():
        precise = operator.precise_products(vector)
    assert precise is not None
    assert float((own - precise[:, 0]).norm() / precise.norm()) < 20 * EPS


def test_a_recording_that_raises_is_no_obstacle() -> None:
    def loss(model: TwoNumbers, _: Any) -> Tensor:
        if torch.overrides._get_current_function_mode() is not None and model.numbers.dtype == torch.float32:
            raise RuntimeError("no modes here")
        return F.relu(model.numbers).pow(2).sum()

    operator = HessianOperator(TwoNumbers(), loss, [0], weights=[1.0])
    precise = operator.precise_products(torch.eye(2))
    torch.testing.assert_close(precise, 2 * torch.eye(2, dtype=torch.float64))


def test_a_loss_that_takes_other_paths_in_float64_is_evaluated_as_it_is() -> None:
    def loss(model: TwoNumbers, _: Any) -> Tensor:
        x = model.numbers
        return (F.relu(x) if x.dtype == torch.float32 else F.softplus(100 * x) / 100).pow(2).sum()

    operator = HessianOperator(TwoNumbers(), loss, [0], weights=[1.0])
    precise = operator.precise_products(torch.eye(2))
    torch.testing.assert_close(precise, 2 * torch.eye(2, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_no_buffer_and_no_batch_is_changed_by_looking_for_pieces() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2))
    batch = (torch.randn(8, 3), torch.randint(2, (8,)))
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    operator = HessianOperator(model.eval(), lambda m, b: F.cross_entropy(m(b[0]), b[1]), [batch])
    model.train()
    before = batch[0].clone()
    assert operator.precise_products(torch.ones(operator.num_parameters, 1)) is not None
    assert torch.equal(batch[0], before)
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, kept[name]), name
