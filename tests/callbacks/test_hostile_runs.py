"""Realistic runs: data modules, precisions, compiled modules, signals, long histories."""

from __future__ import annotations

import gc
import os
import signal
import threading
import types
from typing import Any

import pytest
import torch
from torch import nn

import hessian_callback.measurement.solvers
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.callbacks import full_precision
from tests.helpers.lightning import (
    Callback,
    EarlyStopping,
    LightningDataModule,
    LightningModule,
    MisconfigurationException,
)
from tests.helpers.toy_runs import Net, loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore:a measurement of the Hessian took")


def first_eigenvalues(tmp_path: Any, model: Any, *loaders: Any, choice: Any = None, **options: Any) -> torch.Tensor:
    callback = measure(**(choice or {}))
    trainer(tmp_path, callback, **{"max_epochs": 1, **options}).fit(model, *loaders)
    assert callback.history[0].spectrum is not None, callback.history[0].reason
    return callback.history[0].spectrum.eigenvalues


class Shifted(LightningDataModule):
    """Changes batches on their way to the device, differently in training, and at random."""

    def train_dataloader(self) -> Any:
        return loader(shuffle=True)

    def val_dataloader(self) -> Any:
        return loader(seed=1)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        batch[0].add_(1)
        return batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        x, y = batch
        return (x + torch.rand(()) if self.trainer.training else x * 2), y


