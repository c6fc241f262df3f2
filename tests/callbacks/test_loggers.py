"""Layouts in TensorBoard, pictures in loggers that show them, and errors of loggers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

from hessian_callback import Density, Subspace
from hessian_callback.callbacks.loggers import (
    CHARTS,
    Chart,
    LoggerError,
    curve_layout,
    show_layout,
    show_picture,
    shows_pictures,
)
from tests.helpers.launched import launch_ranks
from tests.helpers.lightning import Callback, CSVLogger, DummyLogger, TensorBoardLogger
from tests.helpers.toy_runs import loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore:a measurement of the Hessian took", "ignore:.*samples are few")
PICTURE = np.full((8, 8, 3), 200, dtype=np.uint8)


def layouts(folder: str) -> list[Layout]:
    board = EventAccumulator(folder, size_guidance={"tensors": 0})
    board.Reload()
    return [Layout.FromString(e.tensor_proto.string_val[0]) for e in board.Tensors("custom_scalars__config__")]


def charts(layout: Layout, category: str) -> dict[str, Any]:
    return {chart.title: chart for one in layout.category if one.title == category for chart in one.chart}


def test_a_run_has_a_layout_of_the_curves_it_logged(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run", prefix="mine")
    callbacks = [
        measure(figures=True),
        measure(figures=True, prefix="head", parameters=r"net\.4", extras=["numerical_interval"]),
    ]
    trainer(tmp_path, *callbacks, logger=logger).fit(seeded(), loader(), loader(seed=1))
    last = layouts(logger.log_dir)[-1]
    assert {c.title.split(":")[0] for c in last.category} == {"hessian", "head"}
    tags = EventAccumulator(logger.log_dir).Reload().Tags()["scalars"]
    for category in last.category:
        for chart in category.chart:
            for series in chart.margin.series:
                assert {series.value, series.lower, series.upper} <= set(tags)
            for pattern in chart.multiline.tag:  # as TensorBoard matches it
                assert len([tag for tag in tags if re.match(pattern, tag)]) == 1, pattern
    band = charts(last, "hessian: slope")["slope with its 95 % interval"].margin.series[0]
    assert (band.value, band.lower) == ("mine-hessian/slope", "mine-hessian/slope_low")


def test_pictures_have_the_steps_of_their_scalars(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    callback = measure(figures=True, extras=[Density(num_hvps=8), Subspace(dimension=2)], max_hvps=200)
    trainer(tmp_path, callback, logger=logger).fit(seeded(), loader(), loader(seed=1))
    board = EventAccumulator(logger.log_dir, size_guidance={"images": 0}).Reload()
    steps = [event.step for event in board.Scalars("hessian/slope")]
    shown = {tag: [event.step for event in board.Images(tag)] for tag in board.Tags()["images"]}
    # Of a single eigenspace there is nothing to compare.
    assert shown == {"hessian/spectrum": steps, "hessian/density": steps, "hessian/subspace_overlaps": steps[1:]}
    # After the run nothing of it is held.
    assert not callback.run_measurer.states


def test_stored_eigenspaces_have_the_logged_overlap(tmp_path: Path) -> None:
    class Watcher(Callback):
        def on_hessian_measured(self, run: Any, module: Any, callback: Any) -> None:
            kept.append(callback.run_measurer.states["subspace"].spaces.overlaps)

    kept: list[Any] = []
    callback = measure(figures=True, extras=[Subspace(dimension=2)], max_hvps=200)
    run = trainer(tmp_path, callback, Watcher(), logger=CSVLogger(tmp_path))
    run.fit(seeded(), loader(), loader(seed=1))
    assert [len(overlaps) for overlaps in kept] == [1, 2, 3]
    logged = [measurement.comparisons["subspace_overlap"] for measurement in callback.history[1:]]
    assert [float(overlaps[-1, -2]) for overlaps in kept[1:]] == pytest.approx(logged, abs=1e-5)


@pytest.mark.parametrize("options", [{"figures": False}, {"extras": ["density"]}])
def test_no_eigenspace_is_stored_without_a_picture(options: dict[str, Any], tmp_path: Path) -> None:
    class Watcher(Callback):
        def on_hessian_measured(self, run: Any, module: Any, callback: Any) -> None:
            kept.append(
                len(callback.run_measurer.states["subspace"].spaces)
                if "subspace" in callback.run_measurer.states
                else 0
            )

    kept: list[int] = []
    chosen = {"figures": True, "extras": [Subspace(dimension=2)], "max_hvps": 200, **options}
    run = trainer(tmp_path, measure(**chosen), Watcher(), logger=CSVLogger(tmp_path), max_epochs=1)
    run.fit(seeded(), loader(), loader(seed=1))
    assert kept == [0, 0]


def test_two_ranks_have_one_board(tmp_path: Path) -> None:
    process = launch_ranks(2, "tests.helpers.board_runs", tmp_path)
    output = process.finish()
    assert process.returncode == 0, output[-4000:]
    one, other = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert one["overlaps"] == other["overlaps"]
    assert [len(overlaps) for overlaps in one["overlaps"]] == [1, 2, 2]
    # The failure of one rank alone has left the space of that measurement out on both.
    assert [list(failed) for failed in one["failed"]] == [[], [], ["subspace"]]
    assert one["names"] == other["names"]
    board = EventAccumulator(str(tmp_path / "run"), size_guidance={"images": 0}).Reload()
    assert len(list((tmp_path / "run").glob("events*"))) == 1
    counts = {tag: len(board.Images(tag)) for tag in board.Tags()["images"]}
    assert counts == {"hessian/spectrum": 3, "hessian/density": 3, "hessian/subspace_overlaps": 1}
    shown = charts(layouts(str(tmp_path / "run"))[-1], "hessian: slope")
    assert "slope with its 95 % interval" in shown


def test_no_layout_where_the_user_has_one(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="run")
    trainer(tmp_path, measure(figures=False), logger=logger, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
    assert "custom_scalars__config__" not in EventAccumulator(logger.log_dir).Reload().Tags()["tensors"]


def test_charts_without_curves_are_left_out() -> None:
    assert curve_layout("hessian", []) == {}
    assert curve_layout("hessian", ["slope"]) == {}
    assert list(curve_layout("h", ["slope", "slope/head", "num_hvps"])) == ["h: slope", "h: cost"]
    (critical,) = curve_layout("h", ["fit_error", "critical_distance"])["h: fit error"].values()
    assert critical == ["Multiline", ["h/fit_error$", "h/critical_distance$"]]


def test_charts_of_extras_are_shown_beside_the_others() -> None:
    extra = (Chart("moments", "third and fourth", ("skewness", "kurtosis")), Chart("cost", "graphs", ("graphs",)))
    names = ["skewness", "graphs", "seconds"]
    layout = curve_layout("h", names, charts=(*CHARTS, *extra))
    assert layout["h: moments"] == {"third and fourth": ["Multiline", ["h/skewness$"]]}
    assert list(layout["h: cost"]) == ["seconds that training stood still", "graphs"]
    assert curve_layout("h", ["skewness", "graphs"]) == {}


def test_bands_need_all_three_curves() -> None:
    chart = Chart("c", "band", ("x", "x_low", "x_high"), is_band=True)
    assert curve_layout("h", ["x", "x_low"], charts=[chart]) == {}
    full = curve_layout("h", ["x_high", "x", "x_low"], charts=[chart], logger_prefix="mine-")
    assert full == {"h: c": {"band": ["Margin", ["mine-h/x", "mine-h/x_low", "mine-h/x_high"]]}}


class Failing:
    """A logger that fails to show pictures."""

    def log_image(self, **options: Any) -> None:
        raise ConnectionError("the server\nis away")


def test_errors_of_a_logger_are_its_own(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    logger = TensorBoardLogger(tmp_path / "file", name="", version="run")
    with pytest.raises(LoggerError, match=r"^TensorBoardLogger failed to write the layout of the curves: \w+Error: "):
        show_layout([logger], {"hessian": ["seconds"]})
    with pytest.raises(LoggerError, match=r"^TensorBoardLogger failed to start: \w+Error: ") as raised:
        shows_pictures(logger)
    assert isinstance(raised.value.__cause__, OSError)
    message = r"^Failing failed to show the picture 'hessian/spectrum': ConnectionError: the server is away$"
    with pytest.raises(LoggerError, match=message):
        show_picture(Failing(), "hessian/spectrum", PICTURE, 0)


@pytest.mark.parametrize("image", [PICTURE[:, :, 0], PICTURE.astype(float), PICTURE.tolist(), PICTURE[:, :, :2]])
def test_pictures_of_another_form_are_refused(image: Any) -> None:
    with pytest.raises(TypeError, match=r"picture 'h/density' must be an array of uint8 of shape"):
        show_picture(Failing(), "h/density", image, 0)


def test_csv_gets_every_number_and_no_picture(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    callback = measure(figures=True)
    trainer(tmp_path, callback, logger=logger).fit(seeded(), loader(), loader(seed=1))
    header, *rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    assert {f"hessian/{name}" for name in callback.history[-1].scalars()} <= set(header.split(","))
    column = header.split(",").index("hessian/slope")
    logged = [float(row.split(",")[column]) for row in rows if row.split(",")[column]]
    assert logged == pytest.approx([m.slope for m in callback.history], rel=1e-6)
    assert not shows_pictures(logger)
    with pytest.raises(TypeError, match="call shows_pictures before"):
        show_picture(logger, "tag", PICTURE, 0)


def test_a_logger_with_every_attribute_shows_no_pictures() -> None:
    assert not shows_pictures(DummyLogger())
    show_layout([DummyLogger()], {"hessian": ["num_hvps"]})


def test_weights_and_biases_keeps_pictures_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    from tests.helpers.lightning import WandbLogger

    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = WandbLogger(save_dir=tmp_path, offline=True)
    try:
        show_picture(logger, "hessian/spectrum", PICTURE, 3)
    finally:
        logger.experiment.finish()
    assert list(tmp_path.rglob("*.png"))


def test_mlflow_keeps_pictures_in_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    # Its skinny edition has no other store that needs no server.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    from tests.helpers.lightning import MLFlowLogger

    logger = MLFlowLogger(tracking_uri=f"file:{tmp_path}/runs", artifact_location=str(tmp_path / "kept"))
    show_picture(logger, "hessian/spectrum", PICTURE, 3)
    assert list((tmp_path / "kept").rglob("*.png"))
