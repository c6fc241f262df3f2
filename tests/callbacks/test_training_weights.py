"""The measured weights are those that the optimizer trains, whatever other callbacks put in their place."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import get_ema_avg_fn

from hessian_callback.callbacks.training_weights import TrainingWeights, may_exchange_weights
from tests.helpers import lightning
from tests.helpers.lightning import Callback, LightningModule, StochasticWeightAveraging
from tests.helpers.toy_runs import loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore")


def newer(name: str) -> Any:
    """Return a callback that early versions of Lightning lack."""
    if not hasattr(lightning, name):
        pytest.skip(f"{lightning.PACKAGE} has no {name}")
    return getattr(lightning, name)


class Plain(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.5)


class Normalised(Plain):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))


class Exchanges(Callback):
    """Puts other weights in for validation, from one hook to another, by copying or by other storage."""

    def __init__(self, first: str, last: str, *, by_storage: bool) -> None:
        self.by_storage = by_storage
        setattr(self, first, self.exchange)
        setattr(self, last, self.exchange)
        self.others: list[torch.Tensor] = []

    def exchange(self, run: Any, module: Any) -> None:
        if not self.others:
            self.others = [3 * parameter.detach().clone() for parameter in module.parameters()]
        for number, parameter in enumerate(module.parameters()):
            if self.by_storage:
                parameter.data, self.others[number] = self.others[number], parameter.data
            else:
                other = parameter.detach().clone()
                parameter.data.copy_(self.others[number])
                self.others[number] = other


AVERAGES: dict[str, Callable[[], Callback]] = {
    "EMAWeightAveraging": lambda: newer("EMAWeightAveraging")(decay=0.5),
    "WeightAveraging": lambda: newer("WeightAveraging")(avg_fn=get_ema_avg_fn(0.9), use_buffers=False),
    "epoch hooks, copied": lambda: Exchanges("on_validation_epoch_start", "on_validation_epoch_end", by_storage=False),
    "outer hooks, copied": lambda: Exchanges("on_validation_start", "on_validation_end", by_storage=False),
    "outer hooks, by storage": lambda: Exchanges("on_validation_start", "on_validation_end", by_storage=True),
}

# Measured after validations, at the end of an epoch and at the end of training.
PATHS: dict[str, dict[str, Any]] = {
    "in validation": {"val_check_interval": 0.5},
    "after epochs": {},
    "every second epoch": {"check_val_every_n_epoch": 2},
}


def fit(tmp_path: Any, callbacks: list[Any], make: Any = Plain, **options: Any) -> Any:
    module = seeded(make)
    run = trainer(tmp_path, *callbacks, **options)
    run.fit(module, loader(32), loader(16, seed=1))
    return module


def spectra(callback: Any) -> list[Any]:
    return [(entry.when, entry.step, entry.spectrum.eigenvalues.tolist(), entry.slope) for entry in callback.history]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The measurements without another callback, by path."""
    found = {}
    for path, options in PATHS.items():
        callback = measure(num_samples=16, at_end=True)
        fit(tmp_path_factory.mktemp("alone"), [callback], **options)
        found[path] = spectra(callback)
    return found


@pytest.mark.parametrize(
    ("average", "path"),
    [
        *((name, "in validation") for name in AVERAGES if name != "epoch hooks, copied"),
        *(("EMAWeightAveraging", path) for path in list(PATHS)[1:]),
    ],
)
def test_the_trained_weights_are_measured_in_any_order(average: str, path: str, alone: Any, tmp_path: Any) -> None:
    """Averages of weights don't change training, so the measurements are those of the run without them."""
    runs = []
    for averaging_first in (True, False):
        callback, other = measure(num_samples=16, at_end=True), AVERAGES[average]()
        order = [other, callback] if averaging_first else [callback, other]
        runs.append((fit(tmp_path, order, **PATHS[path]), callback))
    reference = fit(tmp_path, [AVERAGES[average]()], **PATHS[path])
    for module, callback in runs:
        assert spectra(callback) == alone[path]
        for name, tensor in reference.state_dict().items():
            assert torch.equal(tensor, module.state_dict()[name]), name
        assert torch.equal(reference.trainer.callback_metrics["val_loss"], module.trainer.callback_metrics["val_loss"])


@pytest.mark.parametrize("make", [Plain, Normalised], ids=lambda make: make.__name__)
def test_stochastic_averaging_is_measured_alike_in_any_order(make: Any, tmp_path: Any) -> None:
    runs = []
    for averaging_first in (True, False):
        callback = measure(num_samples=16, at_end=True)
        other = StochasticWeightAveraging(swa_lrs=0.1, swa_epoch_start=1)
        order = [other, callback] if averaging_first else [callback, other]
        fit(tmp_path, order, make, max_epochs=3)
        runs.append(spectra(callback))
    assert len(runs[0]) > 3
    assert runs[0] == runs[1]


