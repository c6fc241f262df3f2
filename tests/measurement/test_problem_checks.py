"""The first measurement says what it cannot correct: losses that are no means, and state that is not put back."""

from __future__ import annotations

import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.errors import LossError, NotTrainableError
from hessian_callback.measurement.failure_policy import FailurePolicy
from hessian_callback.measurement.measure import measure
from hessian_callback.measurement.solvers import PublishedProtocol
from hessian_callback.operators.parameters import chosen_sizes
from hessian_callback.operators.product_check import WrongProductError

LIBRARY = """
class Simulator:
    def __init__(self):
        self.steps, self.inner = 0, {"heat": [0.0]}
    def step(self):
        self.steps += 1
        return self.steps
    def warm(self):
        self.inner["heat"][0] += 1
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A module that lies where installed ones do."""
    folder = tmp_path_factory.mktemp("lib") / "site-packages"
    folder.mkdir()
    (folder / "a_simulator_of_a_test.py").write_text(LIBRARY)
    sys.path.insert(0, str(folder))
    yield importlib.import_module("a_simulator_of_a_test")
    sys.path.remove(str(folder))


def texts(model: nn.Module, loss: Any, batches: Any = None, **options: Any) -> list[str]:
    """Measure, and return the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        measure(model, loss, batches or [samples()], num_eigenvalues=3, **options)
    return [str(warning.message) for warning in caught]


def samples(num: int = 12, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 4, generator=generator).double(), torch.arange(num) % 3


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(4, 3).double()


def mean(model: Any, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1])


def summed(model: Any, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], reduction="sum")


CLASS_WEIGHTS = torch.tensor([1.0, 5.0, 20.0]).double()


def weighted(model: Any, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1], CLASS_WEIGHTS)


def unsorted() -> Any:
    x, y = samples()
    return x, y.sort().values


def weigh(batch: Any) -> float:
    return float(CLASS_WEIGHTS[batch[1]].sum())


def contrastive(model: Any, batch: Any) -> torch.Tensor:
    z = functional.normalize(model(batch[0]), dim=-1)
    return functional.cross_entropy(z @ z.T, torch.arange(len(z)))


def noisy(model: Any, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0] + torch.randn_like(batch[0])), batch[1])


def fixed_size(model: Any, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0].view(12, 4)), batch[1])


@pytest.mark.parametrize(
    ("loss", "options", "words"),
    [
        (summed, {}, "is the sum over its samples.*Return the mean"),
        (weighted, {}, "is not the mean over its samples.*batch_weight="),
        (contrastive, {}, "is not the mean over its samples.*batch size of the training"),
        (weighted, {"batch_weight": weigh}, None),
        (mean, {}, None),
        (lambda m, b: mean(m, b) + 0.1 * m.weight.square().sum(), {}, None),
        # Nothing can be said of these.
        (noisy, {}, None),
        (fixed_size, {}, None),
    ],
    ids=["sum", "class weights", "contrastive", "class weights given", "mean", "penalty", "draws", "fixed size"],
)
def test_a_loss_that_is_no_mean_is_named(loss: Any, options: dict[str, Any], words: str | None) -> None:
    found = texts(network(), loss, [unsorted()], **options)
    if words is None:
        assert found == []
    else:
        assert len(found) == 1
        assert re.search(words, found[0])


def test_the_first_batch_of_more_than_one_sample_is_cut() -> None:
    one = tuple(part[:1] for part in samples())
    assert len(texts(network(), summed, [one, samples(), samples(seed=1)])) == 1
    assert texts(network(), summed, [one, one]) == []


class Stepping(nn.Linear):
    def __init__(self, simulator: Any) -> None:
        super().__init__(4, 3)
        self.parts = [simulator]


def test_an_object_of_a_library_that_a_loss_moves_is_named(library: Any) -> None:
    model = Stepping(library.Simulator()).double()

    def loss(model: Any, batch: Any) -> torch.Tensor:
        model.parts[0].warm()
        return mean(model, batch)

    (text,) = texts(model, loss)
    assert "the loss changes Stepping.parts[0].inner" in text
    assert "Pass loss_fn=..., a function of the module and one batch without side effects" in text


def test_a_value_that_depends_on_such_an_object_is_refused(library: Any) -> None:
    model = Stepping(library.Simulator()).double()

    def loss(model: Any, batch: Any) -> torch.Tensor:
        return mean(model, batch) * model.parts[0].step()

    with pytest.raises(
        LossError, match=r"no function of the parameters.*It changes Stepping.parts\[0\].steps.*loss_fn"
    ):
        measure(model, loss, [samples()], num_eigenvalues=3)


def test_a_loss_that_trains_parameters_itself_names_them() -> None:
    model = nn.ModuleDict({"online": nn.Linear(4, 3), "momentum": nn.Linear(4, 3)}).double()

    def loss(model: Any, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            model["momentum"].weight.mul_(0.9).add_(model["online"].weight, alpha=0.1)
        return functional.mse_loss(model["online"](batch[0]), model["momentum"](batch[0]))

    with pytest.raises(LossError, match=r"It changes momentum\.weight in place.*freeze parameters that"):
        measure(model, loss, [samples()], num_eigenvalues=3)


def test_generators_of_libraries_and_caches_are_no_change() -> None:
    model = network()
    model.helper = functional  # type: ignore[assignment]
    model.rng = np.random.default_rng(0)

    def loss(model: Any, batch: Any) -> torch.Tensor:
        model.rng.random()
        model.last = batch
        return mean(model, batch)

    assert texts(model, loss) == []
    assert not hasattr(model, "last")


# -- a solver of another library -------------------------------------------------------------------


class Flow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.field, self.head = nn.Sequential(nn.Linear(2, 8), nn.Tanh(), nn.Linear(8, 2)), nn.Linear(2, 1)

    def forward(self, t: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return self.field(y)


@pytest.mark.parametrize("name", ["odeint", "odeint_adjoint"])
def test_the_adjoint_method_is_refused_and_the_solver_itself_is_not(name: str) -> None:
    solve = getattr(pytest.importorskip("torchdiffeq"), name)
    torch.manual_seed(0)
    model = Flow().double()
    x = torch.randn(20, 2).double()
    times = torch.tensor([0.0, 1.0]).double()

    def loss(model: Any, batch: Any) -> torch.Tensor:
        end = solve(model, batch, times, rtol=1e-6, atol=1e-6)[-1]
        return (model.head(end).squeeze(-1) - batch.square().sum(1)).square().mean()

    if name == "odeint":
        assert measure(model, loss, [x], num_eigenvalues=3).logged
        return
    with pytest.raises(WrongProductError, match=r"the torch.autograd.Function OdeintAdjointMethod.*loss_fn"):
        measure(model, loss, [x], num_eigenvalues=3)


# -- frozen parameters -------------------------------------------------------------------------------


def test_frozen_parameters_are_waited_for() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3)).double()
    model[0].requires_grad_(False)
    assert chosen_sizes(model) == (12, 27)
    assert chosen_sizes(model, lambda name, parameter: "0" in name) == (0, 15)
    for parameters in (r"^0\.", r"^0\.|1\.bias", None):
        if parameters is None:
            model[1].weight.requires_grad_(False)
        options = {"parameters": parameters, "num_eigenvalues": 4}
        with pytest.raises(NotTrainableError, match=r"belong to frozen parameters.*needs more than the other"):
            measure(model, mean, [samples()], **options)
        policy = FailurePolicy("raise")
        with pytest.warns(UserWarning, match="no slope: NotTrainableError: (15|24) of"):
            outcome = policy.run(
                lambda options=options: measure(model, mean, [samples()], **options),  # type: ignore[misc]
                Ranks(),
                stage="measuring",
                consequence="no slope",
                raise_permanent=True,
            )
        assert outcome.value is None
    model.requires_grad_(True)
    assert measure(model, mean, [samples()], num_eigenvalues=4, parameters=r"^0\.").num_parameters == 15


# -- the gradient's norm -----------------------------------------------------------------------------


def test_the_norm_of_the_gradient_is_that_of_the_hessians_loss() -> None:
    """The loss counts its calls and draws: the norm is of the loss at the first count, with the Hessian's draws."""
    model = nn.Linear(2, 1, bias=False).double()
    model.calls = 0  # type: ignore[assignment]
    x = torch.tensor([[1.0, 2.0], [3.0, 1.0]]).double()
    draws: list[float] = []

    def loss(model: Any, batch: Any) -> torch.Tensor:
        model.calls += 1
        draws.append(float(torch.rand(())))
        return (model.calls + draws[-1]) * model(batch).square().mean()

    measurement = measure(
        model, loss, [x[:1], x[1:]], num_eigenvalues=3, extras=["norms"], solver=PublishedProtocol(allow_fewer=True)
    )
    first, second = draws[:2]
    assert first != second
    # Only the check for written parameters draws otherwise.
    assert len(set(draws) - {first, second}) <= 1
    matrix = ((1 + first) * torch.outer(x[0], x[0]) + (1 + second) * torch.outer(x[1], x[1])) / 2
    expected = float((2 * matrix @ model.weight[0].detach()).norm())
    assert measurement.comparisons["gradient_norm"] == pytest.approx(expected, rel=1e-12)
    assert model.calls == 0
