"""The numbers of loggers: which are read, in which order, and which one belongs to a measurement."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.tensorboard import SummaryWriter

from hessian_callback.measurement.measurement import Measurement
from hessian_callback.reports.logged_scalars import LoggedValue, losses_at, read_scalars


def at(step: int, epoch: int, when: Any = "epoch") -> Measurement:
    return Measurement(epoch, step, when, None, None, "not needed", 0.1)


@pytest.mark.parametrize(
    ("history", "values", "expected"),
    [
        # Every second epoch measured.
        ([at(10, 0), at(30, 2)], [(9, 0, 3.0), (19, 1, 2.0), (29, 2, 1.0)], [3.0, 1.0]),
        # Never an older one: nothing was logged in between.
        ([at(10, 0, "step"), at(20, 0, "step")], [(9, 0, 3.0)], [3.0, None]),
        # Never a later one, though two optimizers make the trainer's steps run ahead of the logger's.
        ([at(20, 0), at(40, 1)], [(9, 0, 3.0), (19, 1, 2.0)], [3.0, 2.0]),
        ([at(0, 0, "fit_start")], [(9, 0, 3.0)], [None]),
    ],
)
def test_losses_at_measurements(history: Any, values: Any, expected: Any) -> None:
    logged = [LoggedValue(step, value, epoch) for step, epoch, value in values]
    assert losses_at(history, logged) == expected


def by_scan(history: list[Measurement], values: list[LoggedValue]) -> list[float | None]:
    """The definition, value by value."""
    found, before = [], -1
    for m in history:
        fitting = [v for v in values if v.step <= m.step]
        if m.when == "epoch" and any(v.epoch is not None for v in values):
            fitting = [v for v in fitting if v.epoch == m.epoch]
        else:
            fitting = [v for v in fitting if v.step > before and (v.epoch is None or v.epoch <= m.epoch)]
        found.append(fitting[-1].value if fitting else None)
        before = m.step
    return found


@given(st.data())
def test_losses_are_those_of_the_definition(data: st.DataObject) -> None:
    steps = sorted(data.draw(st.sets(st.integers(0, 20), max_size=10)))
    every = data.draw(st.integers(1, 5))
    values = [LoggedValue(s, float(s), s // every if data.draw(st.booleans()) else None) for s in steps]
    places = sorted(data.draw(st.sets(st.integers(0, 22), max_size=6)))
    history = [at(s, s // every, data.draw(st.sampled_from(["epoch", "step"]))) for s in places]
    assert losses_at(history, values) == by_scan(history, values)


def test_folder_without_logs_has_no_scalars(tmp_path: Path) -> None:
    found = read_scalars(tmp_path)
    assert (dict(found.values), list(found.notes)) == ({}, [])


# -- metrics.csv -------------------------------------------------------------------------------------

TABLE = "epoch,step,val_loss\r\n0,1,0.5\r\n1,3,0.25\r\n"
READ = [LoggedValue(1, 0.5, 0), LoggedValue(3, 0.25, 1)]


def table(folder: Path, data: bytes) -> tuple[dict[str, Any], str]:
    (folder / "metrics.csv").write_bytes(data)
    found = read_scalars(folder)
    return dict(found.values), "; ".join(found.notes)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_encodings(encoding: str, tmp_path: Path) -> None:
    assert table(tmp_path, TABLE.encode(encoding)) == ({"val_loss": READ}, "")


@pytest.mark.parametrize(
    ("row", "note"),
    [
        ("2,5,0.1,7", "1 row(s) of metrics.csv are damaged"),
        ("2,5", "1 row(s) of metrics.csv are damaged"),
        ("2,x,0.1", "1 row(s) of metrics.csv are damaged"),
        ("2,-5,0.1", "1 row(s) of metrics.csv are damaged"),
        ("2,1_0,0.1", "1 row(s) of metrics.csv are damaged"),
        ("2,٣,0.1", "1 row(s) of metrics.csv are damaged"),
        ("2," + "9" * 5000 + ",0.1", "1 row(s) of metrics.csv are damaged"),
        ('2,5,"0.1', "1 row(s) of metrics.csv are damaged"),
        ("2,5,\0", "of metrics.csv"),  # A damaged row for Python 3.10, a cell without a number for later ones.
        ("2,5," + "x" * 200_000, "1 row(s) of metrics.csv are damaged"),
        ("2,5,text", "1 cell(s) of metrics.csv hold no number"),
        ("2,5,True", "1 cell(s) of metrics.csv hold no number"),
        ("2,5,0.1_5", "1 cell(s) of metrics.csv hold no number"),
        ("2,5,1e-", "1 cell(s) of metrics.csv hold no number"),
        ("2,5,٣", "1 cell(s) of metrics.csv hold no number"),
        ("2,5,\xff", "1 cell(s) of metrics.csv hold no number"),
    ],
)
def test_damaged_rows_and_cells_are_counted_and_the_rest_is_read(row: str, note: str, tmp_path: Path) -> None:
    head, *rows = TABLE.splitlines(keepends=True)
    # First, so that an open quotation mark would swallow the others.
    values, notes = table(tmp_path, "".join([head, f"{row}\r\n", *rows]).encode("utf-8", "surrogateescape"))
    assert note in notes
    assert values == {"val_loss": READ}


def test_a_number_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    values, notes = table(tmp_path, TABLE.encode()[:-4])  # 0.25 has become 0.
    assert values == {"val_loss": READ[:1]}
    assert notes == "1 row(s) of metrics.csv are damaged, and were left out"


@pytest.mark.parametrize("epoch", ["inf", "nan", "-1", "1e300", "x", ""])
def test_an_epoch_that_is_none_is_unknown(epoch: str, tmp_path: Path) -> None:
    values, _ = table(tmp_path, f"epoch,step,loss\n{epoch},3,0.5\n".encode())
    assert values == {"loss": [LoggedValue(3, 0.5, None)]}


@pytest.mark.parametrize("data", [b"", b"\0", b"\xff\xfe", b"a,b\n1,2\n", b'"open\n1\n', b"step\n3\n"])
def test_a_table_without_curves(data: bytes, tmp_path: Path) -> None:
    values, _ = table(tmp_path, data)
    assert values == {}


# -- TensorBoard -----------------------------------------------------------------------------------


def events(folder: Path, clock: int, values: dict[int, float], times: Any = None) -> None:
    """A file of events of a process that began at some time of its clock."""
    with SummaryWriter(str(folder), filename_suffix=f".{clock}") as writer:
        writer.add_scalar("hp_metric", -1, 0)
        for number, (step, value) in enumerate(values.items()):
            writer.add_scalar("loss", value, step, walltime=clock + number if times is None else times[number])
    (path,) = folder.glob(f"*.{clock}")
    path.rename(folder / f"events.out.tfevents.{clock:010d}.host.1.0")


def steps_and_values(folder: Path) -> list[tuple[int, float]]:
    return [(value.step, value.value) for value in read_scalars(folder).values["loss"]]


def test_a_clock_that_is_set_back_within_a_file_loses_nothing(tmp_path: Path) -> None:
    events(tmp_path, 1000, {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}, times=[1000, 1001, 5, 6])
    assert steps_and_values(tmp_path) == [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)]


def test_a_resumed_process_replaces_the_steps_that_it_repeats(tmp_path: Path) -> None:
    events(tmp_path, 1000, {0: 4.0, 1: 3.0, 2: 2.0})
    events(tmp_path, 2000, {1: 3.5, 2: 2.5, 3: 1.5})
    assert steps_and_values(tmp_path) == [(0, 4.0), (1, 3.5), (2, 2.5), (3, 1.5)]


def test_a_resume_on_a_machine_whose_clock_is_behind_loses_nothing(tmp_path: Path) -> None:
    events(tmp_path, 2000, {0: 4.0, 1: 3.0, 2: 2.0})
    events(tmp_path, 1000, {1: 3.5, 2: 2.5, 3: 1.5})
    assert steps_and_values(tmp_path) == [(0, 4.0), (1, 3.5), (2, 2.5), (3, 1.5)]
    assert "by a machine whose clock is behind" in "; ".join(read_scalars(tmp_path).notes)


def test_a_damaged_file_of_events_leaves_the_others(tmp_path: Path) -> None:
    events(tmp_path, 1000, {0: 4.0, 1: 3.0})
    (tmp_path / "events.out.tfevents.0000000500.host.1.0").write_bytes(os.urandom(500))
    events(tmp_path, 2000, {2: 2.0, 3: 1.0})
    path = tmp_path / "events.out.tfevents.0000002000.host.1.0"
    path.write_bytes(path.read_bytes()[:-3])
    assert steps_and_values(tmp_path) == [(0, 4.0), (1, 3.0), (2, 2.0)]


class Counting(list[LoggedValue]):
    """Counts how often an entry is looked at."""

    looks = 0

    def __getitem__(self, index: Any) -> Any:
        self.looks += 1
        return super().__getitem__(index)


def test_the_number_of_values_looked_at_is_that_of_the_measurements(tmp_path: Path) -> None:
    values = Counting(LoggedValue(step, 0.5, step // 10) for step in range(10_000))
    history = [at(step, step // 10) for step in range(9, 10_000, 10)]
    assert losses_at(history, values) == [0.5] * len(history)
    assert values.looks == len(history)
