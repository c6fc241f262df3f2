"""One run of a study, in a process of its own: ``python -m hessian_callback.studies.one_run FOLDER SETTINGS``.

It holds the folder's lock while it runs, refuses to go on with other settings than the folder's, goes on from the
folder's checkpoint if there is one, and says at the end, by a file, that the run is complete.
"""

from __future__ import annotations

import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

__all__ = [
    "CHECKPOINT",
    "FINISHED",
    "SETTINGS",
    "complete_config",
    "digest_in",
    "finished",
    "main",
    "settings_text",
    "write_whole",
]

SETTINGS = "settings.yaml"
FINISHED = "finished.json"
CHECKPOINT = Path("checkpoints", "last.ckpt")
SOLVER = "solver"

_LOCK = "running.lock"
_DIGEST = "# digest: "

_RESUMING = "hessian_callback.studies.resuming"
_CALLBACKS = ("KeepRandomState", "EndWhenTold")

#: Exit status where another process is at the same run.
TAKEN = 75


def _with_solver_checkpoint(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Let the solver of a measuring callback save its state, if it can."""
    solver = options.get("solver") or {"class_path": "hessian_callback.Lanczos"}
    if isinstance(solver, str):
        solver = {"class_path": solver}
    if solver["class_path"].rpartition(".")[2] != "Lanczos":
        return dict(options)
    saved = {"checkpoint": str(folder / SOLVER), **(solver.get("init_args") or {})}
    return {**options, "solver": {**solver, "init_args": saved}}


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
    listed = trainer.get("callbacks") or []
    for callback in listed if isinstance(listed, list) else [listed]:
        if isinstance(callback, str):
            callback = {"class_path": callback}
        if callback["class_path"].rpartition(".")[2] == "PowerLawHessianCallback":
            callback = {**callback, "init_args": _with_solver_checkpoint(callback.get("init_args") or {}, folder)}
        measuring.append(callback)
    trainer |= {
        "default_root_dir": str(folder),
        "logger": logger,
        # Behind those that measure: what they draw is not drawn twice, and what they give up is not saved.
        "callbacks": [*measuring, keeping, *({"class_path": f"{_RESUMING}.{name}"} for name in _CALLBACKS)],
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
    """Write a file so that it is never there in part, whoever else writes it."""
    beside = path.with_name(f"{path.name}.{uuid.uuid4().hex}")
    with beside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def settings_text(config: Mapping[str, Any], digest: str) -> str:
    """A run's settings as a file, which begins with the digest that tells them from others."""
    return f"{_DIGEST}{digest}\n{yaml.safe_dump(dict(config), sort_keys=False)}"


def digest_in(path: Path) -> str | None:
    """The digest that a file of settings begins with; ``None`` if there is no such file."""
    if not path.exists():
        return None
    return path.read_text(encoding="utf-8").partition("\n")[0].removeprefix(_DIGEST)


def main(folder: Path, wanted: Path) -> int:
    """Run some settings in a folder, unless that is done or being done.

    Args:
        folder: the run's folder.
        wanted: the settings, which become the folder's.

    Returns:
        The process' exit status: 0, `TAKEN` if another process holds the lock, or 1 if the folder has other settings.
    """
    with wanted.open(encoding="utf-8") as file:
        settings = yaml.safe_load(file)
    lock = FileLock(folder / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process is at {folder}")
        return TAKEN
    with lock:
        if digest_in(folder / SETTINGS) not in (None, digest_in(wanted)):
            print(f"{folder} holds a run of another configuration; choose another --output, or move that folder away")
            return 1
        os.replace(wanted, folder / SETTINGS)
        if finished(folder) is not None:
            return 0
        began = time.time()
        arguments = ["fit", "--config", str(folder / SETTINGS)]
        resumed = (folder / CHECKPOINT).is_file()
        if resumed:
            arguments += ["--ckpt_path", str(folder / CHECKPOINT)]
        from hessian_callback.cli.main import main as command

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
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
