"""transformers: a BERT for masked tokens, with the library's collator, which draws the masks."""

from __future__ import annotations

from typing import Any

import tokenizers
import torch
import transformers
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.libraries.library import Library
from benchmarks.libraries.training import Wrapped, train_from_scratch

_SPECIAL = {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"}


def _loss(model: Any, batch: Any) -> Tensor:
    return model(**batch).loss


def module_and_data() -> tuple[Wrapped, Any, Any]:
    words = [*_SPECIAL.values(), *(f"word{number}" for number in range(61))]
    vocabulary = {word: number for number, word in enumerate(words)}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=model, **_SPECIAL)
    collate = transformers.DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.3, seed=5)
    rows: Any = [{"input_ids": torch.randint(3, 64, (12,)).tolist()} for _ in range(192)]
    config = transformers.BertConfig(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    train = DataLoader(rows[:128], batch_size=16, shuffle=True, collate_fn=collate)
    val = DataLoader(rows[128:], batch_size=16, collate_fn=collate)
    return Wrapped(transformers.BertForMaskedLM(config), _loss), train, val


LIBRARY = Library(
    model="BertForMaskedLM, wrapped; seeded DataCollatorForLanguageModeling; `batch_weight` counts masked tokens",
    data="random words",
    train=lambda callbacks: train_from_scratch(module_and_data, callbacks),
    setting={"batch_weight": lambda batch: float((batch["labels"] != -100).sum())},
)
