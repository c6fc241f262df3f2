"""The texts of the studies: where they come from, how they are cut, and a run that measures on them."""

from __future__ import annotations

import hashlib
import math
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from torch import Tensor, nn

from hessian_callback.demos import TextData
from hessian_callback.demos.texts import TextWindows, read_text
from hessian_callback.measurement.samples import collect
from tests.helpers.lightning import LightningModule, seed_everything
from tests.helpers.toy_runs import measure, trainer

# Every character once: a window's place can be read off any of its characters.
UNIQUE = "".join(chr(0x4E00 + number) for number in range(1000))


@pytest.fixture
def unique(tmp_path: Path) -> str:
    path = tmp_path / "unique.txt"
    path.write_text(UNIQUE, encoding="utf-8")
    return str(path)


def ready(source: str, **options: Any) -> TextData:
    data = TextData(source, **{"context_length": 8, "batch_size": 4, **options})
    data.setup("fit")
    return data


def windows(loader: Any) -> TextWindows:
    assert isinstance(loader.dataset, TextWindows)
    return loader.dataset


def characters_of(part: TextWindows) -> set[int]:
    return {int(code) for index in range(len(part)) for tensor in part[index] for code in tensor}


# -- sources -----------------------------------------------------------------------------------------


def test_help_texts_are_all_there_in_the_order_of_their_names() -> None:
    remaining = read_text("pydoc_topics")
    for name in sorted(topics):
        assert remaining.startswith(topics[name])
        remaining = remaining[len(topics[name]) :]
    assert remaining == ""


def test_file_is_read_with_its_checksum(tmp_path: Path) -> None:
    text = "déjà vu\n\n  für 3 €\t– 語\n"
    path = tmp_path / "text"
    path.write_bytes(text.encode())
    assert read_text(str(path)) == text
    assert TextData(str(path)).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_ends_of_lines_are_the_same_on_every_system(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"one\r\ntwo\r\n")
    assert read_text(str(tmp_path / "text")) == "one\ntwo\n"


def test_unreadable_files_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file .*nowhere.* 'pydoc_topics', 'bible_kjv' or the path"):
        read_text(str(tmp_path / "nowhere"))
    (tmp_path / "latin").write_bytes("für".encode("latin-1"))
    with pytest.raises(ValueError, match=r"latin is not in UTF-8.*convert it"):
        read_text(str(tmp_path / "latin"))
    (tmp_path / "empty").touch()
    with pytest.raises(ValueError, match=r"empty is empty"):
        read_text(str(tmp_path / "empty"))


def has_bible() -> bool:
    command = shutil.which("bible")
    return command is not None and not subprocess.run([command, "Gen1:1"], capture_output=True, check=False).returncode


@pytest.mark.skipif(not has_bible(), reason="bible-kjv and bible-kjv-text are not installed")
def test_bible_of_debian_passes_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The command would rather take this one.
    (tmp_path / "bible.data").write_bytes(b"another")
    monkeypatch.chdir(tmp_path)
    verses = read_text("bible_kjv").splitlines()
    assert len(verses) == 31102
    assert verses[0] == "In the beginning God created the heaven and the earth."
    assert verses[-1] == "The grace of our Lord Jesus Christ be with you all. Amen."


@pytest.mark.parametrize(
    ("script", "error", "message"),
    [
        (None, FileNotFoundError, r"not installed: apt-get install bible-kjv bible-kjv-text"),
        ("echo no data >&2; exit 255", FileNotFoundError, r"finds no text \(no data\): apt-get install"),
        ("echo Ge1:1 In the end", ValueError, r"SHA-256.*save the text to a file"),
    ],
)
@pytest.mark.skipif(sys.platform == "win32", reason="the made command is a shell script")
def test_missing_and_other_bibles_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str | None, error: type[Exception], message: str
) -> None:
    if script is not None:
        (tmp_path / "bible").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bible").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(error, match=message):
        read_text("bible_kjv")


# -- characters --------------------------------------------------------------------------------------


