"""The networks of the studies, their optimizers and rates, in real runs and from the command line."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import hessian_callback
from hessian_callback import PowerLawHessianCallback, demos
from hessian_callback.cli.main import main
from hessian_callback.demos import FullyConnected, ImageClassifier, LeNet, ResNet18
from tests.helpers.lightning import PACKAGE, Callback, LightningDataModule, LightningModule, Trainer, seed_everything

pytestmark = pytest.mark.filterwarnings(
    "ignore:a measurement of the Hessian took", "ignore:The number of training batches"
)

# -- the networks ----------------------------------------------------------------------------------


def count(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def convolution(inputs: int, outputs: int, size: int) -> int:
    return inputs * outputs * size**2


@pytest.mark.parametrize(("classes", "channels"), [(10, 1), (7, 3)])
def test_lenet_has_the_parameters_of_its_layers(classes: int, channels: int) -> None:
    expected = convolution(channels, 6, 5) + 6 + convolution(6, 16, 5) + 16
    expected += (16 * 5 * 5 + 1) * 120 + (120 + 1) * 84 + (84 + 1) * classes
    network = LeNet(classes, channels)
    assert count(network) == expected
    assert network(torch.zeros(2, channels, 28, 28)).shape == (2, classes)


@pytest.mark.parametrize(("size", "width", "depth", "classes"), [(784, 100, 2, 10), (784, 10, 1, 10), (75, 6, 4, 3)])
def test_fully_connected_has_as_many_hidden_layers_as_its_depth(
    size: int, width: int, depth: int, classes: int
) -> None:
    network = FullyConnected(size, width, depth, classes)
    assert count(network) == (size + 1) * width + (depth - 1) * (width + 1) * width + (width + 1) * classes
    assert sum(isinstance(module, nn.ReLU) for module in network.modules()) == depth
    assert network(torch.zeros(2, size)).shape == (2, classes)


@pytest.mark.parametrize("options", [{"width": 0}, {"depth": 0}])
def test_network_without_hidden_units_is_refused(options: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        FullyConnected(**options)


def test_resnet18_has_the_parameters_of_its_layers() -> None:
    expected = convolution(3, 64, 3) + 2 * 64 + (512 + 1) * 10
    for inputs, outputs in [(64, 64), (64, 128), (128, 256), (256, 512)]:
        expected += convolution(inputs, outputs, 3) + 3 * convolution(outputs, outputs, 3) + 4 * 2 * outputs
        if inputs != outputs:
            expected += convolution(inputs, outputs, 1) + 2 * outputs
    network = ResNet18()
    assert count(network) == expected
    sizes: list[tuple[int, ...]] = []
    for stage in network.stages:
        stage.register_forward_hook(lambda _module, _inputs, output: sizes.append(tuple(output.shape[1:])))
    assert network(torch.zeros(2, 3, 32, 32)).shape == (2, 10)
    assert sizes == [(64, 32, 32), (128, 16, 16), (256, 8, 8), (512, 4, 4)]


def test_resnet18_has_eighteen_layers_on_the_way() -> None:
    layers = [m for m in ResNet18().modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    in_shortcuts = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in layers)
    assert len(layers) - in_shortcuts == 18


@pytest.mark.parametrize("network", [LeNet, FullyConnected])
def test_an_untrained_network_knows_nothing(network: type[nn.Module]) -> None:
    seed_everything(0, verbose=False)
    images, labels = torch.rand(200, 1, 28, 28), torch.arange(200) % 10
    loss = nn.functional.cross_entropy(network()(images), labels)
    assert float(loss.detach()) == pytest.approx(math.log(10), abs=0.05)


# -- training --------------------------------------------------------------------------------------


class Images(LightningDataModule):
    """Forty images of four pixels whose class is their brightest one, in batches of four."""

    def loader(self) -> DataLoader[Any]:
        images = 2 * torch.randn(40, 1, 2, 2, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(images, images.flatten(1).argmax(1)), batch_size=4)

    train_dataloader = val_dataloader = loader


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter(Images().loader().dataset)


class Rates(Callback):
    """The rate of each optimizer step, as it was taken."""

    def __init__(self) -> None:
        self.taken: list[float] = []

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        self.taken.append(optimizer.param_groups[0]["lr"])


def small(**options: Any) -> ImageClassifier:
    seed_everything(0, verbose=False)
    return ImageClassifier(FullyConnected(input_size=4, width=8, depth=1, num_classes=4), **options)


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu", logger=False, callbacks=list(callbacks), default_root_dir=folder, **quiet | options
    )


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_epochs": 2}, 20),
        ({"max_steps": 15}, 15),
        ({"max_epochs": 2, "max_steps": 10}, 10),
        ({"max_epochs": 4, "accumulate_grad_batches": 2}, 20),
    ],
)
def test_the_rate_falls_at_its_shares_of_the_run(limits: dict[str, int], steps: int, tmp_path: Path) -> None:
    rates = Rates()
    run = trainer(tmp_path, rates, **limits)
    run.fit(small(), datamodule=Images())
    assert run.global_step == steps
    first, second = steps * 2 // 5, steps * 2 // 5
    expected = [0.1] * first + [0.01] * second + [0.001] * (steps - first - second)
    assert rates.taken == pytest.approx(expected)


def test_the_rate_is_constant_without_shares(tmp_path: Path) -> None:
    rates = Rates()
    trainer(tmp_path, rates, max_epochs=2).fit(small(decay_at=[]), datamodule=Images())
    assert rates.taken == [0.1] * 20


def test_shares_and_factor_are_the_users(tmp_path: Path) -> None:
    rates = Rates()
    model = small(decay_at=[0.25], decay_factor=0.5)
    trainer(tmp_path, rates, max_epochs=2).fit(model, datamodule=Images())
    assert rates.taken == [0.1] * 5 + [0.05] * 15


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay_at": [40, 80]}, "between 0 and 1"),
        ({"decay_at": [0.0]}, "between 0 and 1"),
        ({"decay_factor": 0.0}, "decay_factor"),
        ({"decay_factor": 10.0}, "decay_factor"),
    ],
)
def test_impossible_schedule_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**options)


def test_schedule_without_an_end_says_what_to_give(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"give the trainer max_steps, or decay_at=\[\]"):
        trainer(tmp_path, max_epochs=-1).fit(small(), datamodule=Images())


def test_schedule_over_a_stream_needs_steps(tmp_path: Path) -> None:
    stream = DataLoader(Stream(), batch_size=4)
    with pytest.raises(ValueError, match="give the trainer max_steps"):
        trainer(tmp_path, max_epochs=1).fit(small(), stream)
    rates = Rates()
    trainer(tmp_path, rates, max_epochs=1, max_steps=5).fit(small(), stream)
    assert rates.taken == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001])


def test_losses_and_accuracies_are_means_over_images(tmp_path: Path) -> None:
    model = small(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, datamodule=Images())
    images, labels = Images().loader().dataset.tensors
    logits = model(images)
    loss, accuracy = nn.functional.cross_entropy(logits, labels), (logits.argmax(1) == labels).double().mean()
    for part in ("train", "val"):
        torch.testing.assert_close(run.callback_metrics[f"{part}_loss"], loss.detach())
        torch.testing.assert_close(run.callback_metrics[f"{part}_acc"], accuracy.float())


def test_a_network_learns_and_is_measured(tmp_path: Path) -> None:
    hessian = PowerLawHessianCallback(
        num_eigenvalues=4, num_samples=40, dataloader="train", at_steps=[0, 80], on_error="raise"
    )
    run = trainer(tmp_path, hessian, max_epochs=8)
    run.fit(small(), datamodule=Images())
    assert run.callback_metrics["train_acc"] > 0.8
    assert [m.step for m in hessian.history] == [0, 80]
    assert all(m.slope is not None and m.slope > 0 for m in hessian.history)


def test_checkpoint_is_loaded_with_the_network_given_again(tmp_path: Path) -> None:
    model = small()
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, datamodule=Images())
    run.save_checkpoint(tmp_path / "last.ckpt")
    network = FullyConnected(input_size=4, width=8, depth=1, num_classes=4)
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", network=network)
    images = torch.rand(3, 1, 2, 2)
    assert torch.equal(loaded(images), model.eval()(images))


# -- from a file -----------------------------------------------------------------------------------


class Told(Callback):
    """Keeps the optimizer of the run that `main` makes, out of a test's reach otherwise."""

    optimizer: Any = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Told.optimizer = trainer.optimizers[0]


