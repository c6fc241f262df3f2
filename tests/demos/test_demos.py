"""The demonstration network and data: what the examples rest on."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from hessian_callback.demos import DigitsCNN, DigitsData
from tests.helpers.lightning import Trainer, seed_everything


def labels_of(data: DigitsData, part: str) -> torch.Tensor:
    loader = getattr(data, f"{part}_dataloader")()
    return loader.dataset.tensors[1]


def images_of(data: DigitsData, part: str) -> torch.Tensor:
    loader = getattr(data, f"{part}_dataloader")()
    return loader.dataset.tensors[0]


def ready(**options: int | float) -> DigitsData:
    data = DigitsData(**options)  # type: ignore[arg-type]
    data.setup("fit")
    return data


def test_split_is_a_partition_with_every_digit_in_both_parts() -> None:
    data = ready()
    train, val = images_of(data, "train"), images_of(data, "val")
    assert (len(train), len(val)) == (1198, 599)
    assert len(torch.cat([train, val]).unique(dim=0)) == len(train) + len(val)
    for part in ("train", "val"):
        counts = torch.bincount(labels_of(data, part), minlength=10)
        assert counts.max() - counts.min() <= 0.1 * counts.sum() / 10


def test_pixels_lie_between_zero_and_one() -> None:
    images = images_of(ready(), "train")
    assert (images.dtype, images.min(), images.max()) == (torch.float32, 0.0, 1.0)


def test_split_depends_on_its_own_seed_alone() -> None:
    seed_everything(1, verbose=False)
    first = ready()
    seed_everything(2, verbose=False)
    assert torch.equal(images_of(first, "val"), images_of(ready(), "val"))
    assert not torch.equal(images_of(first, "val"), images_of(ready(split_seed=1), "val"))


def test_second_setup_keeps_the_split() -> None:
    data = ready()
    before = images_of(data, "val")
    data.setup("validate")
    assert images_of(data, "val") is before


def test_network_learns_the_digits(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(DigitsCNN(), datamodule=DigitsData())
    assert trainer.callback_metrics["val_acc"] > 0.9
    assert trainer.callback_metrics["train_loss"] < 0.4


def test_missing_scikit_learn_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'hessian-callback\[demo\]'"):
        DigitsData().setup("fit")


def test_loader_before_setup_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"call setup\('fit'\)"):
        DigitsData().val_dataloader()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5])
def test_impossible_split_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="between 0 and 1"):
        DigitsData(val_fraction=fraction)
