"""The optimizers of PyTorch themselves diverge just above the predicted edge, and converge just below it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, Adamax, AdamW, NAdam, Optimizer, RAdam, RMSprop

from hessian_callback.measurement.preconditioners import (
    UnsupportedOptimizerError,
    check_optimizer,
    stability_limits,
)

SIZE = 5
# So small that squared gradients change no statistic: the loss is quadratic, and the iteration linear.
START = 1e-120


def random_hessian(seed: int) -> Tensor:
    factor = torch.randn(SIZE, SIZE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return factor @ factor.T + 0.1 * torch.eye(SIZE, dtype=torch.float64)


def statistics(seed: int, size: int) -> Tensor:
    """Squared gradients between 1e-3 and 10."""
    uniform = torch.rand(size, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return 10 ** (4 * uniform - 3)


# What a step does to each statistic if the gradient is negligible: the value before the step that gives the frozen one.
# Steps count one up.
BEFORE: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "exp_avg_sq": lambda group, frozen: frozen / group["betas"][1],
    "max_exp_avg_sq": lambda group, frozen: frozen,
    "exp_inf": lambda group, frozen: frozen / group["betas"][1],
    "square_avg": lambda group, frozen: frozen / group["alpha"],
    "grad_avg": lambda group, frozen: frozen / group["alpha"],
    "sum": lambda group, frozen: frozen,
    "step": lambda group, frozen: frozen - 1,
}


class Frozen:
    """An optimizer on a quadratic whose statistics are the same after every step."""

    def __init__(
        self, kind: type[Optimizer], groups: list[dict[str, Any]], H: Tensor, *, steps: int, seed: int
    ) -> None:
        sizes = [2, SIZE - 2] if len(groups) == 2 else [SIZE]
        generator = torch.Generator().manual_seed(seed)
        start = START * torch.randn(SIZE, generator=generator, dtype=torch.float64)
        self.parameters = [nn.Parameter(part.clone()) for part in start.split(sizes)]
        self.optimizer = kind([{"params": [p], **group} for p, group in zip(self.parameters, groups, strict=True)])
        self.H = H
        self.named = {str(index): parameter for index, parameter in enumerate(self.parameters)}
        self.frozen: dict[Any, dict[str, Any]] = {}
        self.step()  # Makes the state.
        for index, (parameter, group) in enumerate(zip(self.parameters, self.optimizer.param_groups, strict=True)):
            state = self.optimizer.state[parameter]
            values: dict[str, Any] = {}
            for name in state:
                if name == "step":
                    values[name] = torch.tensor(float(steps))
                elif name == "mu_product":
                    mus = [
                        group["betas"][0] * (1 - 0.5 * 0.96 ** (group["momentum_decay"] * t))
                        for t in range(1, steps + 1)
                    ]
                    self.mu = mus[-1]
                    values[name] = torch.tensor(math.prod(mus))
                elif name == "grad_avg":
                    values[name] = 0.3 * statistics(seed + index, parameter.numel()).sqrt()
                elif name in BEFORE:
                    values[name] = statistics(seed + index, parameter.numel())
                else:  # the momentum
                    state[name].zero_()
            self.frozen[parameter] = values
        with torch.no_grad():
            for parameter, part in zip(self.parameters, start.split(sizes), strict=True):
                parameter.copy_(part)
        self.set(before=False)

    def set(self, *, before: bool) -> None:
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                for name, value in self.frozen[parameter].items():
                    if name == "mu_product":
                        now = value / self.mu if before else value
                    else:
                        now = BEFORE[name](group, value) if before else value
                    self.optimizer.state[parameter][name].copy_(now)

    def step(self) -> None:
        sign = -1.0 if self.optimizer.param_groups[0].get("maximize") else 1.0
        gradient = sign * self.H @ torch.cat([p.detach() for p in self.parameters])
        sizes = [p.numel() for p in self.parameters]
        for parameter, part in zip(self.parameters, gradient.split(sizes), strict=True):
            parameter.grad = part
        self.optimizer.step()

    def largest_eigenvalue(self) -> float:
        """The largest eigenvalue of A, by a dense solver."""
        limits = stability_limits(self.optimizer, self.named)
        assert limits is not None
        matrix = limits.scale[:, None] * self.H * limits.scale + torch.diag(limits.shift)
        return float(torch.linalg.eigvalsh(matrix)[-1])

    def scale_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] *= factor

    def growth(self, num_steps: int) -> float:
        """The logarithm of the factor by which the state grows in a number of steps."""
        sizes = []
        for _ in range(num_steps):
            self.set(before=True)
            self.step()
            sizes.append(max(float(p.detach().abs().max()) for p in self.parameters))
        # Averaged over one period, because complex roots oscillate.
        late, early = max(sizes[-20:]), max(sizes[num_steps // 2 - 20 : num_steps // 2])
        return math.log(late / early)


OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "SGD": (SGD, {}),
    "SGD with L2": (SGD, {"weight_decay": 0.7}),
    "SGD with momentum": (SGD, {"momentum": 0.9}),
    "SGD with dampening": (SGD, {"momentum": 0.8, "dampening": 0.4, "weight_decay": 0.3}),
    "Nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.2}),
    "SGD maximizing": (SGD, {"momentum": 0.5, "maximize": True, "weight_decay": 0.2}),
    "SGD foreach": (SGD, {"momentum": 0.9, "foreach": True}),
    "Adam": (Adam, {"eps": 1e-2}),
    "Adam with L2": (Adam, {"weight_decay": 0.5, "betas": (0.8, 0.99)}),
    "Adam fused": (Adam, {"fused": True}),
    "Adam maximizing": (Adam, {"maximize": True, "foreach": True}),
    "AMSGrad": (Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "AdamW": (AdamW, {"weight_decay": 3.0}),
    "AdamW without momentum": (AdamW, {"weight_decay": 3.0, "betas": (0.0, 0.9)}),
    "NAdam": (NAdam, {}),
    "NAdam with L2": (NAdam, {"weight_decay": 0.5, "momentum_decay": 0.1, "eps": 1e-2}),
    "NAdam decoupled": (NAdam, {"weight_decay": 2.0, "decoupled_weight_decay": True}),
    "RAdam": (RAdam, {"weight_decay": 0.5}),
    "RAdam decoupled": (RAdam, {"weight_decay": 2.0, "decoupled_weight_decay": True}),
    "RMSprop": (RMSprop, {"weight_decay": 0.5, "eps": 1e-2}),
    "RMSprop with momentum": (RMSprop, {"momentum": 0.9}),
    "RMSprop centered": (RMSprop, {"centered": True, "momentum": 0.5, "foreach": True}),
    "Adagrad": (Adagrad, {"lr_decay": 0.01, "weight_decay": 0.5}),
    "Adamax": (Adamax, {"weight_decay": 0.5}),
}


def assert_edge(kind: type[Optimizer], groups: list[dict[str, Any]], *, steps: int, seed: int) -> None:
    """The state grows at 1.04 times the rate that is predicted as the edge, and shrinks at .96 times."""
    grown = []
    for factor in (1.04, 0.96):
        run = Frozen(kind, groups, random_hessian(seed), steps=steps, seed=seed)
        run.scale_rates(factor / run.largest_eigenvalue())
        assert run.largest_eigenvalue() == pytest.approx(factor, rel=1e-9)  # A is linear in the rates.
        grown.append(run.growth(120))
    assert grown[0] > 0.5 > 0 > grown[1], grown


@pytest.mark.parametrize(
    ("name", "steps"), [*((name, 40) for name in OPTIMIZERS), *((name, 1) for name in ("Adam", "NAdam", "RAdam"))]
)
def test_an_optimizer_diverges_just_above_the_edge_and_not_just_below(name: str, steps: int) -> None:
    kind, options = OPTIMIZERS[name]
    assert_edge(kind, [{"lr": 0.01, **options}], steps=steps, seed=len(name))


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    seed=st.integers(0, 1000),
    momentum=st.lists(st.floats(0.1, 0.9), min_size=2, max_size=2),
    rates=st.lists(st.floats(1e-3, 1e-1), min_size=2, max_size=2),
    epsilons=st.lists(st.floats(1e-8, 1.0), min_size=2, max_size=2),
    decay=st.floats(0, 2),
    kind=st.sampled_from([Adam, AdamW, RAdam]),
)
def test_groups_of_an_adaptive_optimizer_may_differ_in_everything(
    seed: int, momentum: list[float], rates: list[float], epsilons: list[float], decay: float, kind: type[Optimizer]
) -> None:
    groups = [
        {"lr": rate, "betas": (beta, 0.99), "eps": eps, "weight_decay": decay * index}
        for index, (beta, rate, eps) in enumerate(zip(momentum, rates, epsilons, strict=True))
    ]
    assert_edge(kind, groups, steps=10, seed=seed)


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.generate])
@given(
    seed=st.integers(0, 1000),
    momentum=st.lists(st.floats(0.0, 0.9), min_size=2, max_size=2),
    rates=st.lists(st.floats(1e-3, 1e-1), min_size=2, max_size=2),
    dampening=st.floats(0, 0.9),
    kind=st.sampled_from([SGD, RMSprop]),
)
def test_groups_of_heavy_balls_may_differ_in_everything(
    seed: int, momentum: list[float], rates: list[float], dampening: float, kind: type[Optimizer]
) -> None:
    groups = [{"lr": rate, "momentum": beta} for beta, rate in zip(momentum, rates, strict=True)]
    if kind is SGD:
        groups[1]["dampening"] = dampening
    assert_edge(kind, groups, steps=10, seed=seed)


@pytest.mark.parametrize(
    ("optimizer", "threshold"),
    [
        (lambda p: SGD(p, lr=0.1), 20.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9), 38.0),
        (lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True), 3.8 / 2.8 / 0.1),
        (lambda p: Adam(p, lr=0.1), 380.0),
        (lambda p: AdamW(p, lr=torch.tensor(0.1)), 380.0),
        (lambda p: RMSprop(p, lr=0.1), 20.0),
        (lambda p: Adagrad(p, lr=0.1), 20.0),
        (lambda p: Adamax(p, lr=0.1), 380.0),
    ],
)
def test_thresholds_are_the_published_ones(optimizer: Any, threshold: float) -> None:
    parameter = nn.Parameter(torch.ones(3))
    made = optimizer([parameter])
    parameter.grad = torch.ones(3)
    made.step()
    limits = stability_limits(made, {"p": parameter})
    assert limits is not None
    assert limits.threshold == pytest.approx(threshold)
    assert limits.lr == pytest.approx(0.1)


def test_adam_has_the_preconditioner_of_the_paper() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.float64))
    optimizer = Adam([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-3)
    gradients = torch.tensor([[1.0, 2.0, 3.0], [0.5, 0.0, 1.0]], dtype=torch.float64)
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    second = 0.01 * (0.99 * gradients[0] ** 2 + gradients[1] ** 2)
    P = (1 - 0.9**2) * ((second / (1 - 0.99**2)).sqrt() + 1e-3)
    limits = stability_limits(optimizer, {"p": parameter})
    assert limits is not None
    torch.testing.assert_close(limits.scale, (380 * P) ** -0.5, rtol=1e-12, atol=0)


# -- parameters outside -----------------------------------------------------------------------------------


def test_parameters_that_the_optimizer_does_not_move_count_as_fixed() -> None:
    moved, other, unused = (nn.Parameter(torch.ones(2)) for _ in range(3))
    optimizer = Adam([moved, unused], lr=0.1)
    moved.grad = torch.ones(2)
    optimizer.step()
    limits = stability_limits(optimizer, {"other": other, "moved": moved, "unused": unused})
    assert limits is not None
    assert limits.scale.bool().tolist() == [False, False, True, True, False, False]
    assert limits.threshold == pytest.approx(380)
    assert len(optimizer.state) == 1  # Reading made no entry.


@pytest.mark.parametrize("kind", [Adam, AdamW, NAdam, RAdam, RMSprop, Adagrad, Adamax])
def test_there_are_no_limits_before_the_first_step_of_an_adaptive_optimizer(kind: Any) -> None:
    parameter = nn.Parameter(torch.ones(2))
    assert stability_limits(kind([parameter], lr=0.1), {"p": parameter}) is None


def test_gradient_descent_has_limits_before_its_first_step() -> None:
    parameter = nn.Parameter(torch.ones(2))
    limits = stability_limits(SGD([parameter], lr=0.5, momentum=0.9), {"p": parameter})
    assert limits is not None
    assert limits.threshold == pytest.approx(7.6)
    assert limits.uniform == pytest.approx((1 / 7.6, 0.0))


def test_a_rate_of_zero_moves_nothing() -> None:
    frozen, moved = (nn.Parameter(torch.ones(2)) for _ in range(2))
    optimizer = SGD([{"params": [frozen], "lr": 0.0}, {"params": [moved], "lr": 0.5}])
    limits = stability_limits(optimizer, {"frozen": frozen, "moved": moved})
    assert limits is not None
    assert limits.scale.tolist() == [0.0, 0.0, 0.5, 0.5]
    assert (limits.lr, limits.threshold, limits.uniform) == (0.5, 4.0, None)


def test_a_complex_parameter_counts_as_two_real_ones() -> None:
    parameter = nn.Parameter(torch.ones(2, dtype=torch.complex128))
    optimizer = Adam([parameter], lr=0.1, eps=0.0)
    parameter.grad = torch.tensor([1 + 2j, 3 + 4j], dtype=torch.complex128)
    optimizer.step()
    limits = stability_limits(optimizer, {"p": parameter})
    assert limits is not None
    expected = (380 * 0.1 * torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)) ** -0.5
    torch.testing.assert_close(limits.scale, expected, rtol=1e-12, atol=0)


# -- refusals ---------------------------------------------------------------------------------------------


class OwnStep(Adam):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Renamed(Adam):
    pass


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2))]


@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Adadelta, torch.optim.Rprop, OwnStep])
def test_an_unknown_optimizer_is_refused_in_one_sentence(kind: Any) -> None:
    with pytest.raises(
        UnsupportedOptimizerError, match=rf"the stability of {kind.__name__} is not known.*preconditioner="
    ):
        check_optimizer(kind(parameters()))


def test_a_subclass_that_steps_as_its_parent_is_known() -> None:
    check_optimizer(Renamed(parameters()))


def test_groups_that_maximize_and_minimize_are_refused() -> None:
    optimizer = SGD([{"params": parameters(), "maximize": True}, {"params": parameters()}], lr=0.1)
    with pytest.raises(UnsupportedOptimizerError, match="an optimizer for each"):
        check_optimizer(optimizer)


def test_parameters_of_another_optimizer_are_refused() -> None:
    with pytest.raises(UnsupportedOptimizerError, match="none of the chosen parameters is in the SGD"):
        stability_limits(SGD(parameters(), lr=0.1), {"p": parameters()[0]})


def test_a_zero_preconditioner_is_refused() -> None:
    parameter = nn.Parameter(torch.ones(2))
    optimizer = Adam([parameter], eps=0.0)
    parameter.grad = torch.tensor([0.0, 1.0])
    optimizer.step()
    with pytest.raises(ValueError, match=r"the preconditioner of p must be positive and finite"):
        stability_limits(optimizer, {"p": parameter})


# -- an own preconditioner ----------------------------------------------------------------------------------


def test_a_function_replaces_the_rules() -> None:
    one, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(1))
    optimizer = torch.optim.Rprop([one, other], lr=0.1)

    def preconditioner(group: Any, state: Any, parameter: nn.Parameter) -> Any:
        return None if parameter is other else (torch.tensor([1.0, 4.0]), 2 / group["lr"])

    limits = stability_limits(optimizer, {"one": one, "other": other}, preconditioner)
    assert limits is not None
    torch.testing.assert_close(limits.scale, torch.tensor([0.05, 0.0125, 0.0], dtype=torch.float64).sqrt())
    assert limits.threshold == pytest.approx(20.0)


@pytest.mark.parametrize(
    ("result", "message"),
    [((torch.ones(3), 1.0), "has shape"), ((1.0, -1.0), "threshold"), ((-1.0, 1.0), "positive and finite")],
)
def test_a_function_that_returns_nonsense_is_refused(result: Any, message: str) -> None:
    parameter = nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=message):
        stability_limits(SGD([parameter], lr=0.1), {"p": parameter}, lambda *_: result)
