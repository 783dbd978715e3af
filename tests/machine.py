"""What the machine that runs the tests has: a GPU, SIMD levels and free memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

__all__ = ["EMULATED", "GPU", "HAS_GPU", "LEVELS", "cpu_flags", "free_memory"]

#: Whether the CPU runs the kernels of csrc/cuda in this process (tests/cuda/on_cpu).
EMULATED = "TORCHBP_EMULATOR" in os.environ

#: The device that the tests of a GPU run on, and whether it is there.
GPU = "cpu" if EMULATED else "cuda"
HAS_GPU = EMULATED or torch.cuda.is_available()

#: SIMD level -> what Linux calls the instructions that it needs.
LEVELS = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
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
