"""LeNet on Fashion-MNIST, K = 1000: trained in plain loops, for a GPU that is there for minutes only, or on a CPU.

    python -m benchmarks.fashion_thousand train sgd_s0 random_s0 --folder runs/fashion --device cuda
    python -m benchmarks.fashion_thousand measure sgd_s0 random_s0 --folder runs/fashion --sample train10000
    python -m benchmarks.fashion_thousand report --folder runs/fashion

The device is a GPU if there is one. The first command saves the weights of each run in FOLDER/NAME.pt, and its losses
in FOLDER/NAME.json. The second appends a line for each spectrum to FOLDER/spectra.jsonl. The third prints a table of
both. A command that was interrupted can be given again: what is there already is skipped, and a spectrum continues from
its last checkpoint (its seconds are those of the last command). The recipe is that of
example_configs/lenet_fashion_mnist.yaml. The first two commands do not import Lightning.

A slope is given with the interval that the eigenvalues' error bounds allow, and the law is accepted or rejected if all
spectra within the bounds agree, and otherwise undecided.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from decimal import ROUND_CEILING, Context
from functools import partial
from importlib import util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import hessian_callback
from hessian_callback.algorithms.lanczos import LanczosProgress
from hessian_callback.linalg.full_float32 import full_float32
from hessian_callback.measurement.atomic_files import write_atomically
from hessian_callback.measurement.measure import measure
from hessian_callback.measurement.observer import Observer
from hessian_callback.measurement.solvers import Lanczos
from hessian_callback.power_law.eigengaps import fit_eigengaps
from hessian_callback.power_law.fit import fit_power_law
from hessian_callback.power_law.uncertainty import slope_numerical_interval


def demo_module(name: str) -> ModuleType:
    """Execute a module of hessian_callback.demos by itself, because that package imports Lightning."""
    path = Path(hessian_callback.__file__).parent / "demos" / f"{name}.py"
    spec = util.spec_from_file_location(f"{__name__}.{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


networks = demo_module("networks")
image_files = demo_module("image_files")

RATE, MOMENTUM, WEIGHT_DECAY = 0.1, 0.9, 5e-4
DECAY_AT, DECAY_FACTOR = (0.4, 0.8), 0.1
NUM_CLASSES = 10
# The subset, its order and the noise are the same for all runs.
DATA_SEED = 0
# How many training images are measured, the first ones in the same order. All test images are.
SAMPLES: dict[str, int | None] = {"train1000": 1_000, "train5000": 5_000, "train10000": 10_000, "test": None}
EVALUATED_BATCH = 10_000
# Images of a batch of the measurement. On a CPU the layers of larger ones leave the caches, and take twice the time.
MEASURED_BATCH, MEASURED_BATCH_ON_CPU = 2_500, 250
FITTED = (50, 200, 1000)
# An eigenvalue is fitted if it is known to this part of itself, as in example_configs/studies/mnist_thousand.yaml.
FIT_RTOL = 0.05
SECONDS_BETWEEN_LINES = 15.0
SPECTRA = "spectra.jsonl"
UPWARDS = Context(prec=2, rounding=ROUND_CEILING)
# What the stopped command writes in the place of the solver's own reason.
OUT_OF_TIME = "max_seconds"
DTYPES = {"float32": torch.float32, "float64": torch.float64}
PUBLISHED: list[dict[str, str]] = [
    {"run": "published, random", "K = 1000": "s –, d 0.0971, rejected"},
    {"run": "published, SGD", "K = 1000": "s 1.065, d 0.0132, accepted", "gap exponent": "1.922"},
]


@dataclass(frozen=True)
class Run:
    """One training run; without epochs the initial weights alone."""

    seed: int = 0
    epochs: int = 200
    batch_size: int = 128
    label_noise: float = 0.0
    network: Callable[[], nn.Module] = networks.LeNet
    # The first training images; None: all of them.
    images: int | None = None


RUNS: dict[str, Run] = {
    **{f"sgd_s{seed}": Run(seed) for seed in range(3)},
    **{f"random_s{seed}": Run(seed, epochs=0) for seed in range(3)},
    # As many images as a wheel has of MNIST, and the steps that they give on all images: 8,000 and 7,973.
    "images5000_s0": Run(images=5_000),
    "epochs17_s0": Run(epochs=17),
    "batch1024_s0": Run(batch_size=1024),
    "batch8192_s0": Run(batch_size=8192),
    "noise40_s0": Run(label_noise=0.4),
    "noise80_s0": Run(label_noise=0.8),
    # Fully connected with one hidden layer of a hundred units, as in example_configs/studies/mnist_depth.yaml.
    "depth1_s0": Run(network=partial(networks.FullyConnected, width=100, depth=1)),
}


# -- images ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Images:
    """Standardised images in float32, and labels."""

    images: Tensor
    labels: Tensor

    def on(self, device: str, dtype: torch.dtype = torch.float32) -> Images:
        return Images(self.images.to(device, dtype), self.labels.to(device))

    def subset(self, chosen: Tensor) -> Images:
        return Images(self.images[chosen], self.labels[chosen])


def with_noise(labels: Tensor, share: float) -> Tensor:
    """Replace the labels that ImageData replaces, by the same ones."""
    draws = np.random.default_rng([DATA_SEED, *b"noise"])
    replaced = torch.from_numpy(draws.permutation(len(labels))[: round(share * len(labels))])
    drawn = torch.from_numpy(draws.integers(NUM_CLASSES, size=len(labels)))
    noisy = labels.clone()
    noisy[replaced] = drawn[replaced]
    return noisy


def read_images(folder: str, label_noise: float, num_images: int | None = None) -> tuple[Images, Images]:
    """Return training images, the first ones if a number is given, and test images.

    Pixels are standardised by mean and deviation of all training images, as ImageData does. The files must be those of
    Fashion-MNIST, unless a number of images is read from another folder than that of the Debian package.
    """
    any_files = num_images is not None and folder != image_files.FASHION_MNIST_FOLDER
    sha256 = None if any_files else image_files.FASHION_MNIST_SHA256
    images, labels = image_files.read_idx_folder(folder, "train", sha256=sha256)
    test_images, test_labels = image_files.read_idx_folder(folder, "t10k", sha256=sha256)
    shares = torch.bincount(images.flatten(), minlength=256) / images.numel()
    values = torch.arange(256, dtype=torch.float64)
    mean = (shares * values).sum()
    deviation = (shares * (values - mean) ** 2).sum().sqrt()
    images, labels = images[:num_images], labels[:num_images]
    return (
        Images((images - mean.float()) / deviation.float(), with_noise(labels, label_noise)),
        Images((test_images - mean.float()) / deviation.float(), test_labels),
    )


class PatchConvolution(nn.Conv2d):
    """A convolution as one product of matrices: patches times weights.

    On a GPU cuDNN takes much longer for convolutions in float64 than for those in float32, and products of matrices do
    not. The patches of a kernel of k by k pixels take k² times the memory of the images.
    """

    def _conv_forward(self, images: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        assert not isinstance(self.padding, str)
        (rows, columns), (down, right) = self.padding, self.stride
        padded = F.pad(images, (columns, columns, rows, rows))
        patches = padded.unfold(2, weight.shape[2], down).unfold(3, weight.shape[3], right)
        count, _, height, width = patches.shape[:4]
        matrix = patches.permute(0, 2, 3, 1, 4, 5).reshape(count * height * width, -1)
        products = F.linear(matrix, weight.flatten(1), bias)
        return products.view(count, height, width, -1).permute(0, 3, 1, 2)

    @classmethod
    def replace_in(cls, model: nn.Module) -> None:
        """Compute convolutions of a model in this way if they have one group, no dilation, and zeros as a padding."""
        for layer in (layer for layer in model.modules() if type(layer) is nn.Conv2d):
            plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
            if plain and not isinstance(layer.padding, str):
                layer.__class__ = cls


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]), batch[1])


@torch.no_grad()
def loss_and_error(model: nn.Module, data: Images) -> tuple[float, float]:
    """Mean cross entropy, and share of images for which another class is predicted."""
    loss, wrong = 0.0, 0
    for images, labels in zip(data.images.split(EVALUATED_BATCH), data.labels.split(EVALUATED_BATCH), strict=True):
        logits = model(images)
        loss += float(F.cross_entropy(logits.double(), labels, reduction="sum"))
        wrong += int((logits.argmax(dim=1) != labels).sum())
    return loss / len(data.labels), wrong / len(data.labels)


# -- training ----------------------------------------------------------------------------------------


class Steps:
    """Steps of SGD on images that are all on one device.

    On a GPU a step of this size takes longer to launch than to compute. So the step on a full batch is captured once as
    a CUDA graph and replayed; only the indices of its images change between replays. The rate is a number inside the
    graph, so a cut captures another graph. The smaller last batch of an epoch is a step without a graph.

    Args:
        model: the network, on the device of the images.
        data: images and labels.
        batch_size: images of a full batch.
        graphed: whether steps on full batches are captured.
    """

    def __init__(self, model: nn.Module, data: Images, batch_size: int, *, graphed: bool) -> None:
        self._model = model
        self._data = data
        self._optimizer = torch.optim.SGD(
            model.parameters(), lr=RATE, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, foreach=True
        )
        self._graphed = graphed and batch_size <= len(data.labels)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._is_warm = False
        # The graph reads the indices from this tensor, which is filled in place before each replay.
        self._chosen = torch.arange(min(batch_size, len(data.labels)), device=data.labels.device)

    @property
    def is_graphed(self) -> bool:
        """Whether steps on full batches are replayed, or will be."""
        return self._graphed

    def set_rate(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        self._graph = None

    def take(self, chosen: Tensor) -> None:
        """Take a step on the images with these indices."""
        if not self._graphed or len(chosen) != len(self._chosen):
            self._eager_step(chosen)
            return
        if self._graph is None:
            self._graph = self._captured()
            if self._graph is None:
                self._graphed = False
                self._eager_step(chosen)
                return
        self._chosen.copy_(chosen)
        self._graph.replay()

    def _eager_step(self, chosen: Tensor) -> None:
        self._optimizer.zero_grad(set_to_none=True)
        self._step(chosen)

    def _step(self, chosen: Tensor) -> None:
        images, labels = self._data.images.index_select(0, chosen), self._data.labels.index_select(0, chosen)
        cross_entropy(self._model, (images, labels)).backward()
        self._optimizer.step()

    def _captured(self) -> torch.cuda.CUDAGraph | None:
        """Capture a step, and return it if it does what a step without a graph does; weights stay as they are."""
        try:
            if not self._is_warm:
                self._warm_up()
            # Without gradients the captured backward pass allocates its own in the graph's memory, and each replay
            # writes them anew instead of adding to them.
            self._optimizer.zero_grad(set_to_none=True)
            graph = torch.cuda.CUDAGraph()
            # On the stream of the training: graphs of one stream share a workspace, so they could not run at once.
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                self._step(self._chosen)
            if self._agrees(graph):
                return graph
            problem = "its first step differs from one without a graph"
        except RuntimeError as error:
            problem = " ".join(str(error).split())
        self._optimizer.zero_grad(set_to_none=True)
        print(f"warning: no CUDA graph ({problem}); the steps are launched one by one, which is slower", flush=True)
        return None

    def _warm_up(self) -> None:
        """Take three steps, as PyTorch asks for before a capture, and undo them.

        They make the momentum buffers as well, which a graph could not make. A buffer of zeros gives the same first
        step as none.
        """
        before = [parameter.detach().clone() for parameter in self._model.parameters()]
        try:
            for _ in range(3):
                self._eager_step(self._chosen)
        finally:
            self._restore(before, [torch.zeros_like(buffer) for buffer in self._buffers()])
        self._is_warm = True

    def _agrees(self, graph: torch.cuda.CUDAGraph) -> bool:
        """Compare a replay with a step without a graph, both from the present weights, which are then restored."""
        before = [parameter.detach().clone() for parameter in self._model.parameters()]
        buffers = [buffer.clone() for buffer in self._buffers()]
        graph.replay()
        replayed = [parameter.detach().clone() for parameter in self._model.parameters()]
        self._restore(before, buffers)
        self._eager_step(self._chosen)
        agree = True
        for one, other, old in zip(replayed, self._model.parameters(), before, strict=True):
            change, expected = one - old, other.detach() - old
            # Sums are added up in another order each time. A run that diverges does so either way.
            close = 1e-6 + 1e-3 * float(expected.nan_to_num().abs().max())
            agree = agree and torch.allclose(change, expected, rtol=1e-2, atol=close, equal_nan=True)
        self._restore(before, buffers)
        return agree

    def _buffers(self) -> list[Tensor]:
        states = [self._optimizer.state.get(parameter, {}) for parameter in self._model.parameters()]
        return [state["momentum_buffer"] for state in states if state.get("momentum_buffer") is not None]

    @torch.no_grad()
    def _restore(self, values: Sequence[Tensor], buffers: Sequence[Tensor]) -> None:
        # In place, because the graph holds addresses.
        for parameter, value in zip(self._model.parameters(), values, strict=True):
            parameter.copy_(value)
        for buffer, value in zip(self._buffers(), buffers, strict=True):
            buffer.copy_(value)


def synchronize(device: str) -> None:
    """Wait for the device, so that seconds are those of the work and not of its launch."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def fit_network(
    name: str, model: nn.Module, data: Images, run: Run, epochs: int, device: str
) -> Generator[None, None, tuple[int, bool]]:
    """Train, step by step, and return the number of steps and whether CUDA graphs were used."""
    count = len(data.labels)
    total = epochs * math.ceil(count / run.batch_size)
    # Shares of the steps, as in hessian_callback.demos.ImageClassifier.
    cuts = {round(share * total) for share in DECAY_AT} if total else set()
    steps = Steps(model, data, run.batch_size, graphed=torch.device(device).type == "cuda")
    # On the CPU, so that the order of the images does not depend on the device.
    order = torch.Generator().manual_seed(run.seed)
    rate, taken = RATE, 0
    began = shown = time.perf_counter()
    for epoch in range(epochs):
        for chosen in torch.randperm(count, generator=order).to(device).split(run.batch_size):
            if taken in cuts:
                rate *= DECAY_FACTOR
                steps.set_rate(rate)
            steps.take(chosen)
            taken += 1
            yield
        if time.perf_counter() > shown + SECONDS_BETWEEN_LINES:
            synchronize(device)
            shown = time.perf_counter()
            print(f"{name}: epoch {epoch + 1} of {epochs}, {1e3 * (shown - began) / taken:.3f} ms a step", flush=True)
    return taken, bool(taken) and steps.is_graphed


