"""The memory that this process can still allocate, within the limits of its container."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch

__all__ = ["free_memory", "main_memory_limits"]

# A limit of this size or more means that there is none: cgroup v1 stores the largest multiple of a page instead.
_UNLIMITED = 1 << 60
# File of the limit, file of the usage, and the entry of memory.stat with the part of the usage that can be reclaimed.
_CGROUP_FILES = {
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    "v2": ("memory.max", "memory.current", "inactive_file"),
}


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that could be allocated on a device now; ``None`` if the system does not tell.

    Args:
        device: the device. The main memory is bounded by the smallest of `main_memory_limits`.

    Example:
        >>> free = free_memory(torch.device("cpu"))
        >>> free is None or free > 0
        True
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        # The allocator's unused blocks are available as well.
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type != "cpu":
        return None
    limits = main_memory_limits()
    return max(0, min(limits.values())) if limits else None


def main_memory_limits(root: Path = Path("/")) -> dict[str, int]:
    """Return the bytes of main memory that this process may still allocate, by the name of each known limit.

    The limits are the free memory of the system, those of the process's control groups of version 1 and 2 and of
    their parents (containers, batch systems), and the process's own ``RLIMIT_AS``.

    Args:
        root: the folder that contains ``proc`` and ``sys``.
    """
    found = {}
    available = _number(root / "proc/meminfo", r"^MemAvailable:\s+(\d+) kB")
    if available is not None:
        found["the system"] = available * 1024
    else:
        with suppress(AttributeError, ValueError, OSError):
            found["the system"] = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    in_groups = [room for folder, version in _control_groups(root) if (room := _room_in(folder, version)) is not None]
    if in_groups:
        found["the container"] = min(in_groups)
    limit, used = _address_space(), _number(root / "proc/self/status", r"^VmSize:\s+(\d+) kB")
    if limit is not None and used is not None:
        found["the process (RLIMIT_AS)"] = limit - used * 1024
    return found


def _address_space() -> int | None:
    try:
        import resource
    except ImportError:  # not on Windows
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return None if limit == resource.RLIM_INFINITY else limit


def _control_groups(root: Path) -> Iterator[tuple[Path, str]]:
    """Yield the folders of the process's memory control groups, from the innermost to the root's."""
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = [*line.split(":", 2), "", ""][:3]
        mount = root / "sys/fs/cgroup"
        if number == "0" and not controllers:
            version = "v2"
        elif "memory" in controllers.split(","):
            version, mount = "v1", mount / "memory"
        else:
            continue
        # In a container the path may be that of the host, which does not exist under the container's mount.
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for length in range(len(parts), -1, -1):
            yield mount.joinpath(*parts[:length]), version


def _room_in(folder: Path, version: str) -> int | None:
    """Return the limit of a control group less what it uses; ``None`` without a limit."""
    limit_name, usage_name, reclaimable_name = _CGROUP_FILES[version]
    limit, used = _number(folder / limit_name, r"^(\d+)$"), _number(folder / usage_name, r"^(\d+)$")
    if limit is None or used is None or limit >= _UNLIMITED:
        return None
    reclaimable = _number(folder / "memory.stat", rf"^{reclaimable_name} (\d+)$") or 0
    return limit - max(0, used - reclaimable)


def _number(path: Path, pattern: str) -> int | None:
    match = re.search(pattern, _text(path), re.M)
    return None if match is None else int(match[1])


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
