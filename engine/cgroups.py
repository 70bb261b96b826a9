"""What a container may take of its machine: the limits of Linux's control groups, version 1 and 2.

A group is bound by its own limits and by those of all groups above it. Inside a container the path of a process's group
may be one of the host's, which is not there: what lies at the mount point is the container's own group then.
"""

from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")


def processors() -> float | None:
    """Return how many processors' time the quotas leave this process, or None if there is no quota."""
    shares = [share for group in _groups("cpu") if (share := _quota(group)) is not None]
    return min(shares, default=None)


def available_memory() -> int | None:
    """Return how many bytes the limits still leave this process, or None if there is no limit."""
    return min((left for group in _groups("memory") if (left := _left(group)) is not None), default=None)


def _quota(group: Path) -> float | None:
    found = _words(group / "cpu.max")  # version 2: quota or "max", and period
    if len(found) != 2:
        found = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")  # a quota of -1 is none
    if len(found) != 2 or not all(word.isdecimal() and int(word) for word in found):
        return None
    return int(found[0]) / int(found[1])


def _left(group: Path) -> int | None:
    for limit, usage, reclaimed in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        found = _words(group / limit) + _words(group / usage)
        if len(found) == 2 and all(word.isdecimal() for word in found):
            statistics = _words(group / "memory.stat")
            # Pages of files that nobody used lately count as used, and are given back when memory is needed.
            cached = dict(zip(statistics[::2], statistics[1::2], strict=False)).get(reclaimed, "0")
            return max(0, int(found[0]) - int(found[1]) + (int(cached) if cached.isdecimal() else 0))
    return None


def _groups(controller: str) -> Iterator[Path]:
    """Yield the folders of this process's group and of those above it, in every hierarchy that may limit it."""
    paths = {}
    for line in _lines(PROC / "cgroup"):  # number:controllers:path; version 2 names no controllers
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        paths.update(dict.fromkeys(names.split(","), path))
    for line in _lines(PROC / "mountinfo"):
        mount, _, kind = line.partition(" - ")
        fields, filesystem = mount.split(), kind.split()
        if len(fields) < 5 or len(filesystem) < 3 or filesystem[0] not in ("cgroup", "cgroup2"):
            continue
        name = controller if filesystem[0] == "cgroup" else ""
        if name not in paths or (name and name not in filesystem[2].split(",")):
            continue
        root, place = fields[3], Path(fields[4])
        own = Path(paths[name].removeprefix(root.rstrip("/")).lstrip("/"))
        yield from (place / one for one in (own, *own.parents) if ".." not in one.parts)


def _words(path: Path) -> list[str]:
    return " ".join(_lines(path)).split()


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # another system than Linux, a file that this version lacks, or one that is hidden from us
        return []
