"""The file of the history: what is written is what is read, whatever happened in between."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hessian_callback.algorithms.density import SpectralDensity
from hessian_callback.algorithms.spectrum import Spectrum
from hessian_callback.measurement.history import FILE_NAME, HistoryError, HistoryWriter, read_histories
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.power_law.fit import fit_power_law
from tests.helpers.lightning import CSVLogger, ModelCheckpoint, TensorBoardLogger
from tests.helpers.toy_runs import loader, measure, seeded, trainer


def measurement(step: int = 3, **options: Any) -> Measurement:
    values = torch.tensor([3.0, math.pi, 0.1 + 0.2, 1e-300]).double().sort(descending=True).values
    spectrum = Spectrum(
        eigenvalues=values,
        error_bounds=values / 300,
        converged=torch.tensor([True, True, True, False]),
        rtol=0.01,
        missed_probability=1e-4,
        num_matvecs=40,
        stopped="max_matvecs",
        rounding=1e-12,
        symmetry_defect=0.0,
        ritz_values=values,
    )
    defaults: dict[str, Any] = {"epoch": 1, "step": step, "when": "step", "reason": None, "seconds": 1 / 3}
    return Measurement(spectrum=spectrum, fit=fit_power_law(values[:3]), **{**defaults, **options})


RICH = measurement(
    loss=math.nan,
    comparisons={"trace": math.inf, "slope_half_1": 0.1},
    not_compared={"norms": "a reason\nof “two” lines"},
    density=SpectralDensity(torch.rand(2, 3).double(), torch.rand(2, 3), size=9, rounding=1e-9, num_matvecs=6),
    groups={"head": measurement(), "mapping": measurement(reason="float: nan")},
)


def histories(folder: Path) -> dict[str, list[Measurement]]:
    return dict(read_histories(folder / FILE_NAME).histories)


def test_everything_comes_back_bit_for_bit(tmp_path: Path) -> None:
    HistoryWriter("a/b").write([tmp_path], [RICH])
    ((prefix, (read,)),) = histories(tmp_path).items()
    assert prefix == "a/b"
    # NaN is not equal to itself.
    assert math.isnan(read.loss or 0.0)
    assert replace(read, loss=1.0) == replace(RICH, loss=1.0)
    assert {part.dtype for part in (read.density.nodes, read.density.weights)} == {torch.float64, torch.float32}  # type: ignore[union-attr]
    # Strict JSON: other languages read it too.
    for line in (tmp_path / FILE_NAME).read_text().splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_each_measurement_is_one_more_line(tmp_path: Path) -> None:
    writer, history = HistoryWriter("h"), []
    for step in range(4):
        history.append(measurement(step))
        writer.write([tmp_path], history)
        assert len((tmp_path / FILE_NAME).read_bytes().splitlines()) == step + 2
    assert histories(tmp_path) == {"h": history}


def test_two_callbacks_share_a_file(tmp_path: Path) -> None:
    one, two = HistoryWriter("one"), HistoryWriter("two")
    a, b, c = measurement(1), measurement(1, reason="failed"), measurement(2)
    one.write([tmp_path], [a])
    two.write([tmp_path], [b])
    one.write([tmp_path, tmp_path], [a, c])
    assert histories(tmp_path) == {"one": [a, c], "two": [b]}


def test_what_an_interrupted_run_measured_beyond_its_checkpoint_does_not_count(tmp_path: Path) -> None:
    kept, lost, again, after = (measurement(step) for step in (1, 2, 3, 4))
    first = HistoryWriter("h")
    first.write([tmp_path], [kept])
    first.write([tmp_path], [kept, lost])
    resumed = HistoryWriter("h")
    restored = Measurement.from_state(kept.to_state())
    resumed.write([tmp_path], [restored, again])
    resumed.write([tmp_path], [restored, again, after])
    assert histories(tmp_path) == {"h": [kept, again, after]}


def test_a_validation_later_on_does_not_displace_the_training(tmp_path: Path) -> None:
    trained = [measurement(1)]
    HistoryWriter("h").write([tmp_path], trained)
    HistoryWriter("h").write([tmp_path], [measurement(1, when="validate")])
    assert histories(tmp_path) == {"h": trained}


@pytest.mark.parametrize("cut", [1, 40])
def test_a_line_that_was_cut_off_is_left_out_and_said(tmp_path: Path, cut: int) -> None:
    writer, path = HistoryWriter("h"), tmp_path / FILE_NAME
    writer.write([tmp_path], [measurement(1)])
    writer.write([tmp_path], [measurement(1), measurement(2)])
    path.write_bytes(path.read_bytes()[:-cut])
    HistoryWriter("other").write([tmp_path], [measurement(7)])
    stored = read_histories(path)
    whole = cut == 1  # Only the line's end was missing.
    assert [m.step for m in stored.histories["h"]][-1] == (2 if whole else 1)
    assert [m.step for m in stored.histories["other"]] == [7]
    assert ("cut off" in " ".join(stored.notes)) is not whole


def test_a_file_that_was_deleted_in_a_run_is_written_whole_again(tmp_path: Path) -> None:
    writer, history = HistoryWriter("h"), [measurement(1)]
    path = tmp_path / "run" / FILE_NAME
    writer.write([path.parent], history)
    for step, harm in enumerate((path.unlink, lambda: shutil.rmtree(path.parent), lambda: path.write_bytes(b"")), 2):
        harm()
        history.append(measurement(step))
        writer.write([path.parent], history)
        assert histories(path.parent) == {"h": history}
    assert list(read_histories(path).notes) == []


def test_every_line_has_the_id_of_its_run(tmp_path: Path) -> None:
    one, two = HistoryWriter("h"), HistoryWriter("h")
    one.write([tmp_path], [measurement(1)])
    two.write([tmp_path], [measurement(2)])
    runs = [json.loads(line)["run"] for line in (tmp_path / FILE_NAME).read_text().splitlines()]
    assert runs == [one.run, one.run, two.run, two.run]
    assert one.run != two.run


def test_two_runs_at_the_same_time_are_told_apart(tmp_path: Path) -> None:
    one, two = HistoryWriter("h"), HistoryWriter("h")
    first, second = [measurement(1)], [measurement(1, reason="failed")]
    for step in (2, 3, 4):
        one.write([tmp_path], first)
        two.write([tmp_path], second)
        first, second = [*first, measurement(step)], [*second, measurement(step, reason="failed")]
    stored = read_histories(tmp_path / FILE_NAME)
    assert dict(stored.histories) == {"h": second[:-1]}
    (note,) = stored.notes
    assert "two runs wrote into this folder at the same time" in note


def test_an_earlier_run_in_the_folder_is_mentioned(tmp_path: Path) -> None:
    earlier = [measurement(step) for step in (1, 2, 3)]
    writer = HistoryWriter("h")
    for length in (1, 2, 3):
        writer.write([tmp_path], earlier[:length])
    HistoryWriter("h").write([tmp_path], [measurement(1, seconds=7.0)])
    stored = read_histories(tmp_path / FILE_NAME)
    assert [m.seconds for m in stored.histories["h"]] == [7.0]
    (note,) = stored.notes
    assert "the folder also holds 1 earlier run(s), with 3 measurement(s), and the last run is shown" in note


def test_measurements_that_a_resumed_run_has_not_made_again_are_mentioned(tmp_path: Path) -> None:
    history = [measurement(step) for step in (1, 2, 3)]
    writer = HistoryWriter("h")
    for length in (1, 2, 3):
        writer.write([tmp_path], history[:length])
    resumed = HistoryWriter("h")
    resumed.write([tmp_path], [history[0], measurement(2)])
    (note,) = read_histories(tmp_path / FILE_NAME).notes
    assert "an earlier process of this run made 3 measurements" in note
    resumed.write([tmp_path], [history[0], measurement(2), measurement(3)])
    assert list(read_histories(tmp_path / FILE_NAME).notes) == []


def test_a_resumed_run_whose_loss_is_nan_is_no_other_run(tmp_path: Path) -> None:
    history = [measurement(1, loss=math.nan)]
    HistoryWriter("h").write([tmp_path], history)
    HistoryWriter("h").write([tmp_path], [*history, measurement(2)])
    assert list(read_histories(tmp_path / FILE_NAME).notes) == []


def test_repeated_lines_are_mentioned(tmp_path: Path) -> None:
    HistoryWriter("h").write([tmp_path], [measurement(1)])
    path = tmp_path / FILE_NAME
    path.write_bytes(path.read_bytes() + path.read_bytes().splitlines(keepends=True)[-1])
    (note,) = read_histories(path).notes
    assert "1 measurement(s) are at the same place of the run as another one" in note


def test_a_file_of_a_release_without_run_ids_is_read(tmp_path: Path) -> None:
    history = [measurement(1), measurement(2)]
    HistoryWriter("h").write([tmp_path], history)
    path = tmp_path / FILE_NAME
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        del line["run"]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    stored = read_histories(path)
    assert (dict(stored.histories), list(stored.notes)) == ({"h": history}, [])
    # Another run of that release, and a resumed one, whose loss is not equal to itself.
    path.write_text(path.read_text() + path.read_text().replace('"seconds": 0.33', '"seconds": 0.44'))
    (note,) = read_histories(path).notes
    assert "the folder also holds 1 earlier run(s), with 2 measurement(s)" in note
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    # Resumed by this release, in the same file.
    HistoryWriter("h").write([tmp_path], [*history, measurement(3)])
    assert [m.step for m in histories(tmp_path)["h"]] == [1, 2, 3]


@pytest.mark.parametrize(
    "line",
    [
        b"{",
        b"9" * 5000,
        b"[" * 100_000,
        b'{"version": 1}',
        b'{"version": 1, "prefix": 3}',
        b'{"version": 1, "prefix": "h", "run": 3}',
        b'{"version": 1, "prefix": "h\xff',
    ],
)
def test_damaged_lines_are_counted(line: bytes, tmp_path: Path) -> None:
    HistoryWriter("h").write([tmp_path], [measurement(1)])
    path = tmp_path / FILE_NAME
    path.write_bytes(line + b"\n" + path.read_bytes() + (line + b"\n") * 9)
    stored = read_histories(path)
    assert [m.step for m in stored.histories["h"]] == [1]
    (note,) = stored.notes
    assert note == f"10 lines of {FILE_NAME} are cut off or damaged, and were left out: 1, 4, 5, 6, 7 and 5 more"


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("spectrum", "mapping", "eigenvalues"), {"tensor": [1.0], "dtype": "load"}),
        (("spectrum", "mapping", "eigenvalues"), {"tensor": [1.0], "dtype": ["float64"]}),
        (("spectrum", "mapping", "eigenvalues"), {"tensor": [[1.0], 2.0], "dtype": "float64"}),
        (("spectrum", "mapping", "eigenvalues"), {"tensor": "text", "dtype": "float64"}),
        (("spectrum", "mapping", "eigenvalues"), {"tensor": [10**400], "dtype": "int64"}),
        (("spectrum", "mapping", "eigenvalues"), {"tensor": [1.0]}),
        (("step",), {"float": "1_0"}),
        (("step",), {"other": 1}),
        (("step",), 10**400),
        (("comparisons",), [1]),
    ],
)
def test_a_value_that_no_release_writes_is_refused(place: tuple[str, ...], value: Any, tmp_path: Path) -> None:
    HistoryWriter("h").write([tmp_path], [measurement(1)])
    path = tmp_path / FILE_NAME
    head, line = path.read_text().splitlines()
    entry = json.loads(line)
    *parents, last = place
    inner = entry["measurement"]["mapping"]
    for name in parents:
        inner = inner[name]
    inner[last] = value
    path.write_text(f"{head}\n{json.dumps(entry)}\n")
    with pytest.raises(HistoryError, match="line 2 is not a measurement as this release reads it") as refused:
        read_histories(path)
    assert len(str(refused.value)) < 500


def test_a_full_disk_is_made_up_for_by_the_next_write(tmp_path: Path) -> None:
    writer, first, second = HistoryWriter("h"), measurement(1), measurement(2)
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where the folder should be")
    with pytest.raises(OSError):
        writer.write([blocked], [first])
    blocked.unlink()
    writer.write([blocked], [first, second])
    assert histories(blocked) == {"h": [first, second]}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"version": 99, "prefix": "h"}', "version 99, and this release reads 1"),
        ("[1, 2]", "version None"),
        (
            '{"version": 1, "prefix": "h", "measurement": {"mapping": {"when": "epoch"}}}',
            "not a measurement as this release reads it",
        ),
    ],
)
def test_other_versions_are_refused_with_a_remedy(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / FILE_NAME
    path.write_text(line + "\n")
    with pytest.raises(HistoryError, match=words) as refused:
        read_histories(path)
    assert "read the folder with the release that wrote it" in str(refused.value)


# -- in a run --------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_resumed_run_in_the_same_folder_is_one_history(tmp_path: Path) -> None:
    def logger() -> TensorBoardLogger:
        return TensorBoardLogger(tmp_path, name="run", version=0)

    saving = ModelCheckpoint(tmp_path, filename="{epoch}", save_top_k=-1)
    first = measure()
    trainer(tmp_path, first, saving, logger=logger(), enable_checkpointing=True).fit(seeded(), loader(), loader())
    folder = tmp_path / "run" / "version_0"
    assert histories(folder) == {"hessian": first.history}
    # On from the first epoch's end, as if the second had been lost.
    resumed = measure()
    (checkpoint,) = tmp_path.glob("epoch=0.ckpt")
    trainer(tmp_path, resumed, logger=logger(), max_epochs=3).fit(seeded(), loader(), loader(), ckpt_path=checkpoint)
    assert [m.step for m in resumed.history] == [0, 6, 12, 18]
    assert histories(folder) == {"hessian": resumed.history}


def test_every_logger_with_files_gets_one_and_warns_of_nothing(
    tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    boards, sheets = TensorBoardLogger(tmp_path, name="board"), CSVLogger(tmp_path, name="sheet")
    callback = measure()
    trainer(tmp_path, callback, logger=[boards, sheets], max_epochs=1).fit(seeded(), loader(), loader())
    for logger in (boards, sheets):
        assert histories(Path(logger.log_dir)) == {"hessian": callback.history}
    assert not [str(w.message) for w in recwarn if "not empty" in str(w.message) or FILE_NAME in str(w.message)]


def test_no_logger_no_file(tmp_path: Path) -> None:
    trainer(tmp_path, measure(), max_epochs=1).fit(seeded(), loader(), loader())
    assert not list(tmp_path.rglob(FILE_NAME))


def test_a_file_that_cannot_be_written_is_warned_of(tmp_path: Path) -> None:
    boards = TensorBoardLogger(tmp_path, name="board")
    (Path(boards.log_dir) / FILE_NAME).mkdir(parents=True)
    callback = measure()
    with pytest.warns(UserWarning, match=f"{FILE_NAME} lacks a measurement for now: IsADirectoryError"):
        trainer(tmp_path, callback, logger=boards, max_epochs=1).fit(seeded(), loader(), loader())
    assert [m.logged for m in callback.history] == [True, True]
