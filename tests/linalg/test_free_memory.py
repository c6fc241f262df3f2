"""Free memory as the system, control groups and the process's own limit tell it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from hessian_callback.linalg import free_memory as module
from hessian_callback.linalg.free_memory import free_memory, main_memory_limits
from tests.helpers.forks import run_code

GIB = 2**30


def system(root: Path, files: dict[str, str]) -> Path:
    """A folder with files as Linux has them: 8 GiB available, and some more."""
    for name, text in {"proc/meminfo": f"MemTotal: 1 kB\nMemAvailable: {8 * GIB // 1024} kB\n", **files}.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="a Linux file")
def test_free_memory_is_below_the_total() -> None:
    total = int(Path("/proc/meminfo").read_text().splitlines()[0].split()[1]) * 1024
    free = free_memory(torch.device("cpu"))
    assert free is not None
    assert 0 < free < total


def test_a_system_that_does_not_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(module.os, "sysconf")
    assert "the system" not in main_memory_limits(tmp_path)
    monkeypatch.setattr(module, "main_memory_limits", dict)
    assert free_memory(torch.device("cpu")) is None
    assert free_memory(torch.device("meta")) is None


def test_the_smallest_limit_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"the system": 5, "the container": 3}
    monkeypatch.setattr(module, "main_memory_limits", lambda: limits)
    assert free_memory(torch.device("cpu")) == 3
    limits["the process (RLIMIT_AS)"] = -1  # More is used than a limit that was set later.
    assert free_memory(torch.device("cpu")) == 0


@pytest.mark.parametrize(
    ("files", "room"),
    [
        # A container of version 2: 4 GiB, of which 3 are used, one of them for files that can be dropped.
        (
            {
                "proc/self/cgroup": "0::/\n",
                "sys/fs/cgroup/memory.max": f"{4 * GIB}\n",
                "sys/fs/cgroup/memory.current": f"{3 * GIB}\n",
                "sys/fs/cgroup/memory.stat": f"anon 5\ninactive_file {GIB}\n",
            },
            2 * GIB,
        ),
        # A batch system limits the parent, and the job itself has no limit.
        (
            {
                "proc/self/cgroup": "0::/slurm/job_7/step_0\n",
                "sys/fs/cgroup/slurm/job_7/step_0/memory.max": "max\n",
                "sys/fs/cgroup/slurm/job_7/step_0/memory.current": f"{GIB}\n",
                "sys/fs/cgroup/slurm/job_7/memory.max": f"{6 * GIB}\n",
                "sys/fs/cgroup/slurm/job_7/memory.current": f"{GIB}\n",
            },
            5 * GIB,
        ),
        # Version 1; the path is the host's, which the container does not see.
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/docker/abc\n4:memory:/docker/abc\n0::/\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2 * GIB}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
                "sys/fs/cgroup/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB // 2}\n",
            },
            3 * GIB // 2,
        ),
        # Version 1 without a limit, and damaged files.
        (
            {
                "proc/self/cgroup": "4:memory:/\nno group\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": f"{2**63 - 4096}\n",
                "sys/fs/cgroup/memory/memory.usage_in_bytes": f"{GIB}\n",
            },
            None,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "", "sys/fs/cgroup/memory.current": "x"}, None),
        ({}, None),
    ],
)
def test_limits_of_control_groups(files: dict[str, str], room: int | None, tmp_path: Path) -> None:
    limits = main_memory_limits(system(tmp_path, files))
    assert limits["the system"] == 8 * GIB
    assert limits.get("the container") == room


def test_the_limit_of_the_address_space(tmp_path: Path) -> None:
    code = """
import resource
from hessian_callback.linalg.free_memory import main_memory_limits
assert "the process (RLIMIT_AS)" not in main_memory_limits()
resource.setrlimit(resource.RLIMIT_AS, (64 * 2**30, resource.RLIM_INFINITY))
before = main_memory_limits()["the process (RLIMIT_AS)"]
block = bytearray(2**30)
print(before - main_memory_limits()["the process (RLIMIT_AS)"] >= 2**30, before < 64 * 2**30)
"""
    done = run_code(code)
    assert done.stdout == "True True\n", done.stderr