def train(
    name: str, folder: Path, data_folder: str, device: str, epochs: int | None, num_images: int | None
) -> Iterator[None]:
    """Train a run, step by step, and save its weights, and its losses beside them; skip it if they are there."""
    weights, results = folder / f"{name}.pt", folder / f"{name}.json"
    if weights.exists() and results.exists():
        print(f"{name}: trained already", flush=True)
        return
    run = RUNS[name]
    # A run without epochs stays one.
    epochs = run.epochs if epochs is None else min(epochs, run.epochs)
    num_images = run.images if num_images is None else num_images
    torch.manual_seed(run.seed)
    model = run.network().to(device)
    if torch.device(device).type == "cpu":
        # A step of LeNet takes .6 to .8 of the time in this format.
        model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    training, test = (part.on(device) for part in read_images(data_folder, run.label_noise, num_images))
    synchronize(device)
    began = time.perf_counter()
    taken, graphed = yield from fit_network(name, model, training, run, epochs, device)
    synchronize(device)
    seconds = time.perf_counter() - began
    model.eval()
    train_loss, train_error = loss_and_error(model, training)
    test_loss, test_error = loss_and_error(model, test)
    found = {
        "name": name,
        "epochs": epochs,
        "images": num_images,
        "steps": taken,
        "seconds": round(seconds, 2),
        "cuda_graph": graphed,
        "train_loss": train_loss,
        "train_error": train_error,
        "test_loss": test_loss,
        "test_error": test_error,
        "device": torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "CPU",
        "torch": torch.__version__,
    }
    write_atomically(results, json.dumps(found) + "\n")
    # The weights come last: where they are, the losses are.
    beside = folder / f".{uuid.uuid4().hex}.tmp"
    try:
        torch.save({key: value.detach().cpu() for key, value in model.state_dict().items()}, beside)
        os.replace(beside, weights)
    finally:
        beside.unlink(missing_ok=True)
    print(
        f"{name}: {taken} steps in {seconds:.1f} s, loss {train_loss:.4g}, error {train_error:.4f}; "
        f"test loss {test_loss:.4g}, error {test_error:.4f}",
        flush=True,
    )


