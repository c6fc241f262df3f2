"""A language model of characters with the architecture of nanoGPT, small enough for a CPU."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessian_callback.callbacks.lightning_packages import LightningModule
from hessian_callback.demos.optimizers import OptimizerCallable

__all__ = ["CharacterGPT", "paper_adamw"]

_INIT_STD = 0.02


# Not a lambda, which LightningCLI can't write into a saved configuration.
def paper_adamw(parameters: Iterable[Any]) -> torch.optim.AdamW:
    """AdamW at the paper's rate and weight decay, with the second moment of language models.

    Example:
        >>> optimizer = paper_adamw([torch.nn.Parameter(torch.zeros(2, 2))])
        >>> [optimizer.defaults[name] for name in ("lr", "weight_decay", "betas")]
        [0.0006, 0.1, (0.9, 0.95)]
    """
    return torch.optim.AdamW(parameters, lr=6e-4, weight_decay=0.1, betas=(0.9, 0.95))


class CharacterGPT(LightningModule):
    r"""A decoder-only transformer: learned positions, pre-norm blocks, the head tied to the embedding.

    The paper's GPT2-nano is ``num_layers=6, num_heads=6, width=384, context_length=256``; the default is a
    size for two cores, with .8 million parameters. No layer has a bias. With ``V`` characters, context ``T``,
    ``L`` layers and width ``d`` there are

    .. math:: (V + T) d + L (12 d^2 + 2 d) + d

    parameters, the embedding counted once. In the Hessian it is one parameter as well,
    ``token_embedding.weight``. The blocks are ``blocks.0`` to ``blocks.{L-1}``: the callback's option
    ``parameters=r"^blocks\.3\."`` selects the last one of four.

    Logged: ``train_loss``, the mean over the epoch's batches as they were trained on, and ``val_loss``, in
    nats for each character.

    Source: Radford et al., "Language models are unsupervised multitask learners" (2019), in the size and
    with the initialisation of nanoGPT.

    Args:
        vocab_size: number of different characters, at least that of the data. Embeddings of characters that never
            occur are parameters as well, and part of the Hessian.
        context_length: length of the context, at least that of a sequence.
        num_layers: blocks.
        num_heads: attention heads in each block.
        width: size of a character's vector, a multiple of ``num_heads``.
        dropout: probability of dropout in embeddings, attention weights and residuals.
        optimizer: function from two parameter groups to their optimizer: matrices, and vectors, whose
            ``weight_decay`` is 0. The rate is constant, as in the paper. In a file: ``class_path`` and ``init_args`` of
            an optimizer, whose own defaults apply to the other options. Default: AdamW with rate 6e-4, weight decay .1
            and betas .9 and .95.

    Raises:
        ValueError: if ``num_heads`` does not divide ``width``; in ``setup``, if the data module has more
            characters than the model; in ``forward``, if a sequence is too long.

    Example:
        >>> model = CharacterGPT(num_layers=2)
        >>> model(torch.zeros(3, 64, dtype=torch.int64)).shape
        torch.Size([3, 64, 128])
        >>> [name for name, _ in model.named_parameters() if name.startswith("blocks.1.")]  # doctest: +ELLIPSIS
        ['blocks.1.attention_norm.weight', 'blocks.1.attention.qkv.weight', 'blocks.1.attention.out.weight', ...]
    """

    def __init__(
        self,
        vocab_size: int = 128,
        context_length: int = 64,
        num_layers: int = 4,
        num_heads: int = 4,
        width: int = 128,
        dropout: float = 0.0,
        optimizer: OptimizerCallable = paper_adamw,
    ) -> None:
        """Build and initialise the layers."""
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads, got width={width} and num_heads={num_heads}")
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.optimizer = optimizer
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(context_length, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.Sequential(*(_Block(width, num_heads, dropout) for _ in range(num_layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.token_embedding.weight
        self._initialise(num_layers)

    def _initialise(self, num_layers: int) -> None:
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            # Each block adds two residuals; their sum then has the scale of the embedding.
            to_residual = name.endswith((".attention.out.weight", ".mlp.down.weight"))
            nn.init.normal_(parameter, std=_INIT_STD / (2 * num_layers) ** 0.5 if to_residual else _INIT_STD)

    def setup(self, stage: str) -> None:
        """Check that the model has a vector for each character of the data."""
        found = getattr(self.trainer.datamodule, "vocab_size", None)  # type: ignore[attr-defined]
        if found is not None and found > self.vocab_size:
            raise ValueError(
                f"the data has {found} different characters and the model vocab_size={self.vocab_size}: "
                f"build it with vocab_size={found} (--model.vocab_size {found})"
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each next character, ``(B, T) -> (B, T, vocab_size)``."""
        length = tokens.shape[1]
        if length > self.context_length:
            raise ValueError(
                f"a sequence of {length} characters is longer than context_length={self.context_length}: "
                f"build the model with context_length={length}, or give it shorter sequences"
            )
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding.weight[:length])
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy over all characters of a batch."""
        loss = self._loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss on the held-out text."""
        self.log("val_loss", self._loss(batch), prog_bar=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer, with weight decay for matrices only."""
        parameters = list(self.parameters())
        matrices: dict[str, Any] = {"params": [p for p in parameters if p.ndim >= 2]}
        vectors: dict[str, Any] = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
        return self.optimizer([matrices, vectors])

    def _loss(self, batch: list[Tensor]) -> Tensor:
        tokens, targets = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())


class _Block(nn.Module):
    """Attention and then a perceptron, each behind a norm and added to its input."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width, bias=False)
        self.attention = _CausalAttention(width, num_heads, dropout)
        self.mlp_norm = nn.LayerNorm(width, bias=False)
        self.mlp = _Perceptron(width, dropout)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.attention_norm(x))
        added: Tensor = x + self.mlp(self.mlp_norm(x))
        return added


class _CausalAttention(nn.Module):
    """Self-attention to the same and earlier characters, all heads' queries, keys and values in one product."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        by_head = self.qkv(x).view(batch, length, 3, self.num_heads, width // self.num_heads)
        queries, keys, values = by_head.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            queries, keys, values, dropout_p=self.dropout.p if self.training else 0.0, is_causal=True
        )
        mixed: Tensor = self.dropout(self.out(attended.transpose(1, 2).reshape(batch, length, width)))
        return mixed


class _Perceptron(nn.Module):
    """A hidden layer of four times the width, for each character by itself."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        transformed: Tensor = self.dropout(self.down(F.gelu(self.up(x))))
        return transformed
