"""The plain loops on Fashion-MNIST: runs, spectra against a dense Hessian, fits within bounds, and the table."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, hessian

ROOT = Path(__file__).parents[2]
if not (ROOT / "benchmarks" / "fashion_thousand.py").exists():
    pytest.skip("the benchmarks are not part of an installed package", allow_module_level=True)

from benchmarks import fashion_thousand as study  # noqa: E402
from benchmarks.reproduction import PAGE, SAVED  # noqa: E402
from hessian_callback.demos import ImageClassifier, ImageData, LeNet  # noqa: E402
from hessian_callback.power_law.eigengaps import fit_eigengaps  # noqa: E402
from hessian_callback.power_law.fit import fit_power_law  # noqa: E402

NUM_IMAGES = 96
K = 10


def tiny() -> nn.Module:
    """Sixteen pixels to ten logits: small enough for a dense Hessian."""
    return nn.Sequential(nn.AvgPool2d(7), nn.Flatten(), nn.Linear(16, 10))


def write_idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    path.write_bytes(bytes([0, 0, 8, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes())


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for part, size in (("train", 1000), ("t10k", 40)):
        # Each image has a scale of its own, so that pooled pixels differ.
        images = random.random((size, 28, 28)) * random.integers(1, 256, (size, 1, 1))
        write_idx(folder / f"{part}-images-idx3-ubyte", images.astype(np.uint8))
        write_idx(folder / f"{part}-labels-idx1-ubyte", (np.arange(size) % 10).astype(np.uint8))
    return folder


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, run in (("tiny_s0", study.Run(network=tiny)), ("tiny_random", study.Run(network=tiny, epochs=0))):
        monkeypatch.setitem(study.RUNS, name, run)


def train(folder: Path, data: Path, *names: str, images: int | None = NUM_IMAGES) -> None:
    options = ["--folder", str(folder), "--data", str(data), "--device", "cpu", "--epochs", "1"]
    study.main(["train", *names, *options, *(() if images is None else ("--images", str(images)))])


def measure(folder: Path, data: Path, *names: str, sample: str = "train10000", **options: object) -> None:
    more = [text for name, value in options.items() for text in (f"--{name.replace('_', '-')}", str(value))]
    paths = ["--folder", str(folder), "--data", str(data), "--device", "cpu"]
    study.main(["measure", *names, *paths, "--sample", sample, "--k", str(K), *more])


def dense_eigenvalues(folder: Path, name: str, images: Tensor, labels: Tensor) -> Tensor:
    model = tiny().double()
    model.load_state_dict(torch.load(folder / f"{name}.pt", weights_only=True))
    weight, bias = (parameter.detach() for parameter in model.parameters())

    def loss(flat: Tensor) -> Tensor:
        values = {"2.weight": flat[: weight.numel()].view_as(weight), "2.bias": flat[weight.numel() :]}
        return nn.functional.cross_entropy(functional_call(model, values, (images.double(),)), labels)

    matrix = hessian(loss)(torch.cat([weight.flatten(), bias]))
    assert isinstance(matrix, Tensor)
    return torch.linalg.eigvalsh(matrix).flip(0)


def test_the_page_has_the_table_of_the_saved_spectra() -> None:
    assert study.report(SAVED / "fashion_thousand") in PAGE.read_text(encoding="utf-8")


@pytest.mark.usefixtures("runs")
def test_train_measure_report(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("tiny_s0", "tiny_random")
    train(tmp_path, data, *names)
    measure(tmp_path, data, *names)
    measure(tmp_path, data, "tiny_s0", sample="test")
    found = json.loads((tmp_path / "tiny_s0.json").read_text())
    assert (found["steps"], found["epochs"], found["cuda_graph"]) == (1, 1, False)
    assert json.loads((tmp_path / "tiny_random.json").read_text())["steps"] == 0
    lines = study.read_lines(tmp_path)
    assert [study.key_of(line) for line in lines] == [
        ("tiny_s0", "train10000", K),
        ("tiny_random", "train10000", K),
        ("tiny_s0", "test", K),
    ]
    training, test = study.read_images(str(data), 0.0, NUM_IMAGES)
    for line in lines:
        sample = test if line["sample"] == "test" else training
        expected = dense_eigenvalues(tmp_path, line["name"], sample.images, sample.labels)[:K]
        values, bounds = (torch.tensor(line[key], dtype=torch.float64) for key in ("eigenvalues", "error_bounds"))
        assert bool(((values - expected).abs() <= bounds + 1e-6 * expected).all())
        assert line["stopped"] == "converged"
    assert lines[0]["loss"] == pytest.approx(found["train_loss"], rel=1e-5)
    assert lines[2]["loss"] == pytest.approx(found["test_loss"], rel=1e-5)

    before = (tmp_path / study.SPECTRA).read_bytes(), (tmp_path / "tiny_s0.pt").read_bytes()
    train(tmp_path, data, *names)
    measure(tmp_path, data, *names)
    assert before == ((tmp_path / study.SPECTRA).read_bytes(), (tmp_path / "tiny_s0.pt").read_bytes())
    files = [path for path in tmp_path.iterdir() if path.is_file()]
    assert sorted(path.suffix for path in files) == [".json", ".json", ".jsonl", ".pt", ".pt"]

    capsys.readouterr()
    study.main(["report", "--folder", str(tmp_path)])
    head, _, *rows = ([cell.strip() for cell in row.split("|")[1:-1]] for row in capsys.readouterr().out.splitlines())
    assert [row[0] for row in rows] == ["tiny_s0", "tiny_random", "tiny_s0", "published, random", "published, SGD"]
    for line, row in zip(lines, rows, strict=False):
        cells = dict(zip(head, row, strict=True))
        values = torch.tensor(line["eigenvalues"], dtype=torch.float64)
        for column, fit in (
            (f"K = {K}", fit_power_law(values)),
            (f"K = {K}, H + 0.0005 I", fit_power_law(values + 5e-4)),
        ):
            assert cells[column].startswith(f"s {fit.slope:.3f}")
            assert f"d {fit.fit_error:.4f}" in cells[column]
        assert cells["gap exponent"] == f"{fit_eigengaps(values).exponent:.3f}"


def test_a_run_has_images_of_its_own(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(study.RUNS, "tiny_few", study.Run(network=tiny, images=16, batch_size=8))
    train(tmp_path, data, "tiny_few", images=None)
    found = json.loads((tmp_path / "tiny_few.json").read_text())
    assert (found["images"], found["steps"]) == (16, 2)
    assert len(study.sample_of("tiny_few", "train5000", tmp_path, str(data)).labels) == 16


def test_a_few_images_of_fashion_mnist_are_checked_as_all_of_them(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study.read_images(str(data), 0.0, 16)
    with pytest.raises(ValueError, match="SHA-256"):
        study.read_images(str(data), 0.0)
    monkeypatch.setattr(study.image_files, "FASHION_MNIST_FOLDER", str(data))
    with pytest.raises(ValueError, match="SHA-256"):
        study.read_images(str(data), 0.0, 16)


@pytest.mark.usefixtures("runs")
def test_measurement_out_of_time_has_no_bounds_and_is_made_again(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train(tmp_path, data, "tiny_s0")
    measure(tmp_path, data, "tiny_s0", max_seconds=0)
    assert study.read_lines(tmp_path) == []

    def stop_late(self: study.Watch, progress: study.LanczosProgress) -> None:
        if progress.ritz_values is not None and len(progress.ritz_values) == K:
            raise study.OutOfTimeError(progress)

    with monkeypatch.context() as patch:
        patch.setattr(study.Watch, "_report", stop_late)
        measure(tmp_path, data, "tiny_s0")
    (stopped,) = study.read_lines(tmp_path)
    assert (stopped["stopped"], stopped["error_bounds"]) == ("max_seconds", None)
    assert stopped["fits"][str(K)]["paper"] == "unproven"
    measure(tmp_path, data, "tiny_s0")
    assert [line["stopped"] for line in study.read_lines(tmp_path)] == ["max_seconds", "converged"]
    assert study.report(tmp_path).count("tiny_s0") == 1


@pytest.mark.parametrize("options", [{}, {"stride": (2, 1)}, {"padding": (2, 1)}, {"bias": False}], ids=str)
def test_a_convolution_by_patches_is_a_convolution(options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 3, (3, 2), **options), nn.Tanh(), nn.Flatten()).double()
    images, weights = torch.randn(4, 2, 6, 5).double(), dict(model.named_parameters())

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, images).square().sum()

    expected = model(images), hessian(loss)(weights)
    study.PatchConvolution.replace_in(model)
    assert isinstance(model[0], study.PatchConvolution)
    torch.testing.assert_close((model(images), hessian(loss)(weights)), expected)


@pytest.mark.parametrize("options", [{"groups": 2}, {"dilation": 2}, {"padding": "same"}, {"padding_mode": "circular"}])
def test_other_convolutions_stay_as_they_are(options: dict[str, Any]) -> None:
    model = nn.Conv2d(2, 2, 3, **{"padding": 1, **options})
    study.PatchConvolution.replace_in(model)
    assert type(model) is nn.Conv2d


@pytest.mark.usefixtures("runs")
def test_small_samples_are_a_part_of_larger_ones(tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, data, "tiny_random")
    monkeypatch.setattr(study, "SAMPLES", {"few": 5, "more": 9, "test": None})
    few, more, test = (study.sample_of("tiny_random", sample, tmp_path, str(data)) for sample in study.SAMPLES)
    assert [len(one.labels) for one in (few, more)] == [5, 9]
    assert torch.equal(few.images, more.images[:5])
    assert torch.equal(few.labels, more.labels[:5])
    assert torch.equal(test.images, study.read_images(str(data), 0.0, NUM_IMAGES)[1].images)


def test_images_and_noise_are_those_of_the_data_module(data: Path) -> None:
    clean, _ = study.read_images(str(data), 0.0, 1000)
    for share in (0.4, 0.8):
        module = ImageData("idx", folder=str(data), label_noise=share)
        module.setup("fit")
        (images, labels), (test_images, test_labels) = (
            (part.images, part.labels) for part in (module._train, module._test) if part is not None
        )
        training, test = study.read_images(str(data), share, 1000)
        torch.testing.assert_close(training.images, images)
        torch.testing.assert_close(test.images, test_images)
        assert torch.equal(training.labels, labels)
        assert torch.equal(test.labels, test_labels)
        # A draw hits the old label once in ten times.
        assert float((training.labels != clean.labels).float().mean()) == pytest.approx(0.9 * share, abs=0.03)


def test_steps_are_those_of_the_recipe(tmp_path: Path, data: Path) -> None:
    run = study.Run(seed=3, batch_size=40)
    training, _ = study.read_images(str(data), 0.0, 100)
    torch.manual_seed(0)
    model = run.network()
    expected = LeNet()
    expected.load_state_dict(model.state_dict())
    outcome = []

    def steps() -> Iterator[None]:
        outcome.append((yield from study.fit_network("run", model, training, run, epochs=3, device="cpu")))

    assert len(list(steps())) == 9
    assert outcome == [(9, False)]
    optimizer = ImageClassifier(expected).optimizer(expected.parameters())
    assert isinstance(optimizer, torch.optim.SGD)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [round(0.4 * 9), round(0.8 * 9)], 0.1)
    order = torch.Generator().manual_seed(3)
    for _ in range(3):
        for chosen in torch.randperm(100, generator=order).split(40):
            optimizer.zero_grad()
            study.cross_entropy(expected, (training.images[chosen], training.labels[chosen])).backward()
            optimizer.step()
            scheduler.step()
    for one, other in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_warm_up_and_capture_leave_the_run_as_it_is(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], fails: bool
) -> None:
    """With a stand-in for CUDA graphs: a replay repeats the captured step at the rate of its capture."""
    training, _ = study.read_images(str(data), 0.0, 90)
    captured: list[float] = []

    class Graph:
        def replay(self) -> None:
            assert steps._optimizer.param_groups[0]["lr"] == captured[-1]
            # A graph writes its gradients anew.
            steps._eager_step(steps._chosen)

    @contextmanager
    def capture(graph: Graph, stream: object) -> Iterator[None]:
        if fails:
            raise RuntimeError("operation not permitted")
        state = [value.detach().clone() for value in model.parameters()], [value.clone() for value in steps._buffers()]
        assert all(value.grad is None for value in model.parameters())
        yield
        captured.append(steps._optimizer.param_groups[0]["lr"])
        steps._restore(*state)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    finals = []
    for graphed in (False, True):
        torch.manual_seed(0)
        model = tiny()
        steps = study.Steps(model, training, 40, graphed=graphed)
        for number in range(9):
            if number in (3, 6):
                steps.set_rate(0.1 ** (1 + number // 3))
            # Every third batch is smaller.
            steps.take(torch.arange(40 * (number % 3), min(90, 40 * (number % 3) + 40)))
        finals.append([value.detach() for value in model.parameters()])
    for one, other in zip(*finals, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
    assert captured == ([] if fails else pytest.approx([0.1, 0.01, 0.001]))
    assert steps.is_graphed != fails
    assert ("no CUDA graph (operation not permitted)" in capsys.readouterr().out) == fails


def test_seeds_share_initial_weights_with_their_random_run(tmp_path: Path, data: Path) -> None:
    train(tmp_path, data, "random_s1", images=16)
    saved = torch.load(tmp_path / "random_s1.pt", weights_only=True)
    torch.manual_seed(study.RUNS["sgd_s1"].seed)
    for name, value in LeNet().state_dict().items():
        assert torch.equal(saved[name], value)


def test_interval_of_the_fit_error_holds_the_errors_of_spectra_within_the_bounds() -> None:
    random = np.random.default_rng(0)
    values = np.arange(1, 61) ** -1.1
    bounds = 0.02 * values * random.random(60)
    found = study.fit_with_bounds(torch.from_numpy(values), torch.from_numpy(bounds), 0.0, 60)
    assert found is not None
    errors, slopes = [found["d_ks"]], [found["slope"]]
    for _ in range(200):
        fit = fit_power_law(np.sort(values + bounds * random.random(60)))
        errors.append(fit.fit_error)
        slopes.append(fit.slope)
    assert found["d_ks_low"] <= min(errors) <= max(errors) <= found["d_ks_high"]
    assert found["slope_low"] <= min(slopes) <= max(slopes) <= found["slope_high"]
    assert found["d_ks_high"] - found["d_ks_low"] < 0.1
    exact = study.fit_with_bounds(torch.from_numpy(values), torch.zeros(60, dtype=torch.float64), 0.0, 60)
    assert exact is not None
    assert exact["d_ks_low"] == pytest.approx(exact["d_ks"])
    assert exact["d_ks_high"] == pytest.approx(exact["d_ks"])
    assert study.fit_with_bounds(torch.from_numpy(values), torch.from_numpy(0.1 * values), 0.0, 60) is None


def test_verdicts() -> None:
    assert [study.verdict(*interval, 0.1) for interval in ((0.0, 0.05), (0.2, 0.3), (0.05, 0.2), (None, None))] == [
        "accepted",
        "rejected",
        "undecided",
        "unproven",
    ]


def test_measuring_does_not_import_lightning() -> None:
    code = "import sys, benchmarks.fashion_thousand; print([m for m in sys.modules if 'lightning' in m.split('.')[0]])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
