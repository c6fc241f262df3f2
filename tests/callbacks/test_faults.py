"""Fault drills: what goes wrong in or around a measurement, and the run that continues, or ends as it would have."""

from __future__ import annotations

import copy
import errno
import math
import os
import random
import re
import signal
import sys
import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, assume, event, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, Dataset

from hessian_callback import Lanczos, PowerLawHessianCallback
from hessian_callback.callbacks.module_loss import resolve_loss
from hessian_callback.measurement.errors import LossError, SampleError
from tests.helpers.killed_run import fit
from tests.helpers.launched import launch
from tests.helpers.lightning import CSVLogger, OnExceptionCheckpoint
from tests.helpers.model_zoo import KINDS
from tests.helpers.observed import observable, same
from tests.helpers.toy_runs import NUM_EIGENVALUES, Net, data, loader, measure, seeded, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:a measurement of the Hessian took"),
    pytest.mark.filterwarnings("ignore:the Hessian could not be measured"),
]


def outcome(tmp_path: Any, *callbacks: Any, make: Any = Net, **options: Any) -> dict[str, Any]:
    model = seeded(make)
    run = trainer(tmp_path, *callbacks, **options)
    run.fit(model, loader(shuffle=True), loader(seed=1))
    return observable(run, model)


def unchanged(tmp_path: Any, callback: Any, **options: Any) -> None:
    with_callback, without = outcome(tmp_path, callback, **options), outcome(tmp_path, **options)
    for part in without:
        assert same(with_callback[part], without[part]), part


class Faulty:
    """A loss that goes wrong at the n-th evaluation of the measurement after some step."""

    def __init__(self, fault: Any, *, step: int, evaluation: int) -> None:
        self.fault, self.step, self.left = fault, step, evaluation

    def __call__(self, module: Any, batch: Any) -> torch.Tensor:
        loss = resolve_loss(module)(module, batch)
        if module.trainer.global_step != self.step:
            return loss
        self.left -= 1
        if self.left != 0:
            return loss
        if isinstance(self.fault, float):
            return loss * self.fault
        torch.rand(3)
        raise self.fault("in the loss")


# -- inside the loss -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [RuntimeError, math.nan, math.inf], ids=["exception", "NaN", "infinity"])
def test_inside_the_loss_on_the_nth_product(fault: Any, tmp_path: Any) -> None:
    # Graphs are rebuilt in every product: four batches a product, after some ten evaluations of preparation.
    callback = measure(loss_fn=Faulty(fault, step=6, evaluation=50), memory_budget=0)
    unchanged(tmp_path, callback, max_epochs=3)
    assert [m.logged for m in callback.history] == [True, False, True, True]
    assert [m.spectrum is None for m in callback.history] == [False, True, False, False]
    expected = "in the loss" if fault is RuntimeError else "(?i)nan|inf"
    assert re.search(expected, str(callback.history[1].reason))


def test_a_run_that_diverges_by_itself(tmp_path: Any) -> None:
    class Diverging(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1e38)

    callback = measure()
    with_callback = outcome(tmp_path, callback, make=Diverging)
    without = outcome(tmp_path, make=Diverging)
    weights = with_callback["weights and buffers"]["net.0.weight"]
    assert not weights.isfinite().all()
    assert torch.equal(weights.isnan(), without["weights and buffers"]["net.0.weight"].isnan())
    assert [m.logged for m in callback.history] == [True, False, False]
    assert all("whether training has diverged" in str(m.reason) for m in callback.history[1:])


def test_a_loss_that_changes_from_call_to_call(tmp_path: Any) -> None:
    noise = torch.Generator().manual_seed(0)

    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        moved = batch[0] + torch.randn(batch[0].shape, generator=noise)
        return nn.functional.cross_entropy(module(moved), batch[1])

    with pytest.raises(ValueError, match=r"the same batch gave .*no global random generator moved.*a generator of its"):
        outcome(tmp_path, measure(loss_fn=loss_fn))


