"""Limits that containers and batch systems set: read from the files in which the system shows them."""

import os
from pathlib import Path

import pytest
import torch

from engine import limits
from engine.loaders import choice

GB = 1 << 30


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files of a machine with 64 cores and 100 GB of free memory, to which a test adds its own."""
    monkeypatch.setattr(limits, "PROC", tmp_path / "proc")
    monkeypatch.setattr(limits, "GROUPS", tmp_path / "groups")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)

    def write(**files: str) -> None:
        for name, text in files.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    write(**{"proc/meminfo": f"MemTotal: 128 kB\nMemAvailable:   {100 * GB // 1024} kB\n"})
    return write


def test_a_machine_without_limits(system):
    system(**{"proc/self/cgroup": "0::/\n", "groups/cpu.max": "max 100000", "groups/memory.max": "max"})
    assert (limits.cores(), limits.free_memory()) == (64, 100 * GB)
    assert limits.total_memory() == os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_a_container(system):
    """Docker and Kubernetes: the container sees its own group as the root. Unused pages of files can be had back."""
    system(**{
        "proc/self/cgroup": "0::/\n", "groups/cpu.max": "150000 100000", "groups/memory.max": str(2 * GB),
        "groups/memory.current": str(GB), "groups/memory.stat": f"anon 5\ninactive_file {GB // 2}\n",
    })  # fmt: skip
    assert (limits.cores(), limits.free_memory(), limits.total_memory()) == (2, GB + GB // 2, 2 * GB)
    assert choice.free_memory(torch.device("cpu")) == GB + GB // 2


def test_a_job_of_slurm(system):
    """The job's limit is on a group between the process's own and the root."""
    job = "groups/system.slice/slurmstepd.scope/job_7"
    system(**{
        "proc/self/cgroup": "0::/system.slice/slurmstepd.scope/job_7/step_0/user/task_0\n",
        f"{job}/memory.max": str(4 * GB), f"{job}/memory.current": str(GB), f"{job}/cpu.max": "400000 100000",
        f"{job}/step_0/user/task_0/memory.max": "max", f"{job}/step_0/user/task_0/memory.current": "12",
    })  # fmt: skip
    assert (limits.cores(), limits.free_memory()) == (4, 3 * GB)


def test_version_1(system):
    """Each controller has a tree of its own, and no limit is a very large one. A container shows its host's path."""
    system(**{
        "proc/self/cgroup": "4:memory:/docker/abc\n2:cpu,cpuacct:/docker/abc\n0::/docker/abc\n",
        "groups/memory/memory.limit_in_bytes": str(3 * GB), "groups/memory/memory.usage_in_bytes": str(GB),
        "groups/memory/memory.stat": f"inactive_file 1\ntotal_inactive_file {GB}\n",
        "groups/cpu/cpu.cfs_quota_us": "100000", "groups/cpu/cpu.cfs_period_us": "100000",
    })  # fmt: skip
    assert (limits.cores(), limits.free_memory()) == (1, 3 * GB)
    system(**{"groups/cpu/cpu.cfs_quota_us": "-1", "groups/memory/memory.limit_in_bytes": "9223372036854771712"})
    assert (limits.cores(), limits.free_memory()) == (64, 100 * GB)


def test_a_machine_without_these_files(tmp_path, monkeypatch):
    """macOS has no /proc, and no affinity."""
    monkeypatch.setattr(limits, "PROC", tmp_path)
    monkeypatch.setattr(limits, "GROUPS", tmp_path)
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    monkeypatch.setattr(os, "sysconf_names", {})
    assert (limits.cores(), limits.free_memory()) == (8, None)


def test_torch_starts_as_many_threads_as_the_share_of_time_allows(system, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    chosen: list[int] = []
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    limits.fit_threads()
    assert chosen == []  # without a limit nothing changes
    system(**{"proc/self/cgroup": "0::/\n", "groups/cpu.max": "200000 100000"})
    limits.fit_threads()
    assert chosen == [2]
    monkeypatch.setenv("OMP_NUM_THREADS", "8")
    limits.fit_threads()
    assert chosen == [2]
