"""peft: a LoRA adapter on a GPT-2 with random weights."""

from __future__ import annotations

from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.libraries.library import Library
from benchmarks.libraries.training import Wrapped, train_from_scratch


def _loss(model: Any, batch: Any) -> Tensor:
    return model(input_ids=batch["input_ids"], labels=batch["input_ids"]).loss


def module_and_data() -> tuple[Wrapped, Any, Any]:
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    adapted = peft.LoraConfig(r=2, lora_alpha=4, lora_dropout=0.1, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(transformers.GPT2LMHeadModel(config), adapted)
    rows: Any = [{"input_ids": row} for row in torch.randint(64, (192, 12))]
    train = DataLoader(rows[:128], batch_size=16, shuffle=True)
    return Wrapped(model, _loss), train, DataLoader(rows[128:], batch_size=16)


LIBRARY = Library(
    model="LoRA on GPT2LMHeadModel, wrapped",
    data="random tokens",
    train=lambda callbacks: train_from_scratch(module_and_data, callbacks),
)
