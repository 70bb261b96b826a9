"""Limits of containers, in made-up /proc and cgroup folders: both versions, nested groups, what is not there."""

import pytest

from memedge.engine import cgroups, machine

V1 = "30 25 0:26 / {place}/{name} rw shared:9 - cgroup cgroup rw,{name}\n"
V2 = "30 25 0:26 / {place} rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """Return a function that makes a /proc/self and files of groups."""
    monkeypatch.setattr(cgroups, "PROC", tmp_path)

    def make(groups: str, mounts: str, files: dict[str, str]) -> None:
        (tmp_path / "cgroup").write_text(groups)
        (tmp_path / "mountinfo").write_text("22 1 8:1 / / rw - ext4 /dev/sda rw\nodd line\n" + mounts)
        for name, content in files.items():
            path = tmp_path / "fs" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(content + "\n")

    return make


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"a/b/cpu.max": "400000 100000", "a/cpu.max": "200000 100000"}, 2),  # the group above is narrower
        ({"a/b/cpu.max": "50000 100000", "a/cpu.max": "max 100000"}, 0.5),
        ({"cpu.max": "garbage"}, None),
        ({"cpu.max": "100000 0"}, None),
        ({}, None),
    ],
)
def test_quotas_of_version_2(fake, tmp_path, files, expected):
    fake("0::/a/b\n", V2.format(place=tmp_path / "fs"), files)
    assert cgroups.processors() == expected


def test_quotas_of_version_1(fake, tmp_path):
    mounts = "".join(V1.format(place=tmp_path / "fs", name=name) for name in ("cpuset", "cpu,cpuacct"))
    files = {"cpu,cpuacct/job/cpu.cfs_quota_us": "300000", "cpu,cpuacct/job/cpu.cfs_period_us": "100000"}
    none = {"cpu,cpuacct/cpu.cfs_quota_us": "-1", "cpu,cpuacct/cpu.cfs_period_us": "100000"}
    fake("5:cpu,cpuacct:/job\n4:cpuset:/\n", mounts, files | none)
    assert cgroups.processors() == 3
    # A container that sees the host's path, and its own group at the mount point.
    fake("5:cpu,cpuacct:/docker/123\n", mounts, {"cpu,cpuacct/cpu.cfs_quota_us": "250000"})
    assert cgroups.processors() == 2.5


def test_a_group_that_is_mounted_in_part(fake, tmp_path):
    fake(
        "0::/pod/box\n", V2.replace(" / {place}", " /pod {place}").format(place=tmp_path / "fs"), {"box/cpu.max": "1 1"}
    )
    assert cgroups.processors() == 1


def test_memory_of_both_versions(fake, tmp_path):
    two = {"memory.max": "1000", "memory.current": "900", "memory.stat": "anon 5\ninactive_file 300\nfile 1"}
    fake("0::/\n", V2.format(place=tmp_path / "fs"), two)
    assert cgroups.available_memory() == 400
    assert machine.available_memory() == 400
    fake("0::/\n", V2.format(place=tmp_path / "fs"), {"memory.max": "max"})
    assert cgroups.available_memory() is None
    one = {"memory.limit_in_bytes": "500", "memory.usage_in_bytes": "600", "memory.stat": "total_inactive_file 50"}
    fake("3:memory:/\n", V1.format(place=tmp_path / "fs", name="memory"), {f"memory/{k}": v for k, v in one.items()})
    assert cgroups.available_memory() == 0


def test_where_there_are_no_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(cgroups, "PROC", tmp_path / "absent")
    assert cgroups.processors() is None
    assert cgroups.available_memory() is None


@pytest.mark.parametrize(("quota", "count"), [(None, 8), (2.0, 2), (1.5, 2), (0.1, 1), (64.0, 8)])
def test_threads_are_no_more_than_a_quota_is_worth(monkeypatch, quota, count):
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)), raising=False)
    monkeypatch.setattr(cgroups, "processors", lambda: quota)
    assert machine.usable_processors() == count
