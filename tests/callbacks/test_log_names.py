"""Names that stay in the log directory, and patterns that end."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hessian_callback.operators.names import matching
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from hessian_callback import PowerLawHessianCallback
from hessian_callback.operators import names
from hessian_callback.operators.parameters import select_parameters
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


REALISTIC = [
    f"transformer.h.{i}.{part}.{kind}"
    for i in range(96)
    for part in ("ln_1", "attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj", "mlp.dense_4h_to_h.lora_A.default")
    for kind in ("weight", "bias")
]


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        (r"h\.95\.", 12),
        (r"^transformer\.h\.\d+\.(?:attn|mlp)\.", 96 * 10),
        (r"^(\w+\.)+weight$", 96 * 6),
        (r".*\..*\..*\..*weight", 96 * 6),
        (r"(?i)LORA_[AB](\.\w+)*\.weight$", 96),
        (r"h\.(9[0-5]|[0-8]\d)\.mlp", 6 * 86),
    ],
)
def test_patterns_on_realistic_names(pattern: str, found: int) -> None:
    assert len(matching("parameters", pattern, REALISTIC)) == found


@pytest.mark.parametrize("pattern", [r"^(\w+\.?)+$(?!\w)!", r"^(?:[A-Za-z0-9_.]+)*!$", r"^((\w|\.)+)+ $"])
def test_a_pattern_that_would_not_end_is_refused(pattern: str, monkeypatch: Any) -> None:
    monkeypatch.setattr(names, "_LIMIT_SECONDS", 3.0)
    names._ends_in_time.cache_clear()
    with pytest.raises(ValueError, match=r"takes too long.*without a repetition inside of a repetition, or pass a c"):
        matching("parameters", pattern, ["transformer.h.11.mlp.dense_4h_to_h.lora_A.default.weight"])


def test_it_is_refused_before_training(tmp_path: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(names, "_LIMIT_SECONDS", 3.0)
    names._ends_in_time.cache_clear()

    class Long(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a_block_with_a_rather_long_name_of_its_own = nn.Linear(5, 3)

    model = seeded()
    model.long = Long()
    run = trainer(tmp_path, measure(parameters=r"^(\w+\.?)+!"))
    with pytest.raises(MisconfigurationException, match="takes too long"):
        run.fit(model, loader(), loader(seed=1))
    assert run.global_step == 0
    with pytest.raises(ValueError, match="takes too long"):
        select_parameters(model, r"^(\w+\.?)+!")


def test_all_that_is_saved_loads_without_unpickling(tmp_path: Any) -> None:
    callback = measure(extras=["density", "norms"], groups={"last": "^net.4"})
    trainer(tmp_path, callback, max_epochs=1).fit(seeded(), loader(), loader(seed=1))
    torch.save(callback.state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state", weights_only=True)
    other = measure()
    other.load_state_dict(state)
    assert other.history == callback.history