def train_in_turns(trainings: Sequence[Iterator[None]], device: str) -> None:
    """Take a step of each training in turn.

    On a GPU each has a stream of its own: the kernels of one are too small to fill it, so those of several run at once.
    """
    on_gpu = torch.device(device).type == "cuda"
    pending = [(training, torch.cuda.Stream() if on_gpu else None) for training in trainings]
    with full_float32():
        while pending:
            ended = []
            for training, stream in pending:
                with torch.cuda.stream(stream):
                    if next(training, _ENDED) is _ENDED:
                        ended.append(training)
            pending = [pair for pair in pending if pair[0] not in ended]


_ENDED = object()


# -- fits --------------------------------------------------------------------------------------------


def distance_interval(
    lower: np.ndarray[Any, Any], upper: np.ndarray[Any, Any], slopes: tuple[float, float]
) -> tuple[float, float]:
    r"""Bound the fit errors of all spectra with :math:`\lambda_i \in [l_i, u_i]` and slopes in an interval.

    :math:`F^*(\lambda_i) = 1 - e^{-y_i / s}` lies between the values at the smallest :math:`y_i` with the largest slope
    and the reverse. The interval is wider than need be, since the extremes are taken for each eigenvalue by itself.
    """
    num = len(lower)
    least = np.maximum(np.log(lower / upper[-1]), 0.0) / slopes[1]
    most = np.maximum(np.log(upper / lower[-1]), 0.0) / slopes[0]
    law_low, law_high = -np.expm1(-least), -np.expm1(-most)
    # The cutoff is zero logarithms from itself.
    law_low[-1] = law_high[-1] = 0.0
    at_or_below = np.arange(num, 0, -1) / num
    below = at_or_below - 1.0 / num
    return (
        max(0.0, float((at_or_below - law_high).max()), float((law_low - below).max())),
        float(max((at_or_below - law_low).max(), (law_high - below).max())),
    )


