"""Comparisons, blocks and the published protocol on two ranks: the numbers of one rank, and failing together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.ddp_results import results
from tests.helpers.ddp_runs import COMPARISON_RUNS
from tests.helpers.launched import launch_ranks
from tests.helpers.ranks import needs_sharding
from tests.helpers.toy_runs import loader, measure, seeded, trainer

pytestmark = pytest.mark.filterwarnings("ignore:a measurement of the Hessian took", "ignore:.*samples are few")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: Any) -> Path:
    out = tmp_path_factory.mktemp("two")
    (out / "output").write_text(launch_ranks(2, "tests.helpers.ddp_runs", out, "ddp", 2, *COMPARISON_RUNS).finish())
    return out


@pytest.mark.parametrize("name", ["compared", "paper"])
def test_the_number_of_ranks_does_not_matter(name: str, two_ranks: Path, tmp_path: Any) -> None:
    one, other = results(two_ranks, name)
    assert one["error"] is other["error"] is None
    assert one["history"] == other["history"]
    choice, options = COMPARISON_RUNS[name]
    callback = measure(**choice)
    trainer(tmp_path, callback, **options).fit(seeded(), loader(num=48, shuffle=True), loader(num=45, seed=1))
    together, alone = one["history"][0], callback.history[0]  # later on, two ranks have trained otherwise
    assert not together.not_compared
    expected = {name: value for name, value in alone.scalars().items() if name != "seconds"}
    found = {name: value for name, value in together.scalars().items() if name != "seconds"}
    # What one more product moves, and an interval that is as narrow as the bounds.
    assert found == pytest.approx(expected, rel=1e-5)
    assert one["history"][-1].scalars().keys() >= found.keys()


def test_the_later_measurement_is_compared_with_the_first(two_ranks: Path) -> None:
    first, last = results(two_ranks, "compared")[1]["history"]
    assert "subspace_angle" not in first.comparisons
    assert 0 < last.comparisons["subspace_angle"] < 1.6
    assert set(last.groups) == {"first", "head"}


@needs_sharding
@pytest.mark.parametrize("name", ["sharded compared", "sharded differences compared"])
def test_sharded_modules_are_compared_as_well(name: str, two_ranks: Path) -> None:
    one, other = results(two_ranks, name)
    assert one["error"] is other["error"] is None
    assert [entry.scalars() for entry in one["history"]] == [entry.scalars() for entry in other["history"]]
    last = one["history"][-1]
    assert last.logged
    assert {"trace", "negative_mass", "subspace_angle"} <= last.comparisons.keys()
    if name == "sharded compared":
        assert one["history"] == other["history"]
        assert not last.not_compared
        assert {"gradient_norm", "parameter_norm", "slope_half_1"} <= last.comparisons.keys()
        assert last.groups["head"].logged
    else:
        # Half of the batches are too few for both ranks, and each rank says what it knows of that.
        reasons = [result["history"][-1].not_compared for result in (one, other)]
        assert [list(known) for known in reasons] == [["norms", "split_half"]] * 2
        assert all("leaves them sharded" in known["norms"] for known in reasons)
        assert any("pass more batches than there are ranks" in known["split_half"] for known in reasons)


def test_a_comparison_fails_on_all_ranks_and_leaves_the_rest(two_ranks: Path) -> None:
    for rank, result in enumerate(results(two_ranks, "no gradient")):
        assert result["error"] is None
        for measurement in result["history"]:
            assert measurement.logged
            assert "trace" in measurement.comparisons
            assert "gradient_norm" not in measurement.comparisons
            reason = measurement.not_compared["norms"]
            assert ("rank one's own trouble" in reason) if rank == 1 else reason.startswith("rank 1 failed")
        assert "hessian/trace" in result["metrics"]
        assert "hessian/gradient_norm" not in result["metrics"]
