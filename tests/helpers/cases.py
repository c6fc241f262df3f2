"""Small models with a loss and batches, and the dense Hessian that everything is held against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessian_callback import HessianOperator


@dataclass
class Case:
    """A model, its mean loss, and batches that need not be of one size."""

    model: nn.Module
    loss_fn: Callable[[Any, Any], Tensor]
    batches: list[Any]
    weights: list[float]


class TiedAttention(nn.Module):
    """One causal attention layer whose output projection is the embedding."""

    def __init__(self, vocabulary: int = 7, width: int = 6, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Embedding(vocabulary, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        shape = (*tokens.shape, self.heads, -1)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + attended.transpose(1, 2).reshape(x.shape))


def classify(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


def next_token(model: nn.Module, tokens: Tensor) -> Tensor:
    return F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


def mlp(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    batches = [(torch.randn(n, 5, dtype=dtype), torch.randint(3, (n,))) for n in (3, 4)]
    return Case(model, classify, batches, [3.0, 4.0])


def cnn(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(8, 3)
    ).to(dtype)
    model(torch.randn(20, 1, 6, 6, dtype=dtype))  # running statistics that are not trivial
    model.eval()
    batches = [(torch.randn(n, 1, 6, 6, dtype=dtype), torch.randint(3, (n,))) for n in (2, 6)]
    return Case(model, classify, batches, [2.0, 6.0])


def attention(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(2)
    return Case(TiedAttention().to(dtype), next_token, [torch.randint(7, (n, 5)) for n in (2, 3)], [2.0, 3.0])


def dictionary(dtype: torch.dtype = torch.float64) -> Case:
    torch.manual_seed(3)

    def loss_fn(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return F.binary_cross_entropy_with_logits(model(batch["x"]).squeeze(-1), batch["y"])

    model = nn.Sequential(nn.Linear(4, 3), nn.SiLU(), nn.Linear(3, 1)).to(dtype)
    batches = [{"x": torch.randn(n, 4, dtype=dtype), "y": torch.rand(n, dtype=dtype)} for n in (5, 1)]
    return Case(model, loss_fn, batches, [5.0, 1.0])


CASES: dict[str, Callable[..., Case]] = {"mlp": mlp, "cnn": cnn, "attention": attention, "dictionary": dictionary}


def dense_hessian(case: Case, chosen: Callable[[str], bool] = lambda name: True) -> Tensor:
    """The Hessian of the weighted mean loss by ``torch.func.hessian``, in the order of ``named_parameters``.

    Not through a layer norm: there, under vmap, PyTorch 2.13 gives a wrong block (finite differences say so).
    """
    parameters = {name: p.detach() for name, p in case.model.named_parameters() if p.requires_grad and chosen(name)}
    wrapper = _Wrapper(case)

    def value(flat: Tensor) -> Tensor:
        pieces = flat.split([p.numel() for p in parameters.values()])
        named = {f"model.{name}": piece.view_as(p) for (name, p), piece in zip(parameters.items(), pieces, strict=True)}
        total = sum(
            weight * torch.func.functional_call(wrapper, named, (batch,))
            for batch, weight in zip(case.batches, case.weights, strict=True)
        )
        return total / sum(case.weights)

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        hessian = torch.func.hessian(value)(torch.cat([p.flatten() for p in parameters.values()]))
    return (hessian + hessian.T) / 2


def dense(operator: HessianOperator) -> Tensor:
    """All columns of an operator."""
    identity = torch.eye(operator.num_parameters, dtype=operator.dtype)
    return torch.stack([operator.matvec(row) for row in identity], dim=1)


class _Wrapper(nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.model = case.model
        self.loss_fn = case.loss_fn

    def forward(self, batch: Any) -> Tensor:
        return self.loss_fn(self.model, batch)


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A dense symmetric matrix in float64 with the given eigenvalues and random eigenvectors."""
    n = len(eigenvalues)
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64, generator=generator))
    matrix = (basis * eigenvalues.to(torch.float64)) @ basis.T
    return (matrix + matrix.T) / 2


def assign_to_ranks(
    case_name: str, dtype: torch.dtype, rank: int, world_size: int, holders: int
) -> tuple[Any, list[Any], list]:
    """Split a case into single samples, so that shares can be ragged; only the first ``holders`` ranks get any."""
    case = CASES[case_name](dtype)
    singles, weights = [], []
    for batch in case.batches:
        leaves, spec = torch.utils._pytree.tree_flatten(batch)
        for index in range(len(leaves[0])):
            singles.append(torch.utils._pytree.tree_unflatten([leaf[index : index + 1] for leaf in leaves], spec))
            weights.append(1.0)
    mine = slice(rank, None, holders) if rank < holders else slice(0)
    return case, singles[mine], weights[mine]