def configuration(folder: Path, optimizer: dict[str, Any] | None = None) -> Path:
    network = {
        "class_path": "hessian_callback.demos.FullyConnected",
        "init_args": {"input_size": 4, "width": 8, "depth": 1, "num_classes": 4},
    }
    model: dict[str, Any] = {"network": network}
    if optimizer is not None:
        model["optimizer"] = optimizer
    settings = {
        "model": {"class_path": "hessian_callback.demos.ImageClassifier", "init_args": model},
        "data": {"class_path": f"{__name__}.Images"},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": {
                "class_path": "CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "run"},
            },
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": f"{__name__}.Told"}],
        },
    }
    path = folder / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.fixture(autouse=True)
def no_other_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["hessian-callback"])


def test_a_file_names_another_optimizer_whose_own_defaults_hold(tmp_path: Path) -> None:
    """RMSprop has a momentum and a weight decay as well, which SGD's must not become."""
    path = configuration(tmp_path, {"class_path": "torch.optim.RMSprop", "init_args": {"lr": 0.002}})
    main(["fit", "--config", str(path)])
    assert type(Told.optimizer) is torch.optim.RMSprop
    own = torch.optim.RMSprop([nn.Parameter(torch.zeros(1))], lr=0.002).defaults
    assert Told.optimizer.defaults == own
    # The rate fell twice in between.
    assert Told.optimizer.param_groups[0]["initial_lr"] == 0.002
    assert Told.optimizer.param_groups[0]["lr"] == pytest.approx(0.002 * 0.1**2)


def test_the_saved_configuration_of_a_run_repeats_it_and_validates_its_checkpoint(tmp_path: Path) -> None:
    main(["fit", "--config", str(configuration(tmp_path)), "--seed_everything", "3"])
    assert type(Told.optimizer) is torch.optim.SGD
    weights = [parameter.detach().clone() for parameter in Told.optimizer.param_groups[0]["params"]]
    saved = tmp_path / "run" / "version_0" / "config.yaml"
    main(["fit", "--config", str(saved)])
    again: list[Tensor] = Told.optimizer.param_groups[0]["params"]
    assert all(torch.equal(first, second) for first, second in zip(weights, again, strict=True))
    (checkpoint,) = (tmp_path / "run" / "version_0").glob("checkpoints/*.ckpt")
    main(["validate", "--config", str(configuration(tmp_path)), "--ckpt_path", str(checkpoint)])


def test_models_do_without_jsonargparse(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(sys.modules):
        if name.startswith(("hessian_callback.demos", f"{PACKAGE}.cli")):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(hessian_callback, "demos", demos)  # Which importing sets anew.
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    anew = importlib.import_module("hessian_callback.demos")
    assert anew.ImageClassifier is not ImageClassifier
    anew.ImageClassifier(anew.LeNet())
    anew.CharacterGPT(num_layers=1)
