"""`measure` and `Measurer` without a Trainer: plain loops, groups, failures and several processes."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any, ClassVar

import pytest
import torch
import torch.distributed as dist

from hessian_callback import HessianOperator, Lanczos, Measurement, PublishedProtocol, Trace, measure
from hessian_callback.linalg.distributed import Ranks
from hessian_callback.measurement.extras.base import Examination, Extra, Finding
from hessian_callback.measurement.failure_policy import FailurePolicy
from hessian_callback.measurement.measurer import Measurer
from hessian_callback.measurement.place import Place
from tests.helpers.problems import BATCH_SIZE, NUM_BATCHES, batches, cross_entropy, network, problem
from tests.helpers.ranks import run_ranks

PLACE = Place(2, 30, "epoch")


def dense(parameters: str | None = None) -> torch.Tensor:
    """All eigenvalues of the Hessian, descending."""
    operator = HessianOperator(network(), cross_entropy, batches(), parameters=parameters)
    matrix = torch.stack([operator.matvec(column) for column in torch.eye(operator.num_parameters).double()])
    return torch.linalg.eigvalsh((matrix + matrix.T) / 2).flip(0)


def test_eigenvalues_are_those_of_a_dense_solver() -> None:
    measurement = measure(network(), cross_entropy, batches(), num_eigenvalues=8, epoch=2, step=30)
    assert (measurement.epoch, measurement.step) == (2, 30)
    assert measurement.num_samples == NUM_BATCHES * BATCH_SIZE
    assert measurement.precision == "float64"
    assert measurement.logged
    assert measurement.spectrum is not None
    errors = (measurement.spectrum.eigenvalues - dense()[:8]).abs()
    assert (errors <= measurement.spectrum.error_bounds).all()
    assert measurement.loss == pytest.approx(
        float(torch.stack([cross_entropy(network(), batch) for batch in batches()]).mean())
    )
    assert Measurement.from_state(measurement.to_state()) == measurement


class FaultyOnce:
    """Cross-entropy that is NaN in one of its evaluations."""

    def __init__(self, faulty: int) -> None:
        self.faulty, self.calls = faulty, 0

    def __call__(self, model: Any, batch: Any) -> torch.Tensor:
        self.calls += 1
        return cross_entropy(model, batch) * (torch.nan if self.calls == self.faulty else 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_one_bad_evaluation_is_an_error_or_leaves_the_values(dtype: torch.dtype) -> None:
    # Trials of an engine may fail and fall back; a product that enters the result may not.
    model = network().to(dtype)
    data = [(x.to(dtype), y) for x, y in batches()[:2]]
    truth = measure(network(), cross_entropy, batches()[:2], num_eigenvalues=3, solver=Lanczos(rtol=1e-6)).spectrum
    assert truth is not None
    raised = 0
    for faulty in range(1, 20):
        loss = FaultyOnce(faulty)
        try:
            spectrum = measure(model, loss, data, num_eigenvalues=3, solver=Lanczos(max_hvps=12)).spectrum
        except ArithmeticError:
            raised += 1
            continue
        assert spectrum is not None
        allowed = spectrum.error_bounds + truth.error_bounds
        assert ((spectrum.eigenvalues - truth.eigenvalues).abs() <= allowed).all()
    assert 0 < raised < 19


def test_groups_are_diagonal_blocks() -> None:
    measurement = measure(
        network(), cross_entropy, batches(), num_eigenvalues=8, groups={"first": "^0", "head": "^2"}, solver=Lanczos()
    )
    for group, pattern in {"first": "^0", "head": "^2"}.items():
        spectrum = measurement.groups[group].spectrum
        assert spectrum is not None
        assert ((spectrum.eigenvalues - dense(pattern)[:8]).abs() <= spectrum.error_bounds).all()


def test_solver_and_extras_are_objects() -> None:
    measurement = measure(
        network(), cross_entropy, batches(), num_eigenvalues=8, solver=PublishedProtocol(), extras=[Trace(num_hvps=8)]
    )
    assert measurement.mode == "paper"
    assert measurement.num_hvps == 24
    assert measurement.comparisons["num_extra_hvps"] == 8


def test_weights_of_batches() -> None:
    """Counting a batch three times is weighing it by three."""
    first, second, *_ = batches()
    heavy = measure(network(), cross_entropy, [first, second], weights=[3.0, 1.0], num_eigenvalues=5)
    repeated = measure(network(), cross_entropy, [first, first, first, second], num_eigenvalues=5)
    assert heavy.spectrum is not None
    assert repeated.spectrum is not None
    torch.testing.assert_close(heavy.spectrum.eigenvalues, repeated.spectrum.eigenvalues, rtol=1e-3, atol=0)
    with pytest.raises(ValueError, match="there are 2 batches but 1 weights"):
        measure(network(), cross_entropy, [first, second], weights=[1.0])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batches": []}, "no batches"),
        ({"num_eigenvalues": 2}, "num_eigenvalues must be an integer of at least 3"),
        ({"parameters": "^nothing"}, "chooses no trainable parameter"),
        ({"extras": ["hessian"]}, "choose among"),
    ],
)
def test_bad_input_is_refused(options: dict[str, Any], match: str) -> None:
    chosen: dict[str, Any] = {"batches": batches(), **options}
    with pytest.raises(ValueError, match=match):
        measure(network(), cross_entropy, chosen.pop("batches"), **chosen)


def on_rank(rank: int) -> Any:
    mine = batches()[rank::2]
    return measure(network(), cross_entropy, mine, num_eigenvalues=8, process_group=dist.group.WORLD)


def test_two_processes_measure_the_same_as_one() -> None:
    alone = measure(network(), cross_entropy, batches(), num_eigenvalues=8)
    assert alone.spectrum is not None
    for outcome in run_ranks(on_rank, 2):
        measurement = outcome.value
        assert measurement.world_size == 2
        assert measurement.num_samples == alone.num_samples
        torch.testing.assert_close(measurement.spectrum.eigenvalues, alone.spectrum.eigenvalues, rtol=1e-9, atol=0)


class Broken(Extra):
    """Fails on rank 1 alone, or on a single process."""

    name = "broken"
    keys: ClassVar = {"broken": "a value"}

    def compute(self, examination: Examination) -> Finding:
        ranks = examination.problem.ranks
        if ranks.rank == ranks.world_size - 1:
            raise RuntimeError("no room")
        return Finding({"broken": 1.0})


def test_an_extra_that_fails_leaves_the_rest() -> None:
    measurer = Measurer(8, extras=[Broken(), "trace"])
    with pytest.warns(UserWarning, match="the measurement has no broken: RuntimeError: no room"):
        result = measurer.measure(problem(), PLACE, failures=FailurePolicy("warn"))
    assert result.measurement.not_compared == {"broken": "RuntimeError: no room"}
    assert result.measurement.logged
    assert "trace" in result.measurement.comparisons
    with pytest.raises(RuntimeError, match="no room"):
        measurer.measure(problem(), PLACE)


def broken_on_rank(rank: int) -> Any:
    measurer = Measurer(8, extras=[Broken(), "norms"])
    measurement = measurer.measure(problem(Ranks(dist.group.WORLD)), PLACE, failures=FailurePolicy("warn")).measurement
    return dict(measurement.not_compared), sorted(measurement.comparisons)


def test_an_extra_that_fails_on_one_rank_fails_on_all() -> None:
    one, other = (outcome.value for outcome in run_ranks(broken_on_rank, 2))
    assert "rank 1 failed while computing broken" in one[0]["broken"]
    assert other[0]["broken"] == "RuntimeError: no room"
    assert one[1] == other[1] == ["gradient_norm", "parameter_norm"]


def test_measuring_needs_no_lightning(tmp_path: Any) -> None:
    code = """
import sys, torch
from torch import nn
from hessian_callback import measure
model = nn.Linear(4, 2)
loss = lambda model, batch: nn.functional.mse_loss(model(batch[0]), batch[1])
print(measure(model, loss, [(torch.randn(30, 4), torch.randn(30, 2))], num_eigenvalues=4).num_hvps > 0)
print(sorted({"lightning", "pytorch_lightning", "matplotlib"} & {name.split(".")[0] for name in sys.modules}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == ["True", "[]"], done.stderr
