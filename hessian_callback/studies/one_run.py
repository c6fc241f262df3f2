"""One run of a study, in a process of its own: ``python -m hessian_callback.studies.one_run FOLDER SETTINGS``.

The process holds the folder's lock, refuses other settings than the folder's, resumes from the folder's checkpoint if
there is one, and writes a file at the end that marks the run as complete.
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

from hessian_callback.measurement.atomic_files import write_atomically
from hessian_callback.studies.definition import StudyError

__all__ = [
    "CHECKPOINT",
    "FINISHED",
    "SETTINGS",
    "complete_config",
    "digest_in",
    "finished",
    "main",
    "settings_text",
]

SETTINGS = "settings.yaml"
FINISHED = "finished.json"
CHECKPOINT = Path("checkpoints", "last.ckpt")
SOLVER = "solver"

_LOCK = "running.lock"
_DIGEST = "# digest: "

_RESUMING = "hessian_callback.studies.resuming"
_CALLBACKS = ("KeepRandomState", "EndOnSigterm")

#: Exit status if another process runs the same settings.
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
    """Add the settings with which a run writes into its folder, and resumes there after it was killed."""
    trainer = dict(config.get("trainer") or {})
    # Names without a module are those of the package that the model belongs to.
    keeping = {
        "class_path": "ModelCheckpoint",
        "init_args": {
            "dirpath": str(folder / CHECKPOINT.parent),
            "filename": CHECKPOINT.stem,
            "enable_version_counter": False,
        },
    }
    logger = {
        "class_path": "TensorBoardLogger",
        "init_args": {"save_dir": str(folder), "name": "", "version": ""},
    }
    measuring = []
    listed = trainer.get("callbacks") or []
    for callback in listed if isinstance(listed, list) else [listed]:
        if isinstance(callback, str):
            callback = {"class_path": callback}
        if str(callback.get("class_path")).rpartition(".")[2] == "PowerLawHessianCallback":
            callback = {**callback, "init_args": _with_solver_checkpoint(callback.get("init_args") or {}, folder)}
        measuring.append(callback)
    trainer |= {
        "default_root_dir": str(folder),
        "logger": logger,
        # Behind the callbacks that measure, so that their draws are in the saved states and a measurement that they
        # give up is not saved.
        "callbacks": [*measuring, keeping, *({"class_path": f"{_RESUMING}.{name}"} for name in _CALLBACKS)],
    }
    for option in ("enable_progress_bar", "enable_model_summary"):
        trainer.setdefault(option, False)
    return {**config, "trainer": trainer}


def finished(folder: Path) -> dict[str, Any] | None:
    """Return the content of the file that a complete run has; ``None`` if it is not complete.

    Raises:
        StudyError: if the file is damaged.
    """
    path = folder / FINISHED
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise StudyError(f"{path} is damaged ({error}); move it away to have the run continued") from error
    seconds = content.get("seconds") if isinstance(content, dict) else None
    if not isinstance(content, dict) or not isinstance(seconds, int | float) or "device" not in content:
        raise StudyError(f"{path} lacks the run's seconds and device; move it away to have the run continued")
    return content


def settings_text(config: Mapping[str, Any], digest: str) -> str:
    """Return the content of a file of settings, which begins with their digest."""
    return f"{_DIGEST}{digest}\n{yaml.safe_dump(dict(config), sort_keys=False)}"


def digest_in(path: Path) -> str | None:
    """Return the digest that a file of settings begins with; ``None`` if there is no such file."""
    if not path.exists():
        return None
    return path.read_text(encoding="utf-8", errors="replace").partition("\n")[0].removeprefix(_DIGEST)


def main(folder: Path, wanted: Path) -> int:
    """Run some settings in a folder, unless the run is complete or another process runs it.

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
        print(f"another process runs in {folder}")
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
        write_atomically(folder / FINISHED, json.dumps(ending, indent=1) + "\n")
    return 0


def _circumstances(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The device and the versions of a run."""
    import torch

    from hessian_callback._version import __version__
    from hessian_callback.callbacks.lightning_packages import PACKAGES

    accelerator = (settings.get("trainer") or {}).get("accelerator", "auto")
    on_gpu = accelerator in ("auto", "gpu", "cuda") and torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} thread(s)",
        "versions": {
            "hessian-callback": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            **{name.partition(".")[0]: sys.modules[name].__version__ for name in PACKAGES},
        },
    }


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
