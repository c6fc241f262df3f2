"""One library's run without the callback and with it, in this process: ``python -m benchmarks.libraries.trial``."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.libraries.library import Library, library, version
from benchmarks.timing import pin_threads
from hessian_callback import PowerLawHessianCallback

# Options of every run with the callback.
OPTIONS: dict[str, Any] = {"num_eigenvalues": 3, "num_samples": 32, "figures": False}
SOURCES = ("val", "train")


@dataclass
class Run:
    """What one training run with the callback left.

    Attributes:
        source: the loader of the samples, ``"val"`` or ``"train"``.
        remedy: further options, in words; ``None`` if there are none.
        differs: the state that is not the same as after the run without the callback.
        slopes: the slope of each measurement.
        reasons: why measurements failed.
        num_hvps: products of a measurement, the median.
        seconds: processor time of a measurement, the median. It is its duration times the share of a processor that
            the process had during the run.
        warned: warnings that the run without the callback does not give.
        error: the error that ended the run.
        total_seconds: processor time of the whole run.
    """

    source: str
    remedy: str | None
    differs: list[str] = field(default_factory=list)
    slopes: list[float | None] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)
    num_hvps: float | None = None
    seconds: float | None = None
    warned: list[str] = field(default_factory=list)
    error: str | None = None
    total_seconds: float = 0.0

    @property
    def measured(self) -> bool:
        """Whether the run ended well and each of its measurements has a slope."""
        return self.error is None and bool(self.slopes) and None not in self.slopes


@dataclass
class Trial:
    """The runs of a library.

    Attributes:
        name: the library's distribution.
        version: its version.
        model: see `Library`.
        data: see `Library`.
        trainer: the package of the Trainer that ran, and its version.
        irreproducible: the state that differs between two runs without the callback.
        plain_seconds: processor time of a run without the callback.
        runs: for each source of samples a run without remedy, and those with remedies until one measured.
    """

    name: str
    version: str
    model: str
    data: str
    trainer: str = ""
    irreproducible: list[str] = field(default_factory=list)
    plain_seconds: float = 0.0
    runs: list[Run] = field(default_factory=list)


@dataclass
class EndState:
    """The state of a run at its end: weights, optimizers, generators, modes and logged metrics.

    Attributes:
        values: the state by its name.
        trainer: the package of the Trainer and its version.
        measuring: the callback that measured, which is a copy if the library copies callbacks.
        warned: the run's warnings.
        seconds: the processor time of the whole run.
        share: the share of a processor that the run had.
    """

    values: dict[str, Any] = field(default_factory=dict)
    trainer: str = ""
    measuring: Any = None
    warned: list[str] = field(default_factory=list)
    seconds: float = 0.0
    share: float = 1.0

    def record(self, trainer: Any, pl_module: Any) -> None:
        # A library may have a Trainer of its own.
        packages = [base.__module__.partition(".")[0] for base in type(trainer).__mro__ if base.__name__ == "Trainer"]
        package = packages[-1]
        self.trainer = f"{package} {version(package.replace('_', '-'))}"
        measuring = [one for one in trainer.callbacks if isinstance(one, PowerLawHessianCallback)]
        self.measuring = measuring[0] if measuring else None
        state = {
            "weights": pl_module.state_dict(),
            "optimizer": [optimizer.state_dict() for optimizer in trainer.optimizers],
            "metrics": {name: value for name, value in trainer.callback_metrics.items() if "hessian/" not in name},
            "modes": {name: module.training for name, module in pl_module.named_modules()},
            "hyperparameters": repr(dict(pl_module.hparams)),
            "torch generator": torch.get_rng_state(),
            "numpy generator": list(np.random.get_state()),
            "Python generator": list(random.getstate()),
        }
        self.values = {path: _frozen(value) for path, value in _leaves(state)}


def _recorder(end: EndState) -> Any:
    """Return a callback of every installed Lightning package that records the state at the end of a run."""
    bases = [base for base in PowerLawHessianCallback.__mro__ if base.__name__ == "Callback"]
    return type("Recorder", tuple(bases), {"on_fit_end": lambda _, *run: end.record(*run)})()


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{path}/{key}" if path else str(key))
    elif isinstance(value, (list, tuple)):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{path}/{number}")
    else:
        yield path, value


def _frozen(value: Any) -> Any:
    """Return bytes that tell a value from any other: NaN equals itself, and 0.0 does not equal -0.0."""
    if isinstance(value, Tensor):
        plain = value.detach().cpu().contiguous()
        return str(plain.dtype), tuple(plain.shape), plain.flatten().view(torch.uint8).numpy().tobytes()
    if isinstance(value, np.ndarray):
        return str(value.dtype), value.shape, value.tobytes()
    return repr(value)


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the names of entries that two states do not have in common."""
    return [name for name in dict.fromkeys([*one, *other]) if one.get(name) != other.get(name)]


def _train(case: Library, end: EndState, *callbacks: Any) -> None:
    # There is one thread, so the processor time is what the run would take on an idle machine.
    began, began_on_clock = time.process_time(), time.perf_counter()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            case.train([*callbacks, _recorder(end)])
        finally:
            end.seconds = time.process_time() - began
            end.share = end.seconds / (time.perf_counter() - began_on_clock)
            end.warned = list(dict.fromkeys(str(one.message) for one in caught))


def _with_callback(case: Library, plain: EndState, source: str, remedy: str | None, options: Mapping[str, Any]) -> Run:
    run, end = Run(source, remedy), EndState()
    callback = PowerLawHessianCallback(**{**OPTIONS, "dataloader": source, **case.setting, **options})
    try:
        _train(case, end, callback)
        run.differs = differences(plain.values, end.values)
    except Exception as error:
        traceback.print_exc()
        run.error = f"{type(error).__name__}: {' '.join(str(error).split())}"
    history = (end.measuring or callback).history
    run.total_seconds = end.seconds
    run.warned = [text for text in end.warned if text not in plain.warned]
    run.slopes = [None if one.fit is None else one.fit.slope for one in history]
    run.reasons = list(dict.fromkeys(one.reason for one in history if one.reason))
    spent = [one.spectrum.num_matvecs for one in history if one.spectrum is not None]
    run.num_hvps = statistics.median(spent) if spent else None
    run.seconds = statistics.median(one.seconds for one in history) * end.share if history else None
    return run


def run_trial(name: str) -> Trial:
    """Train a library's model without the callback, with it, and with the remedies until one measures."""
    case = library(name)
    trial = Trial(name, str(version(name)), case.model, case.data)
    plain = EndState()
    _train(case, plain)
    trial.trainer, trial.plain_seconds = plain.trainer, plain.seconds
    for source in SOURCES:
        remedies: list[tuple[str | None, Mapping[str, Any]]] = [(None, {}), *case.remedies.items()]
        for remedy, options in remedies:
            run = _with_callback(case, plain, source, remedy, options)
            if run.differs and not trial.irreproducible:
                # The first run of a process may leave caches, or the library's runs may differ by themselves.
                again = EndState()
                _train(case, again)
                trial.irreproducible = differences(plain.values, again.values)
                plain = again
                run = _with_callback(case, plain, source, remedy, options)
            trial.runs.append(run)
            if run.measured:
                break
    return trial


def trial_from_json(values: Mapping[str, Any]) -> Trial:
    """Return the trial that a process wrote."""
    return Trial(**{**values, "runs": [Run(**run) for run in values["runs"]]})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name")
    parser.add_argument("output", type=Path, help="the result is written there, as JSON")
    options = parser.parse_args(arguments)
    pin_threads()
    options.output.write_text(json.dumps(asdict(run_trial(options.name)), indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
