"""What the machine that runs the tests has: SIMD levels and free memory."""

from __future__ import annotations

from pathlib import Path

__all__ = ["LEVELS", "cpu_flags", "free_memory"]

#: SIMD level -> what Linux calls the instructions that it needs.
LEVELS = {
    "baseline": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


def cpu_flags() -> set[str]:
    """What the machine has, according to Linux."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("flags", "Features")):
            return set(line.split(":")[1].split())
    return set()


def free_memory() -> int:
    """Bytes that may be allocated without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