def test_a_loss_that_draws_is_measured_and_training_draws_as_before(tmp_path: Any) -> None:
    def loss_fn(module: Any, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(module(batch[0] + 0.1 * torch.randn_like(batch[0])), batch[1])

    callback = measure(loss_fn=loss_fn)
    with_callback, without = outcome(tmp_path, callback), outcome(tmp_path)
    assert torch.equal(
        with_callback["weights and buffers"]["net.0.weight"], without["weights and buffers"]["net.0.weight"]
    )
    assert all(measurement.logged for measurement in callback.history)


# -- memory --------------------------------------------------------------------------------------------------


class Room:
    """A loss for whose batches there is room up to a size."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __call__(self, module: Any, batch: Any) -> torch.Tensor:
        if len(batch[0]) > self.samples:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return resolve_loss(module)(module, batch)


def test_out_of_memory_halves_the_batches_and_goes_on(tmp_path: Any, capsys: Any) -> None:
    callback, roomy = measure(loss_fn=Room(3), verbose=True), measure()
    unchanged(tmp_path, callback)
    unchanged(tmp_path, roomy)
    # Of the loader's batches of 8 quarters are left.
    assert "out of memory, so batches were halved 2 time(s) and the measurement went on" in capsys.readouterr().out
    for tight, ample in zip(callback.history, roomy.history, strict=True):
        torch.testing.assert_close(tight.spectrum.eigenvalues, ample.spectrum.eigenvalues, rtol=1e-3, atol=1e-5)
        assert tight.loss == pytest.approx(ample.loss)


def test_when_nothing_fits_the_reason_says_what_would(tmp_path: Any) -> None:
    callback = measure(loss_fn=Room(0))
    unchanged(tmp_path, callback)
    assert all(m.spectrum is None for m in callback.history)
    assert all("Choose fewer parameters (parameters=...), shorter" in str(m.reason) for m in callback.history)


# -- from outside --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_in_the_middle_of_a_measurement(signal_number: int, tmp_path: Any) -> None:
    """Everything is as before, and Lightning ends the run in its own way, with a checkpoint."""
    before: dict[str, Any] = {}

    class Signalled(Faulty):
        def __call__(self, module: Any, batch: Any) -> torch.Tensor:
            if module.trainer.global_step == self.step:
                self.left -= 1
                if self.left == 0:
                    os.kill(os.getpid(), signal_number)
            return resolve_loss(module)(module, batch)

    class Watched(PowerLawHessianCallback):
        def _measure(self, trainer: Any, pl_module: Any, place: Any, *hook: Any) -> None:
            before.update(observable(trainer, pl_module))
            super()._measure(trainer, pl_module, place, *hook)

    loss_fn = Signalled(None, step=6, evaluation=50)
    callback = Watched(
        num_eigenvalues=NUM_EIGENVALUES,
        num_samples=32,
        loss_fn=loss_fn,
        solver=Lanczos(memory_budget=0),
        figures=False,
        verbose=False,
    )
    saver = OnExceptionCheckpoint(tmp_path, filename="interrupted")
    model = seeded()
    run = trainer(tmp_path, callback, saver, max_epochs=3, enable_checkpointing=True)
    # A shell that starts the tests in the background has them ignore SIGINT.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
        with pytest.raises(SystemExit):
            run.fit(model, loader(shuffle=True), loader(seed=1))
        assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == handlers
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert loss_fn.left <= 0, "the measurement was not interrupted"
    assert len(callback.history) == 1
    after = observable(run, model)
    for part in ("weights and buffers", "optimizer", "gradients", "modes", "losses", "calls", "attributes"):
        assert same(after[part], before[part]), part
    assert after["grad mode"]
    if signal_number == signal.SIGINT:
        saved = torch.load(tmp_path / "interrupted.ckpt", weights_only=True)
        assert same(saved["state_dict"], before["weights and buffers"])
        assert len(saved["callbacks"][callback.state_key]["history"]) == 1


def test_killed_and_resumed(tmp_path: Any) -> None:
    """Killed in the measurement of step 20, resumed from the end of the third epoch, step 18."""
    whole, model = fit(tmp_path / "whole")
    killed = launch("tests.helpers.killed_run", tmp_path / "killed", 20)
    output = killed.finish()
    assert killed.returncode == -signal.SIGKILL, output[-500:]
    last = tmp_path / "killed" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 18
    resumed, other = fit(tmp_path / "resumed", ckpt_path=last)
    assert same(other.state_dict(), model.state_dict())
    assert [m.step for m in resumed.history] == [0, 4, 8, 12, 16, 20, 24]
    assert [replace(m, seconds=0.0) for m in resumed.history] == [replace(m, seconds=0.0) for m in whole.history]


# -- disks ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS], ids=["disk full", "read-only"])
def test_a_log_that_cannot_be_written(number: int, tmp_path: Any) -> None:
    class Full(CSVLogger):
        def log_metrics(self, metrics: Any, step: Any = None) -> None:
            if any(key.startswith("hessian/") for key in metrics):
                raise OSError(number, os.strerror(number))

    callback = measure(every_n_train_steps=3)
    with pytest.warns(UserWarning, match=rf"a logger lacks this measurement.*{os.strerror(number)}"):
        with_callback = outcome(tmp_path, callback, logger=Full(tmp_path))
    without = outcome(tmp_path, logger=CSVLogger(tmp_path / "other"))
    assert all(same(with_callback[part], without[part]) for part in without)
    assert [m.step for m in callback.history] == [0, 3, 6, 9, 12]
    assert all(m.fit is not None for m in callback.history)
    with pytest.raises(OSError, match=os.strerror(number)):
        outcome(tmp_path, measure(every_n_train_steps=3, on_error="raise"), logger=Full(tmp_path))


def test_a_closed_standard_output(tmp_path: Any, monkeypatch: Any) -> None:
    with open(os.devnull, "w") as closed:
        pass
    callback = measure(verbose=True)
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", closed)
        outcome(tmp_path, callback)
    assert all(m.logged for m in callback.history)


# -- loaders -------------------------------------------------------------------------------------------------


class Unreadable(Dataset):
    """Reads until it has been read so often."""

    def __init__(self, reads: int) -> None:
        self.reads = reads

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        self.reads -= 1
        if self.reads < 0:
            raise OSError(errno.EIO, "the shard cannot be read")
        return data()[index]


def test_a_loader_that_raises(tmp_path: Any) -> None:
    callback = measure(dataloader=DataLoader(Unreadable(20), batch_size=8))
    unchanged(tmp_path, callback)
    assert [m.logged for m in callback.history] == [False, False, False]
    assert all("the shard cannot be read" in str(m.reason) for m in callback.history)
    with pytest.raises(OSError, match="the shard cannot be read"):
        outcome(tmp_path, measure(dataloader=DataLoader(Unreadable(20)), on_error="raise"))


@pytest.mark.parametrize("empty", [[], DataLoader([])], ids=["list", "DataLoader"])
def test_a_loader_that_is_empty(empty: Any, tmp_path: Any) -> None:
    with pytest.raises(SampleError, match=r"gives no sample; pass another one as dataloader=my_loader"):
        outcome(tmp_path, measure(dataloader=empty))


def test_a_loader_of_fewer_samples_than_asked_for(tmp_path: Any, caplog: Any) -> None:
    callback = measure(dataloader=DataLoader(data(20), batch_size=8), num_samples=1000)
    with caplog.at_level("INFO"):
        unchanged(tmp_path, callback)
    assert "num_samples=1000, but there are only 20 samples; all are used" in caplog.text
    assert {m.num_samples for m in callback.history} == {20}
    assert all(m.logged for m in callback.history)


# -- all at once ---------------------------------------------------------------------------------------------

QUICK = (
    "BatchNorm, dropout, metrics, lists",
    "step that returns a dict, logs, asks the trainer",
    "SyncBatchNorm",
    "attention (SDPA), tied embedding",
    "RNN, padding_idx",
    "LoRA-like adapters",
    "frozen backbone in eval mode",
    "checkpointing (use_reentrant=False)",
    "two optimizers, manual optimisation",
)
HOOKS: dict[str, dict[str, Any]] = {
    "train start": {"at_steps": [0]},
    "train batch end": {"at_steps": [2]},
    "train epoch end": {},
    "validation epoch end": {},
    "validate": {},
}
FAULTS: dict[str, Any] = {
    "none": None,
    "exception": RuntimeError,
    "memory": MemoryError,
    "NaN": math.nan,
    "infinity": -math.inf,
    "Ctrl-C": KeyboardInterrupt,
    "exit": SystemExit,
}


def everything(run: Any, model: Any) -> dict[str, Any]:
    """All that a training run could notice."""
    return {
        "state": copy.deepcopy(model.state_dict()),
        "identities": [(name, id(tensor), tensor.dtype) for name, tensor in model.named_parameters()],
        "gradients": [None if p.grad is None else (id(p.grad), p.grad.clone()) for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in run.optimizers],
        "modes": [module.training for module in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "generators": (torch.get_rng_state(), random.getstate()),
        "grad": (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")),
        "numbers": (torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()),
        "attention": (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()),
        "trainer": (run.should_stop, run.state.stage, [id(logger) for logger in run.loggers], run.global_step),
        "metrics": {k: v for k, v in run.callback_metrics.items() if not k.startswith("hessian/")},
        "signals": (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)),
    }


class Watched(PowerLawHessianCallback):
    """Compares what is observable before and after each measurement, however it ends."""

    def _measure(self, trainer: Any, pl_module: Any, place: Any, *hook: Any) -> None:
        before = everything(trainer, pl_module)
        try:
            super()._measure(trainer, pl_module, place, *hook)
        finally:
            after = everything(trainer, pl_module)
            self.compared = getattr(self, "compared", 0) + 1
            self.different = [part for part in before if not same(after[part], before[part])]


@given(
    st.sampled_from(QUICK),
    st.sampled_from(["32-true", "64-true", "bf16-mixed", "bf16-true"]),
    st.sampled_from(list(HOOKS)),
    st.sampled_from(list(FAULTS)),
    st.integers(1, 60),
    st.sampled_from([None, 0, 2000]),
)
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_restoration_is_a_property(
    tmp_path: Any, name: str, precision: str, hook: str, fault: str, evaluation: int, memory_budget: int | None
) -> None:
    # Its step needs optimizers, which trainer.validate() does not make: refused, whatever the fault.
    assume(not (hook == "validate" and "asks the trainer" in name))
    kind = KINDS[name]
    step = 0 if hook in ("train start", "validate") else 2
    calls = 1 + ("two optimizers" in name)
    loss_fn = Faulty(FAULTS[fault], step=step * calls, evaluation=0 if fault == "none" else evaluation)
    callback = Watched(
        num_eigenvalues=3,
        num_samples=12,
        solver=Lanczos(max_hvps=12, rtol=0.2, memory_budget=memory_budget),
        loss_fn=loss_fn,
        figures=False,
        verbose=False,
        **{**kind.choice, **HOOKS[hook]},
    )
    options = {"limit_train_batches": 2, "limit_val_batches": 1, "max_epochs": 1, "precision": precision}
    if hook == "validation epoch end":
        options["val_check_interval"] = 2
    model = seeded(kind.build)
    run = trainer(tmp_path, callback, **options)
    ended = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if hook == "validate":
                run.validate(model, kind.loaders()[1], verbose=False)
            else:
                run.fit(model, *kind.loaders())
        except (RuntimeError, LossError, ArithmeticError, SystemExit, KeyboardInterrupt, MemoryError):
            ended = True
    came = loss_fn.left <= 0 and fault != "none"
    event(f"{fault}: {'came' if came else 'did not come'}, the run {'ended' if ended else 'went on'}")
    assert came or not ended
    assert callback.compared > 0
    assert callback.different == []
