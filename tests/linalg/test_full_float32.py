"""Reduced-precision float32 modes are off inside the block, however they were set, and restored after it."""

from __future__ import annotations

import warnings

import pytest
import torch

from hessian_callback.linalg.full_float32 import full_float32
from tests.helpers.forks import run_code

# Ways in which a run can enable TF32. Each needs a process of its own, because torch refuses some mixtures for good.
WAYS = {
    "defaults": "",
    "high": "torch.set_float32_matmul_precision('high')",
    "not in cuDNN": "torch.backends.cudnn.allow_tf32 = False",
    "new name": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    "convolutions only": "torch.backends.cudnn.conv.fp32_precision = 'ieee'",
    "everything": "torch.backends.fp32_precision = 'tf32'",
}

SCRIPT = """
import warnings
import torch
from hessian_callback.linalg.full_float32 import full_float32
warnings.simplefilter("ignore")
backends = torch.backends

def settings():
    read = {
        "matmul": torch.get_float32_matmul_precision,
        "cublas": lambda: backends.cuda.matmul.allow_tf32,
        "cudnn": lambda: backends.cudnn.allow_tf32,
    }
    for place in ("cuda", "cudnn", "mkldnn"):
        for operation in ("matmul", "conv", "rnn"):
            owner = getattr(getattr(backends, place), operation, None)
            if hasattr(owner, "fp32_precision"):
                read[place + " " + operation] = lambda owner=owner: owner.fp32_precision
    found = {}
    for name, get in read.items():
        try:
            found[name] = get()
        except RuntimeError:
            found[name] = "refused"
    return found

exec(WAY)
before = settings()
with full_float32():
    inside = settings()
    with full_float32():
        assert settings() == inside
try:
    with full_float32():
        raise KeyError
except KeyError:
    pass
assert settings() == before, (before, settings())
allowed = {"highest", "ieee", False, "refused"}
assert set(inside.values()) <= allowed, inside
"""


@pytest.mark.parametrize("way", WAYS)
def test_the_block_disables_reduced_precision_and_restores_it(way: str) -> None:
    if "fp32_precision" in WAYS[way] and not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        pytest.skip("this torch has the old names only")
    script = SCRIPT.replace("WAY", repr(WAYS[way]))
    ended = run_code(script)
    assert ended.returncode == 0, ended.stderr


def test_warnings_of_the_block_are_not_suppressed() -> None:
    with pytest.warns(UserWarning, match="mine"), full_float32():
        warnings.warn("mine", stacklevel=1)


def test_untouched_settings_still_follow_the_generic_setting() -> None:
    if not hasattr(torch.backends, "fp32_precision"):
        pytest.skip("this torch has the old names only")
    script = """
import torch
from hessian_callback.linalg.full_float32 import full_float32
torch.backends.fp32_precision = "ieee"
with full_float32():
    pass
torch.backends.fp32_precision = "tf32"
backends = torch.backends
owners = backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul
assert {owner.fp32_precision for owner in owners} == {"tf32"}
"""
    ended = run_code(script)
    assert ended.returncode == 0, ended.stderr
