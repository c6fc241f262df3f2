"""Runs in which parameters are frozen and unfrozen."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.lightning import (
    BackboneFinetuning,
    BaseFinetuning,
    Callback,
    LightningModule,
    MisconfigurationException,
)
from tests.helpers.toy_runs import loader, measure, seeded, trainer


class Tuned(LightningModule):
    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, width), nn.Tanh())
        self.head = nn.Linear(width, 3)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0])), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([parameter for parameter in self.parameters() if parameter.requires_grad], lr=0.1)


class Alternating(BaseFinetuning):
    """Trains the first layer in the first epoch, and another of the same size in the second."""

    def freeze_before_training(self, module: Any) -> None:
        self.freeze(module.other)

    def finetune_function(self, module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.freeze(module.backbone)
            self.unfreeze_and_add_param_group(module.other, optimizer)


class Doubled(Tuned):
    def __init__(self) -> None:
        super().__init__()
        self.other = nn.Sequential(nn.Linear(5, 6), nn.Tanh())

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return nn.functional.cross_entropy(self.head(self.backbone(batch[0]) + self.other(batch[0])), batch[1])


def unfreezing() -> Any:
    return BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.01, verbose=False)


def fit(tmp_path: Any, callback: Any, make: Any = Tuned, other: Any = None, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(tmp_path, callback, other or unfreezing(), max_epochs=2)
        run.fit(seeded(make, **options), loader(24), loader(16, seed=1))
    assert run.global_step == 6
    return [str(warning.message) for warning in caught]


@pytest.mark.parametrize("on_error", ["warn", "raise"])
@pytest.mark.parametrize(
    ("choice", "options", "num_parameters"),
    [({"parameters": "^backbone"}, {}, 36), ({"num_eigenvalues": 7}, {"width": 1}, 12)],
    ids=["frozen name", "too few trained"],
)
def test_frozen_parameters_are_measured_as_soon_as_they_are_trained(
    choice: dict[str, Any], options: dict[str, Any], num_parameters: int, on_error: str, tmp_path: Any
) -> None:
    callback = measure(num_samples=16, on_error=on_error, **choice)
    texts = fit(tmp_path, callback, **options)
    start, first, second = callback.history
    for entry in (start, first):
        assert "frozen parameters" in entry.reason
        assert entry.spectrum is None
    assert second.num_parameters == num_parameters
    assert second.spectrum is not None
    assert sum("belong to frozen parameters" in text for text in texts) == 1


def test_a_group_of_frozen_parameters_waits_alone(tmp_path: Any) -> None:
    callback = measure(num_samples=16, groups={"backbone": "^backbone", "head": "^head"})
    texts = fit(tmp_path, callback)
    assert [set(entry.groups) for entry in callback.history] == [{"head"}, {"head"}, {"head", "backbone"}]
    assert [entry.logged for entry in callback.history] == [True] * 3
    assert "frozen parameters" in callback.history[0].not_compared["group backbone"]
    assert sum("of 57 parameters, the one before was of 21" in text for text in texts) == 1


def test_another_set_of_as_many_parameters_is_named(tmp_path: Any) -> None:
    callback = measure(num_samples=16)
    texts = fit(tmp_path, callback, Doubled, Alternating())
    assert [entry.num_parameters for entry in callback.history] == [57] * 3
    (text,) = [text for text in texts if "must not be compared" in text]
    assert "with other.0.weight, other.0.bias and without backbone.0.weight, backbone.0.bias" in text


def test_names_that_do_not_exist_are_refused_at_the_start(tmp_path: Any) -> None:
    for choice in ({"parameters": "^spine"}, {"groups": {"spine": "^spine"}}):
        with pytest.raises(MisconfigurationException, match=r"chooses no trainable parameter; there are: head\.weight"):
            fit(tmp_path, measure(num_samples=16, **choice))


class Adapted(Callback):
    """Adds parameters when the fit starts."""

    def on_fit_start(self, run: Any, module: Any) -> None:
        module.backbone.register_parameter("shift", nn.Parameter(torch.zeros(6)))
        module.backbone.register_forward_hook(lambda layer, inputs, output: output + layer.shift)
        run.optimizers[0].add_param_group({"params": [module.backbone.shift]})


@pytest.mark.parametrize("added_first", [True, False])
def test_parameters_that_another_callback_adds_are_measured_in_any_order(added_first: bool, tmp_path: Any) -> None:
    callback = measure(num_samples=16, parameters="shift")
    order = [Adapted(), callback] if added_first else [callback, Adapted()]
    trainer(tmp_path, *order, max_epochs=1).fit(seeded(Tuned), loader(24), loader(16, seed=1))
    assert [entry.num_parameters for entry in callback.history] == [6, 6]
