"""Constants that a module makes in the inference mode of ``trainer.validate()``."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import pytest
import torch
from torch import nn

from hessian_callback.measurement.errors import LossError
from hessian_callback.measurement.measure import measure as measure_model
from tests.helpers.lightning import LightningModule
from tests.helpers.toy_runs import loader, measure, seeded, trainer

Table = namedtuple("Table", "cos sin")
elsewhere: dict[str, Any] = {}


class Holder:
    def __init__(self) -> None:
        self.scale: Any = None


class Lazy(LightningModule):
    """Makes a constant at its first use, and keeps it somewhere."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.last = nn.Linear(5, 3)
        self.where = where
        self.cache: dict[str, Any] = {}
        self.holder = Holder()
        self.register_buffer("table", None, persistent=False)

    def scale(self) -> torch.Tensor:
        made = torch.linspace(0.5, 1.5, 5)
        if self.where == "nowhere":
            return made
        if self.where == "attribute":
            self.__dict__.setdefault("made", made)
            return self.made
        if self.where == "buffer":
            self.table = made if self.table is None else self.table
            return self.table
        if self.where == "object":
            self.holder.scale = made if self.holder.scale is None else self.holder.scale
            return self.holder.scale
        if self.where == "global":
            return elsewhere.setdefault("made", made)
        kinds = {"dict": made, "list": [made], "tuple": (0, (made,)), "named": Table(made, 1.0)}
        kept = self.cache.setdefault("made", kinds[self.where])
        found = {"list": lambda: kept[0], "tuple": lambda: kept[1][0], "named": lambda: kept.cos}
        return found.get(self.where, lambda: kept)()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(torch.tanh(self.first(x) * self.scale()))

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))


KEPT = ("attribute", "buffer", "object", "dict", "list", "tuple", "named")


@pytest.fixture(scope="module")
def expected(tmp_path_factory: Any) -> torch.Tensor:
    callback = measure(on_error="raise")
    model = seeded(lambda: Lazy("nowhere"))
    trainer(tmp_path_factory.mktemp("nowhere"), callback).validate(model, loader(), verbose=False)
    return callback.history[0].spectrum.eigenvalues


@pytest.mark.parametrize("where", KEPT)
def test_validate_measures_a_module_that_keeps_a_constant(where: str, expected: Any, tmp_path: Any) -> None:
    model = seeded(lambda: Lazy(where))
    for _ in range(2):
        callback = measure(on_error="raise")
        trainer(tmp_path, callback).validate(model, loader(), verbose=False)
        torch.testing.assert_close(callback.history[0].spectrum.eigenvalues, expected, rtol=1e-5, atol=0)
        # What validation made is still there.
        with torch.inference_mode():
            assert model.scale().is_inference()


def test_measure_takes_a_model_that_was_used_in_inference_mode(expected: Any) -> None:
    model = seeded(lambda: Lazy("tuple"))
    with torch.inference_mode():
        model(torch.ones(1, 5))
    found = measure_model(
        model,
        lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1]),
        list(loader()),
        num_eigenvalues=3,
    )
    assert found.slope is not None


def test_a_constant_out_of_reach_is_said_with_the_remedy(tmp_path: Any) -> None:
    elsewhere.clear()
    model = seeded(lambda: Lazy("global"))
    with pytest.raises(LossError, match=r"Inference tensors.*inference_mode\(\); make it.*inference_mode=False"):
        trainer(tmp_path, measure(on_error="raise")).validate(model, loader(), verbose=False)
    elsewhere.clear()
    callback = measure(on_error="raise")
    trainer(tmp_path, callback, inference_mode=False).validate(model, loader(), verbose=False)
    assert callback.history[0].slope is not None
