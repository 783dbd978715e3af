"""csrc/cpu: the SIMD levels, each in a process of its own, and more than 2^31 elements."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import torchbp
import torchbp.functional as F
from tests.machine import LEVELS, cpu_flags, free_memory

ROOT = Path(__file__).parents[2]
EXPONENTIALS = "test_exponentials_over_the_whole_range"
HALF_UPDATES = "test_half_types_round_once"


def run_python(*arguments: str, level: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TORCHBP_CPU": level, "PYTHONPATH": str(ROOT)}
    environment.pop("PYTEST_XDIST_WORKER", None)
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("level", LEVELS)
def test_level(level: str) -> None:
    """Forward, backward, special values, layouts and accuracy, computed at this level."""
    if not LEVELS[level] <= cpu_flags():
        pytest.skip(f"this machine has no {level}")
    shown = run_python("-c", "import torchbp; print(torchbp.cpu_level())", level=level)
    assert shown.stdout == f"{level}\n", shown.stderr
    tests = ["tests/test_functional.py", "tests/cpu/test_math.py", "tests/cpu/test_products.py"]
    tests += ["tests/data/test_loader.py", "tests/functions/test_softmax_ce.py::" + EXPONENTIALS]
    which = "forward_and_backward or special_values or layouts_that_differ or test_math"
    tests += ["tests/cpu/test_blocks.py", "tests/optim/test_optimizers.py::" + HALF_UPDATES]
    which += f" or threads or test_products or kernel or streamed or {HALF_UPDATES} or "
    which += EXPONENTIALS
    options = ["-q", "-x", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", which]
    result = run_python("-m", "pytest", *options, *tests, level=level)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-1000:]


def test_the_best_level_is_chosen() -> None:
    if "TORCHBP_CPU" in os.environ:
        pytest.skip("TORCHBP_CPU is set")
    best = [level for level, flags in LEVELS.items() if flags <= cpu_flags()][-1]
    assert torchbp.cpu_level() == best


def test_unknown_level() -> None:
    program = "import torch, torchbp.functional as F; F.relu(torch.ones(2))"
    result = run_python("-c", program, level="sse9")
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()
    assert any("TORCHBP_CPU=sse9: wants baseline, avx2 or avx512" in line for line in last), last


# ---- more than 2^31 elements ---------------------------------------------------------------------

HUGE = 2**31 + 8


@pytest.mark.skipif(free_memory() < 12 << 30, reason="needs 12 GB of free memory")
def test_more_than_2_31_elements() -> None:
    # zeros() takes memory from the system that it has already cleared: reading costs next to none.
    x = torch.zeros(HUGE, dtype=torch.bfloat16)
    places = [0, 1, 2**31 - 1, 2**31, HUGE - 1]
    x[places] = torch.tensor([3.0, -1, 2, -5, 7], dtype=torch.bfloat16)
    y = F.relu(x)
    assert y[places].tolist() == [3, 0, 2, 0, 7]
    assert y[[2, 12345, 2**31 - 2, HUGE - 2]].tolist() == [0] * 4
    del y
    last = x.view(-1, 8)[:, 7]  # strided
    assert F.scale(last, 2.0)[[-1, 2**28 - 1]].tolist() == [14, 4]
    assert F.l2_penalty(x).item() == 88
    y, index = torch.ops.torchbp.max_pieces(x[8:].view(-1, 256, 8))
    assert y[-1, 7].item() == 7
    assert index[-1, 7].item() == 255
    assert y[-2, 7].item() == 0
