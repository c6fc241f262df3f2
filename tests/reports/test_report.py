"""The report of real runs: what is on the page and in the CSV is what was measured and logged."""

from __future__ import annotations

import csv
import html
import os
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hessian_callback.measurement.history import FILE_NAME, HistoryError, HistoryWriter, read_histories
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.reports.report import ReportFiles, main, write_report
from hessian_callback.reports.run_files import find_runs
from hessian_callback.reports.run_tables import correlations, tabulate
from tests.helpers.browser import browser, console_errors  # noqa: F401
from tests.helpers.lightning import CSVLogger, ModelCheckpoint, TensorBoardLogger
from tests.helpers.toy_runs import loader, measure, seeded, trainer

_REFERENCE = re.compile(
    r"(?:\b(?:src|href|action|data|poster)\s*=\s*[\"'](?!#|data:,)|url\((?!#)|@import|<script|<iframe)"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """board: TensorBoard, interrupted after two epochs and resumed; sheet: CSV, the same K; small: another K."""
    root = tmp_path_factory.mktemp("runs")

    def board() -> TensorBoardLogger:
        return TensorBoardLogger(root, name="board", version=0)

    saving = ModelCheckpoint(root / "board" / "version_0" / "checkpoints", save_top_k=-1, filename="{epoch}")
    fit(root, measure(), saving, logger=board(), enable_checkpointing=True, max_epochs=3)
    checkpoint = root / "board" / "version_0" / "checkpoints" / "epoch=1.ckpt"
    fit(root, measure(), logger=board(), max_epochs=6, ckpt_path=checkpoint)
    fit(root, measure(), logger=CSVLogger(root, name="sheet"), max_epochs=2, seed=2)
    fit(root, measure(num_eigenvalues=3), logger=CSVLogger(root, name="small"), max_epochs=1)
    return root


def fit(root: Path, *callbacks: Any, ckpt_path: Any = None, seed: int = 1, **options: Any) -> None:
    trainer(root, *callbacks, **options).fit(seeded(seed=seed), loader(), loader(seed=3), ckpt_path=ckpt_path)


def at(step: int, epoch: int, when: Any = "epoch") -> Measurement:
    return Measurement(epoch, step, when, None, None, "not needed", 0.1)


def report(tmp_path: Path, *folders: Path, **options: Any) -> tuple[ReportFiles, str]:
    written = write_report(folders, tmp_path / "report.html", **options)
    return written, written.html.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def board(runs: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportFiles, str]:
    """The report of the resumed run."""
    return report(tmp_path_factory.mktemp("report"), runs / "board" / "version_0")


def history_of(folder: Path) -> list[Measurement]:
    return read_histories(folder / FILE_NAME).histories["hessian"]


def rows_of(written: ReportFiles) -> list[dict[str, str]]:
    with written.csv.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


# -- one run ---------------------------------------------------------------------------------------


def test_csv_read_back_is_the_history(runs: Path, board: tuple[ReportFiles, str]) -> None:
    written, _ = board
    history = history_of(runs / "board" / "version_0")
    rows = rows_of(written)
    assert [m.step for m in history] == [0, 6, 12, 18, 24, 30, 36]
    for row, m in zip(rows, history, strict=True):
        assert (int(row["step"]), int(row["epoch"]), row["when"]) == (m.step, m.epoch, m.when)
        for column, value in {
            "slope": m.slope,
            "slope_stderr": m.slope_stderr,
            "fit_error": m.fit_error,
            "lambda_max": m.lambda_max,
            "held_out_loss": m.loss,
            "seconds": m.seconds,
        }.items():
            assert value is not None
            assert float(row[column]) == value, column


def test_losses_of_a_resumed_run_are_those_of_its_events(runs: Path) -> None:
    folder = runs / "board" / "version_0"
    (run,) = find_runs([folder])
    table = tabulate(run)
    assert (table.validation_name, table.training_name) == ("val_loss", "train_loss_epoch")
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0}, purge_orphaned_data=False)
    board.Reload()
    newest = {event.step: event.value for event in board.Scalars("val_loss")}  # Later files replace earlier ones.
    assert table.validation[0] is None
    assert table.validation[1:] == [newest[m.step - 1] for m in run.history[1:]]


