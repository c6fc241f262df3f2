"""The report of monitored runs, alone and beside measurements of the power law."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from hessian_callback.measurement.history import FILE_NAME, HistoryError, HistoryWriter
from hessian_callback.measurement.measurement import Measurement
from hessian_callback.reports.edge import find_edge_runs
from hessian_callback.reports.report import write_report

TABLE = """\
edge/loss,edge/max_lr,edge/ratio,edge/ratio_error,epoch,step
1.5,0.2,0.5,0.01,0,50
1.25,0.08,1.25,0.02,0,100
,,,,0,120
0.5,0.1,0.9,0.01,0,150
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "logs" / "version_0"
    folder.mkdir(parents=True)
    (folder / "metrics.csv").write_text(TABLE)
    return folder


def test_a_monitored_run_is_read_from_its_logs(run: Path) -> None:
    (found,) = find_edge_runs([run.parent])
    assert (found.name, found.folder, found.prefix) == ("logs/version_0", run, "edge")
    assert [(ratio.step, ratio.value) for ratio in found.ratios] == [(50, 0.5), (100, 1.25), (150, 0.9)]
    assert found.lrs == pytest.approx({50: 0.1, 100: 0.1, 150: 0.09})
    assert found.first_above == 100


def test_the_report_of_a_monitored_run_alone(run: Path) -> None:
    written = write_report([run])
    page = written.html.read_text()
    assert written.html.parent == run
    assert (written.num_runs, written.num_measurements, written.left_out) == (1, 0, [])
    assert "<h1>Edge of stability</h1>" in page
    assert "first above 1 at step 100" in page
    assert page.count("Ratio to the edge of stability, learning rate and loss") == 1


def test_the_section_stands_beside_the_power_law(run: Path) -> None:
    failed = Measurement(0, 150, "step", None, None, "not needed", 0.1)
    HistoryWriter("hessian").write([run], [failed])
    assert (run / FILE_NAME).is_file()
    written = write_report([run])
    page = written.html.read_text()
    assert "Power law of the Hessian" in page
    assert "Edge of stability: logs/version_0 (edge)" in page


def test_a_run_with_a_history_and_a_monitored_one_are_found_together(run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    HistoryWriter("hessian").write([other], [Measurement(0, 1, "step", None, None, "not needed", 0.1)])
    written = write_report([run, other], tmp_path / "both.html")
    assert "Edge of stability: logs/version_0 (edge)" in written.html.read_text()
    assert written.num_measurements == 1


def test_logs_without_either_are_still_an_error(run: Path) -> None:
    shutil.copy(run / "metrics.csv", run / "kept")
    (run / "metrics.csv").write_text("loss,step\n1.0,5\n")
    with pytest.raises(HistoryError, match="no measurement of the Hessian"):
        write_report([run])