def verdict(low: float | None, high: float | None, critical: float) -> str:
    """What all fit errors of an interval agree on."""
    if low is None or high is None:
        return "unproven"
    if high < critical:
        return "accepted"
    return "rejected" if low >= critical else "undecided"


def fit_with_bounds(
    values: Tensor, bounds: Tensor | None, rounding: float, num_eigenvalues: int
) -> dict[str, Any] | None:
    """Fit the largest eigenvalues, with the intervals that the error bounds allow; None if too few are known.

    Args:
        values: eigenvalues, descending.
        bounds: their error bounds; None if they have none, so that no verdict is proven.
        rounding: rounding level of the spectrum. Exact products put no Ritz value above its eigenvalue by more.
        num_eigenvalues: K.
    """
    known = values > 0 if bounds is None else bounds <= FIT_RTOL * values
    num_known = int(known.long().cumprod(0).sum())
    if num_known < num_eigenvalues:
        return None
    values = values[:num_eigenvalues]
    fit = fit_power_law(values)
    slopes: tuple[float | None, float | None] = (None, None)
    errors: tuple[float | None, float | None] = (None, None)
    if bounds is not None:
        lowest, width = values - rounding, bounds[:num_eigenvalues] + rounding
        low, high = slope_numerical_interval(lowest, width, sides="above")
        slopes = low, high
        errors = distance_interval(lowest.numpy(), (lowest + width).numpy(), (low, high))
    try:
        gap_exponent = fit_eigengaps(values).exponent
    except ValueError:  # Equal eigenvalues have no gaps.
        gap_exponent = None
    return {
        "slope": fit.slope,
        "slope_low": slopes[0],
        "slope_high": slopes[1],
        "d_ks": fit.fit_error,
        "d_ks_low": errors[0],
        "d_ks_high": errors[1],
        "paper": verdict(*errors, fit.critical_distance_paper),
        "fitted": verdict(*errors, fit.critical_distance_fitted),
        "gap_exponent": gap_exponent,
    }