def test_page_stands_alone_and_shows_the_numbers(runs: Path, board: tuple[ReportFiles, str]) -> None:
    _, page = board
    assert not _REFERENCE.search(page)
    for m in history_of(runs / "board" / "version_0"):
        assert f"<td>{m.slope:.3f}</td>" in page
        assert f"<td>{m.fit_error:.3f}</td>" in page
    assert page.count("<svg") == 4
    assert "log(step) (baseline)" in page


def test_page_opens_from_disk_without_a_complaint(
    runs: Path,
    board: tuple[ReportFiles, str],
    browser: Any,  # noqa: F811
) -> None:
    written, _ = board
    browser.get(written.html.as_uri())
    assert console_errors(browser) == []
    text = browser.find_element("tag name", "body").text
    for m in history_of(runs / "board" / "version_0"):
        assert f"{m.slope:.3f}" in text
    widths = browser.execute_script("return [...document.querySelectorAll('svg')].map(s => s.clientWidth)")
    assert len(widths) == 4
    assert min(widths) > 300
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def test_first_measurement_is_not_correlated(runs: Path) -> None:
    (run,) = find_runs([runs / "board" / "version_0"])
    found = {c.statistic: c for c in correlations(tabulate(run))}
    assert {c.num for c in found.values()} == {6}
    losses = tabulate(run).validation[1:]
    if losses == sorted(losses, reverse=True):  # type: ignore[type-var]
        assert found["log(step)"].spearman == pytest.approx(-1)


def test_run_without_tensorboard(runs: Path, tmp_path: Path) -> None:
    written, page = report(tmp_path, runs / "sheet" / "version_0")
    rows = rows_of(written)
    with (runs / "sheet" / "version_0" / "metrics.csv").open(newline="") as file:
        logged = [row["val_loss"] for row in csv.DictReader(file) if row["val_loss"]]
    assert [row["validation_loss"] for row in rows] == ["", *(repr(float(value)) for value in logged)]
    assert "needs at least 5 pairs" in page