def test_transfer_hooks_run_alike_at_every_measurement(tmp_path: Any) -> None:
    fitted, validated = measure(), measure()
    model = seeded()
    trainer(tmp_path, validated).validate(model, datamodule=Shifted(), verbose=False)
    trainer(tmp_path, fitted, max_epochs=1).fit(seeded(), datamodule=Shifted())
    start = fitted.history[0].spectrum.eigenvalues
    torch.testing.assert_close(start, validated.history[0].spectrum.eigenvalues)
    plain = first_eigenvalues(tmp_path, seeded(), loader(), loader(seed=1))
    assert not torch.allclose(start, plain, rtol=1e-3)

    # Random changes are drawn from the seed, alike in each measurement.
    class Still(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    frozen = measure(dataloader="train", parameters="weight")
    model = seeded(Still)
    for module in model.net:
        if isinstance(module, nn.BatchNorm1d):
            module.momentum = 0.0
    trainer(tmp_path, frozen, max_epochs=2).fit(model, datamodule=Shifted())
    for later in frozen.history[1:]:
        assert torch.equal(later.spectrum.eigenvalues, frozen.history[0].spectrum.eigenvalues)


class MakesTensors(Net):
    """A forward that creates tensors of the default dtype."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(x @ torch.eye(5))


@pytest.mark.parametrize(
    ("precision", "rtol", "used"),
    [
        ("64-true", 1e-4, "float64"),
        ("32-true", 0.0, "float32"),
        ("bf16-mixed", 1e-6, "float32"),
        ("16-mixed", 1e-6, "float32"),
        ("bf16-true", 1e-5, "float32 (a copy of bfloat16)"),
        ("16-true", 1e-5, "float32 (a copy of float16)"),
    ],
    ids=["64-true", "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true"],
)
@pytest.mark.filterwarnings("ignore:.*AMP with fp16 is not supported on CPU")
def test_precision(precision: str, rtol: float, used: str, tmp_path: Any) -> None:
    expected_of = seeded(MakesTensors)
    if "-true" in precision and "16" in precision:
        half = torch.bfloat16 if precision.startswith("b") else torch.float16
        expected_of.to(half).float()  # the half-precision values, in float32
    expected = first_eigenvalues(tmp_path, expected_of, loader(), loader(seed=1))
    callback = measure()
    model = seeded(MakesTensors)
    trainer(tmp_path, callback, max_epochs=1, precision=precision).fit(model, loader(), loader(seed=1))
    first = callback.history[0]
    assert first.spectrum is not None, first.reason
    torch.testing.assert_close(first.spectrum.eigenvalues, expected, rtol=rtol, atol=0)
    assert [m.precision for m in callback.history] == [used, used]
    assert f"HVPs in {used}, " in first.summary()
    assert torch.get_default_dtype() == torch.float32


def test_no_room_for_a_copy_in_float32(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(full_precision, "free_memory", lambda device: 400)
    run = trainer(tmp_path, measure(), max_epochs=1, precision="bf16-true")
    with pytest.raises(
        MisconfigurationException, match=r"would take 276 B of the 400 B that are free: use precision='bf16-mixed', or"
    ):
        run.fit(seeded(), loader(), loader(seed=1))


def test_a_module_that_cannot_be_copied(tmp_path: Any) -> None:
    model = seeded()
    model.lock = threading.Lock()
    run = trainer(tmp_path, measure(), max_epochs=1, precision="bf16-true")
    with pytest.raises(MisconfigurationException, match=r"cannot be copied.*pickle.*use precision='bf16-mixed'"):
        run.fit(model, loader(), loader(seed=1))


class Quiet(Net):
    """Without logging, which fails in Lightning's compiled training_step."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None


def test_a_module_that_is_compiled(tmp_path: Any) -> None:
    expected = first_eigenvalues(tmp_path, seeded(Quiet), loader(), loader(seed=1))
    # The compiler differentiates, as with the default backend, but generates no machine code.
    compiled = torch.compile(seeded(Quiet), backend="aot_eager")
    found = first_eigenvalues(tmp_path, compiled, loader(), loader(seed=1))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


class CompiledForward(Quiet):
    def __init__(self) -> None:
        super().__init__()
        self.forward = torch.compile(self.forward, backend="aot_eager")  # type: ignore[method-assign]


@pytest.mark.parametrize("part", ["whole", "forward"])
def test_a_compiled_module_in_half_precision(part: str, tmp_path: Any) -> None:
    slopes = []
    for compiled in (False, True):
        model = seeded(CompiledForward if compiled and part == "forward" else Quiet)
        if compiled and part == "whole":
            model = torch.compile(model, backend="aot_eager")
        callback = measure(on_error="raise")
        run = trainer(tmp_path, callback, max_epochs=1, precision="bf16-true", limit_train_batches=1)
        run.fit(model, loader(), loader(seed=1))
        slopes.append([m.slope for m in callback.history])
    assert slopes[1] == pytest.approx(slopes[0], rel=1e-5)


class Keeps(Quiet):
    """Collects results with their graphs, and a constant in half precision that is made at the first use."""

    def __init__(self) -> None:
        super().__init__()
        self.outputs: list[Any] = []
        self.kept = {"by": types.SimpleNamespace(last=None)}
        self.eye: torch.Tensor | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.eye is None:
            self.eye = torch.eye(5, dtype=x.dtype)
        return self.net(x @ self.eye)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        loss = super().training_step(batch, batch_idx)
        self.outputs.append(loss)
        self.kept["by"].last = (loss, loss.square())
        return loss

    def on_train_epoch_end(self) -> None:
        assert all(loss.grad_fn is not None for loss in self.outputs)
        self.outputs.clear()


def test_results_and_constants_that_a_module_keeps_in_half_precision(tmp_path: Any) -> None:
    spectra = []
    for make in (Quiet, Keeps):
        callback = measure(on_error="raise")
        trainer(tmp_path, callback, precision="bf16-true").fit(seeded(make), loader(), loader(seed=1))
        spectra.append([m.spectrum.eigenvalues for m in callback.history])
    torch.testing.assert_close(spectra[1], spectra[0], rtol=1e-5, atol=0)


class Penalised(Quiet):
    """A loss with a term that a step adds to it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Any = None
        self.prepare()

    def prepare(self) -> None:
        self.net[0].register_forward_hook(self.see)

    def see(self, layer: Any, inputs: Any, output: Any) -> None:
        self.seen = output

    def penalty(self) -> torch.Tensor:
        return self.seen.float().pow(4).mean()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.penalty()


class PenalisedByClosure(Penalised):
    """The same through functions that refer to the module."""

    def prepare(self) -> None:
        self.net[0].register_forward_hook(lambda layer, inputs, output: setattr(self, "seen", output))
        self.inner = lambda: self.seen.float().pow(4)
        self.penalty = lambda inner=self.inner: inner().mean()  # type: ignore[method-assign]


class WithConstant(Quiet):
    """A constant in half precision, which a function encloses."""

    def __init__(self) -> None:
        super().__init__()
        constant = torch.eye(5, dtype=torch.bfloat16)
        self.turn = lambda x: x @ constant

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step((self.turn(batch[0]), batch[1]), batch_idx)


class PenalisedByOptimizer(Penalised):
    """A term of the parameters that the optimizer has."""

    def penalty(self) -> torch.Tensor:
        return self.optimizers().param_groups[0]["params"][0].float().square().sum()


def test_functions_that_refer_to_a_module_in_half_precision(tmp_path: Any) -> None:
    spectra = []
    for make in (Penalised, PenalisedByClosure):
        callback = measure(on_error="raise")
        trainer(tmp_path, callback, precision="bf16-true").fit(seeded(make), loader(), loader(seed=1))
        spectra.append([m.spectrum.eigenvalues for m in callback.history])
    torch.testing.assert_close(spectra[1], spectra[0], rtol=1e-5, atol=0)


def test_functions_that_enclose_constants_in_half_precision(tmp_path: Any) -> None:
    callback = measure(on_error="raise")
    trainer(tmp_path, callback, precision="bf16-true").fit(seeded(WithConstant), loader(), loader(seed=1))
    assert all(entry.logged for entry in callback.history)


def test_parameters_that_are_reached_past_the_copy_are_refused(tmp_path: Any) -> None:
    run = trainer(tmp_path, measure(), precision="bf16-true")
    with pytest.raises(MisconfigurationException, match="the loss uses parameters or buffers of the original"):
        run.fit(seeded(PenalisedByOptimizer), loader(), loader(seed=1))


class TwoOptimizers(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 5), nn.Tanh(), nn.Linear(5, 3))
        self.automatic_optimization = False

    def hessian_loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.hessian_loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), lr=0.1) for part in (self.net[0], self.net[2])]


def test_manual_optimisation_with_two_optimizers(tmp_path: Any) -> None:
    callback = measure(at_steps=[0, 5, 12], dataloader="train")
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(TwoOptimizers), loader())
    # Each batch takes two steps, so step 5 is passed at step 6.
    assert [m.step for m in callback.history] == [0, 6, 12]
    assert all(m.logged for m in callback.history)


@pytest.mark.parametrize("choice", [{}, {"memory_budget": 0}, {"hvp": "finite_difference"}], ids=str)
def test_memory_after_many_measurements(choice: dict[str, Any], tmp_path: Any) -> None:
    """After 50 measurements as many tensors are alive as after 2, apart from those of the history."""
    alive = {}

    class Count(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step not in (2, 50):
                return
            gc.collect()
            kept = {
                id(tensor) for m in callback.history for tensor in vars(m.spectrum).values() if torch.is_tensor(tensor)
            }
            tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and id(thing) not in kept]
            # Sparse tensors of other tests have no storage.
            tensors = [tensor for tensor in tensors if tensor.layout == torch.strided]
            alive[trainer.global_step] = len(tensors), sum(tensor.untyped_storage().nbytes() for tensor in tensors)

    callback = measure(
        every_n_train_steps=1, dataloader="train", num_eigenvalues=3, num_samples=16, max_hvps=8, rtol=0.5, **choice
    )
    run = trainer(tmp_path, callback, Count(), max_epochs=9, limit_val_batches=0)
    run.fit(seeded(Quiet), loader())  # Lightning keeps what is logged at the end of an epoch.
    assert [m.step for m in callback.history[1:]] == list(range(1, 55))
    assert alive[50] == alive[2]


@pytest.mark.parametrize("where", ["start", "epoch"])
def test_sigterm_in_the_middle_of_a_measurement(where: str, tmp_path: Any) -> None:
    calls = iter(range(10**6))

    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        due = module.trainer.global_step == (0 if where == "start" else 6)
        if due and next(calls) == 11:
            os.kill(os.getpid(), signal.SIGTERM)
        return nn.functional.cross_entropy(module(batch[0]), batch[1])

    callback = measure(loss_fn=loss_fn, memory_budget=0)
    model = seeded()
    run = trainer(tmp_path, callback, max_epochs=3)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run.fit(model, loader(), loader(seed=1))
    assert len(callback.history) == (0 if where == "start" else 1)
    assert model.training
    assert torch.is_grad_enabled()
    assert signal.getsignal(signal.SIGTERM) == before
    # The measurement ends at once, and not after all products.
    assert next(calls) < 40


# -- stopping ------------------------------------------------------------------------------------------------

# Epoch and slope of LeNet on MNIST, as published.
PAPER = {1: 1.102, 2: 1.087, 3: 1.092, 10: 0.972, 20: 0.925, 30: 0.930}


@pytest.mark.parametrize(
    ("mode", "patience", "stops_after"),
    # The slope falls, but not monotonically: mode "min" needs patience 2, and mode "max" stops early.
    [("min", 1, 3), ("min", 2, None), ("max", 1, 2), ("max", 2, 3), ("max", 3, 10)],
)
def test_the_papers_slopes_through_early_stopping(
    mode: str, patience: int, stops_after: int | None, tmp_path: Any, monkeypatch: Any
) -> None:
    slopes = iter([1.2, *PAPER.values()])

    def replay(operator: Any, k: int, **_: Any) -> Spectrum:
        ranks = torch.arange(1, k + 1, dtype=torch.float64)
        exponent = next(slopes) / float((k / ranks).log().mean())
        values = ranks**-exponent
        return Spectrum(
            eigenvalues=values,
            error_bounds=torch.zeros_like(values),
            converged=torch.ones(k, dtype=torch.bool),
            missed_probability=0.0,
            num_matvecs=0,
            stopped="converged",
            rounding=0.0,
            symmetry_defect=0.0,
            ritz_values=values,
            rtol=0.01,
        )

    monkeypatch.setattr(hessian_callback.measurement.solvers, "top_eigenvalues", replay)
    callback = measure()
    stopper = EarlyStopping("hessian/slope", mode=mode, patience=patience, strict=False)
    run = trainer(tmp_path, callback, stopper, max_epochs=len(PAPER))
    run.fit(seeded(), loader(), loader(seed=1))
    measured = [m.slope for m in callback.history[1:]]
    assert measured == pytest.approx(list(PAPER.values())[: len(measured)])
    epochs = list(PAPER)[: len(measured)]
    assert (stopper.stopped_epoch != 0) == (stops_after is not None)
    assert epochs[-1] == (stops_after or 30)
