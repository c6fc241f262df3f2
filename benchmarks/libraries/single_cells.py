"""scvi-tools: a variational autoencoder of gene counts, trained by the library's own Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import scvi

from benchmarks.libraries.library import MAX_EPOCHS, QUIET, Library


def train(callbacks: Sequence[Any]) -> None:
    scvi.settings.seed = 1
    counts = scvi.data.synthetic_iid(batch_size=80, n_genes=20, n_proteins=0, n_regions=0)
    scvi.model.SCVI.setup_anndata(counts, batch_key="batch")
    model = scvi.model.SCVI(counts, n_hidden=8, n_latent=3)
    options = {name: value for name, value in QUIET.items() if name not in ("enable_model_summary",)}
    model.train(max_epochs=MAX_EPOCHS, batch_size=32, train_size=0.6, callbacks=list(callbacks), **options)


LIBRARY = Library(
    model="SCVI",
    data="synthetic_iid",
    train=train,
)
