"""Modules as people train them, each at its smallest, with the data that they take."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torchmetrics
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from tests.helpers.lightning import LightningModule
from tests.helpers.toy_runs import Net, loader

VOCABULARY = 13


@dataclass
class Kind:
    """A module in the zoo.

    Attributes:
        build: makes the module.
        loaders: makes its training and validation loader.
        choice: the callback's options.
        options: the trainer's.
    """

    build: Callable[[], LightningModule]
    loaders: Callable[[], tuple[Any, Any]]
    choice: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)


class Trained(LightningModule):
    """A network with a loss, trained in the plainest way."""

    def __init__(self, net: nn.Module, loss: Callable[[nn.Module, Any], Tensor]) -> None:
        super().__init__()
        self.net = net
        self._loss = loss

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self._loss(self.net, batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self._loss(self.net, batch), batch_size=1)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=0.01)


# -- data ----------------------------------------------------------------------------------------------------


def points() -> tuple[Any, Any]:
    return loader(24, shuffle=True), loader(24, seed=1)


def images() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    rows = [(torch.randn(3, 12, 12, generator=generator), i % 3) for i in range(16)]
    return DataLoader(rows, batch_size=8, shuffle=True), DataLoader(rows, batch_size=8)


def tokens() -> tuple[Any, Any]:
    generator = torch.Generator().manual_seed(0)
    rows = [torch.randint(VOCABULARY, (7,), generator=generator) for _ in range(16)]
    return DataLoader(rows, batch_size=8, shuffle=True), DataLoader(rows, batch_size=8)


def padded_text(batch_size: int = 8) -> tuple[Any, Any]:
    """What a tokenizer and a collator make: dictionaries with masks, and labels that do not all count."""
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(16):
        ids = torch.randint(1, VOCABULARY, (8,), generator=generator)
        mask = (torch.arange(8) < 3 + i % 6).long()
        rows.append({"input_ids": ids * mask, "attention_mask": mask, "labels": ids.where(mask.bool(), -100)})
    return DataLoader(rows, batch_size=batch_size, shuffle=True), DataLoader(rows, batch_size=batch_size)


def counted_tokens(batch: Any) -> float:
    # The first token of a row is never predicted.
    return float((batch["labels"][:, 1:] != -100).sum())


def next_token(net: nn.Module, batch: Tensor) -> Tensor:
    return F.cross_entropy(net(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def classify(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


# -- networks ------------------------------------------------------------------------------------------------


class Decoder(nn.Module):
    """Causal attention with dropout, whose output layer is the embedding."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(x + self.dropout(attended.transpose(1, 2).flatten(2)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 4, padding_idx=0)
        self.recurrent = kind(4, 5, num_layers=2, dropout=0.2, batch_first=True)
        self.head = nn.Linear(5, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.recurrent(self.embed(tokens))[0])


class Block(nn.Module):
    """Two convolutions and a shortcut, as in torchvision."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


def resnet(width: int = 3) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(3, stride=2, padding=1),
        Block(width, width, 1),
        Block(width, 2 * width, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(2 * width, 3),
    )


class Adapted(nn.Module):
    """A frozen layer and a trained correction of low rank."""

    def __init__(self, frozen: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.frozen = frozen.requires_grad_(False)
        self.down = nn.Linear(frozen.in_features, rank, bias=False)
        self.up = nn.Linear(rank, frozen.out_features, bias=False)
        self.scale = 2.0 / rank

    def forward(self, x: Tensor) -> Tensor:
        return self.frozen(x) + self.scale * self.up(self.down(x))


def lora() -> nn.Module:
    return nn.Sequential(Adapted(nn.Linear(5, 6)), nn.GELU(), Adapted(nn.Linear(6, 3)))


class Backbone(LightningModule):
    """A frozen backbone that stays in eval mode, and a head that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.ReLU()).requires_grad_(False)
        self.head = nn.Linear(6, 3)

    def on_train_epoch_start(self) -> None:
        self.backbone.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        with torch.no_grad():
            features = self.backbone(batch[0])
        return F.cross_entropy(self.head(features), batch[1])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.head.parameters(), lr=0.1)


class Checkpointed(nn.Module):
    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(5, 6), nn.Linear(6, 3)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        inner = x.clone().requires_grad_()
        return self.second(checkpoint(lambda y: torch.tanh(self.first(y)), inner, use_reentrant=self.reentrant))