def test_codes_are_places_in_the_vocabulary_and_lead_back() -> None:
    data = TextData()
    assert list(data.vocabulary) == sorted(set(data.text))
    assert data.vocab_size == len(set(data.text))
    codes = data.encode(data.text)
    assert codes.dtype == torch.int64
    assert codes.unique().tolist() == list(range(data.vocab_size))
    assert codes[:500].tolist() == [data.vocabulary.index(character) for character in data.text[:500]]
    assert data.decode(codes) == data.text
    assert data.decode([0, 1]) == data.vocabulary[:2]


def test_vocabulary_has_the_held_out_characters_too(unique: str) -> None:
    data = ready(unique, val_fraction=0.5, train_characters=20)
    assert data.vocabulary == UNIQUE


@pytest.mark.parametrize("stranger", ["\0", "\U0001f600", "~"])
def test_unknown_characters_are_named(unique: str, stranger: str) -> None:
    with pytest.raises(ValueError, match=r"don't occur in the text") as caught:
        TextData(unique).encode(UNIQUE[0] + stranger)
    assert repr(stranger) in str(caught.value)


# -- windows -----------------------------------------------------------------------------------------


def test_targets_are_the_inputs_shifted_by_one(unique: str) -> None:
    data = ready(unique)
    for loader in (data.train_dataloader(), data.val_dataloader()):
        batches = list(loader)
        for inputs, targets in batches:
            assert (inputs.dtype, targets.dtype) == (torch.int64, torch.int64)
            assert inputs.shape[1] == targets.shape[1] == 8
            # The vocabulary is the text itself, so that codes count up along it.
            assert torch.equal(targets, inputs + 1)
            assert torch.equal(inputs, inputs[:, :1] + torch.arange(8))


def test_training_windows_begin_anywhere_and_none_reaches_the_end_of_the_text(unique: str) -> None:
    data = ready(unique)
    train, held_out = windows(data.train_dataloader()), windows(data.val_dataloader())
    assert [int(train[index][0][0]) for index in range(len(train))] == list(range(900 - 8))
    assert characters_of(train) == set(range(900))
    # 12 windows of 8 leave 4 characters, one of which is the last window's target.
    assert [int(held_out[index][0][0]) for index in range(len(held_out))] == list(range(900, 900 + 12 * 8, 8))
    assert characters_of(held_out) == set(range(900, 900 + 12 * 8 + 1))


@pytest.mark.parametrize(("held_out", "expected"), [(32, 3), (33, 4), (40, 4), (41, 5)])
def test_last_held_out_window_needs_its_last_target(tmp_path: Path, held_out: int, expected: int) -> None:
    (tmp_path / "text").write_text(UNIQUE[: 2 * held_out], encoding="utf-8")
    data = ready(str(tmp_path / "text"), val_fraction=0.5)
    assert len(windows(data.val_dataloader())) == expected


@pytest.mark.parametrize("number", [1, 5, 12])
def test_chosen_held_out_windows_are_evenly_spaced(unique: str, number: int) -> None:
    everything = windows(ready(unique).val_dataloader()).starts.tolist()
    starts = windows(ready(unique, val_sequences=number).val_dataloader()).starts.tolist()
    assert len(set(starts)) == number
    assert set(starts) <= set(everything)
    gaps = {later - earlier for earlier, later in pairwise(starts)}
    assert not gaps or max(gaps) - min(gaps) <= 8


def test_few_training_characters_are_the_first(unique: str) -> None:
    data = ready(unique, train_characters=50)
    assert characters_of(windows(data.train_dataloader())) == set(range(50))
    assert characters_of(windows(data.val_dataloader())) == set(range(900, 997))


@pytest.mark.parametrize(("steps", "expected"), [(None, math.ceil(900 / 32)), (3, 3), (500, 500)])
def test_epoch_has_the_steps_asked_for_or_one_reading_of_the_text(
    unique: str, steps: int | None, expected: int
) -> None:
    loader = ready(unique, steps_per_epoch=steps).train_dataloader()
    assert len(loader) == expected
    assert [len(inputs) for inputs, _ in loader] == [4] * expected