def fitted_numbers(k: int) -> list[int]:
    """The K's that are fitted of k eigenvalues."""
    return sorted({number for number in FITTED if number < k} | {k})


# -- measurements ------------------------------------------------------------------------------------


class OutOfTimeError(Exception):
    """Ends a measurement at the end of its time."""

    def __init__(self, progress: LanczosProgress) -> None:
        super().__init__("the time is over")
        self.progress = progress


class Watch(Observer):
    """Prints lines while a spectrum is computed, and stops the computation at a time of `time.perf_counter`."""

    def __init__(self, name: str, deadline: float) -> None:
        self._name = name
        self._deadline = deadline
        self._began = self._shown = time.perf_counter()

    @contextmanager
    def solving(
        self, name: str, expected_hvps: int, checkpoint: str | None
    ) -> Iterator[Callable[[LanczosProgress], None]]:
        """Follow a spectrum; see `Observer.solving`."""
        yield self._report

    def _report(self, progress: LanczosProgress) -> None:
        now = time.perf_counter()
        if now > self._deadline:
            raise OutOfTimeError(progress)
        if now > self._shown + SECONDS_BETWEEN_LINES:
            self._shown = now
            print(
                f"{self._name}: {now - self._began:.0f} s, {progress.num_matvecs} products, "
                f"{progress.num_converged} of {progress.k} converged",
                flush=True,
            )


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """The lines of all spectra, in the order in which they were measured."""
    path = folder / SPECTRA
    if not path.exists():
        return []
    return [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines() if text.strip()]


