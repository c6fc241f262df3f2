"""torch-geometric: a GIN that classifies graphs, with the library's loader."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn import functional
from torch_geometric.datasets import FakeDataset
from torch_geometric.loader import DataLoader
from torch_geometric.nn import GIN, global_mean_pool

from benchmarks.libraries.library import Library
from benchmarks.libraries.training import Wrapped, train_from_scratch


class _Classifier(nn.Module):
    def __init__(self, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.layers = GIN(num_features, 16, num_layers=2, dropout=0.1, norm="batch_norm")
        self.head = nn.Linear(16, num_classes)

    def forward(self, graphs: Any) -> Tensor:
        hidden = self.layers(graphs.x, graphs.edge_index, batch=graphs.batch)
        return self.head(global_mean_pool(hidden, graphs.batch))


def _loss(model: Any, batch: Any) -> Tensor:
    return functional.cross_entropy(model(batch), batch.y)


def module_and_data() -> tuple[Wrapped, Any, Any]:
    graphs = FakeDataset(num_graphs=160, avg_num_nodes=12, avg_degree=3, num_channels=8, num_classes=3)
    model = _Classifier(graphs.num_features, graphs.num_classes)
    train = DataLoader(graphs[:96], batch_size=16, shuffle=True)
    return Wrapped(model, _loss), train, DataLoader(graphs[96:], batch_size=16)


LIBRARY = Library(
    model="GIN, wrapped",
    data="FakeDataset",
    train=lambda callbacks: train_from_scratch(module_and_data, callbacks),
    remedies={"batch_weight=lambda batch: batch.num_graphs": {"batch_weight": lambda batch: float(batch.num_graphs)}},
)
