"""Limits of the groups around a process, in both versions of control groups."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpt_fast import control_groups
from vpt_fast.control_groups import cores, memory_left


@pytest.fixture
def machine(tmp_path, monkeypatch) -> Path:
    """A machine without control groups; its files are to be written below the returned folder."""
    monkeypatch.setattr(control_groups, "_ROOT", tmp_path / "groups")
    monkeypatch.setattr(control_groups, "_OWN", tmp_path / "own")
    return tmp_path


def write(folder: Path, **files: object) -> None:
    """Files named with _ for the first dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("_", ".", 1)).write_text(f"{content}\n")


def write_memory_2(folder: Path, limit: object, used: int, inactive: int) -> None:
    stat = f"anon 1000000\ninactive_file {inactive}"
    write(folder, memory_max=limit, memory_current=used, memory_stat=stat)


def test_limits_of_this_machine_are_positive_or_none() -> None:
    for found in (memory_left(), cores()):
        assert found is None or found > 0


def test_machine_without_control_groups_has_no_limit(machine) -> None:
    assert memory_left() is None and cores() is None


def test_container_has_what_its_group_leaves(machine) -> None:
    (machine / "own").write_text("0::/\n")
    write_memory_2(machine / "groups", 5_000_000, 4_000_000, 300_000)
    write(machine / "groups", cpu_max="350000 100000")
    assert (memory_left(), cores()) == (1_300_000, 4)


def test_group_without_limits_has_none(machine) -> None:
    (machine / "own").write_text("0::/\n")
    write_memory_2(machine / "groups", "max", 4_000_000, 300_000)
    write(machine / "groups", cpu_max="max 100000")
    assert (memory_left(), cores()) == (None, None)


def test_nearest_limit_of_all_groups_around_a_job_counts(machine) -> None:
    (machine / "own").write_text("0::/slurm/job_1/step_0\n")
    write_memory_2(machine / "groups/slurm/job_1/step_0", "max", 500, 0)
    write_memory_2(machine / "groups/slurm/job_1", 9000, 2000, 0)
    write_memory_2(machine / "groups/slurm", 100_000, 95_000, 1000)
    write(machine / "groups/slurm/job_1/step_0", cpu_max="800000 100000")
    write(machine / "groups/slurm/job_1", cpu_max="200000 100000")
    assert (memory_left(), cores()) == (6000, 2)


def test_version_1_is_read_where_each_controller_has_its_own_groups(machine) -> None:
    (machine / "own").write_text("5:memory:/slurm/job_1\n3:cpu,cpuacct:/slurm/job_2\n0::/\n")
    memory, cpu = machine / "groups/memory/slurm/job_1", machine / "groups/cpu/slurm"
    stat = "inactive_file 7\ntotal_inactive_file 300"
    write(memory, memory_limit_in_bytes=9000, memory_usage_in_bytes=5000, memory_stat=stat)
    write(cpu / "job_2", cpu_cfs_quota_us=-1, cpu_cfs_period_us=100_000)
    write(cpu, cpu_cfs_quota_us=600_000, cpu_cfs_period_us=100_000)
    assert (memory_left(), cores()) == (4300, 6)


def test_container_that_cannot_see_its_groups_name_is_found_at_the_root(machine) -> None:
    (machine / "own").write_text("5:memory:/docker/0123abc\n")
    stat = "total_inactive_file 0"
    write(machine / "groups/memory", memory_limit_in_bytes=900, memory_usage_in_bytes=500, memory_stat=stat)
    assert memory_left() == 400