def key_of(line: dict[str, Any]) -> tuple[str, str, int]:
    return line["name"], line["sample"], line["k"]


def sample_of(name: str, sample: str, folder: Path, data_folder: str) -> Images:
    """The images that a run is measured on, with the labels that it was trained on."""
    num_images = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))["images"]
    training, test = read_images(data_folder, RUNS[name].label_noise, num_images)
    if sample == "test":
        return test
    order = torch.randperm(len(training.labels), generator=torch.Generator().manual_seed(DATA_SEED))
    return training.subset(order[: SAMPLES[sample]])


def measure_run(name: str, folder: Path, sample: str, options: argparse.Namespace, deadline: float) -> None:
    """Measure a trained run and append a line to the file of spectra; skip it if it has one."""
    if any(key_of(line) == (name, sample, options.k) and line["stopped"] != OUT_OF_TIME for line in read_lines(folder)):
        print(f"{name}, {sample}: measured already", flush=True)
        return
    dtype = DTYPES[options.dtype]
    model = RUNS[name].network()
    model.load_state_dict(torch.load(folder / f"{name}.pt", map_location="cpu", weights_only=True))
    model.to(options.device, dtype).eval()
    if torch.device(options.device).type == "cuda" and dtype == torch.float64:
        PatchConvolution.replace_in(model)
    data = sample_of(name, sample, folder, options.data).on(options.device, dtype)
    size = MEASURED_BATCH_ON_CPU if torch.device(options.device).type == "cpu" else MEASURED_BATCH
    batches = list(zip(data.images.split(size), data.labels.split(size), strict=True))
    line: dict[str, Any] = {
        "name": name,
        "sample": sample,
        "k": options.k,
        "images": len(data.labels),
        "dtype": options.dtype,
        "rtol": options.rtol,
        "device": torch.cuda.get_device_name() if torch.device(options.device).type == "cuda" else "CPU",
    }
    bounds: Tensor | None = None
    began = time.perf_counter()
    try:
        measured = measure(
            model,
            cross_entropy,
            batches,
            num_eigenvalues=options.k,
            solver=Lanczos(
                rtol=options.rtol,
                max_hvps=options.max_hvps,
                checkpoint=folder / "checkpoints" / f"{name}_{sample}_{options.k}",
            ),
            observer=Watch(f"{name}, {sample}", deadline),
        )
    except OutOfTimeError as error:
        # Estimates from below without bounds, which a later call replaces.
        progress = error.progress
        if progress.ritz_values is None or len(progress.ritz_values) < options.k:
            print(f"{name}, {sample}: the time was over after {progress.num_matvecs} products, too few", flush=True)
            return
        values, rounding = progress.ritz_values.double().cpu(), 0.0
        line |= {"loss": None, "num_hvps": progress.num_matvecs, "stopped": OUT_OF_TIME, "engine": None}
        line |= {"num_converged": progress.num_converged, "missed_probability": None}
    else:
        spectrum = measured.spectrum
        assert spectrum is not None
        values, bounds, rounding = spectrum.eigenvalues, spectrum.error_bounds, spectrum.rounding
        line |= {"loss": measured.loss, "num_hvps": spectrum.num_matvecs, "stopped": spectrum.stopped}
        line |= {"engine": measured.engine, "num_converged": spectrum.num_converged}
        line |= {"missed_probability": spectrum.missed_probability}
    line |= {
        "seconds": round(time.perf_counter() - began, 2),
        "fits": {str(k): fit_with_bounds(values, bounds, rounding, k) for k in fitted_numbers(options.k)},
        "rounding": rounding,
        "eigenvalues": [float(f"{value:.7g}") for value in values.tolist()],
        # Rounded up, so that they stay bounds.
        "error_bounds": None
        if bounds is None
        else [float(UPWARDS.create_decimal_from_float(bound)) for bound in bounds.tolist()],
    }
    # One write, so that a line is whole or missing.
    with (folder / SPECTRA).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
    print(
        f"{name}, {sample}: {line['num_hvps']} products in {line['seconds']} s, {line['num_converged']} of "
        f"{options.k} converged, {line['stopped']}",
        flush=True,
    )