@pytest.mark.parametrize(
    ("average", "words"),
    [
        ("EMAWeightAveraging", "those that EMAWeightAveraging has"),
        ("outer hooks, copied", "those that another callback has"),
    ],
)
def test_a_line_says_once_which_weights_are_measured(average: str, words: str, tmp_path: Any, capsys: Any) -> None:
    callback = measure(num_samples=16, verbose=True)
    fit(tmp_path, [callback, AVERAGES[average]()], val_check_interval=0.5)
    assert capsys.readouterr().out.count(f"the weights that the optimizer trains are measured, and not {words}") == 1


class Schedulefree(Plain):
    """Exchanges its weights where Lightning sets its mode for a validation."""

    def on_validation_model_eval(self) -> None:
        super().on_validation_model_eval()
        self.scale(3.0)

    def on_validation_model_train(self) -> None:
        super().on_validation_model_train()
        self.scale(1 / 3)

    def scale(self, factor: float) -> None:
        for parameter in self.parameters():
            parameter.data.mul_(factor)


class SchedulefreeByMode(Plain):
    """The same where its mode is set."""

    def train(self, mode: bool = True) -> Any:
        if mode != self.training:
            for parameter in self.parameters():
                parameter.data.mul_(1 / 3 if mode else 3.0)
        return super().train(mode)


class Norms(Callback):
    """Notes the norm of the weights after each step."""

    def __init__(self) -> None:
        self.norms: dict[int, float] = {}

    def on_train_batch_end(self, run: Any, module: Any, *_: Any) -> None:
        self.norms[run.global_step] = float(nn.utils.parameters_to_vector(module.parameters()).norm())


@pytest.mark.parametrize("kind", [Schedulefree, SchedulefreeByMode])
def test_modules_that_exchange_weights_with_their_mode(kind: Any, tmp_path: Any) -> None:
    callbacks, norms = [measure(extras=["norms"]), measure(extras=["norms"], prefix="other")], Norms()
    run = trainer(tmp_path, *callbacks, norms, max_epochs=3, val_check_interval=0.5)
    run.fit(seeded(kind), loader(num=40), loader())
    for callback in callbacks:
        measured = [entry for entry in callback.history if entry.when == "epoch"]
        assert len(measured) == 6
        for entry in measured:
            assert entry.comparisons["parameter_norm"] == pytest.approx(norms.norms[entry.step], rel=1e-5)
    assert "run" not in vars(run.fit_loop.epoch_loop.val_loop)


def test_weights_are_copied_only_if_something_may_exchange_them(tmp_path: Any, monkeypatch: Any) -> None:
    copies: list[Any] = []
    monkeypatch.setattr(TrainingWeights, "keep", lambda self, module: copies.append(module))
    fit(tmp_path, [measure(num_samples=16)], val_check_interval=0.5)
    assert copies == []
    fit(tmp_path, [measure(num_samples=16), AVERAGES["outer hooks, copied"]()], val_check_interval=0.5)
    assert copies


def test_own_hooks_of_callbacks_and_modules_may_exchange_weights() -> None:
    class Swaps(Plain):
        def on_validation_epoch_start(self) -> None:
            pass

    class Later(Callback):
        def on_validation_epoch_end(self, run: Any, module: Any) -> None:
            pass

    assert not may_exchange_weights(
        [Plain(), Later(), measure(), lightning.ModelCheckpoint(), lightning.EarlyStopping("x")]
    )
    assert may_exchange_weights([Swaps()])
    assert may_exchange_weights([AVERAGES["epoch hooks, copied"]()])


def test_validate_measures_the_weights_that_the_module_has(tmp_path: Any) -> None:
    module = seeded(Plain)
    callback, other = measure(num_samples=16), AVERAGES["epoch hooks, copied"]()
    trainer(tmp_path, other, callback).validate(module, loader(16, seed=1), verbose=False)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.mul_(3)
    tripled = measure(num_samples=16)
    trainer(tmp_path, tripled).validate(module, loader(16, seed=1), verbose=False)
    assert spectra(callback) == spectra(tripled)


def test_signals_that_save_come_after_the_weights_are_back() -> None:
    layer = nn.BatchNorm1d(2)
    seen: list[float] = []
    weights = TrainingWeights()
    weights.keep(layer)
    layer.weight.data.fill_(5.0)
    layer.running_mean.fill_(7.0)
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append(float(layer.weight[0])))
    run = trainer(None)
    try:
        with weights.put_back(run) as exchanged:
            signal.raise_signal(signal.SIGUSR1)
            assert exchanged
            assert layer.weight.tolist() == [1.0, 1.0]
            assert layer.running_mean.tolist() == [0.0, 0.0]
            assert seen == []
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [5.0]
    assert layer.running_mean.tolist() == [7.0, 7.0]


def test_buffers_that_validation_changes_are_no_exchange() -> None:
    layer = nn.BatchNorm1d(2)
    weights = TrainingWeights()
    weights.keep(layer)
    layer.running_mean.fill_(7.0)
    with weights.put_back(None) as exchanged:
        assert not exchanged
        assert layer.running_mean.tolist() == [7.0, 7.0]
    weights.discard()
    layer.weight.data.fill_(5.0)
    with weights.put_back(None) as exchanged:
        assert not exchanged
