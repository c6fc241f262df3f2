"""Names under which quantities are logged stay in the log directory."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from hessian_callback import PowerLawHessianCallback
from tests.helpers.toy_runs import loader, measure, seeded, trainer


@pytest.mark.parametrize(
    "name",
    ["..", "../up", "a/../../b", "/etc/cron.d/x", "a//b", "C:\\temp", "a\\..\\b", "~root/x", "a\0b", "a\nb", "."],
)
def test_names_that_lead_out_of_the_log_directory(name: str) -> None:
    with pytest.raises(ValueError, match=r"prefix must be"):
        PowerLawHessianCallback(prefix=name)
    with pytest.raises(ValueError, match=r"groups"):
        PowerLawHessianCallback(groups={name: "weight"})


@pytest.mark.parametrize("name", ["hessian", "train_hessian", "curvature/last.block", "my hessian-2", "größe"])
def test_names_that_stay(name: str) -> None:
    assert PowerLawHessianCallback(prefix=name).prefix == name


def test_all_that_is_saved_loads_without_unpickling(tmp_path: Any) -> None:
    callback = measure(extras=["density", "norms"], groups={"last": "^net.4"})
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
    torch.save(callback.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    other = measure()
    other.load_state_dict(state)
    assert other.history == callback.history