# -- report ------------------------------------------------------------------------------------------


def fit_cell(fit: dict[str, Any] | None) -> str:
    """Slope, fit error, and the verdicts by 1.36/√K and by the critical value of a fitted exponent."""
    if fit is None:
        return ""
    slope, low, high = f"{fit['slope']:.3f}", fit["slope_low"], fit["slope_high"]
    if low is not None and high is not None and f"{low:.3f}" != f"{high:.3f}":
        slope += f" ({low:.3f}–{high:.3f})"
    return f"s {slope}, d {fit['d_ks']:.4f}, {fit['paper']}/{fit['fitted']}"


def shifted_fit(line: dict[str, Any], num_eigenvalues: int) -> dict[str, Any] | None:
    """Fit the spectrum of the loss with its weight decay, which adds the same to each eigenvalue."""
    values = torch.tensor(line["eigenvalues"], dtype=torch.float64) + WEIGHT_DECAY
    bounds = None if line["error_bounds"] is None else torch.tensor(line["error_bounds"], dtype=torch.float64)
    return fit_with_bounds(values, bounds, line["rounding"], num_eigenvalues)


def table_line(line: dict[str, Any], result: dict[str, Any]) -> dict[str, str]:
    cells = {
        "run": line["name"],
        "sample": line["sample"],
        "train loss": f"{result['train_loss']:.3g}",
        "train error": f"{result['train_error']:.4f}",
        "test loss": f"{result['test_loss']:.3g}",
        "test error": f"{result['test_error']:.4f}",
        "products": str(line["num_hvps"]),
        "seconds": f"{line['seconds']:.0f}",
        "stopped": line["stopped"],
    }
    cells |= {f"K = {k}": fit_cell(fit) for k, fit in line["fits"].items()}
    last = line["fits"][str(line["k"])]
    cells[f"K = {line['k']}, H + {WEIGHT_DECAY:g} I"] = fit_cell(shifted_fit(line, line["k"]))
    known = last is not None and last["gap_exponent"] is not None
    cells["gap exponent"] = f"{last['gap_exponent']:.3f}" if known else ""
    return cells


