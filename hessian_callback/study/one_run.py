"""One run of a study, in a process of its own: ``python -m hessian_callback.study.one_run FOLDER``.

It holds the folder's lock while it runs, goes on from the folder's checkpoint if there is one, and says at the end, by
a file, that the run is complete.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

__all__ = ["CHECKPOINT", "FINISHED", "SETTINGS", "complete_config", "finished", "main", "write_whole"]

SETTINGS = "settings.yaml"
FINISHED = "finished.json"
CHECKPOINT = Path("checkpoints", "last.ckpt")
SOLVER = "solver"

_LOCK = "running.lock"

#: Exit status where another process is at the same run.
TAKEN = 75


def complete_config(config: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Add to a run's configuration what makes it write into its folder, and go on there after it was killed."""
    trainer = dict(config.get("trainer") or {})
    keeping = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {
            "dirpath": str(folder / CHECKPOINT.parent),
            "filename": CHECKPOINT.stem,
            "enable_version_counter": False,
        },
    }
    logger = {
        "class_path": "lightning.pytorch.loggers.TensorBoardLogger",
        "init_args": {"save_dir": str(folder), "name": "", "version": ""},
    }
    measuring = []
    for callback in trainer.get("callbacks") or []:
        if callback["class_path"].rpartition(".")[2] == "PowerLawHessianCallback":
            options = dict(callback.get("init_args") or {})
            if options.get("mode") != "paper":  # Its runs are short, and can't be saved.
                options.setdefault("solver_checkpoint", str(folder / SOLVER))
            callback = {**callback, "init_args": options}
        measuring.append(callback)
    trainer |= {
        "default_root_dir": str(folder),
        "logger": logger,
        # Last, so that what other callbacks draw before training is not drawn twice.
        "callbacks": [*measuring, keeping, {"class_path": "hessian_callback.study.random_state.KeepRandomState"}],
    }
    for option in ("enable_progress_bar", "enable_model_summary"):
        trainer.setdefault(option, False)
    return {**config, "trainer": trainer}


def finished(folder: Path) -> dict[str, Any] | None:
    """What a run left at its end; ``None`` if it has not come to it."""
    path = folder / FINISHED
    if not path.is_file():
        return None
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is never there in part."""
    beside = path.with_name(f"{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def main(folder: Path) -> int:
    """Run what the folder's settings say, unless that is done or being done.

    Returns:
        The process' exit status: 0, or `TAKEN` if another process holds the lock.
    """
    with (folder / SETTINGS).open(encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is at {folder}")
        return TAKEN
    with lock:
        if finished(folder) is not None:
            return 0
        began = time.time()
        arguments = ["fit", "--config", str(folder / SETTINGS)]
        resumed = (folder / CHECKPOINT).is_file()
        if resumed:
            arguments += ["--ckpt_path", str(folder / CHECKPOINT)]
        from hessian_callback.cli import main as command

        command(arguments)
        ending = {"seconds": round(time.time() - began, 1), "resumed": resumed, **_circumstances(settings)}
        write_whole(folder / FINISHED, json.dumps(ending, indent=1) + "\n")
    return 0


def _circumstances(settings: Mapping[str, Any]) -> dict[str, Any]:
    """On what a run was made."""
    import lightning
    import torch

    from hessian_callback._version import __version__

    accelerator = (settings.get("trainer") or {}).get("accelerator", "auto")
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)",
        "versions": {
            "hessian-callback": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "lightning": lightning.__version__,
        },
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
