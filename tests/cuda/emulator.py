"""Tests of the emulator itself (on_cpu/): that a kernel with a fault shows it. They run in the
process of test_on_cpu.py, where the kernels of on_cpu/faults.cu are."""

from __future__ import annotations

import pytest
import torch

WANTED = torch.arange(63.0, -1, -1)


def run(name: str) -> torch.Tensor:
    result: torch.Tensor = getattr(torch.ops.torchbp_faults, name)(torch.empty(1))
    return result


def test_threads_that_wait_for_each_other() -> None:
    assert torch.equal(run("none"), WANTED)


def test_a_barrier_that_is_missing() -> None:
    assert not torch.equal(run("no_barrier"), WANTED)


@pytest.mark.parametrize("name", ["barrier_in_a_branch", "shuffle_in_a_branch"])
def test_threads_that_never_come(name: str) -> None:
    with pytest.raises(RuntimeError, match="wait for others that never come"):
        run(name)
    assert torch.equal(run("none"), WANTED)  # and the next kernel is none the worse


def test_shared_memory_is_full_of_nan() -> None:
    assert run("shared").isnan().all()


def test_a_write_beyond_shared_memory() -> None:
    with pytest.raises(RuntimeError, match="writes beyond its shared memory"):
        run("beyond_shared")


def test_blocks_of_the_tensor_cores() -> None:
    """A lane holds two neighbours of a row of the transpose; loading them is no barrier."""
    wanted = torch.arange(64.0).view(8, 8).mT.flatten()
    assert torch.equal(run("blocks"), wanted)
    assert not torch.equal(run("blocks_no_barrier"), wanted)