def report(folder: Path) -> str:
    """The table in Markdown, the last line of each spectrum, in the order of the runs."""
    # It reads definitions of studies, for which more packages are needed than for measurements.
    from hessian_callback.studies.results import markdown_table

    latest = {key_of(line): line for line in read_lines(folder)}
    names = list(RUNS)
    lines = []
    for line in sorted(latest.values(), key=lambda line: (line["sample"] == "test", names.index(line["name"]))):
        result = json.loads((folder / f"{line['name']}.json").read_text(encoding="utf-8"))
        lines.append(table_line(line, result))
    return markdown_table([*lines, *PUBLISHED])


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--folder", type=Path, required=True, help="weights, losses and spectra")
    computing = argparse.ArgumentParser(add_help=False, parents=[shared])
    computing.add_argument("names", nargs="+", choices=RUNS, metavar="NAME", help=", ".join(RUNS))
    computing.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    computing.add_argument("--data", default=image_files.FASHION_MNIST_FOLDER, help="folder of the four IDX files")
    training = commands.add_parser("train", parents=[computing])
    training.add_argument("--epochs", type=int, help="fewer epochs than the run has")
    training.add_argument("--images", type=int, help="the first training images alone, of any IDX files")
    measuring = commands.add_parser("measure", parents=[computing])
    measuring.add_argument("--sample", choices=tuple(SAMPLES), required=True)
    measuring.add_argument("--k", type=int, default=1000)
    measuring.add_argument("--dtype", choices=DTYPES, default="float64")
    measuring.add_argument("--rtol", type=float, default=1e-2)
    measuring.add_argument("--max-hvps", type=int, help="products at most; default: ten for each eigenvalue")
    measuring.add_argument("--max-seconds", type=float, default=math.inf, help="of all measurements of this command")
    commands.add_parser("report", parents=[shared])
    options = parser.parse_args(arguments)
    if options.command == "report":
        print(report(options.folder))
        return
    options.folder.mkdir(parents=True, exist_ok=True)
    if options.command == "train":
        arguments_of_all = options.folder, options.data, options.device, options.epochs, options.images
        train_in_turns([train(name, *arguments_of_all) for name in options.names], options.device)
        return
    deadline = time.perf_counter() + options.max_seconds
    for name in options.names:
        if not (options.folder / f"{name}.pt").exists():
            print(f"{name}: not measured, it has no weights; train it first", flush=True)
            continue
        if time.perf_counter() > deadline:
            print(f"{name}: not measured, the time is over", flush=True)
            continue
        measure_run(name, options.folder, options.sample, options, deadline)


if __name__ == "__main__":
    main()
