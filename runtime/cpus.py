"""How many CPUs this process may use: affinity, and the quotas of its cgroups (containers, systemd)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from math import ceil, inf
from pathlib import Path


def available_cpus(root: Path = Path("/")) -> int:
    """The number of CPUs this process may use, at least 1.

    It is the CPU affinity, or the smallest quota of the process's cgroup (version 1 or 2) and those around it. A
    fraction counts as a whole CPU, since fewer threads could not use up the quota. `root` is the folder in which
    `proc` and `sys` lie.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, ceil(min(allowed, *_quotas(root), inf)))


def _quotas(root: Path) -> Iterator[float]:
    """The quotas, in CPUs, of the cgroup of this process and of those around it."""
    mounts = [line.split() for line in _read(root / "proc/self/mountinfo").splitlines()]
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, group = [*line.split(":", 2), "", ""][:3]
        for mount in mounts:
            # mountinfo: ... 3 the cgroup that is mounted, 4 where, - file system, source, options of the file system
            if "-" not in mount or len(mount) < mount.index("-") + 4:
                continue
            system, _, options = mount[mount.index("-") + 1 :][:3]
            if system == "cgroup2" and not controllers:
                quota = _quota_v2
            elif system == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options.split(","):
                quota = _quota_v1
            else:
                continue
            top = root / mount[4].lstrip("/")
            # In a container without a cgroup namespace the mount shows only a part of the hierarchy.
            inner = Path(os.path.relpath(group, mount[3])) if mount[3].startswith("/") else Path()
            folder = top if ".." in inner.parts else top / inner
            for each in (folder, *folder.parents):
                yield quota(each)
                if each == top:
                    break


def _quota_v2(folder: Path) -> float:
    return _ratio(*[*_read(folder / "cpu.max").split(), "max", "100000"][:2])


def _quota_v1(folder: Path) -> float:
    return _ratio(_read(folder / "cpu.cfs_quota_us"), _read(folder / "cpu.cfs_period_us"))


def _ratio(quota: str, period: str) -> float:
    """Quota / period; infinite where there is no limit ("max", -1, or no file)."""
    try:
        limit = int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return inf
    return limit if limit > 0 else inf


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