class Adversarial(LightningModule):
    """Two networks with an optimizer each, stepped by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.generator, self.critic = nn.Linear(2, 5), nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 1))

    def hessian_loss(self, batch: Any) -> Tensor:
        return F.softplus(-self.critic(self.generator(batch[0][:, :2]))).mean()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_generator, of_critic = self.optimizers()
        self.toggle_optimizer(of_generator)
        of_generator.zero_grad()
        self.manual_backward(self.hessian_loss(batch))
        of_generator.step()
        self.untoggle_optimizer(of_generator)
        self.toggle_optimizer(of_critic)
        of_critic.zero_grad()
        made = self.generator(batch[0][:, :2]).detach()
        self.manual_backward(F.softplus(self.critic(made)).mean() + F.softplus(-self.critic(batch[0])).mean())
        of_critic.step()
        self.untoggle_optimizer(of_critic)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        return None

    def configure_optimizers(self) -> Any:
        return [torch.optim.Adam(part.parameters(), lr=0.01) for part in (self.generator, self.critic)]


class Talkative(LightningModule):
    """A step that logs on step, updates a metric, asks the trainer, looks at the optimizer, returns a dictionary."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 6), nn.SiLU(), nn.Linear(6, 3))
        self.accuracy = torchmetrics.Accuracy("multiclass", num_classes=3)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
        logits = self.net(batch[0])
        progress = self.trainer.global_step / max(1, self.trainer.max_epochs * self.trainer.num_training_batches)
        smoothing = 0.1 * (1 + math.cos(math.pi * progress))
        loss = F.cross_entropy(logits, batch[1], label_smoothing=smoothing)
        self.accuracy(logits, batch[1])
        self.log("accuracy", self.accuracy, on_step=True, on_epoch=True, prog_bar=True)
        self.log("rate", self.optimizers().param_groups[0]["lr"], on_step=True, logger=True)
        return {"loss": loss, "logits": logits.detach()}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 2), "interval": "step"}]


class LanguageModel(LightningModule):
    """A Hugging Face model from its configuration: the loss is its own, the mean over the tokens that count."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.model = make()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.model(**batch).loss
        self.log("train_loss", loss, on_step=True, batch_size=len(batch["labels"]))
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.model(**batch).loss, batch_size=len(batch["labels"]))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=8, n_embd=6, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=8,
            intermediate_size=10,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=0,
        )
    )


def compiled(net: nn.Module) -> nn.Module:
    # Differentiated by the compiler, as with the usual backend, but not turned into machine code.
    return torch.compile(net, backend="aot_eager")


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.2), nn.Linear(6, 3))


class OwnSubmodule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = compiled(nn.Sequential(nn.Linear(5, 6), nn.Tanh()))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


WEIGHED = {"batch_weight": counted_tokens}

KINDS: dict[str, Kind] = {
    "BatchNorm, dropout, metrics, lists": Kind(Net, points),
    "step that returns a dict, logs, asks the trainer": Kind(Talkative, points),
    "ResNet (torchvision's layout)": Kind(lambda: Trained(resnet(), classify), images),
    "SyncBatchNorm": Kind(lambda: Trained(nn.SyncBatchNorm.convert_sync_batchnorm(mlp()), classify), points),
    "attention (SDPA), tied embedding": Kind(lambda: Trained(Decoder(), next_token), tokens),
    "TransformerEncoderLayer": Kind(
        lambda: Trained(
            nn.Sequential(nn.Unflatten(1, (1, 5)), nn.TransformerEncoderLayer(5, 1, 6, batch_first=True), nn.Flatten()),
            classify,
        ),
        points,
    ),
    "RNN, padding_idx": Kind(lambda: Trained(Recurrent(nn.RNN), next_token), tokens),
    "LSTM, padding_idx": Kind(lambda: Trained(Recurrent(nn.LSTM), next_token), tokens),
    "GRU, padding_idx": Kind(lambda: Trained(Recurrent(nn.GRU), next_token), tokens),
    "LoRA-like adapters": Kind(lambda: Trained(lora(), classify), points),
    "frozen backbone in eval mode": Kind(Backbone, points),
    "compiled submodule": Kind(lambda: Trained(OwnSubmodule(), classify), points),
    "compiled network": Kind(lambda: Trained(compiled(mlp()), classify), points),
    "checkpointing (use_reentrant=False)": Kind(lambda: Trained(Checkpointed(reentrant=False), classify), points),
    "two optimizers, manual optimisation": Kind(Adversarial, points),
    "gradient accumulation": Kind(Net, points, {}, {"accumulate_grad_batches": 2}),
    "Hugging Face GPT-2": Kind(lambda: LanguageModel(gpt2), padded_text, WEIGHED),
    "Hugging Face Llama": Kind(lambda: LanguageModel(llama), padded_text, WEIGHED),
}