def test_checkpoint_takes_the_place_of_the_file(runs: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    shutil.copy(runs / "board" / "version_0" / "checkpoints" / "epoch=1.ckpt", folder / "checkpoints")
    (run,) = find_runs([folder])
    assert list(run.history) == history_of(runs / "board" / "version_0")[:3]
    _, page = report(tmp_path, folder)
    assert "up to the checkpoint epoch=1.ckpt" in page
    assert "the mean loss over the held-out samples is used" in page


def test_failed_measurements_are_listed_with_their_reason_and_escaped(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    failed = Measurement(1, 5, "epoch", None, None, "a <b>bad</b> loss", 0.1)
    HistoryWriter("hessian").write([folder], [failed])
    _, page = report(tmp_path, folder)
    assert "not logged: a &lt;b&gt;bad&lt;/b&gt; loss" in page


# -- several runs ------------------------------------------------------------------------------------


def test_runs_of_one_k_are_compared_and_another_k_is_not(runs: Path, tmp_path: Path) -> None:
    written, page = report(tmp_path, runs)
    assert (written.num_runs, written.num_measurements) == (3, 7 + 3 + 2)
    assert "2 runs compared: hessian, K = 4" in page
    assert re.search(r"cannot be compared.*small/version_0 \(hessian, K = 3\)", page)
    # At the last step of the shorter one.
    board, sheet = (history_of(runs / name / "version_0") for name in ("board", "sheet"))
    assert "At the last step that all have reached (12)" in page
    assert page.index(f"<td>{board[2].slope:.3f}</td>") < page.index("Rank correlations across the runs")
    assert f"<td>{sheet[2].slope:.3f}</td>" in page
    assert not _REFERENCE.search(page)


# -- hostile folders -------------------------------------------------------------------------------------


class Foreign:
    """A class that a checkpoint must not be able to load."""


@pytest.fixture
def whole(tmp_path: Path) -> Path:
    """A folder of runs with one that can be read."""
    HistoryWriter("hessian").write([tmp_path / "runs" / "whole"], [at(5, 0), at(10, 1)])
    return tmp_path / "runs"


@pytest.mark.parametrize(
    "content",
    [
        {"callbacks": {"x": np.float64(1.0)}},
        {"callbacks": {"x": Foreign()}},
        b"",
        b"PK\x03\x04 cut off",
        os.urandom(1000),
    ],
    ids=["numpy", "object", "empty", "cut", "random"],
)
def test_an_unreadable_checkpoint_leaves_the_other_runs(content: Any, whole: Path, tmp_path: Path) -> None:
    broken = whole / "broken" / "checkpoints"
    broken.mkdir(parents=True)
    if isinstance(content, bytes):
        (broken / "a.ckpt").write_bytes(content)
    else:
        torch.save(content, broken / "a.ckpt")
    written, page = report(tmp_path, whole)
    (reason,) = written.left_out
    assert written.num_runs == 1
    assert "a.ckpt can&#39;t be read as a checkpoint" in page
    assert "a.ckpt can't be read as a checkpoint" in reason
    with pytest.raises(HistoryError, match=r"a\.ckpt can't be read"):
        find_runs([whole])


@pytest.mark.parametrize(
    "content",
    [[1], {"callbacks": [1]}, {"callbacks": {3: {"version": 1}}}, {"callbacks": {"PowerLaw{'": {"version": 1}}}],
)
def test_a_checkpoint_of_another_kind_is_no_run(content: Any, whole: Path, tmp_path: Path) -> None:
    (whole / "other").mkdir()
    torch.save(content, whole / "other" / "a.ckpt")
    written, _ = report(tmp_path, whole)
    assert (written.num_runs, list(written.left_out)) == (1, [])


def test_an_older_checkpoint_takes_the_place_of_one_that_was_cut_off(runs: Path, tmp_path: Path) -> None:
    source = runs / "board" / "version_0" / "checkpoints" / "epoch=1.ckpt"
    shutil.copy(source, tmp_path / "old.ckpt")
    os.utime(tmp_path / "old.ckpt", (1, 1))
    (tmp_path / "new.ckpt").write_bytes(source.read_bytes()[:1000])
    (run,) = find_runs([tmp_path])
    assert run.source.name == "old.ckpt"


@pytest.mark.parametrize("line", ['{"version": 2}', "[]", '{"version": 1, "prefix": "h", "measurement": 3}'])
def test_a_bad_history_leaves_the_other_runs(line: str, whole: Path, tmp_path: Path) -> None:
    (whole / "bad").mkdir()
    (whole / "bad" / FILE_NAME).write_text(line + "\n")
    written, page = report(tmp_path, whole)
    assert (written.num_runs, len(written.left_out)) == (1, 1)
    assert "left out: " in page
    # Alone, it is an error.
    with pytest.raises(HistoryError, match="read the folder with the release that wrote it"):
        report(tmp_path, whole / "bad")


def test_a_hundred_thousand_damaged_lines_make_one_note(whole: Path, tmp_path: Path) -> None:
    with (whole / "whole" / FILE_NAME).open("ab") as file:
        file.write(b"{\n" * 100_000)
    _, page = report(tmp_path, whole / "whole")
    assert "100000 lines of hessian_history.jsonl are cut off or damaged, and were left out: 4, 5, 6, 7, 8 and" in page
    assert len(page) < 100_000


def test_a_long_reason_is_cut(tmp_path: Path) -> None:
    HistoryWriter("hessian").write([tmp_path], [Measurement(1, 5, "epoch", None, None, "x" * 1_000_000, 0.1)] * 3)
    _, page = report(tmp_path, tmp_path)
    assert "… (1000000 characters)" in page
    assert len(page) < 100_000


def test_a_long_history_shows_its_last_rows(tmp_path: Path) -> None:
    HistoryWriter("hessian").write([tmp_path], [at(step, step) for step in range(1, 3001)])
    written, page = report(tmp_path, tmp_path)
    assert len(rows_of(written)) == 3000
    assert "The last measurements; 2500 earlier ones are in report.csv" in page
    assert "<td>epoch 3000</td>" in page
    assert "<td>epoch 2500</td>" not in page


@pytest.mark.parametrize("name", ["$\\frac$", "$x", "a & <b>", "_hidden", 'quo"te', "ü\u202e"])
def test_names_of_runs_and_curves_are_shown_as_they_are(name: str, runs: Path, tmp_path: Path) -> None:
    for folder in (name, "other"):
        shutil.copytree(runs / "sheet" / "version_0", tmp_path / "all" / folder)
        table = (tmp_path / "all" / folder / "metrics.csv").read_text()
        quoted = '"' + name.replace('"', '""') + '"'
        (tmp_path / "all" / folder / "metrics.csv").write_text(table.replace("val_loss", quoted))
    _, page = report(tmp_path, tmp_path / "all", val_loss=name)
    assert not _REFERENCE.search(page)
    assert f"{html.escape(name)} of several runs over the optimizer steps" in html.unescape(page).replace(
        name, html.escape(name)
    )
    assert "<b>" not in re.sub(r"<b>[\d.]+( s)?</b>|<b>none</b>", "", page)
    Attributes(page)


class Attributes(HTMLParser):
    """Checks that no attribute begins within another one's value."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.labels: list[str] = []
        self.feed(page)
        assert self.labels

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "svg":
            found = dict(attrs)
            assert found.keys() <= {"role", "aria-label", "xmlns", "xmlns:xlink", "version", "viewbox"}, found
            self.labels.append(found["aria-label"] or "")


def test_a_folder_whose_name_is_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/run\xff"))
    try:
        HistoryWriter("hessian").write([folder], [at(5, 0)])
    except OSError:
        pytest.skip("this file system takes UTF-8 only")
    written, page = report(tmp_path, folder)
    assert "run\ufffd" in page
    assert rows_of(written)[0]["run"].endswith("run\ufffd")
    main([str(folder)])
    assert "run\\udcff/hessian_report.html" in capsys.readouterr().out


def test_the_output_replaces_links_and_does_not_follow_them(whole: Path, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("precious")
    folder = whole / "whole"
    for name in ("hessian_report.html", "hessian_report.csv"):
        (folder / name).symlink_to(precious)
    written = write_report([folder])
    assert precious.read_text() == "precious"
    assert not written.html.is_symlink()
    assert written.html.read_text().startswith("<!DOCTYPE html>")
    assert sorted(path.name for path in folder.iterdir()) == [FILE_NAME, "hessian_report.csv", "hessian_report.html"]


def test_an_output_that_cannot_be_written_is_one_sentence(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(SystemExit) as stopped:
        main([str(whole), "--output", str(tmp_path / "page.html")])
    assert stopped.value.code == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
    assert not list(tmp_path.glob(".*"))


# -- words -------------------------------------------------------------------------------------------


def test_command_prints_where_the_files_are(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main([str(runs / "sheet" / "version_0"), "--output", str(tmp_path / "a" / "page.html")])
    assert f"report: {tmp_path}/a/page.html" in capsys.readouterr().out
    assert (tmp_path / "a" / "page.csv").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/nowhere"], "no such folder: .*nowhere. Give the folder of a run"),
        (["{tmp}"], "holds no measurement of the Hessian.*Train with PowerLawHessianCallback"),
        (["{runs}/sheet/version_0", "--val_loss", "nll"], "--val_loss nll: .* has no such curve.*wrote .*val_loss"),
        (["{runs}/sheet/version_0", "-o", "{tmp}/page.pdf"], "must end in .html"),
    ],
)
def test_errors_are_one_sentence_with_the_remedy_and_exit_code_2(
    runs: Path, tmp_path: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([argument.format(tmp=tmp_path, runs=runs) for argument in arguments])
    assert stopped.value.code == 2
    text = capsys.readouterr().err
    assert re.match(f"hessian-callback report: .*{words}", text)
    assert len(text.splitlines()) == 1


def test_state_of_another_version_is_refused(runs: Path, tmp_path: Path) -> None:
    content = torch.load(runs / "board" / "version_0" / "checkpoints" / "epoch=1.ckpt", weights_only=True)
    (key,) = [key for key in content["callbacks"] if key.startswith("PowerLaw")]
    content["callbacks"][key]["version"] = 0
    torch.save(content, tmp_path / "old.ckpt")
    with pytest.raises(HistoryError, match="Make the report with the release that wrote it"):
        find_runs([tmp_path])


def test_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.ckpt").write_bytes(os.urandom(100))
    with pytest.raises(HistoryError, match=r"x\.ckpt can't be read as a checkpoint"):
        find_runs([tmp_path])
