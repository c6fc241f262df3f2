"""chemprop: a message-passing network that regresses a property of molecules."""

from __future__ import annotations

from typing import Any

from chemprop import data, models, nn
from lightning.pytorch import LightningModule

from benchmarks.libraries.library import Library
from benchmarks.libraries.training import train_from_scratch


def _loader(chains: range, *, shuffle: bool) -> Any:
    """Return a loader of alcohols, ethers and amines; the target is the share of heteroatoms."""
    smiles = [form.format("C" * left, "C" * right) for left in chains for right in (1, 2) for form in _FORMS]
    points = [data.MoleculeDatapoint.from_smi(one, [1 / len(one)]) for one in smiles]
    return data.build_dataloader(data.MoleculeDataset(points), batch_size=8, shuffle=shuffle, seed=3)


_FORMS = ("{0}O{1}", "{0}N{1}", "{0}C(=O){1}", "{0}(O){1}", "c1ccccc1{0}{1}", "{0}=C{1}")


def module_and_data() -> tuple[LightningModule, Any, Any]:
    messages = nn.BondMessagePassing(d_h=12, depth=2, dropout=0.1)
    model = models.MPNN(messages, nn.MeanAggregation(), nn.RegressionFFN(input_dim=12, hidden_dim=12), batch_norm=True)
    return model, _loader(range(1, 9), shuffle=True), _loader(range(3, 9), shuffle=False)


LIBRARY = Library(
    model="MPNN",
    data="SMILES of short chains",
    train=lambda callbacks: train_from_scratch(module_and_data, callbacks),
    remedies={"batch_weight=lambda batch: len(batch.Y)": {"batch_weight": lambda batch: float(len(batch.Y))}},
)
