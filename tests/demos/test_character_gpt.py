"""The character model of the studies: its layers, what trains it, and its Hessian in real runs."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, TensorDataset

from hessian_callback import Lanczos, PowerLawHessianCallback
from hessian_callback.cli.main import main
from hessian_callback.demos import CharacterGPT
from tests.helpers.lightning import Callback, LightningDataModule, LightningModule, Trainer, seed_everything

pytestmark = pytest.mark.filterwarnings(
    "ignore:a measurement of the Hessian took", "ignore:The number of training batches"
)

VOCABULARY, LENGTH = 6, 5
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "context_length": LENGTH, "num_layers": 2, "num_heads": 2, "width": 4
}  # fmt: skip


def small(**options: Any) -> CharacterGPT:
    seed_everything(0, verbose=False)
    return CharacterGPT(**SMALL | options)


class Text(LightningDataModule):
    """Ten sequences of a cycle through the characters, in batches of four, four and two."""

    def __init__(self, vocab_size: int = VOCABULARY) -> None:
        super().__init__()
        self.vocab_size = vocab_size

    def loader(self) -> DataLoader[Any]:
        starts = torch.arange(10)[:, None]
        codes = (starts + torch.arange(LENGTH + 1)) % VOCABULARY
        return DataLoader(TensorDataset(codes[:, :-1], codes[:, 1:]), batch_size=4)

    train_dataloader = val_dataloader = loader


def trainer(folder: Path, *callbacks: Callback, **options: Any) -> Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return Trainer(
        accelerator="cpu", logger=False, callbacks=list(callbacks), default_root_dir=folder, **quiet | options
    )


# -- the layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vocabulary", "context", "layers", "heads", "width"), [(128, 64, 4, 4, 128), (65, 256, 6, 6, 384), (6, 5, 1, 2, 4)]
)
def test_parameters_are_those_of_the_formula(
    vocabulary: int, context: int, layers: int, heads: int, width: int
) -> None:
    with torch.device("meta"):
        model = CharacterGPT(vocabulary, context, layers, heads, width)
    expected = (vocabulary + context) * width + layers * (12 * width**2 + 2 * width) + width
    assert sum(p.numel() for p in model.parameters()) == expected
    in_last_block = [p.numel() for name, p in model.named_parameters() if name.startswith(f"blocks.{layers - 1}.")]
    assert sum(in_last_block) == 12 * width**2 + 2 * width


def test_head_and_embedding_are_one_parameter() -> None:
    model = small()
    assert model.head.weight is model.token_embedding.weight
    names = [name for name, _ in model.named_parameters()]
    assert "token_embedding.weight" in names
    assert "head.weight" not in names
    assert not [name for name in names if name.endswith("bias")]


def test_an_untrained_model_knows_nothing() -> None:
    seed_everything(0, verbose=False)
    model = CharacterGPT()
    tokens, targets = torch.randint(128, (2, 8, 64))
    loss = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten())
    assert float(loss.detach()) == pytest.approx(math.log(128), abs=0.1)


def test_what_adds_to_the_residual_starts_smaller() -> None:
    seed_everything(0, verbose=False)
    for name, parameter in CharacterGPT(num_layers=2).named_parameters():
        if parameter.ndim == 1:
            assert torch.equal(parameter, torch.ones_like(parameter)), name
            continue
        expected = 0.01 if name.endswith(("attention.out.weight", "mlp.down.weight")) else 0.02
        # The standard error of the standard deviation of a normal sample.
        error = expected / math.sqrt(2 * parameter.numel())
        assert float(parameter.detach().std()) == pytest.approx(expected, abs=5 * error), name


def test_a_later_character_changes_no_earlier_logit() -> None:
    model = small(context_length=16).eval()
    tokens = torch.randint(VOCABULARY, (3, 16))
    logits = model(tokens)
    for position in (1, 9, 15):
        changed = tokens.clone()
        changed[:, position] = (changed[:, position] + 1) % VOCABULARY
        other = model(changed)
        assert torch.equal(other[:, :position], logits[:, :position])
        assert not torch.isclose(other[:, position:], logits[:, position:]).all(dim=-1).any()


def test_logits_are_those_of_the_formulas() -> None:
    """Written again for one sequence, in loops over positions and heads."""
    model = small(num_layers=1).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    weights = {name.removeprefix("blocks.0."): p.detach() for name, p in model.named_parameters()}

    def norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean()
        return weights[f"{name}.weight"] * centred / (centred.square().mean() + 1e-5).sqrt()

    tokens = torch.tensor([3, 0, 5, 5, 1])
    x = [weights["token_embedding.weight"][t] + weights["position_embedding.weight"][i] for i, t in enumerate(tokens)]
    qkv = [weights["attention.qkv.weight"] @ norm(row, "attention_norm") for row in x]
    for i in range(LENGTH):
        heads = []
        for head in (slice(0, 2), slice(2, 4)):
            query, keys, values = qkv[i][:4][head], [r[4:8][head] for r in qkv], [r[8:][head] for r in qkv]
            scores = torch.stack([query @ keys[j] / math.sqrt(2) for j in range(i + 1)])
            heads.append(sum(share * values[j] for j, share in enumerate(scores.softmax(0))))
        x[i] = x[i] + weights["attention.out.weight"] @ torch.cat(heads)
        hidden = weights["mlp.up.weight"] @ norm(x[i], "mlp_norm")
        hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
        x[i] = x[i] + weights["mlp.down.weight"] @ hidden
    expected = torch.stack([weights["token_embedding.weight"] @ norm(row, "norm") for row in x])
    torch.testing.assert_close(model(tokens[None])[0].detach(), expected)


def test_dropout_acts_in_training_only() -> None:
    tokens = torch.randint(VOCABULARY, (2, LENGTH))
    model = small(dropout=0.5)
    assert not torch.equal(model(tokens), model(tokens))
    without = small()
    assert torch.equal(model.eval()(tokens), without(tokens))


def test_width_must_be_a_multiple_of_heads() -> None:
    with pytest.raises(ValueError, match="width must be a multiple of num_heads"):
        CharacterGPT(width=10, num_heads=4)


def test_too_long_a_sequence_says_what_to_set() -> None:
    with pytest.raises(ValueError, match=f"with context_length={LENGTH + 1}"):
        small()(torch.zeros(1, LENGTH + 1, dtype=torch.int64))


# -- training --------------------------------------------------------------------------------------


def test_matrices_decay_and_vectors_do_not() -> None:
    model = small()
    optimizer = model.configure_optimizers()
    matrices, vectors = optimizer.param_groups
    assert isinstance(optimizer, torch.optim.AdamW)
    assert {p.ndim for p in matrices["params"]} == {2}
    assert {p.ndim for p in vectors["params"]} == {1}
    assert (matrices["weight_decay"], vectors["weight_decay"]) == (0.1, 0.0)
    assert {group["lr"] for group in optimizer.param_groups} == {6e-4}
    given = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters())


def test_losses_are_means_over_characters(tmp_path: Path) -> None:
    model = small(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0))
    run = trainer(tmp_path, max_epochs=1)
    run.fit(model, datamodule=Text())
    tokens, targets = Text().loader().dataset.tensors
    expected = nn.functional.cross_entropy(model(tokens).flatten(0, 1), targets.flatten()).detach()
    torch.testing.assert_close(run.callback_metrics["train_loss"], expected)
    torch.testing.assert_close(run.callback_metrics["val_loss"], expected)


def test_data_with_more_characters_than_the_model_are_refused(tmp_path: Path) -> None:
    run = trainer(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match=r"build it with vocab_size=7 \(--model.vocab_size 7\)"):
        run.fit(small(), datamodule=Text(vocab_size=VOCABULARY + 1))
    trainer(tmp_path, fast_dev_run=True).fit(small(vocab_size=9), datamodule=Text())
    trainer(tmp_path, fast_dev_run=True).fit(small(), Text().loader())


def test_a_model_learns_and_is_measured(tmp_path: Path) -> None:
    chosen = {"all": None, "last_block": r"^blocks\.1\."}
    measured = {
        name: PowerLawHessianCallback(
            num_eigenvalues=4,
            num_samples=10,
            parameters=parameters,
            dataloader="train",
            at_steps=[30, 60],
            solver=Lanczos(rtol=0.05, max_hvps=400),
            prefix=name,
            on_error="raise",
        )
        for name, parameters in chosen.items()
    }
    model = small(optimizer=lambda groups: torch.optim.AdamW(groups, lr=0.03), dropout=0.1)
    run = trainer(tmp_path, *measured.values(), max_epochs=20)
    run.fit(model, datamodule=Text())
    assert run.callback_metrics["val_loss"] < 0.5 * math.log(VOCABULARY)
    in_block = 12 * 4**2 + 2 * 4
    sizes = {"all": (VOCABULARY + LENGTH) * 4 + 2 * in_block + 4, "last_block": in_block}
    for name, callback in measured.items():
        assert [m.step for m in callback.history] == [30, 60], name
        assert {m.num_parameters for m in callback.history} == {sizes[name]}
        assert all(m.slope is not None and m.slope > 0 for m in callback.history), name


@pytest.mark.parametrize("parameters", [r"^blocks\.0\.", None])
def test_eigenvalues_are_those_of_the_dense_hessian(parameters: str | None, tmp_path: Path) -> None:
    """Of the mean over all characters, with the embedding's two uses in one block."""
    model = small(num_layers=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    hessian = PowerLawHessianCallback(
        num_eigenvalues=5,
        num_samples=10,
        parameters=parameters,
        solver=Lanczos(rtol=1e-6),
        at_steps=[0],
        on_error="raise",
    )
    run = trainer(tmp_path, hessian, max_steps=1, precision="64-true")
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    run.fit(model, datamodule=Text())

    chosen = {name: w for name, w in weights.items() if parameters is None or name.startswith("blocks.0.")}
    tokens, targets = Text().loader().dataset.tensors

    def loss(flat: Tensor) -> Tensor:
        parts = flat.split([w.numel() for w in chosen.values()])
        moved = {name: part.view_as(chosen[name]) for name, part in zip(chosen, parts, strict=True)}
        logits = torch.func.functional_call(model.double(), weights | moved, (tokens,))
        return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())

    with sdpa_kernel(SDPBackend.MATH):
        dense = torch.autograd.functional.hessian(loss, torch.cat([w.flatten() for w in chosen.values()]))
    expected = torch.linalg.eigvalsh(dense).flip(0)[:5]
    (measurement,) = hessian.history
    assert measurement.slope is not None, measurement.reason
    torch.testing.assert_close(measurement.spectrum.eigenvalues[:5], expected, rtol=1e-6, atol=0)


