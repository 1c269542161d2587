"""The CPUs of a process, against a made-up root with the kernel's files."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from itune.runtime.cpus import available_cpus

V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: set(range(8)), raising=False)


def machine(root: Path, cgroup: str, mounts: str, files: dict[str, str]) -> Path:
    for name, text in {"proc/self/cgroup": cgroup, "proc/self/mountinfo": mounts, **files}.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return root


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        ("100000 100000", 1),
        ("150000 100000", 2),
        ("1000 100000", 1),
        ("200000 50000", 4),
        ("max 100000", 8),
        ("6400000 100000", 8),
        ("max", 8),
        ("", 8),
        ("nonsense", 8),
    ],
)
def test_the_quota_of_cgroup_v2(limit: str, expected: int, tmp_path: Path) -> None:
    assert available_cpus(machine(tmp_path, "0::/\n", V2, {"sys/fs/cgroup/cpu.max": limit})) == expected


def test_the_smallest_quota_around_a_nested_cgroup(tmp_path: Path) -> None:
    files = {"a/cpu.max": "300000 100000", "a/b/cpu.max": "max 100000", "a/b/c/cpu.max": "500000 100000"}
    root = machine(tmp_path, "0::/a/b/c\n", V2, {f"sys/fs/cgroup/{name}": text for name, text in files.items()})
    assert available_cpus(root) == 3
    (root / "sys/fs/cgroup/a/b/c/cpu.max").write_text("200000 100000")
    assert available_cpus(root) == 2


@pytest.mark.parametrize(("quota", "expected"), [("100000", 1), ("250000", 3), ("-1", 8), ("0", 8)])
def test_the_quota_of_cgroup_v1(quota: str, expected: int, tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/pod"
    files = {f"{folder}/cpu.cfs_quota_us": quota, f"{folder}/cpu.cfs_period_us": "100000"}
    cgroup = "3:cpuset:/\n2:cpu,cpuacct:/pod\n0::/\n"
    assert available_cpus(machine(tmp_path, cgroup, V1 + V2.replace("cgroup rw", "unified rw"), files)) == expected


def test_a_container_that_sees_only_its_own_cgroup(tmp_path: Path) -> None:
    mounts = V1.replace(" / ", " /docker/id ")
    files = {f"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_{name}_us": "100000" for name in ("quota", "period")}
    assert available_cpus(machine(tmp_path, "2:cpu,cpuacct:/docker/id\n", mounts, files)) == 1
    # A process that was moved elsewhere still has the limits of the mount.
    assert available_cpus(machine(tmp_path, "2:cpu,cpuacct:/other\n", mounts, files)) == 1


def test_a_system_without_cgroups(tmp_path: Path) -> None:
    assert available_cpus(tmp_path) == 8


def test_affinity_below_the_quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {3})
    assert available_cpus(machine(tmp_path, "0::/\n", V2, {"sys/fs/cgroup/cpu.max": "400000 100000"})) == 1


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs a system that pins processes to CPUs")
def test_available_cpus_are_those_of_the_process() -> None:
    script = (
        "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))]);"
        "from itune.runtime.cpus import available_cpus; print(available_cpus())"
    )
    assert subprocess.check_output([sys.executable, "-c", script], text=True).strip() == "1"