def test_windows_follow_the_run_seed_and_the_held_out_ones_do_not(unique: str) -> None:
    def batches(seed: int, part: str) -> Tensor:
        seed_everything(seed, verbose=False)
        return torch.cat([inputs for inputs, _ in getattr(ready(unique), f"{part}_dataloader")()])

    assert torch.equal(batches(1, "train"), batches(1, "train"))
    assert not torch.equal(batches(1, "train"), batches(2, "train"))
    assert torch.equal(batches(1, "val"), batches(2, "val"))


def test_second_setup_keeps_the_windows(unique: str) -> None:
    data = ready(unique)
    before = windows(data.train_dataloader())
    data.setup("validate")
    assert windows(data.train_dataloader()) is before


# -- a run -------------------------------------------------------------------------------------------


def test_the_callback_collects_windows_of_the_whole_training_part(unique: str) -> None:
    loader = ready(unique, steps_per_epoch=1).train_dataloader()
    chosen = collect(loader, num_samples=300)
    assert chosen.indices is not None
    assert len(set(chosen.indices)) == 300
    assert torch.cat([inputs[:, 0] for inputs, _ in chosen.batches]).tolist() == list(chosen.indices)
    assert all(torch.equal(targets, inputs + 1) for inputs, targets in chosen.batches)


class Bigrams(LightningModule):
    """Predicts a character from the one before it."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.logits = nn.Embedding(vocab_size, vocab_size)
        nn.init.zeros_(self.logits.weight)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        inputs, targets = batch
        return nn.functional.cross_entropy(self.logits(inputs).flatten(0, 1), targets.flatten())

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=0.1)


def test_a_run_trains_and_measures_on_the_training_windows(tmp_path: Path) -> None:
    seed_everything(0, verbose=False)
    data = TextData(steps_per_epoch=30, val_sequences=32)
    callback = measure(dataloader="train", num_samples=64, num_eigenvalues=5, rtol=0.1)
    run = trainer(tmp_path, callback, max_epochs=1)
    run.fit(Bigrams(data.vocab_size), datamodule=data)
    assert run.global_step == 30
    assert callback.history[-1].fit is not None
    # The uniform guess is the start.
    assert run.callback_metrics["val_loss"] < math.log(data.vocab_size) - 1


def test_the_command_line_understands_the_options(unique: str) -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(TextData, "data")
    parsed = parser.parse_args([f"--data.source={unique}", "--data.train_characters=50", "--data.context_length=8"])
    data = TextData(**parsed.data.as_dict())
    data.setup("fit")
    assert len(windows(data.train_dataloader())) == 42


# -- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["context_length", "batch_size", "eval_batch_size", "train_characters", "steps_per_epoch", "val_sequences"]
)
def test_counts_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        TextData(**{name: 0})  # type: ignore[arg-type]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, math.nan])
def test_impossible_split_is_refused(fraction: float) -> None:
    with pytest.raises(ValueError, match="val_fraction must lie between 0 and 1"):
        TextData(val_fraction=fraction)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_characters": 901}, "only 900 are not held out"),
        ({"train_characters": 8}, "training part has 8 characters, and one window and its last target take 9"),
        ({"context_length": 100}, "held-out part has 100 characters, and one window and its last target take 101"),
        ({"val_sequences": 13}, "the held-out part has 12 windows"),
    ],
)
def test_more_text_than_there_is_is_refused(unique: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ready(unique, **options)


def test_shortest_text_that_will_do_gives_one_window_each(tmp_path: Path) -> None:
    (tmp_path / "text").write_text(UNIQUE[:18], encoding="utf-8")
    data = ready(str(tmp_path / "text"), val_fraction=0.5)
    assert len(windows(data.train_dataloader())) == len(windows(data.val_dataloader())) == 1


def test_loader_before_setup_says_what_to_call() -> None:
    for part in ("train", "val"):
        with pytest.raises(RuntimeError, match=r"call setup\('fit'\)"):
            getattr(TextData(), f"{part}_dataloader")()
