"""The benchmarks and checks for a GPU, on the CPU: that they run, and that nothing which fails stops the rest."""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    not (ROOT / "benchmarks" / "gpu.py").exists(), reason="the benchmarks are not part of an installed package"
)

if (ROOT / "benchmarks" / "gpu.py").exists():
    from benchmarks import gpu, gpu_checks
    from benchmarks.cases import Case, measured


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]


def bench(part: str, folder: Path) -> gpu.Bench:
    return gpu.Bench(part, torch.device("cpu"), quick=True, output=folder)


@pytest.mark.parametrize("part", ["basis", "full:gpt2"])
def test_a_part_runs(part: str, tmp_path: Path) -> None:
    assert gpu.main([part, "--device", "cpu", "--quick", "--output", str(tmp_path)]) == 0
    found = lines(tmp_path)
    assert {line["part"] for line in found} == {part}
    assert not any("failed" in line for line in found)
    assert found[-1]["finished"]


def test_all_contestants_agree(tmp_path: Path) -> None:
    gpu.products(bench("products", tmp_path), measured("tiny"), {**gpu.OWN, **gpu.PEERS, **gpu.RECORDED}, together=True)
    *contestants, summary = lines(tmp_path)
    ran = {line["contestant"]: line for line in contestants if "failed" not in line}
    assert ran.keys() >= gpu.OWN.keys() | gpu.RECORDED.keys()
    assert all(line["difference"] < 1e-5 for line in ran.values())
    assert [ran[name]["num_cached_graphs"] for name in gpu.OWN] == [4, 0, 0]
    assert summary["milliseconds"].keys() == ran.keys()
    assert min(summary["ratio_to_fastest_of_ours"][name] for name in (*gpu.OWN, *gpu.RECORDED)) == 1


@pytest.mark.parametrize("together", [True, False])
def test_a_contestant_that_fails_does_not_stop_the_others(together: bool, tmp_path: Path) -> None:
    def unable(case: Case) -> gpu.Contestant:
        raise RuntimeError("no such engine")

    def breaks(vector: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("too large")

    contestants: dict[str, gpu.Build] = {"a": unable, "b": lambda case: gpu.Contestant(breaks), **gpu.KEPT}
    gpu.products(bench("products", tmp_path), measured("tiny"), contestants, together=together)
    first, second, third, summary = lines(tmp_path)
    assert first["failed"] == "RuntimeError: no such engine"
    assert second["failed"] == "OutOfMemoryError: too large"
    assert third["difference"] == 0
    assert summary["milliseconds"].keys() == gpu.KEPT.keys()


def test_a_part_that_fails_or_takes_too_long_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(bench: gpu.Bench) -> None:
        raise ValueError("nothing there")

    gpu.run_apart(bench("basis", tmp_path), 0.1)
    assert lines(tmp_path)[-1]["failed"] == "ended by its limit of 0.1 seconds"
    monkeypatch.setitem(gpu.PARTS, "basis", fails)
    assert gpu.run_here(bench("basis", tmp_path)) == gpu.REPORTED
    assert lines(tmp_path)[-1]["failed"] == "ValueError: nothing there"
    assert gpu.main(["basis", "tf32", "--seconds", "0", "--output", str(tmp_path)]) == 0
    assert [line["failed"] for line in lines(tmp_path)[-2:]] == ["not begun: no time left"] * 2
    with pytest.raises(SystemExit):
        gpu.main(["basis", "unknown", "--output", str(tmp_path)])


def test_every_part_has_a_limit() -> None:
    assert list(gpu.LIMITS) == list(gpu.PARTS)


def test_the_models_have_their_usual_sizes() -> None:
    with torch.device("meta"):
        sizes = [
            sum(parameter.numel() for parameter in build().parameters())
            for build in (partial(gpu.gpt2_model, 1024), gpu.resnet18_model)
        ]
    assert sizes == [124_439_808, 11_173_962]


def test_halves_add_up_and_the_high_one_has_ten_bits() -> None:
    matrix = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    high, low = gpu.halves(matrix)
    assert torch.equal(high + low, matrix)
    mantissa, _ = torch.frexp(high)
    assert torch.equal(mantissa * 2**11, (mantissa * 2**11).round())
    assert float((low / matrix).abs().max()) < 2**-10
    exact = matrix.double() @ matrix.double()
    assert gpu.distance(gpu.three_products((high, low), (high, low)), exact) < 1e-6


def test_every_test_of_the_gpu_is_in_one_group() -> None:
    names = re.findall(r"^def test_(\w+)", gpu_checks.FILE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert set(gpu_checks.GROUPS) <= set(gpu_checks.groups())
    assert sorted(name for group in gpu_checks.groups().values() for name in group.tests) == sorted(names)


def test_results_of_a_process_that_is_ended_are_kept(tmp_path: Path) -> None:
    file = tmp_path / "test_some.py"
    file.write_text(
        "import time, pytest\n"
        "def test_right(): pass\n"
        "def test_wrong(): assert 1 == 2\n"
        "def test_left_out(): pytest.skip('not here')\n"
        "def test_endless(): time.sleep(60)\n"
    )
    outcome = gpu_checks.run_tests("some", [str(file)], tmp_path, limit=6)
    assert gpu_checks.counts([outcome]) == "1 passed, 1 failed, 1 skipped, 1 not finished"
    text = gpu_checks.table([outcome])
    assert "some: 1 passed, 1 failed, 1 skipped, 1 not finished; 6 s; ended by its limit of 6 s" in text
    assert "FAILED test_wrong: assert 1 == 2" in text
    assert "BEGUN test_endless: not finished" in text
    second = gpu_checks.run_tests("some", [f"{file}::test_right", f"{file}::test_wrong"], tmp_path, 60, "1/2")
    assert gpu_checks.counts([second]) == "0 passed, 1 failed, 0 skipped"
