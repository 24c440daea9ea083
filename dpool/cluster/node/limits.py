"""What this machine allows: how many processes may be started. Reads; changes nothing. Asked before a group opens."""

from __future__ import annotations

import resource


def process_limit() -> tuple[int, str]:
    """The lowest limit on processes that applies here, and its name."""
    limits: list[tuple[int, str]] = []
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY:
        limits.append((soft, "RLIMIT_NPROC"))
    # Each worker takes a descriptor for its end and one for its death.
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if descriptors != resource.RLIM_INFINITY:
        limits.append((descriptors // 2, "RLIMIT_NOFILE, two descriptors a worker"))
    for path in ("/sys/fs/cgroup/pids.max", "/sys/fs/cgroup/pids/pids.max", "/proc/sys/kernel/pid_max"):
        try:
            with open(path) as file:
                limits.append((int(file.read()), path))
        except (OSError, ValueError):
            continue
    return min(limits) if limits else (1 << 22, "the kernel")