# -- from a file -----------------------------------------------------------------------------------


class Told(Callback):
    """Keeps the optimizer of the run that `main` makes, out of a test's reach otherwise."""

    optimizer: Any = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        Told.optimizer = trainer.optimizers[0]


@pytest.fixture
def configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(sys, "argv", ["hessian-callback"])
    logger = {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}}
    return {
        "model": {"class_path": "hessian_callback.demos.CharacterGPT", "init_args": dict(SMALL)},
        "data": {"class_path": f"{__name__}.Text"},
        "trainer": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": logger,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [{"class_path": f"{__name__}.Told"}],
        },
    }


def test_a_file_names_another_optimizer(configuration: dict[str, Any], tmp_path: Path) -> None:
    configuration["model"]["init_args"]["optimizer"] = {
        "class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.2}
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configuration))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    groups = Told.optimizer.param_groups
    assert [(group["lr"], group["weight_decay"]) for group in groups] == [(0.01, 0.2), (0.01, 0.0)]
    assert {group["betas"] for group in groups} == {(0.9, 0.999)}


def test_the_default_optimizer_is_in_the_saved_configuration(configuration: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(configuration))
    main(["fit", "--config", str(tmp_path / "run.yaml")])
    (saved,) = tmp_path.rglob("config.yaml")
    Told.optimizer = None
    main(["fit", "--config", str(saved)])
    assert Told.optimizer.defaults["betas"] == (0.9, 0.95)
