"""What this machine has, and what this process takes of it."""

import math
import os
import platform
import sys
from pathlib import Path

from memedge.engine import cgroups


def usable_processors() -> int:
    """Return how many processors this process may use, which under taskset or in a container is not all of them."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = cgroups.processors()
    # Part of a processor is rounded up: it is time that was given. More threads than that only wait for each other.
    return count if quota is None else max(1, min(count, math.ceil(quota)))


def processor_name() -> str:
    """Return what the processor calls itself, or its architecture where it does not say."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def load_average() -> float | None:
    """Return how many processes ran or waited during the last minute, or None where that cannot be found out."""
    try:
        return os.getloadavg()[0]
    except (AttributeError, OSError):
        return None


def peak_memory() -> int:
    """Return the largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # not getrusage: a child process inherits its parent's peak there
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory() -> int | None:
    """Return how many bytes can still be used without swapping, or None where that cannot be found out.

    That is the machine's, or what the limits of a container leave if it is less.
    """
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    left = cgroups.available_memory()
    return min(found if left is None else [*found, left], default=None)
