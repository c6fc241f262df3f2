"""Modules as people train them: each is measured rightly, and trains as if nobody had measured it."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from hessian_callback import HessianOperator
from hessian_callback.callbacks.module_loss import resolve_loss
from hessian_callback.operators.derivatives import DoubleBackwardError
from tests.helpers.lightning import ModelCheckpoint
from tests.helpers.model_zoo import (
    KINDS,
    WEIGHED,
    Checkpointed,
    LanguageModel,
    Trained,
    classify,
    gpt2,
    llama,
    padded_text,
    points,
)
from tests.helpers.observed import same
from tests.helpers.toy_runs import measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore:a measurement of the Hessian took")


def trained(name: str, tmp_path: Any, *callbacks: Any) -> dict[str, Any]:
    kind = KINDS[name]
    model = seeded(kind.build)
    run = trainer(tmp_path, *callbacks, max_epochs=1, **kind.options)
    run.fit(model, *kind.loaders())
    return {
        "weights and buffers": copy.deepcopy(model.state_dict()),
        "optimizers": [copy.deepcopy(optimizer.state_dict()) for optimizer in run.optimizers],
        "modes": [module.training for module in model.modules()],
        "frozen": [parameter.requires_grad for parameter in model.parameters()],
        "random": torch.get_rng_state(),
        "logged": {k: v for k, v in run.callback_metrics.items() if not k.startswith("hessian/")},
    }


@pytest.mark.parametrize("name", KINDS)
def test_training_with_the_callback(name: str, tmp_path: Any) -> None:
    kind = KINDS[name]
    if "Hugging Face" in name:
        pytest.importorskip("transformers")
    callback = measure(on_error="raise", **kind.choice)
    with_callback, without = trained(name, tmp_path, callback), trained(name, tmp_path)
    for part in without:
        assert same(with_callback[part], without[part]), part
    assert [m.when for m in callback.history] == ["fit_start", "epoch"]
    assert all(m.spectrum is not None and m.spectrum.eigenvalues[0] > 0 for m in callback.history)
    assert {m.engine for m in callback.history} == {"double_backward"}


# Without a trainer, which one of them asks.
@pytest.mark.parametrize("name", [name for name in KINDS if "asks the trainer" not in name])
def test_the_product_is_that_of_differences(name: str) -> None:
    """In float64, where differences are good to six digits."""
    if "Hugging Face" in name:
        pytest.importorskip("transformers")
    kind = KINDS[name]
    model = seeded(kind.build).double().eval()
    model.log = model.log_dict = lambda *_, **__: None
    batch = next(iter(kind.loaders()[1]))
    if isinstance(batch, list):
        batch = [part.double() if part.is_floating_point() else part for part in batch]
    operator = HessianOperator(model, resolve_loss(model), [batch], weights=[1.0])
    vector = torch.randn(operator.num_parameters, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    if "padding_idx" in name:
        vector[:4] = 0  # The row is a constant to backward, and to the operator.
    product = operator.matvec(vector)
    parameters = [p for p in model.parameters() if p.requires_grad]
    directions = vector.split([p.numel() for p in parameters])

    def gradient(step: float) -> torch.Tensor:
        moved = copy.deepcopy(model)
        chosen = [p for p in moved.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter, direction in zip(chosen, directions, strict=True):
                parameter.add_(direction.view_as(parameter), alpha=step)
        with torch.compiler.set_stance("force_eager"):
            loss = resolve_loss(moved)(moved, batch)
        gradients = torch.autograd.grad(loss, chosen, materialize_grads=True)
        return torch.cat([part.flatten() for part in gradients])

    # Hugging Face's norms and losses are float32 whatever the module is.
    step, tolerance = (1e-4, 2e-2) if "Hugging Face" in name else (1e-6, 1e-4)
    expected = (gradient(step) - gradient(-step)) / (2 * step)
    if "padding_idx" in name:
        expected[:4] = 0
    assert float((product - expected).norm()) <= tolerance * float(expected.norm())


@pytest.mark.parametrize("make", [gpt2, llama])
def test_tokens_weigh_alike_in_batches_of_any_size(make: Any, tmp_path: Any) -> None:
    """The mean over all counted tokens does not depend on how rows are batched; the mean of batches' means does."""
    pytest.importorskip("transformers")

    def first(size: int, **choice: Any) -> torch.Tensor:
        callback = measure(num_samples=16, rtol=1e-3, on_error="raise", **choice)
        run = trainer(tmp_path, callback)
        run.validate(seeded(lambda: LanguageModel(make)), padded_text(size)[1], verbose=False)
        return callback.history[0].spectrum.eigenvalues

    whole = first(16, **WEIGHED)
    torch.testing.assert_close(first(3, **WEIGHED), whole, rtol=1e-3, atol=0)
    assert not torch.allclose(first(3), whole, rtol=1e-3)


def test_reentrant_checkpointing_is_named(tmp_path: Any) -> None:
    model = Trained(Checkpointed(reentrant=True), classify)
    with pytest.raises(DoubleBackwardError, match=r"reentrant.*pass use_reentrant=False"):
        trainer(tmp_path, measure()).fit(model, *points())


def test_a_checkpoint_of_each_optimizers_run_can_be_read(tmp_path: Any) -> None:
    name = "two optimizers, manual optimisation"
    callback, saver = measure(), ModelCheckpoint(tmp_path)
    run = trainer(tmp_path, callback, saver, max_epochs=1, enable_checkpointing=True)
    run.fit(seeded(KINDS[name].build), *KINDS[name].loaders())
    loaded = torch.load(saver.best_model_path, weights_only=True)
    assert len(loaded["callbacks"][callback.state_key]["history"]) == 2
