"""TensorBoard's table of hyperparameters, read from the files of training runs."""

from __future__ import annotations

from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from tests.helpers.lightning import LightningModule, TensorBoardLogger, Trainer
from tests.helpers.toy_runs import Net, loader, measure


class Described(Net):
    def __init__(self, rate: float = 0.25, shape: str = "wide") -> None:
        super().__init__()
        self.save_hyperparameters()


def run(module: LightningModule, logger: TensorBoardLogger) -> EventAccumulator:
    trainer = Trainer(
        max_epochs=2,
        logger=logger,
        callbacks=[measure(), measure(prefix="head", parameters="weight")],
        accelerator="cpu",
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader(), loader())
    board = EventAccumulator(logger.log_dir)
    board.Reload()
    return board


def columns(board: EventAccumulator) -> tuple[set[str], set[str]]:
    """Hyperparameters and metrics, of the announcement that TensorBoard shows."""
    content = board.SummaryMetadata("_hparams_/experiment").plugin_data.content
    experiment = HParamsPluginData.FromString(content).experiment
    return {info.name for info in experiment.hparam_infos}, {info.name.tag for info in experiment.metric_infos}


@pytest.mark.parametrize("prefix", ["", "mine"])
def test_the_table_has_the_slope_beside_lightnings_own_metric(tmp_path: Path, prefix: str) -> None:
    logger = TensorBoardLogger(tmp_path, prefix=prefix)
    board = run(Described(), logger)
    start = f"{prefix}-" if prefix else ""
    named = ("hp_metric", "hessian/slope", "hessian/fit_error", "head/slope", "head/fit_error")
    expected = {start + name for name in named}
    assert columns(board) == ({"rate", "shape"}, expected)
    assert expected <= set(board.Tags()["scalars"])
    assert len(list(Path(logger.log_dir).glob("events*"))) == 1


def test_nothing_is_announced_if_lightning_announces_nothing(tmp_path: Path) -> None:
    for module, logger in (
        (Net(), TensorBoardLogger(tmp_path, "plain")),
        (Described(), TensorBoardLogger(tmp_path, "without", default_hp_metric=False)),
    ):
        assert "_hparams_/experiment" not in run(module, logger).summary_metadata
