"""The callback on several ranks: one Hessian whatever their number, one decision, and failing together."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hessian_callback.measurement.measurement import Measurement
from tests.helpers.ddp_results import results
from tests.helpers.ddp_runs import RUNS
from tests.helpers.launched import TIMEOUT, launch, launch_ranks
from tests.helpers.ranks import needs_sharding
from tests.helpers.toy_runs import loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore:a measurement of the Hessian took")

EVERYWHERE = {2: ["plain", "float64", "augmented", "weights"], 3: ["float64", "augmented"]}


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("two")
    names = [name for name in RUNS if name != "killed"]
    (out / "output").write_text(launch_ranks(2, "tests.helpers.ddp_runs", out, "ddp", 2, *names).finish())
    return out


@pytest.fixture(scope="module")
def three_ranks(tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("three")
    (out / "output").write_text(launch_ranks(3, "tests.helpers.ddp_runs", out, "ddp", 3, *EVERYWHERE[3]).finish())
    return out


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: Any) -> Callable[[str], list[Measurement]]:
    out = tmp_path_factory.mktemp("one")

    def run(name: str) -> list[Measurement]:
        choice, options = RUNS[name]
        callback = measure(**choice)
        trainer(out, callback, **options).fit(seeded(), loader(num=48, shuffle=True), loader(num=45, seed=1))
        return callback.history

    return run


# -- one Hessian ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world_size", "name"), [(W, name) for W in EVERYWHERE for name in EVERYWHERE[W]])
def test_the_number_of_ranks_does_not_matter(world_size: int, name: str, request: Any, one_rank: Any) -> None:
    out = request.getfixturevalue({2: "two_ranks", 3: "three_ranks"}[world_size])
    together = results(out, name, world_size)[0]["history"][0]
    alone = one_rank(name)[0]
    assert together.num_samples == alone.num_samples
    assert together.world_size == world_size
    rtol = 1e-10 if name == "float64" else 1e-4
    torch.testing.assert_close(together.spectrum.eigenvalues, alone.spectrum.eigenvalues, rtol=rtol, atol=0)
    assert together.slope == pytest.approx(alone.slope, rel=10 * rtol)
    assert together.loss == pytest.approx(alone.loss, rel=1e-6)


@pytest.mark.parametrize(
    "name", [*EVERYWHERE[2], "idle", "stream", "own loader", "halves", "steps", "share of time", "predicted"]
)
def test_all_ranks_hold_the_same(name: str, two_ranks: Path) -> None:
    one, other = results(two_ranks, name)
    assert one["error"] is other["error"] is None
    assert len(one["history"]) > 1
    assert one["history"] == other["history"]
    for key, value in one["metrics"].items():
        if key.startswith("hessian/"):
            assert value == other["metrics"][key] or key == "hessian/overhead", key
    assert all(m.logged for m in one["history"])


def test_a_rank_without_a_batch_takes_part(two_ranks: Path, one_rank: Any) -> None:
    together = results(two_ranks, "idle")[1]["history"][0]
    assert together.num_samples == 8
    torch.testing.assert_close(
        together.spectrum.eigenvalues, one_rank("idle")[0].spectrum.eigenvalues, rtol=1e-4, atol=0
    )
    assert "differ by 100% from their mean (8, 0)" in (two_ranks / "output").read_text()


def test_a_stream_gives_each_rank_its_own(two_ranks: Path) -> None:
    assert results(two_ranks, "stream")[0]["history"][0].num_samples == 16


def test_training_of_two_ranks_is_the_same_bit_for_bit(two_ranks: Path) -> None:
    without = results(two_ranks, "none")
    # Without figures in the way: a run that fails, one that thins out, and one that measures by steps.
    for name in ("warn", "late", "nan"):
        for one, other in zip(results(two_ranks, name), without, strict=True):
            assert all(torch.equal(one["weights"][key], other["weights"][key]) for key in other["weights"]), name
            assert torch.equal(one["random"], other["random"]), name
            for key, value in other["metrics"].items():
                assert one["metrics"][key] == value, (name, key)


def test_early_stopping_stops_all_ranks_in_the_same_epoch(two_ranks: Path) -> None:
    one, other = results(two_ranks, "plain")
    assert [m.epoch for m in one["history"]] == [0, 0, 1]
    assert one["epochs"] == other["epochs"]
    assert len(list((two_ranks / "plain-checkpoints").glob("*.ckpt"))) == 2


def test_resuming_with_another_number_of_ranks(two_ranks: Path, tmp_path: Path) -> None:
    checkpoint = min((two_ranks / "plain-checkpoints").glob("*.ckpt"), key=lambda file: file.stat().st_mtime_ns)
    callback = measure()
    run = trainer(tmp_path, callback, max_epochs=2)
    run.fit(seeded(), loader(num=48, shuffle=True), loader(num=45, seed=1), ckpt_path=checkpoint)
    earlier = results(two_ranks, "plain")[0]["history"]
    assert callback.history[:2] == earlier[:2]
    assert [(m.when, m.epoch, m.world_size) for m in callback.history] == [
        ("fit_start", 0, 2),
        ("epoch", 0, 2),
        ("epoch", 1, 1),
    ]
    assert {m.num_samples for m in callback.history} == {32}


@needs_sharding
def test_a_sharded_model_has_the_same_hessian_and_trains_on_untouched(two_ranks: Path, one_rank: Any) -> None:
    sharded, without, replicated = (results(two_ranks, name) for name in ("sharded", "sharded none", "plain"))
    for one, other in zip(sharded, without, strict=True):
        assert one["error"] is other["error"] is None
        assert all(torch.equal(one["weights"][key], other["weights"][key]) for key in other["weights"])
        assert torch.equal(one["random"], other["random"])
        assert all(m.logged for m in one["history"])
    assert sharded[0]["history"] == sharded[1]["history"]
    ours, theirs = (ranks[0]["history"][0].spectrum.eigenvalues for ranks in (sharded, replicated))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=0)


@needs_sharding
def test_differences_leave_the_parameters_sharded(two_ranks: Path) -> None:
    one, other = results(two_ranks, "sharded differences")
    assert one["error"] is other["error"] is None
    assert one["history"] == other["history"]
    assert {m.engine for m in one["history"]} == {"finite_difference"}
    exact = results(two_ranks, "sharded")[0]["history"][0].spectrum.eigenvalues
    found = one["history"][0].spectrum
    assert bool((abs(found.eigenvalues - exact) <= found.error_bounds).all())


# -- failing together ----------------------------------------------------------------------------------------

OWN = "rank one's own trouble"
FAILURES = {
    "warn": (OWN, "preparing the Hessian-vector products"),
    "late": (OWN, "computing a Hessian-vector product"),
    "nan": ("loss of batch 0 is nan", "preparing the Hessian-vector products"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_ranks_skip_a_failed_measurement_together(name: str, two_ranks: Path) -> None:
    own, stage = FAILURES[name]
    zero, one = results(two_ranks, name)
    for result in (zero, one):
        assert result["error"] is None
        assert [m.logged for m in result["history"]] == [True, False, False]
    assert own in str(one["history"][1].reason)
    assert f"rank 1 failed while {stage}" in str(zero["history"][1].reason)
    output = (two_ranks / "output").read_text()
    assert own in output
    assert f"rank 1 failed while {stage}" in output


@pytest.mark.parametrize(
    ("name", "own"),
    [("raise", OWN), ("reading", "OSError: rank one cannot read"), ("permanent", "Pass loss_fn=")],
)
def test_ranks_raise_together(name: str, own: str, two_ranks: Path) -> None:
    zero, one = results(two_ranks, name)
    assert own in one["error"]
    assert zero["error"].startswith("PeerError: rank 1 failed while")
    assert max(zero["seconds"], one["seconds"]) < 100


@pytest.mark.parametrize(("strategy", "name"), [("ddp_spawn", "warn"), ("ddp_fork", "late")])
def test_other_launchers(strategy: str, name: str, tmp_path: Path, two_ranks: Path) -> None:
    output = launch("tests.helpers.ddp_runs", tmp_path, strategy, 2, name).finish()
    (tmp_path / "output").write_text(output)
    for result, popen in zip(results(tmp_path, name), results(two_ranks, name), strict=True):
        assert [m.reason for m in result["history"]] == [m.reason for m in popen["history"]]
        ours, theirs = (r["history"][0].spectrum.eigenvalues for r in (result, popen))
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        assert all(torch.equal(result["weights"][key], popen["weights"][key]) for key in popen["weights"])


def test_survivors_of_a_killed_rank_end_at_once(tmp_path: Path) -> None:
    """Lightning starts the second rank, as it does for a user's script."""
    began = time.monotonic()
    output = launch("tests.helpers.ddp_runs", tmp_path, "ddp", 2, "killed").finish()
    result = torch.load(tmp_path / "killed-0.pt", weights_only=True)
    assert "RankLostError" in result["error"], output[-3000:]
    assert "another rank's process has ended" in result["error"]
    # The limit is the group's own, which survivors would wait for if they did not notice: half an hour.
    assert result["seconds"] < 100
    assert time.monotonic() - began < TIMEOUT
